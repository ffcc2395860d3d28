// dropout and alpha dropout: checks, the generator, and choice of the kernel. The maths is in dropout.h and philox.h.
#include "dropout.h"

#include <ATen/CPUGeneratorImpl.h>

#include "checks.h"
#include "device.h"
#include "ops.h"

namespace fastnorm {

Tensor dropout_state(const std::optional<at::Generator>& generator, const Tensor& input) {
  check_supported("dropout", input);
#ifdef FASTNORM_WITH_CUDA
  if (input.is_cuda()) {
    const bool of_cpu = generator && generator->defined() && generator->device().is_cpu();
    if (!of_cpu) return cuda_dropout_state(generator, input);
    TORCH_CHECK(
        !is_captured(input),
        "dropout: generator must not be on cpu while a CUDA graph is captured: every replay would have one mask");
  }
#endif
  auto* gen = at::get_generator_or_default<at::CPUGeneratorImpl>(generator, at::detail::getDefaultCPUGenerator());
  const Tensor state = new_empty({2}, at::kLong, at::kCPU);
  int64_t* p = state.mutable_data_ptr<int64_t>();
  const std::lock_guard<std::mutex> lock(gen->mutex_);
  p[0] = static_cast<int64_t>(gen->random64());
  p[1] = 0;
  return state;
}

// The layout that a tensor is read in: channels_last where only that is dense.
static Layout layout_of(const Tensor& t) { return t.dim() < 2 ? Layout::kContiguous : shape_of(t).layout; }

static Tensor apply(const char* op, Tensor input, double p, DropoutLevel (*level)(double), const Tensor& state,
                    int64_t channel_dims, bool inplace) {
  check_supported(op, input);
  TORCH_CHECK_VALUE(p >= 0 && p <= 1, op, ": p must be in [0, 1], got ", p);
  TORCH_CHECK(state.scalar_type() == at::kLong && state.numel() == 2 && state.is_contiguous() &&
                  (state.is_cpu() || state.device() == input.device()),
              op, ": state must be two contiguous numbers of type Long on cpu or ", input.device(), ", got shape ",
              state.sizes(), " of type ", state.scalar_type(), " on ", state.device());
  TORCH_CHECK(channel_dims >= 0 && channel_dims <= std::min<int64_t>(2, input.dim()), op,
              ": channel_dims must be in [0, ", std::min<int64_t>(2, input.dim()), "], got ", channel_dims);

  Dropout args{};
  Layout layout = Layout::kContiguous;  // of x and y
  if (channel_dims == 2 || (channel_dims == 0 && input.dim() > 2)) {
    args.shape = shape_of(input);
    args.by_channel = channel_dims == 2 && args.shape.S != 1;  // one position a channel: an element is a channel
    layout = args.shape.layout;
  } else if (channel_dims == 1) {  // samples lie one after the other in either layout; how each lies does not matter
    const int64_t N = input.size(0);
    args.shape = {1, N, N ? input.numel() / N : 0, Layout::kContiguous};
    args.by_channel = true;
    layout = layout_of(input);
  } else {
    args.shape = {1, 1, input.numel(), Layout::kContiguous};
  }

  const bool dense = is_dense(input, layout);
  const Tensor x = dense ? input : in_layout(input, layout);
  if (!inplace) input.reset();
  const Tensor y = inplace ? x : last_reference_or_empty(x, layout);
  // As torch does where an op writes: refuse an inference tensor outside of inference mode, and let autograd know.
  if (inplace && dense) input.unsafeGetTensorImpl()->bump_version();
  if (x.numel() > 0) {
    args.dtype = dtype_of(x);
    const int64_t* numbers = state.const_data_ptr<int64_t>();
    if (state.is_cpu()) {
      args.seed = static_cast<uint64_t>(numbers[0]);
      args.offset = static_cast<uint64_t>(numbers[1]);
    } else {
      args.state = numbers;
    }
    args.level = level(p);
    args.x = x.const_data_ptr();
    args.y = y.mutable_data_ptr();
    FASTNORM_RUN(dropout, args, x);
  }
  if (inplace && !dense) input.copy_(y);
  return inplace ? input : y;
}

Tensor dropout(Tensor input, double p, const Tensor& state, int64_t channel_dims, bool inplace) {
  return apply("dropout", std::move(input), p, dropout_level, state, channel_dims, inplace);
}

Tensor alpha_dropout(Tensor input, double p, const Tensor& state, int64_t channel_dims, bool inplace) {
  return apply("alpha_dropout", std::move(input), p, alpha_dropout_level, state, channel_dims, inplace);
}

Tensor alpha_dropout_backward(Tensor grad_output, double p, const Tensor& state, int64_t channel_dims) {
  const auto linear_part = [](double p) {
    const DropoutLevel level = alpha_dropout_level(p);
    return DropoutLevel{level.threshold, level.scale};
  };
  return apply("alpha_dropout_backward", std::move(grad_output), p, linear_part, state, channel_dims, false);
}

}  // namespace fastnorm
