// spectral_norm: checks, allocation and choice of the kernel. The maths is in spectral_norm.h.
#include "spectral_norm.h"

#include "checks.h"
#include "device.h"
#include "ops.h"

namespace fastnorm {

static constexpr const char* kOp = "spectral_norm";

static int64_t checked_dim(const Tensor& weight, int64_t dim) {
  const int64_t rank = weight.dim();
  TORCH_CHECK(rank >= 2, kOp, ": weight must have at least 2 dimensions, got ", rank, " with shape ", weight.sizes());
  TORCH_CHECK_INDEX(dim >= -rank && dim < rank, kOp, ": dim must be in [", -rank, ", ", rank - 1,
                    "] for a weight of shape ", weight.sizes(), ", got ", dim);
  return dim < 0 ? dim + rank : dim;
}

static void check_vector(const char* name, const Tensor& t, int64_t size, at::ScalarType type, const Tensor& weight) {
  check_place(kOp, name, t, weight);
  TORCH_CHECK(t.dim() == 1 && t.size(0) == size, kOp, ": ", name, " must have shape [", size,
              "] for a weight of shape ", weight.sizes(), ", got ", t.sizes());
  TORCH_CHECK(t.scalar_type() == type, kOp, ": ", name, " must be of type ", type, " for a weight of type ",
              weight.scalar_type(), ", got ", t.scalar_type());
  TORCH_CHECK(is_dense(t, Layout::kContiguous), kOp, ": ", name, " must be contiguous");
}

static at::ScalarType arithmetic_type(const Tensor& t) {
  return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// A channels_last weight whose rows are its dimension 0: it is a matrix as it lies, but for the order of the columns.
// The vector v is then permuted, not the weight.
static bool has_permuted_rows(const Tensor& weight, int64_t dim) { return dim == 0 && !weight.is_contiguous(); }

// A row's elements from the logical order to that of the weight in memory, and back.
static Tensor to_memory_order(const Tensor& v, const Tensor& weight) {
  const Tensor row = new_empty_strided(weight.sizes().slice(1), weight.strides().slice(1), v.scalar_type(), v.device());
  row.copy_(v.view(row.sizes()));
  return row.as_strided({v.numel()}, {1});
}
static void from_memory_order(const Tensor& row, const Tensor& weight, const Tensor& v) {
  v.view(weight.sizes().slice(1)).copy_(row.as_strided(weight.sizes().slice(1), weight.strides().slice(1)));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> spectral_norm_forward(const Tensor& weight_, const Tensor& u,
                                                                 const Tensor& v, int64_t iterations, int64_t dim,
                                                                 double eps) {
  check_supported(kOp, weight_, "weight");
  dim = checked_dim(weight_, dim);
  const int64_t h = weight_.size(dim), w = h ? weight_.numel() / h : v.numel();
  check_vector("u", u, h, weight_.scalar_type(), weight_);
  check_vector("v", v, w, weight_.scalar_type(), weight_);
  TORCH_CHECK_VALUE(iterations >= 0, kOp, ": n_power_iterations must not be negative, got ", iterations);

  const auto arithmetic = arithmetic_type(weight_);
  const Tensor kept_u = new_empty({h}, arithmetic, weight_.device()),
               kept_v = new_empty({w}, arithmetic, weight_.device());
  const Tensor sigma = new_empty({1}, at::kDouble, weight_.device());
  const Tensor weight = dense(weight_);
  const bool permuted = has_permuted_rows(weight, dim);
  const Tensor y = new_empty_like(weight);
  if (weight.numel() == 0) return {y, kept_u.copy_(u), kept_v.copy_(v), sigma.fill_(1)};
  const Tensor matrix = dim == 0 ? weight : weight.movedim(dim, 0).contiguous();
  const Tensor v_row = permuted ? to_memory_order(v, weight) : v;

  SpectralNormForward args{};
  args.h = h;
  args.w = w;
  args.dtype = dtype_of(weight);
  args.iterations = iterations;
  args.eps = eps;
  args.matrix = matrix.const_data_ptr();
  args.weight = weight.const_data_ptr();
  args.y = y.mutable_data_ptr();
  args.u = u.mutable_data_ptr();
  args.v = v_row.mutable_data_ptr();
  args.kept_u = kept_u.mutable_data_ptr();
  args.kept_v = kept_v.mutable_data_ptr();
  args.sigma = sigma.mutable_data_ptr<double>();
  FASTNORM_RUN(spectral_norm_forward, args, weight);

  if (permuted) {
    if (iterations > 0) from_memory_order(v_row, weight, v);
    from_memory_order(kept_v.clone(), weight, kept_v);
  }
  if (iterations > 0) {
    for (const Tensor* t : {&u, &v})
      if (!t->is_inference()) t->unsafeGetTensorImpl()->bump_version();
  }
  return {y, kept_u, kept_v, sigma};
}

Tensor spectral_norm_backward(const Tensor& grad_output, const Tensor& weight_, const Tensor& u, const Tensor& v,
                              const Tensor& sigma, int64_t dim) {
  check_supported(kOp, weight_, "weight");
  dim = checked_dim(weight_, dim);
  check_like_input(kOp, "grad_output", grad_output, weight_);
  const int64_t h = weight_.size(dim), w = h ? weight_.numel() / h : v.numel();
  check_vector("u", u, h, arithmetic_type(weight_), weight_);
  check_vector("v", v, w, arithmetic_type(weight_), weight_);
  TORCH_CHECK(sigma.scalar_type() == at::kDouble && sigma.numel() == 1, kOp,
              ": sigma must be what spectral_norm_forward returned");
  const Tensor as_given = dense(weight_);
  const bool permuted = has_permuted_rows(as_given, dim);
  const Tensor weight = permuted ? as_given : as_given.contiguous();
  const Tensor dweight = new_empty_like(weight);
  if (weight.numel() == 0) return dweight;
  const Tensor dy = lying_as(weight, grad_output);
  const Tensor v_row = permuted ? to_memory_order(v, weight) : v;

  SpectralNormBackward args{};
  int64_t S = 1;  // not weight.stride(dim), which may be any number where dim has one element
  for (int64_t d = dim + 1; d < weight.dim(); ++d) S *= weight.size(d);
  args.shape = {weight.numel() / (h * S), h, S, Layout::kContiguous};
  args.dtype = dtype_of(weight);
  args.weight = weight.const_data_ptr();
  args.dy = dy.const_data_ptr();
  args.u = u.const_data_ptr();
  args.v = v_row.const_data_ptr();
  args.sigma = sigma.const_data_ptr<double>();
  args.dweight = dweight.mutable_data_ptr();
  FASTNORM_RUN(spectral_norm_backward, args, weight);
  return dweight;
}

}  // namespace fastnorm
