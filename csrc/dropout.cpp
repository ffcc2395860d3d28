// dropout: checks, the generator, and choice of the kernel. The maths is in dropout.h and philox.h.
#include "dropout.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/empty.h>

#include "checks.h"
#include "ops.h"

namespace fastnorm {

static constexpr const char* kOp = "dropout";

Tensor dropout_state(const std::optional<at::Generator>& generator) {
  auto* gen = at::get_generator_or_default<at::CPUGeneratorImpl>(generator, at::detail::getDefaultCPUGenerator());
  const Tensor state = at::empty({2}, at::TensorOptions().dtype(at::kLong));
  int64_t* p = state.mutable_data_ptr<int64_t>();
  const std::lock_guard<std::mutex> lock(gen->mutex_);
  p[0] = static_cast<int64_t>(gen->random64());
  p[1] = 0;
  return state;
}

Tensor dropout(const Tensor& input, double p, const Tensor& state, int64_t channel_dims, bool inplace) {
  check_supported(kOp, input);
  TORCH_CHECK_VALUE(p >= 0 && p <= 1, kOp, ": p must be in [0, 1], got ", p);
  TORCH_CHECK(state.scalar_type() == at::kLong && state.numel() == 2 && state.is_contiguous() && state.is_cpu(), kOp,
              ": state must be two contiguous numbers of type Long on the CPU, got shape ", state.sizes(), " of type ",
              state.scalar_type());
  TORCH_CHECK(channel_dims >= 0 && channel_dims <= input.dim(), kOp, ": channel_dims must be in [0, ", input.dim(),
              "], got ", channel_dims);

  Dropout args{};
  args.by_channel = channel_dims > 0;
  args.shape = {1, 1, input.numel(), Layout::kContiguous};
  if (channel_dims == 2 || (channel_dims == 0 && input.dim() > 2)) args.shape = shape_of(input);
  if (channel_dims == 1)
    args.shape = {1, input.size(0), input.size(0) ? input.numel() / input.size(0) : 0, Layout::kContiguous};

  const bool dense = is_dense(input, args.shape.layout);
  const Tensor x = dense ? input : in_layout(input, args.shape.layout);
  const Tensor y = inplace && dense ? input : inplace ? x : empty_in_layout(x, args.shape.layout);
  if (input.numel() > 0) {
    args.dtype = dtype_of(x);
    args.seed = static_cast<uint64_t>(state.const_data_ptr<int64_t>()[0]);
    args.offset = static_cast<uint64_t>(state.const_data_ptr<int64_t>()[1]);
    args.level = dropout_level(p);
    args.x = x.const_data_ptr();
    args.y = y.mutable_data_ptr();
    cpu::dropout(args);
  }
  if (inplace && !dense) input.copy_(y);
  return inplace ? input : y;
}

}  // namespace fastnorm
