// weight_norm: checks, allocation and choice of the kernel. The maths is in weight_norm.h.
#include "weight_norm.h"

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

void check_weight_norm(const Tensor& v, const Tensor& g, int64_t dim) {
  check_supported(kOp, v, "v");
  dim = checked_dim(v, dim);
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

std::tuple<Tensor, Tensor> weight_norm_forward(const Tensor& v_, const Tensor& g_) {
  const Tensor v = dense(v_), g = in_layout(g_, Layout::kContiguous);
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

std::tuple<Tensor, Tensor> weight_norm_backward(const Tensor& dw_, const Tensor& v_, const Tensor& g_,
                                                const Tensor& norm_, std::array<bool, 2> wanted) {
  const Tensor v = dense(v_), g = in_layout(g_, Layout::kContiguous);
  Tensor dv, dg;
  if (wanted[0]) dv = new_empty_like(v);
  if (wanted[1]) dg = v.numel() ? new_empty_like(g) : new_zeros_like(g);
  if (v.numel() == 0) return {dv, dg};
  check_like_input(kOp, "grad_output", dw_, v);
  TORCH_CHECK(norm_.scalar_type() == at::kDouble && norm_.numel() == g.numel() && norm_.device() == v.device(), kOp,
              ": norm must be what weight_norm_forward returned");
  const Tensor norm = norm_.contiguous();
  const Tensor dw = lying_as(v, dw_);

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
  return {dv, dg};
}

}  // namespace fastnorm
