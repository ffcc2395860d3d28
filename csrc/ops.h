// The C++ functions behind fastnorm._C, one line each in bindings.cpp. Each is defined in the file of its op.
#pragma once

#include <ATen/core/Generator.h>

#include <array>
#include <tuple>

#include "tensors.h"

namespace fastnorm {

// -> y, statistics (float64 [2, C]: mean and rstd), mask. `momentum` None: cumulative average. `keep_mask`: return what
// backward needs of the activation if that is one bit an element (batch_norm.h), else an undefined tensor.
std::tuple<Tensor, Tensor, Tensor> batch_norm_forward(
    const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
    const OptionalTensor& running_mean, const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
    bool training, std::optional<double> momentum, double eps, std::optional<std::string_view> activation,
    bool skip_nonfinite_stats, bool keep_mask);

// -> dx, dweight, dbias, dresidual, each undefined where `wanted` says so.
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward(
    const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& residual, const OptionalTensor& mask, const Tensor& statistics, bool training,
    std::optional<std::string_view> activation, std::array<bool, 4> wanted);

// -> the derivative of a piecewise linear activation at every element, in input's type, from the mask of
// batch_norm_forward.
Tensor batch_norm_mask_slopes(const Tensor& input, const Tensor& mask, std::optional<std::string_view> activation);

// -> int64 [2]: the seed and offset of one mask, taken from `generator` (the CPU's default one if none is given).
Tensor dropout_state(const std::optional<at::Generator>& generator);

// -> input * mask / (1 - p), the mask drawn from `state`; `channel_dims` leading dimensions share a draw, 0: one an
// element.
Tensor dropout(const Tensor& input, double p, const Tensor& state, int64_t channel_dims, bool inplace);

// -> y, statistics (float64 [2, N, num_groups]: mean and rstd), mask as batch_norm_forward returns it.
std::tuple<Tensor, Tensor, Tensor> group_norm_forward(const Tensor& input, const OptionalTensor& weight,
                                                      const OptionalTensor& bias, const OptionalTensor& residual,
                                                      int64_t num_groups, double eps,
                                                      std::optional<std::string_view> activation, bool keep_mask);

// -> dx, dweight, dbias, dresidual, each undefined where `wanted` says so. Of instance_norm too, with num_groups = C.
std::tuple<Tensor, Tensor, Tensor, Tensor> group_norm_backward(
    const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& residual, const OptionalTensor& mask, const Tensor& statistics, int64_t num_groups,
    std::optional<std::string_view> activation, std::array<bool, 4> wanted);

// -> as batch_norm_mask_slopes, from the mask of group_norm_forward or instance_norm_forward.
Tensor group_norm_mask_slopes(const Tensor& input, const Tensor& mask, std::optional<std::string_view> activation);

// -> y, statistics (float64 [2, N, C]), mask. The running statistics, where given, are updated.
std::tuple<Tensor, Tensor, Tensor> instance_norm_forward(const Tensor& input, const OptionalTensor& weight,
                                                         const OptionalTensor& bias, const OptionalTensor& residual,
                                                         const OptionalTensor& running_mean,
                                                         const OptionalTensor& running_var, double momentum, double eps,
                                                         std::optional<std::string_view> activation, bool keep_mask);

}  // namespace fastnorm
