// What group_norm.cpp does for instance_norm.cpp too.
#pragma once

#include <array>
#include <tuple>

#include "tensors.h"

namespace fastnorm {

// Checks of everything but num_groups, allocation, and the kernel. -> y, statistics, mask, variance, the last undefined
// unless wanted. `op` is the name in messages.
std::tuple<Tensor, Tensor, Tensor, Tensor> normalize_groups(const char* op, const Tensor& input, int64_t num_groups,
                                                            const OptionalTensor& weight, const OptionalTensor& bias,
                                                            const OptionalTensor& residual, double eps,
                                                            std::optional<std::string_view> activation, bool keep_mask,
                                                            bool want_variance);

// Checks of everything but num_groups, allocation, and the kernel. -> as group_norm_backward.
std::tuple<Tensor, Tensor, Tensor, Tensor> normalize_groups_backward(
    const char* op, Tensor grad_output, const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& residual, const OptionalTensor& mask, const Tensor& statistics, int64_t num_groups,
    std::optional<std::string_view> activation, std::array<bool, 4> wanted);

}  // namespace fastnorm
