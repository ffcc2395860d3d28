// layer_norm and rms_norm: checks, allocation and choice of the kernel. The maths is in layer_norm.h.
#include "layer_norm.h"

#include "checks.h"
#include "device.h"
#include "ops.h"

namespace fastnorm {

static const char* op_name(bool subtract_mean) { return subtract_mean ? "layer_norm" : "rms_norm"; }

// A parameter: normalized_shape, in the input's type or float32. torch's rms_norm promotes other types, its layer_norm
// refuses them.
static void check_parameter(const char* op, const char* name, const OptionalTensor& t, const Tensor& input,
                            at::IntArrayRef normalized_shape, bool torch_promotes) {
  if (!is_given(t)) return;
  check_place(op, name, *t, input);
  TORCH_CHECK(t->sizes() == normalized_shape, op, ": ", name, " must have shape ", normalized_shape,
              " (normalized_shape), got ", t->sizes());
  const auto type = t->scalar_type(), wanted = input.scalar_type();
  const bool low_precision = wanted == at::kBFloat16 || wanted == at::kHalf;
  const bool fits = type == wanted || (low_precision && type == at::kFloat);
  TORCH_CHECK_NOT_IMPLEMENTED(fits || !torch_promotes, op, ": no kernel for a ", name, " of type ", type,
                              " with an input of type ", wanted);
  TORCH_CHECK(fits, op, ": ", name, " must be of type ", wanted, low_precision ? " or Float" : "",
              " for an input of type ", wanted, ", got ", type);
}

// The input as rows: M of them, N elements each.
struct Rows {
  int64_t M, N;
};

static Rows check_shapes(bool subtract_mean, const Tensor& input, at::IntArrayRef normalized_shape,
                         const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual) {
  const char* op = op_name(subtract_mean);
  check_supported(op, input);
  TORCH_CHECK(!normalized_shape.empty(), op, ": normalized_shape must have at least one dimension, got []");
  const auto dims = static_cast<int64_t>(normalized_shape.size()), rest = input.dim() - dims;
  TORCH_CHECK(rest >= 0 && input.sizes().slice(rest) == normalized_shape, op, ": input must have shape [*, ",
              c10::Join(", ", normalized_shape), "] (normalized_shape ", normalized_shape, "), got ", input.sizes());
  check_parameter(op, "weight", weight, input, normalized_shape, !subtract_mean);
  check_parameter(op, "bias", bias, input, normalized_shape, !subtract_mean);
  check_same_type(op, "weight", weight, "bias", bias);
  check_like_input(op, "residual", residual, input);
  Rows rows{1, 1};
  for (int64_t d = 0; d < input.dim(); ++d) (d < rest ? rows.M : rows.N) *= input.size(d);
  return rows;
}

// The tensor that backward gets: mean, rstd and rest as rows of [3, M], or rstd alone.
static int64_t kept_numbers(bool subtract_mean) { return subtract_mean ? 3 : 1; }
static at::ScalarType statistics_type(const Tensor& input) {
  return input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}
template <typename P, typename Args>
static void set_statistics(Args& args, P* p) {
  args.rstd = p;
  if (!args.subtract_mean) return;
  const int64_t bytes = args.M * (args.dtype == Dtype::kFloat64 ? 8 : 4);
  using Byte = std::conditional_t<std::is_const_v<P>, const char, char>;
  args.mean = reinterpret_cast<Byte*>(p) + bytes;
  args.rest = reinterpret_cast<Byte*>(p) + 2 * bytes;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_forward(const Tensor& input, const OptionalTensor& weight,
                                                      const OptionalTensor& bias, const OptionalTensor& residual,
                                                      const std::vector<int64_t>& normalized_shape, double eps,
                                                      std::optional<std::string_view> activation, bool subtract_mean,
                                                      bool keep) {
  const Rows rows = check_shapes(subtract_mean, input, normalized_shape, weight, bias, residual);
  const Activation act = activation_of(op_name(subtract_mean), activation);

  const Tensor x = in_layout(input, Layout::kContiguous);
  const Tensor y = empty_in_layout(x, Layout::kContiguous);
  Tensor statistics, mask;
  if (keep) {
    statistics = new_empty({kept_numbers(subtract_mean), rows.M}, statistics_type(input), input.device());
    if (is_given(residual) && is_piecewise_linear(act)) {
      const MaskRows bits{rows.M, rows.N};
      mask = new_empty({bits.rows, bits.bytes_per_row()}, at::kByte, input.device());
    }
  }
  if (input.numel() == 0) {
    if (keep) statistics.zero_();
    return {y, statistics, mask};
  }
  const OptionalTensor w = in_layout(weight, Layout::kContiguous), b = in_layout(bias, Layout::kContiguous),
                       r = in_layout(residual, Layout::kContiguous);

  LayerNormForward args{};
  args.M = rows.M;
  args.N = rows.N;
  args.dtype = dtype_of(x);
  args.param_dtype = param_dtype(input, weight, bias);
  args.activation = act;
  args.subtract_mean = subtract_mean;
  args.eps = eps;
  args.x = x.const_data_ptr();
  args.residual = data_or_null(r);
  args.weight = data_or_null(w);
  args.bias = data_or_null(b);
  args.y = y.mutable_data_ptr();
  if (keep) set_statistics(args, statistics.mutable_data_ptr());
  args.mask = mask.defined() ? mask.mutable_data_ptr<uint8_t>() : nullptr;
  FASTNORM_RUN(layer_norm_forward, args, input);
  return {y, statistics, mask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_backward(Tensor grad_output, const Tensor& input,
                                                               const OptionalTensor& weight, const OptionalTensor& bias,
                                                               const OptionalTensor& residual,
                                                               const OptionalTensor& mask, const Tensor& statistics,
                                                               const std::vector<int64_t>& normalized_shape,
                                                               std::optional<std::string_view> activation,
                                                               bool subtract_mean, std::array<bool, 4> wanted) {
  const char* op = op_name(subtract_mean);
  const Rows rows = check_shapes(subtract_mean, input, normalized_shape, weight, bias, residual);
  check_like_input(op, "grad_output", grad_output, input);
  const Activation act = activation_of(op, activation);
  TORCH_CHECK(statistics.scalar_type() == statistics_type(input) && statistics.is_contiguous() &&
                  statistics.numel() == kept_numbers(subtract_mean) * rows.M && statistics.device() == input.device(),
              op, ": statistics must be what layer_norm_forward returned");
  if (is_given(mask)) {
    const MaskRows bits{rows.M, rows.N};
    TORCH_CHECK(mask->scalar_type() == at::kByte && mask->numel() == bits.rows * bits.bytes_per_row() &&
                    mask->is_contiguous() && mask->device() == input.device(),
                op, ": mask must be what layer_norm_forward returned");
  }

  const OptionalTensor w = in_layout(weight, Layout::kContiguous), b = in_layout(bias, Layout::kContiguous),
                       r = in_layout(residual, Layout::kContiguous);
  const Tensor x = in_layout(input, Layout::kContiguous), dy = in_layout(grad_output, Layout::kContiguous);
  Tensor dx, dweight, dbias, dresidual;
  if (wanted[3]) dresidual = act == Activation::kNone ? grad_output : empty_in_layout(x, Layout::kContiguous);
  grad_output.reset();
  if (wanted[0]) dx = last_reference_or_empty(dy, Layout::kContiguous);
  if (wanted[1] && is_given(w)) dweight = input.numel() ? new_empty_like(*w) : new_zeros_like(*w);
  if (wanted[2] && is_given(b)) dbias = input.numel() ? new_empty_like(*b) : new_zeros_like(*b);
  if (input.numel() == 0) return {dx, dweight, dbias, dresidual};

  LayerNormBackward args{};
  args.M = rows.M;
  args.N = rows.N;
  args.dtype = dtype_of(x);
  args.param_dtype = param_dtype(input, weight, bias);
  args.activation = act;
  args.subtract_mean = subtract_mean;
  args.x = x.const_data_ptr();
  args.dy = dy.const_data_ptr();
  args.residual = data_or_null(r);
  args.weight = data_or_null(w);
  args.bias = data_or_null(b);
  set_statistics(args, statistics.const_data_ptr());
  args.mask = is_given(mask) ? mask->const_data_ptr<uint8_t>() : nullptr;
  args.dx = dx.defined() ? dx.mutable_data_ptr() : nullptr;
  args.dresidual = dresidual.defined() && act != Activation::kNone ? dresidual.mutable_data_ptr() : nullptr;
  args.dweight = dweight.defined() ? dweight.mutable_data_ptr() : nullptr;
  args.dbias = dbias.defined() ? dbias.mutable_data_ptr() : nullptr;
  FASTNORM_RUN(layer_norm_backward, args, input);
  return {dx, dweight, dbias, dresidual};
}

}  // namespace fastnorm
