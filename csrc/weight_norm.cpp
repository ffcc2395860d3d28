// weight_norm: checks, allocation and choice of the kernel. The maths is in weight_norm.h.
#include "weight_norm.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>

#include "checks.h"
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
  check_same_device(kOp, "g", g, v);
  TORCH_CHECK(g.scalar_type() == v.scalar_type() || (g.scalar_type() == at::kFloat && v.scalar_type() != at::kDouble),
              kOp, ": g must be of v's type ", v.scalar_type(), v.scalar_type() == at::kDouble ? "" : " or Float",
              ", got ", g.scalar_type());
}

// Any dense tensor is read as it lies: slice c of `dim` is the elements (n, c, s) of [N, C, S] in memory.
static Shape slices_of(const Tensor& v, int64_t dim) {
  if (dim == -1 || v.size(dim) == 1) return {1, 1, v.numel(), Layout::kContiguous};
  const int64_t C = v.size(dim), S = v.stride(dim);
  return {v.numel() / (C * S), C, S, Layout::kContiguous};
}

static Tensor dense(const Tensor& t) { return t.is_non_overlapping_and_dense() ? t : t.contiguous(); }

std::tuple<Tensor, Tensor> weight_norm_forward(const Tensor& v_, const Tensor& g_, int64_t dim) {
  check_supported(kOp, v_);
  dim = checked_dim(v_, dim);
  check_magnitude(v_, g_, dim);
  const Tensor v = dense(v_), g = g_.contiguous();
  const Tensor w = at::empty_like(v);
  const Tensor norm = at::empty({g.numel()}, v.options().dtype(at::kDouble));
  if (v.numel() == 0) return {w, norm.zero_()};

  WeightNormForward args{};
  args.shape = slices_of(v, dim);
  args.dtype = dtype_of(v);
  args.param_dtype = dtype_of(g);
  args.v = v.const_data_ptr();
  args.g = g.const_data_ptr();
  args.w = w.mutable_data_ptr();
  args.norm = norm.mutable_data_ptr<double>();
  cpu::weight_norm_forward(args);
  return {w, norm};
}

std::tuple<Tensor, Tensor> weight_norm_backward(const Tensor& grad_output, const Tensor& v_, const Tensor& g_,
                                                const Tensor& norm, int64_t dim, std::array<bool, 2> wanted) {
  check_supported(kOp, v_);
  dim = checked_dim(v_, dim);
  check_magnitude(v_, g_, dim);
  check_like_input(kOp, "grad_output", grad_output, v_);
  TORCH_CHECK(norm.scalar_type() == at::kDouble && norm.numel() == g_.numel() && norm.is_contiguous(), kOp,
              ": norm must be what weight_norm_forward returned");
  const Tensor v = dense(v_), g = g_.contiguous();
  Tensor dv, dg;
  if (wanted[0]) dv = at::empty_like(v);
  if (wanted[1]) dg = v.numel() ? at::empty_like(g) : at::zeros_like(g);
  if (v.numel() == 0) return {dv, dg};
  const Tensor dw = grad_output.strides() == v.strides() ? grad_output : at::empty_like(v).copy_(grad_output);

  WeightNormBackward args{};
  args.shape = slices_of(v, dim);
  args.dtype = dtype_of(v);
  args.param_dtype = dtype_of(g);
  args.v = v.const_data_ptr();
  args.g = g.const_data_ptr();
  args.dw = dw.const_data_ptr();
  args.norm = norm.const_data_ptr<double>();
  args.dv = dv.defined() ? dv.mutable_data_ptr() : nullptr;
  args.dg = dg.defined() ? dg.mutable_data_ptr() : nullptr;
  cpu::weight_norm_backward(args);
  return {dv, dg};
}

}  // namespace fastnorm
