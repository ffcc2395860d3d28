// batch_norm: checks, allocation and choice of the kernel. The maths is in batch_norm.h.
#include "batch_norm.h"

#include <cmath>
#include <limits>

#include "checks.h"
#include "device.h"
#include "ops.h"

namespace fastnorm {

static constexpr const char *kOp = "batch_norm", *kRenorm = "batch_renorm";

// The mask's rows where the input is.
static MaskRows mask_rows(const Tensor& input, const Shape& shape) {
  return input.is_cuda() ? cuda_mask_rows(shape) : mask_rows(shape);
}

static void check_channels(const char* op, const Tensor& input) {
  TORCH_CHECK(input.dim() >= 2, op, ": input must have at least 2 dimensions (N, C, *), got ", input.dim(),
              " with shape ", input.sizes());
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_forward(
    const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
    const OptionalTensor& running_mean, const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
    bool training, std::optional<double> momentum, double eps, std::optional<std::string_view> activation,
    bool skip_nonfinite_stats, std::optional<std::array<double, 2>> renorm, bool keep_mask) {
  const char* op = renorm ? kRenorm : kOp;
  check_supported(op, input);
  check_channels(op, input);
  check_per_channel(op, "weight", weight, input);
  check_per_channel(op, "bias", bias, input);
  check_same_type(op, "weight", weight, "bias", bias);
  check_per_channel(op, "running_mean", running_mean, input);
  check_per_channel(op, "running_var", running_var, input);
  check_same_type(op, "running_mean", running_mean, "running_var", running_var);
  check_like_input(op, "residual", residual, input);
  TORCH_CHECK(is_given(running_mean) == is_given(running_var), op,
              ": running_mean and running_var must be given together, got only ",
              is_given(running_mean) ? "running_mean" : "running_var");
  TORCH_CHECK(training || is_given(running_mean), op, ": running_mean and running_var must be given if training=False");
  if (is_given(num_batches_tracked)) {
    TORCH_CHECK(num_batches_tracked->numel() == 1, op, ": num_batches_tracked must be one number, got shape ",
                num_batches_tracked->sizes());
    check_place(op, "num_batches_tracked", *num_batches_tracked, input);
  }
  TORCH_CHECK_VALUE(momentum || !training || !is_given(running_mean) || is_given(num_batches_tracked), op,
                    ": momentum=None (cumulative average) needs num_batches_tracked");
  const auto [r_max, d_max] = renorm.value_or(std::array<double, 2>{1, 0});
  if (renorm) {
    TORCH_CHECK(is_given(running_mean), op, ": running_mean and running_var must be given, for r and d come from them");
    TORCH_CHECK_VALUE(r_max >= 1, op, ": r_max must be at least 1, got ", r_max);
    TORCH_CHECK_VALUE(d_max >= 0, op, ": d_max must be at least 0, got ", d_max);
  }
  const bool corrects = training && (r_max > 1 || d_max > 0);  // else it is batch_norm, bit for bit
  const Activation act = activation_of(op, activation);

  const Shape shape = shape_of(input);
  TORCH_CHECK_VALUE(!training || shape.N * shape.S != 1, op,
                    ": expected more than 1 value per channel in training, got input shape ", input.sizes());
  if (training) {
    check_updatable(op, running_mean, running_var);
    TORCH_CHECK_NOT_IMPLEMENTED(!is_given(num_batches_tracked) || num_batches_tracked->scalar_type() == at::kLong, op,
                                ": no kernel for num_batches_tracked of type ", num_batches_tracked->scalar_type(),
                                ", wanted Long");
  }

  const Tensor x = in_layout(input, shape.layout);
  const Tensor y = empty_in_layout(x, shape.layout);
  const Tensor statistics = new_empty({corrects ? 4 : 2, shape.C}, at::kDouble, input.device());
  Tensor mask;
  if (input.numel() == 0) {
    // As torch does: a batch that is counted but teaches nothing.
    statistics.zero_();
    if (training && is_given(num_batches_tracked)) num_batches_tracked->add_(1);
    return {y, statistics, mask};
  }
  if (keep_mask && is_given(residual) && is_piecewise_linear(act))
    mask = new_mask(mask_rows(input, shape).bytes(), shape.layout, input.device());
  const OptionalTensor w = in_layout(weight, Layout::kContiguous), b = in_layout(bias, Layout::kContiguous);
  const OptionalTensor r = in_layout(residual, shape.layout);
  const OptionalTensor rm = training ? running_mean : in_layout(running_mean, Layout::kContiguous),
                       rv = training ? running_var : in_layout(running_var, Layout::kContiguous);

  BatchNormForward args{};
  args.shape = shape;
  args.dtype = dtype_of(x);
  args.param_dtype = param_dtype(input, weight, bias);
  args.stats_dtype = is_given(rm) ? dtype_of(*rm) : args.dtype;
  args.activation = act;
  args.training = training;
  args.skip_nonfinite_stats = skip_nonfinite_stats;
  args.eps = eps;
  args.momentum = momentum.value_or(std::numeric_limits<double>::quiet_NaN());
  args.x = x.const_data_ptr();
  args.residual = data_or_null(r);
  args.weight = data_or_null(w);
  args.bias = data_or_null(b);
  args.running_mean = mutable_data_or_null(rm);
  args.running_var = mutable_data_or_null(rv);
  args.num_batches_tracked =
      training && is_given(num_batches_tracked) ? num_batches_tracked->mutable_data_ptr<int64_t>() : nullptr;
  args.y = y.mutable_data_ptr();
  args.mean = statistics.mutable_data_ptr<double>();
  args.rstd = args.mean + shape.C;
  args.r = corrects ? args.rstd + shape.C : nullptr;
  args.d = corrects ? args.r + shape.C : nullptr;
  args.r_max = r_max;
  args.d_max = d_max;
  args.mask = mask.defined() ? mask.mutable_data_ptr<uint8_t>() : nullptr;
  FASTNORM_RUN(batch_norm_forward, args, input);

  if (training) {
    for (const OptionalTensor* t : {&running_mean, &running_var, &num_batches_tracked})
      if (is_given(*t) && !(*t)->is_inference()) (*t)->unsafeGetTensorImpl()->bump_version();
  }
  return {y, statistics, mask};
}

static void check_statistics(const char* op, const Tensor& statistics, int64_t rows, const Tensor& input) {
  TORCH_CHECK(statistics.scalar_type() == at::kDouble && statistics.numel() == rows * input.size(1) &&
                  statistics.is_contiguous() && statistics.device() == input.device(),
              op, ": statistics must be what batch_norm_forward returned");
}

// What every backward reads: checked, in one layout, and kept alive as long as the pointers in `args` are used.
struct BackwardOperands {
  Tensor x, dy;
  OptionalTensor weight, bias, residual;
  BatchNormBackward args{};

  BackwardOperands(const char* op, const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight_,
                   const OptionalTensor& bias_, const OptionalTensor& residual_, const OptionalTensor& mask,
                   const Tensor& statistics, std::optional<std::string_view> activation, bool corrected) {
    check_supported(op, input);
    check_channels(op, input);
    check_like_input(op, "grad_output", grad_output, input);
    check_per_channel(op, "weight", weight_, input);
    check_per_channel(op, "bias", bias_, input);
    check_like_input(op, "residual", residual_, input);
    check_statistics(op, statistics, corrected ? 4 : 2, input);
    args.activation = activation_of(op, activation);
    args.shape = shape_of(input, mask);
    if (is_given(mask)) {
      const MaskRows rows = mask_rows(input, args.shape);
      TORCH_CHECK(mask->scalar_type() == at::kByte && mask->numel() == rows.bytes() && mask->is_contiguous() &&
                      mask->device() == input.device(),
                  op, ": mask must be what batch_norm_forward returned");
    }
    const Layout layout = args.shape.layout;
    x = in_layout(input, layout);
    dy = in_layout(grad_output, layout);
    weight = in_layout(weight_, Layout::kContiguous);
    bias = in_layout(bias_, Layout::kContiguous);
    residual = in_layout(residual_, layout);
    args.dtype = dtype_of(x);
    args.param_dtype = param_dtype(input, weight, bias);
    args.x = x.const_data_ptr();
    args.dy = dy.const_data_ptr();
    args.residual = data_or_null(residual);
    args.weight = data_or_null(weight);
    args.bias = data_or_null(bias);
    args.mean = statistics.const_data_ptr<double>();
    args.rstd = args.mean + args.shape.C;
    args.r = corrected ? args.rstd + args.shape.C : nullptr;
    args.d = corrected ? args.r + args.shape.C : nullptr;
    args.mask = is_given(mask) ? mask->const_data_ptr<uint8_t>() : nullptr;
  }

  // dx and dresidual, undefined where not wanted.
  std::array<Tensor, 2> make_elements(Tensor grad_output, bool wants_dx, bool wants_dresidual) {
    const bool passed_on = args.activation == Activation::kNone;  // dresidual = dz = dy
    Tensor dx, dresidual;
    if (wants_dresidual) dresidual = passed_on ? grad_output : empty_in_layout(x, args.shape.layout);
    grad_output.reset();
    if (wants_dx) dx = last_reference_or_empty(dy, args.shape.layout);
    args.dx = dx.defined() ? dx.mutable_data_ptr() : nullptr;
    args.dresidual = dresidual.defined() && !passed_on ? dresidual.mutable_data_ptr() : nullptr;
    return {dx, dresidual};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward(
    Tensor grad_output, const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& residual, const OptionalTensor& mask, const Tensor& statistics, bool training,
    std::optional<std::string_view> activation, std::array<bool, 4> wanted) {
  const bool corrected = statistics.dim() == 2 && statistics.size(0) == 4;
  BackwardOperands o(corrected ? kRenorm : kOp, grad_output, input, weight, bias, residual, mask, statistics,
                     activation, corrected);
  const auto [dx, dresidual] = o.make_elements(std::move(grad_output), wanted[0], wanted[3]);
  Tensor dweight, dbias;
  if (wanted[1] && is_given(weight)) dweight = input.numel() ? new_empty_like(*o.weight) : new_zeros_like(*o.weight);
  if (wanted[2] && is_given(bias)) dbias = input.numel() ? new_empty_like(*o.bias) : new_zeros_like(*o.bias);
  if (input.numel() == 0) return {dx, dweight, dbias, dresidual};
  o.args.training = training;
  o.args.dweight = dweight.defined() ? dweight.mutable_data_ptr() : nullptr;
  o.args.dbias = dbias.defined() ? dbias.mutable_data_ptr() : nullptr;
  FASTNORM_RUN(batch_norm_backward, o.args, input);
  return {dx, dweight, dbias, dresidual};
}

// ---- the four steps of batch normalisation over the batches of several processes

Tensor batch_norm_statistics(const Tensor& input) {
  check_supported(kOp, input);
  check_channels(kOp, input);
  const Shape shape = shape_of(input);
  if (input.numel() == 0) return new_zeros({2, shape.C}, at::kDouble, input.device());
  const Tensor x = in_layout(input, shape.layout), statistics = new_empty({3, shape.C}, at::kDouble, input.device());
  BatchNormForward args{};
  args.shape = shape;
  args.dtype = args.param_dtype = args.stats_dtype = dtype_of(x);
  args.training = true;
  args.x = x.const_data_ptr();
  args.mean = statistics.mutable_data_ptr<double>();
  args.variance = args.mean + shape.C;
  args.rstd = args.variance + shape.C;
  FASTNORM_RUN(batch_norm_forward, args, input);
  return statistics.narrow(0, 0, 2);
}

std::tuple<Tensor, Tensor> batch_norm_normalize(const Tensor& input, const OptionalTensor& weight,
                                                const OptionalTensor& bias, const OptionalTensor& residual,
                                                const Tensor& statistics, std::optional<std::string_view> activation,
                                                bool keep_mask) {
  check_supported(kOp, input);
  check_channels(kOp, input);
  check_per_channel(kOp, "weight", weight, input);
  check_per_channel(kOp, "bias", bias, input);
  check_same_type(kOp, "weight", weight, "bias", bias);
  check_like_input(kOp, "residual", residual, input);
  check_statistics(kOp, statistics, 2, input);
  const Activation act = activation_of(kOp, activation);
  const Shape shape = shape_of(input);
  const Tensor x = in_layout(input, shape.layout), y = empty_in_layout(x, shape.layout);
  Tensor mask;
  if (input.numel() == 0) return {y, mask};
  if (keep_mask && is_given(residual) && is_piecewise_linear(act))
    mask = new_mask(mask_rows(input, shape).bytes(), shape.layout, input.device());
  const OptionalTensor w = in_layout(weight, Layout::kContiguous), b = in_layout(bias, Layout::kContiguous);
  const OptionalTensor r = in_layout(residual, shape.layout);
  BatchNormForward args{};
  args.shape = shape;
  args.dtype = args.stats_dtype = dtype_of(x);
  args.param_dtype = param_dtype(input, weight, bias);
  args.activation = act;
  args.x = x.const_data_ptr();
  args.residual = data_or_null(r);
  args.weight = data_or_null(w);
  args.bias = data_or_null(b);
  args.y = y.mutable_data_ptr();
  args.given_mean = statistics.const_data_ptr<double>();
  args.given_rstd = args.given_mean + shape.C;
  args.mask = mask.defined() ? mask.mutable_data_ptr<uint8_t>() : nullptr;
  FASTNORM_RUN(batch_norm_forward, args, input);
  return {y, mask};
}

Tensor batch_norm_backward_reduce(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                                  const OptionalTensor& bias, const OptionalTensor& residual,
                                  const OptionalTensor& mask, const Tensor& statistics,
                                  std::optional<std::string_view> activation) {
  BackwardOperands o(kOp, grad_output, input, weight, bias, residual, mask, statistics, activation, false);
  const Tensor sums = new_zeros({2, input.size(1)}, at::kDouble, input.device());
  if (input.numel() == 0) return sums;
  o.args.training = true;
  o.args.sums = sums.mutable_data_ptr<double>();
  FASTNORM_RUN(batch_norm_backward, o.args, input);
  return sums;
}

std::tuple<Tensor, Tensor> batch_norm_backward_elements(const Tensor& grad_output, const Tensor& input,
                                                        const OptionalTensor& weight, const OptionalTensor& bias,
                                                        const OptionalTensor& residual, const OptionalTensor& mask,
                                                        const Tensor& statistics, const Tensor& sums, double count,
                                                        std::optional<std::string_view> activation,
                                                        std::array<bool, 2> wanted) {
  BackwardOperands o(kOp, grad_output, input, weight, bias, residual, mask, statistics, activation, false);
  TORCH_CHECK(sums.scalar_type() == at::kDouble && sums.numel() == 2 * input.size(1) && sums.is_contiguous() &&
                  sums.device() == input.device(),
              kOp, ": sums must be what batch_norm_backward_reduce returned");
  const auto [dx, dresidual] = o.make_elements(grad_output, wanted[0], wanted[1]);
  if (input.numel() == 0) return {dx, dresidual};
  o.args.training = true;
  o.args.given_sums = sums.const_data_ptr<double>();
  o.args.count = count;
  FASTNORM_RUN(batch_norm_backward, o.args, input);
  return {dx, dresidual};
}

}  // namespace fastnorm
