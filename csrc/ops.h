// The C++ functions behind fastnorm._C, one line each in bindings.cpp. Each is defined in the file of its op. Shapes are
// vectors, which may come of any integers of Python: torch's own caster takes those of numpy for none.
#pragma once

#include <ATen/core/Generator.h>

#include <array>
#include <tuple>
#include <vector>

#include "tensors.h"

namespace fastnorm {

// -> y, statistics (float64 [2, C]: mean and rstd), mask. `momentum` None: cumulative average. `renorm`: r_max and
// d_max of batch renormalisation, whose statistics are [4, C] in training, r and d after mean and rstd. `keep_mask`:
// return what backward needs of the activation if that is one bit an element (batch_norm.h), else an undefined tensor.
std::tuple<Tensor, Tensor, Tensor> batch_norm_forward(
    const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
    const OptionalTensor& running_mean, const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
    bool training, std::optional<double> momentum, double eps, std::optional<std::string_view> activation,
    bool skip_nonfinite_stats, std::optional<std::array<double, 2>> renorm, bool keep_mask);

// -> dx, dweight, dbias, dresidual, each undefined where `wanted` says so. This and the backwards below that take
// `grad_output` by value write dx over it where the caller gave the last reference away (last_reference_or_empty).
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward(
    Tensor grad_output, const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& residual, const OptionalTensor& mask, const Tensor& statistics, bool training,
    std::optional<std::string_view> activation, std::array<bool, 4> wanted);

// Batch normalisation over the batches of several processes, between which statistics and sums are merged:
// -> float64 [2, C]: mean and biased variance of this batch, zeros if it is empty.
Tensor batch_norm_statistics(const Tensor& input);

// -> y and mask, with given statistics: float64 [2, C], mean and rstd.
std::tuple<Tensor, Tensor> batch_norm_normalize(const Tensor& input, const OptionalTensor& weight,
                                                const OptionalTensor& bias, const OptionalTensor& residual,
                                                const Tensor& statistics, std::optional<std::string_view> activation,
                                                bool keep_mask);

// -> float64 [2, C]: the sums over this batch that are dbias and dweight.
Tensor batch_norm_backward_reduce(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                                  const OptionalTensor& bias, const OptionalTensor& residual,
                                  const OptionalTensor& mask, const Tensor& statistics,
                                  std::optional<std::string_view> activation);

// -> dx and dresidual from the sums over all batches, of `count` values a channel.
std::tuple<Tensor, Tensor> batch_norm_backward_elements(const Tensor& grad_output, const Tensor& input,
                                                        const OptionalTensor& weight, const OptionalTensor& bias,
                                                        const OptionalTensor& residual, const OptionalTensor& mask,
                                                        const Tensor& statistics, const Tensor& sums, double count,
                                                        std::optional<std::string_view> activation,
                                                        std::array<bool, 2> wanted);

// -> int64 [2]: the seed and offset of one mask for `input`, taken from `generator`: one of the CPU or of input's
// device, the default one of that device if none is given.
Tensor dropout_state(const std::optional<at::Generator>& generator, const Tensor& input);

// -> input * mask / (1 - p), the mask drawn from `state`; `channel_dims` leading dimensions have a draw each, 0: one an
// element.
Tensor dropout(Tensor input, double p, const Tensor& state, int64_t channel_dims, bool inplace);

// -> a * (mask ? input : alpha') + b (dropout.h), of the same mask.
Tensor alpha_dropout(Tensor input, double p, const Tensor& state, int64_t channel_dims, bool inplace);

// -> dx = a * mask * grad_output
Tensor alpha_dropout_backward(Tensor grad_output, double p, const Tensor& state, int64_t channel_dims);

// layer_norm, or rms_norm without `subtract_mean`. -> y, and with `keep`, else undefined, what backward needs:
// statistics (float32, float64 for float64: [3, M], rms_norm [1, M]; layer_norm.h) and the mask.
std::tuple<Tensor, Tensor, Tensor> layer_norm_forward(const Tensor& input, const OptionalTensor& weight,
                                                      const OptionalTensor& bias, const OptionalTensor& residual,
                                                      const std::vector<int64_t>& normalized_shape, double eps,
                                                      std::optional<std::string_view> activation, bool subtract_mean,
                                                      bool keep);

// -> dx, dweight, dbias, dresidual, each undefined where `wanted` says so.
std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_backward(Tensor grad_output, const Tensor& input,
                                                               const OptionalTensor& weight, const OptionalTensor& bias,
                                                               const OptionalTensor& residual,
                                                               const OptionalTensor& mask, const Tensor& statistics,
                                                               const std::vector<int64_t>& normalized_shape,
                                                               std::optional<std::string_view> activation,
                                                               bool subtract_mean, std::array<bool, 4> wanted);

// -> y. `region` "inter" or "intra", `convention` "torch" or "paper".
Tensor local_response_norm_forward(const Tensor& input, int64_t size, double alpha, double beta, double k,
                                   std::string_view region, std::string_view convention);

// -> dx.
Tensor local_response_norm_backward(const Tensor& grad_output, const Tensor& input, int64_t size, double alpha,
                                    double beta, double k, std::string_view region, std::string_view convention);

// -> weight / sigma, u and v (in the arithmetic's type) and sigma for backward. With iterations > 0, u and v are
// updated.
std::tuple<Tensor, Tensor, Tensor, Tensor> spectral_norm_forward(const Tensor& weight, const Tensor& u, const Tensor& v,
                                                                 int64_t iterations, int64_t dim, double eps);

// -> dweight; u, v and sigma are what forward returned.
Tensor spectral_norm_backward(const Tensor& grad_output, const Tensor& weight, const Tensor& u, const Tensor& v,
                              const Tensor& sigma, int64_t dim);

// `dim` -1: the norm of the whole of v.
void check_weight_norm(const Tensor& v, const Tensor& g, int64_t dim);

// -> w = v * (g / norm), and norm for backward, of arguments that passed the check.
std::tuple<Tensor, Tensor> weight_norm_forward(const Tensor& v, const Tensor& g);

// -> dv, dg, each undefined where `wanted` says so.
std::tuple<Tensor, Tensor> weight_norm_backward(const Tensor& grad_output, const Tensor& v, const Tensor& g,
                                                const Tensor& norm, std::array<bool, 2> wanted);

// -> y, statistics (float64 [2, N, num_groups]: mean and rstd), mask as batch_norm_forward returns it.
std::tuple<Tensor, Tensor, Tensor> group_norm_forward(const Tensor& input, const OptionalTensor& weight,
                                                      const OptionalTensor& bias, const OptionalTensor& residual,
                                                      int64_t num_groups, double eps,
                                                      std::optional<std::string_view> activation, bool keep_mask);

// -> dx, dweight, dbias, dresidual, each undefined where `wanted` says so.
std::tuple<Tensor, Tensor, Tensor, Tensor> group_norm_backward(
    Tensor grad_output, const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& residual, const OptionalTensor& mask, const Tensor& statistics, int64_t num_groups,
    std::optional<std::string_view> activation, std::array<bool, 4> wanted);

// -> y, statistics (float64 [2, N, C]), mask. The running statistics, where given, are updated.
std::tuple<Tensor, Tensor, Tensor> instance_norm_forward(const Tensor& input, const OptionalTensor& weight,
                                                         const OptionalTensor& bias, const OptionalTensor& residual,
                                                         const OptionalTensor& running_mean,
                                                         const OptionalTensor& running_var, double momentum, double eps,
                                                         std::optional<std::string_view> activation, bool keep_mask);

// -> dx, dweight, dbias, dresidual, each undefined where `wanted` says so.
std::tuple<Tensor, Tensor, Tensor, Tensor> instance_norm_backward(
    Tensor grad_output, const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& residual, const OptionalTensor& mask, const Tensor& statistics,
    std::optional<std::string_view> activation, std::array<bool, 4> wanted);

// ---- differentiable as they are (autograd.cpp): arguments as those of the forwards above, -> y alone

Tensor batch_norm(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                  const OptionalTensor& residual, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                  const OptionalTensor& num_batches_tracked, bool training, std::optional<double> momentum, double eps,
                  std::optional<std::string_view> activation, bool skip_nonfinite_stats,
                  std::optional<std::array<double, 2>> renorm);
Tensor layer_norm(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                  const OptionalTensor& residual, const std::vector<int64_t>& normalized_shape, double eps,
                  std::optional<std::string_view> activation, bool subtract_mean);
Tensor group_norm(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                  const OptionalTensor& residual, int64_t num_groups, double eps,
                  std::optional<std::string_view> activation);
Tensor instance_norm(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& residual, const OptionalTensor& running_mean,
                     const OptionalTensor& running_var, double momentum, double eps,
                     std::optional<std::string_view> activation);
// dropout, or alpha_dropout.
Tensor differentiable_dropout(const Tensor& input, double p, const Tensor& state, int64_t channel_dims, bool alpha);
Tensor weight_norm(const Tensor& v, const Tensor& g, int64_t dim);

}  // namespace fastnorm
