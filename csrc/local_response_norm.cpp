// local_response_norm: checks, allocation and choice of the kernel. The maths is in local_response_norm.h.
#include "local_response_norm.h"

#include <string>

#include "checks.h"
#include "device.h"
#include "ops.h"

namespace fastnorm {

static constexpr const char* kOp = "local_response_norm";

static Region region_of(std::string_view name) {
  TORCH_CHECK_VALUE(name == "inter" || name == "intra", kOp, ": region must be 'inter' or 'intra', got '",
                    std::string(name), "'");
  return name == "inter" ? Region::kInter : Region::kIntra;
}

// torch: alpha over the number of elements in the window; an even window reaches further back. paper: alpha as it is,
// and an even size n has n + 1 elements.
static LocalResponseNormSetting setting_of(const Tensor& input, int64_t size, double alpha, double beta, double k,
                                           std::string_view region_name, std::string_view convention) {
  const Region region = region_of(region_name);
  TORCH_CHECK_VALUE(convention == "torch" || convention == "paper", kOp,
                    ": convention must be 'torch' or 'paper', got '", std::string(convention), "'");
  TORCH_CHECK_VALUE(region != Region::kInter || input.dim() >= 3, kOp,
                    ": input must have at least 3 dimensions (N, C, *), got ", input.dim(), " with shape ",
                    input.sizes());
  TORCH_CHECK_VALUE(region != Region::kIntra || input.dim() == 4, kOp,
                    ": input must have shape (N, C, H, W) for region='intra', got ", input.dim(),
                    " dimensions with shape ", input.sizes());
  TORCH_CHECK(size > 0, kOp, ": size must be at least 1, got ", size);
  if (convention == "paper") return {region, size / 2, size / 2, alpha, beta, k};
  const double elements = static_cast<double>(size) * (region == Region::kIntra ? static_cast<double>(size) : 1.0);
  return {region, size / 2, (size - 1) / 2, alpha / elements, beta, k};
}

Tensor local_response_norm_forward(const Tensor& input, int64_t size, double alpha, double beta, double k,
                                   std::string_view region, std::string_view convention) {
  check_supported(kOp, input);
  const LocalResponseNormSetting setting = setting_of(input, size, alpha, beta, k, region, convention);
  const Shape shape = shape_of(input);
  const Tensor x = in_layout(input, shape.layout);
  const Tensor y = empty_in_layout(x, shape.layout);
  if (input.numel() == 0) return y;
  if (beta == 0) return y.copy_(x);  // s^0 = 1, even of 0 and NaN

  LocalResponseNormForward args{};
  args.shape = shape;
  args.H = input.size(-2);
  args.W = input.size(-1);
  args.dtype = dtype_of(x);
  args.setting = setting;
  args.x = x.const_data_ptr();
  args.y = y.mutable_data_ptr();
  FASTNORM_RUN(local_response_norm_forward, args, input);
  return y;
}

Tensor local_response_norm_backward(const Tensor& grad_output, const Tensor& input, int64_t size, double alpha,
                                    double beta, double k, std::string_view region, std::string_view convention) {
  check_supported(kOp, input);
  const LocalResponseNormSetting setting = setting_of(input, size, alpha, beta, k, region, convention);
  check_like_input(kOp, "grad_output", grad_output, input);
  const Shape shape = shape_of(input);
  const Tensor x = in_layout(input, shape.layout), dy = in_layout(grad_output, shape.layout);
  const Tensor dx = empty_in_layout(x, shape.layout);
  if (input.numel() == 0) return dx;
  if (beta == 0) return dx.copy_(dy);

  LocalResponseNormBackward args{};
  args.shape = shape;
  args.H = input.size(-2);
  args.W = input.size(-1);
  args.dtype = dtype_of(x);
  args.setting = setting;
  args.x = x.const_data_ptr();
  args.dy = dy.const_data_ptr();
  args.dx = dx.mutable_data_ptr();
  FASTNORM_RUN(local_response_norm_backward, args, input);
  return dx;
}

}  // namespace fastnorm
