// What group_norm.cpp does for instance_norm.cpp too.
#pragma once

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

}  // namespace fastnorm
