// instance_norm: group_norm's kernel with a channel a group, and the running statistics. The maths is in
// instance_norm.h.
#include "instance_norm.h"

#include "checks.h"
#include "device.h"
#include "groups.h"
#include "ops.h"

namespace fastnorm {

static constexpr const char* kOp = "instance_norm";

std::tuple<Tensor, Tensor, Tensor> instance_norm_forward(const Tensor& input, const OptionalTensor& weight,
                                                         const OptionalTensor& bias, const OptionalTensor& residual,
                                                         const OptionalTensor& running_mean,
                                                         const OptionalTensor& running_var, double momentum, double eps,
                                                         std::optional<std::string_view> activation, bool keep_mask) {
  check_supported(kOp, input);
  int64_t S = 1;
  for (int64_t d = 2; d < input.dim(); ++d) S *= input.size(d);
  TORCH_CHECK_VALUE(S != 1, kOp, ": expected more than 1 spatial element, got input shape ", input.sizes());
  check_per_channel(kOp, "running_mean", running_mean, input);
  check_per_channel(kOp, "running_var", running_var, input);
  check_same_type(kOp, "running_mean", running_mean, "running_var", running_var);
  const bool tracks = is_given(running_mean);
  TORCH_CHECK(tracks == is_given(running_var), kOp, ": running_mean and running_var must be given together, got only ",
              tracks ? "running_mean" : "running_var");
  check_updatable(kOp, running_mean, running_var);

  const auto [y, statistics, mask, variance] =
      normalize_groups(kOp, input, input.size(1), weight, bias, residual, eps, activation, keep_mask, tracks);
  if (tracks && variance.defined()) {
    InstanceNormRunning args{};
    args.shape = shape_of(input);
    args.stats_dtype = dtype_of(*running_mean);
    args.momentum = momentum;
    args.mean = statistics.const_data_ptr<double>();
    args.variance = variance.const_data_ptr<double>();
    args.running_mean = running_mean->mutable_data_ptr();
    args.running_var = running_var->mutable_data_ptr();
    FASTNORM_RUN(instance_norm_running, args, input);
    for (const OptionalTensor* t : {&running_mean, &running_var})
      if (!(*t)->is_inference()) (*t)->unsafeGetTensorImpl()->bump_version();
  }
  return {y, statistics, mask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> instance_norm_backward(
    Tensor grad_output, const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& residual, const OptionalTensor& mask, const Tensor& statistics,
    std::optional<std::string_view> activation, std::array<bool, 4> wanted) {
  check_supported(kOp, input);
  return normalize_groups_backward(kOp, std::move(grad_output), input, weight, bias, residual, mask, statistics,
                                   input.size(1), activation, wanted);
}

}  // namespace fastnorm
