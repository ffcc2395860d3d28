// weight_norm: checks, allocation, choice of the kernel, and its node in the autograd graph. The maths is in
// weight_norm.h.
//
// The node is C++, unlike the other ops': torch's own is, and on a small weight a Python function takes longer than all
// the rest.
#include "weight_norm.h"

#include <ATen/TensorOperators.h>
#include <torch/csrc/autograd/custom_function.h>

#include "checks.h"
#include "device.h"
#include "ops.h"

namespace fastnorm {

static constexpr const char* kOp = "weight_norm";

// `dim` counted from the front, or -1 for the norm of the whole tensor (torch's meaning of -1 here).
static int64_t checked_dim(const Tensor& v, int64_t dim) {
  const int64_t rank = v.dim();
  TORCH_CHECK_INDEX(dim == -1 || (dim >= -rank && dim < rank), kOp, ": dim must be in [", -rank, ", ", rank - 1,
                    "] for a weight of shape ", v.sizes(), ", got ", dim);
  return dim < -1 ? dim + rank : dim;
}

static void check_magnitude(const Tensor& v, const Tensor& g, int64_t dim) {
  at::DimVector wanted(v.dim(), 1);
  if (dim >= 0) wanted[dim] = v.size(dim);
  const bool scalar = dim == -1 && g.numel() == 1 && g.dim() <= v.dim();
  TORCH_CHECK(scalar || g.sizes() == at::IntArrayRef(wanted), kOp, ": g must have shape ", at::IntArrayRef(wanted),
              dim == -1 ? " or []" : "", " for v of shape ", v.sizes(), " and dim=", dim, ", got ", g.sizes());
  check_place(kOp, "g", g, v);
  const bool low_precision = v.scalar_type() == at::kBFloat16 || v.scalar_type() == at::kHalf;
  TORCH_CHECK(g.scalar_type() == v.scalar_type() || (low_precision && g.scalar_type() == at::kFloat), kOp,
              ": g must be of v's type ", v.scalar_type(), low_precision ? " or Float" : "", ", got ", g.scalar_type());
}

// The one dimension that g has, or -1.
static int64_t dim_of(const Tensor& g) {
  for (int64_t d = 0; d < g.dim(); ++d)
    if (g.size(d) != 1) return d;
  return -1;
}

// v is dense in either layout. Slice c is the elements (n, c, s) of [N, C, S] in memory.
static Shape slices_of(const Tensor& v, const Tensor& g) {
  const int64_t dim = dim_of(g);
  if (dim == -1) return {1, 1, v.numel(), Layout::kContiguous};
  const int64_t C = v.size(dim), S = v.stride(dim);
  return {v.numel() / (C * S), C, S, Layout::kContiguous};
}

static Tensor dense(const Tensor& t) { return is_dense(t) ? t : t.contiguous(); }

// -> w, norm
static std::tuple<Tensor, Tensor> forward(const Tensor& g_, const Tensor& v_) {
  const Tensor v = dense(v_), g = g_.contiguous();
  const Tensor norm = new_empty({g.numel()}, at::kDouble, v.device());
  const Tensor w = new_empty_like(v);
  if (v.numel() == 0) return {w, norm.zero_()};

  WeightNormForward args{};
  args.shape = slices_of(v, g);
  args.dtype = dtype_of(v);
  args.param_dtype = dtype_of(g);
  args.v = v.const_data_ptr();
  args.g = g.const_data_ptr();
  args.w = w.mutable_data_ptr();
  args.norm = norm.mutable_data_ptr<double>();
  FASTNORM_RUN(weight_norm_forward, args, v);
  return {w, norm};
}

// -> dg, dv, each undefined where `wanted` says so
static torch::autograd::variable_list backward(const Tensor& dw_, const Tensor& g_, const Tensor& v_,
                                               const Tensor& norm, std::array<bool, 2> wanted) {
  const Tensor v = dense(v_), g = g_.contiguous();
  Tensor dv, dg;
  if (wanted[1]) dv = new_empty_like(v);
  if (wanted[0]) dg = v.numel() ? new_empty_like(g) : new_zeros_like(g);
  if (v.numel() == 0) return {dg, dv};
  const Tensor dw = dw_.strides() == v.strides() ? dw_ : new_empty_like(v).copy_(dw_);

  WeightNormBackward args{};
  args.shape = slices_of(v, g);
  args.dtype = dtype_of(v);
  args.param_dtype = dtype_of(g);
  args.v = v.const_data_ptr();
  args.g = g.const_data_ptr();
  args.dw = dw.const_data_ptr();
  args.norm = norm.const_data_ptr<double>();
  args.dv = dv.defined() ? dv.mutable_data_ptr() : nullptr;
  args.dg = dg.defined() ? dg.mutable_data_ptr() : nullptr;
  FASTNORM_RUN(weight_norm_backward, args, v);
  return {dg, dv};
}

// The same gradients in torch's ops, for derivatives of higher order.
static torch::autograd::variable_list differentiable_backward(const Tensor& dw, const Tensor& g, const Tensor& v) {
  const int64_t dim = dim_of(g);
  at::DimVector dims;
  for (int64_t d = 0; d < v.dim(); ++d)
    if (d != dim) dims.push_back(d);
  const auto arithmetic = v.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor x = v.to(arithmetic), dx = dw.to(arithmetic);
  const auto sum = [&](const Tensor& t) { return dims.empty() ? t : t.sum(dims, /*keepdim=*/true); };
  const Tensor norm = sum(x.square()).sqrt();
  const Tensor dg = sum(dx * x) / norm;
  const Tensor dv = (dx - x * (dg / norm)) * (g.to(arithmetic).view(norm.sizes()) / norm);
  return {dg.view(g.sizes()).to(g.scalar_type()), dv.to(v.scalar_type())};
}

namespace {

struct WeightNormFunction : torch::autograd::Function<WeightNormFunction> {
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& g, const Tensor& v) {
    const auto [w, norm] = fastnorm::forward(g, v);
    ctx->save_for_backward({g, v, norm});
    return w;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &g = saved[0], &v = saved[1], &norm = saved[2];
    // A tensor of vmap has no storage.
    const bool transformed = !grads[0].has_storage() || grads[0]._fw_grad(/*level=*/0).defined();
    if (at::GradMode::is_enabled() || transformed) return differentiable_backward(grads[0], g, v);
    return fastnorm::backward(grads[0], g, v, norm, {ctx->needs_input_grad(0), ctx->needs_input_grad(1)});
  }
};

}  // namespace

Tensor weight_norm(const Tensor& v, const Tensor& g, int64_t dim) {
  check_supported(kOp, v, "v");
  check_magnitude(v, g, checked_dim(v, dim));
  if (at::GradMode::is_enabled() && (g.requires_grad() || v.requires_grad())) return WeightNormFunction::apply(g, v);
  return std::get<0>(forward(g, v));
}

}  // namespace fastnorm
