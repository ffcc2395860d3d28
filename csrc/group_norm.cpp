// group_norm: checks, allocation and choice of the kernel. The maths is in group_norm.h.
#include "group_norm.h"

#include "checks.h"
#include "device.h"
#include "groups.h"
#include "ops.h"

namespace fastnorm {

static constexpr const char* kOp = "group_norm";

// The mask's rows where the input is.
static MaskRows mask_rows(const Tensor& input, const Shape& shape) {
  return input.is_cuda() ? cuda_mask_rows(shape) : group_mask_rows(shape);
}

static void check_groups(const Tensor& input, int64_t num_groups) {
  TORCH_CHECK(input.dim() >= 2, kOp, ": input must have at least 2 dimensions (N, C, *), got ", input.dim(),
              " with shape ", input.sizes());
  TORCH_CHECK(num_groups > 0, kOp, ": num_groups must be positive, got ", num_groups);
  TORCH_CHECK(input.size(1) % num_groups == 0, kOp, ": num_groups must divide the number of channels ", input.size(1),
              " (input.size(1)), got ", num_groups);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> normalize_groups(const char* op, const Tensor& input, int64_t num_groups,
                                                            const OptionalTensor& weight, const OptionalTensor& bias,
                                                            const OptionalTensor& residual, double eps,
                                                            std::optional<std::string_view> activation, bool keep_mask,
                                                            bool want_variance) {
  check_per_channel(op, "weight", weight, input);
  check_per_channel(op, "bias", bias, input);
  check_same_type(op, "weight", weight, "bias", bias);
  check_like_input(op, "residual", residual, input);
  const Activation act = activation_of(op, activation);

  const Shape shape = shape_of(input);
  const Tensor x = in_layout(input, shape.layout);
  const Tensor y = empty_in_layout(x, shape.layout);
  const Tensor statistics = new_empty({2, shape.N, num_groups}, at::kDouble, input.device());
  Tensor mask, variance;
  if (input.numel() == 0) {
    statistics.zero_();
    return {y, statistics, mask, variance};
  }
  if (want_variance) variance = new_empty({shape.N, num_groups}, at::kDouble, input.device());
  if (keep_mask && is_given(residual) && is_piecewise_linear(act)) {
    mask = new_mask(mask_rows(input, shape).bytes(), shape.layout, input.device());
  }
  const OptionalTensor w = in_layout(weight, Layout::kContiguous), b = in_layout(bias, Layout::kContiguous),
                       r = in_layout(residual, shape.layout);

  GroupNormForward args{};
  args.shape = shape;
  args.G = num_groups;
  args.dtype = dtype_of(x);
  args.param_dtype = param_dtype(input, weight, bias);
  args.activation = act;
  args.eps = eps;
  args.x = x.const_data_ptr();
  args.residual = data_or_null(r);
  args.weight = data_or_null(w);
  args.bias = data_or_null(b);
  args.y = y.mutable_data_ptr();
  args.mean = statistics.mutable_data_ptr<double>();
  args.rstd = args.mean + shape.N * num_groups;
  args.variance = variance.defined() ? variance.mutable_data_ptr<double>() : nullptr;
  args.mask = mask.defined() ? mask.mutable_data_ptr<uint8_t>() : nullptr;
  FASTNORM_RUN(group_norm_forward, args, input);
  return {y, statistics, mask, variance};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> normalize_groups_backward(
    const char* op, Tensor grad_output, const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& residual, const OptionalTensor& mask, const Tensor& statistics, int64_t num_groups,
    std::optional<std::string_view> activation, std::array<bool, 4> wanted) {
  check_like_input(op, "grad_output", grad_output, input);
  check_per_channel(op, "weight", weight, input);
  check_per_channel(op, "bias", bias, input);
  check_like_input(op, "residual", residual, input);
  const Activation act = activation_of(op, activation);
  const Shape shape = shape_of(input, mask);
  const int64_t slices = shape.N * num_groups;
  TORCH_CHECK(statistics.scalar_type() == at::kDouble && statistics.numel() == 2 * slices &&
                  statistics.is_contiguous() && statistics.device() == input.device(),
              op, ": statistics must be what ", op, "_forward returned");
  if (is_given(mask)) {
    const MaskRows rows = mask_rows(input, shape);
    TORCH_CHECK(mask->scalar_type() == at::kByte && mask->numel() == rows.bytes() && mask->is_contiguous() &&
                    mask->device() == input.device(),
                op, ": mask must be what ", op, "_forward returned");
  }

  const OptionalTensor w = in_layout(weight, Layout::kContiguous), b = in_layout(bias, Layout::kContiguous),
                       r = in_layout(residual, shape.layout);
  const Tensor x = in_layout(input, shape.layout), dy = in_layout(grad_output, shape.layout);
  Tensor dx, dweight, dbias, dresidual;
  if (wanted[3]) dresidual = act == Activation::kNone ? grad_output : empty_in_layout(x, shape.layout);
  grad_output.reset();
  if (wanted[0]) dx = last_reference_or_empty(dy, shape.layout);
  if (wanted[1] && is_given(w)) dweight = input.numel() ? new_empty_like(*w) : new_zeros_like(*w);
  if (wanted[2] && is_given(b)) dbias = input.numel() ? new_empty_like(*b) : new_zeros_like(*b);
  if (input.numel() == 0) return {dx, dweight, dbias, dresidual};

  GroupNormBackward args{};
  args.shape = shape;
  args.G = num_groups;
  args.dtype = dtype_of(x);
  args.param_dtype = param_dtype(input, weight, bias);
  args.activation = act;
  args.x = x.const_data_ptr();
  args.dy = dy.const_data_ptr();
  args.residual = data_or_null(r);
  args.weight = data_or_null(w);
  args.bias = data_or_null(b);
  args.mean = statistics.const_data_ptr<double>();
  args.rstd = args.mean + slices;
  args.mask = is_given(mask) ? mask->const_data_ptr<uint8_t>() : nullptr;
  args.dx = dx.defined() ? dx.mutable_data_ptr() : nullptr;
  args.dresidual = dresidual.defined() && act != Activation::kNone ? dresidual.mutable_data_ptr() : nullptr;
  args.dweight = dweight.defined() ? dweight.mutable_data_ptr() : nullptr;
  args.dbias = dbias.defined() ? dbias.mutable_data_ptr() : nullptr;
  FASTNORM_RUN(group_norm_backward, args, input);
  return {dx, dweight, dbias, dresidual};
}

std::tuple<Tensor, Tensor, Tensor> group_norm_forward(const Tensor& input, const OptionalTensor& weight,
                                                      const OptionalTensor& bias, const OptionalTensor& residual,
                                                      int64_t num_groups, double eps,
                                                      std::optional<std::string_view> activation, bool keep_mask) {
  check_supported(kOp, input);
  check_groups(input, num_groups);
  TORCH_CHECK_VALUE(input.numel() != num_groups, kOp, ": expected more than 1 value per group, got input shape ",
                    input.sizes(), " with num_groups=", num_groups);
  const auto [y, statistics, mask, variance] =
      normalize_groups(kOp, input, num_groups, weight, bias, residual, eps, activation, keep_mask, false);
  return {y, statistics, mask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> group_norm_backward(
    Tensor grad_output, const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& residual, const OptionalTensor& mask, const Tensor& statistics, int64_t num_groups,
    std::optional<std::string_view> activation, std::array<bool, 4> wanted) {
  check_supported(kOp, input);
  check_groups(input, num_groups);
  return normalize_groups_backward(kOp, std::move(grad_output), input, weight, bias, residual, mask, statistics,
                                   num_groups, activation, wanted);
}

}  // namespace fastnorm
