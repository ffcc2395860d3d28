#include "device.h"

#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

#ifdef FASTNORM_WITH_CUDA
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>

#include <array>
#include <atomic>

#include "dropout.h"
#include "tensors.h"
#endif

namespace fastnorm {

#ifndef FASTNORM_WITH_CUDA

void check_device(const char* op, const at::Tensor& t, const char* name) {
  TORCH_CHECK_NOT_IMPLEMENTED(!t.is_cuda(), op, ": no kernel for ", name, " on ", t.device(),
                              ": this build of fastnorm is for the CPU alone");
  TORCH_CHECK_NOT_IMPLEMENTED(t.is_cpu(), op, ": no kernel for ", name, " on ", t.device(), ", wanted cpu");
}

const CudaBuild& cuda_build() {
  static const CudaBuild none;
  return none;
}

#else

#define FASTNORM_QUOTE(...) #__VA_ARGS__
#define FASTNORM_QUOTE_VALUE(...) FASTNORM_QUOTE(__VA_ARGS__)

// setup.py gives the three lists, which have commas in them.
const CudaBuild& cuda_build() {
  static const CudaBuild build{std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10),
                               {FASTNORM_CUDA_BINARIES},
                               {FASTNORM_CUDA_PTX},
                               FASTNORM_QUOTE_VALUE(FASTNORM_CUDA_OPS)};
  return build;
}

static int capability_of(c10::DeviceIndex index) {
  int major = 0, minor = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index));
  return major * 10 + minor;
}

static bool runs_on(c10::DeviceIndex index) {
  constexpr size_t kDevices = 64;
  enum : int8_t { kUnknown, kYes, kNo };
  static std::array<std::atomic<int8_t>, kDevices> known{};
  auto& answer = known.at(static_cast<size_t>(index));
  if (answer == kUnknown) {
    answer = cuda_build_runs_on(capability_of(index)) ? kYes : kNo;
  }
  return answer == kYes;
}

void check_device(const char* op, const at::Tensor& t, const char* name) {
  TORCH_CHECK_NOT_IMPLEMENTED(t.is_cpu() || t.is_cuda(), op, ": no kernel for ", name, " on ", t.device(),
                              ", wanted cpu or cuda");
  if (t.is_cpu() || runs_on(t.get_device())) return;
  const int capability = capability_of(t.get_device());
  const CudaBuild& build = cuda_build();
  TORCH_CHECK_NOT_IMPLEMENTED(false, op, ": no kernel for ", name, " on ", t.device(), " of compute capability ",
                              capability / 10, ".", capability % 10, ": this build has machine code for [",
                              c10::Join(", ", build.binaries), "] and PTX for [", c10::Join(", ", build.ptx), "]");
}

cuda::Queue OnCuda::queue(int64_t workspace_bytes) {
  if (workspace_bytes > 0)
    workspace_ = c10::cuda::CUDACachingAllocator::get()->allocate(static_cast<size_t>(workspace_bytes));
  return {at::cuda::getCurrentCUDAStream().stream(), workspace_.get()};
}

bool is_captured(const at::Tensor& t) {
  const c10::DeviceGuard guard(t.device());
  return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
}

at::Tensor cuda_dropout_state(const std::optional<at::Generator>& generator, const at::Tensor& input) {
  const bool given = generator && generator->defined();
  // torch.Generator("cuda") says no more than that of its device.
  const at::Device device = given ? generator->device() : input.device();
  TORCH_CHECK(device == input.device() || (device.is_cuda() && !device.has_index()), "dropout: generator must be on ",
              input.device(), " like input, or on cpu, got one on ", device);
  OnCuda there(input);
  auto* gen = at::get_generator_or_default<at::CUDAGeneratorImpl>(
      generator, at::cuda::detail::getDefaultCUDAGenerator(input.get_device()));
  at::PhiloxCudaState philox;
  {
    const std::lock_guard<std::mutex> lock(gen->mutex_);
    philox = gen->philox_cuda_state(/*increment=*/4);  // the least that torch counts by
  }
  if (philox.captured_) {
    const at::Tensor state = new_empty({2}, at::kLong, input.device());
    cuda::dropout_state(
        {philox.seed_.ptr, philox.offset_.ptr, philox.offset_intragraph_, state.mutable_data_ptr<int64_t>()},
        there.queue(0));
    return state;
  }
  const at::Tensor state = new_empty({2}, at::kLong, at::kCPU);
  int64_t* p = state.mutable_data_ptr<int64_t>();
  p[0] = static_cast<int64_t>(dropout_seed(philox.seed_.val, philox.offset_.val));
  p[1] = 0;
  return state;
}

#endif

bool cuda_build_runs_on(int capability) {
  for (const int binary : cuda_build().binaries)
    if (binary / 10 == capability / 10 && binary <= capability) return true;
  for (const int ptx : cuda_build().ptx)
    if (ptx <= capability) return true;
  return false;
}

}  // namespace fastnorm
