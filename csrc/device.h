// Which device an op's kernel runs on, and how it is started there. Only device.cpp includes CUDA's headers and torch's
// headers for CUDA; a build for the CPU alone needs neither.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>

#include <string>
#include <vector>

#include "backend.h"

namespace fastnorm {

// NotImplementedError unless this build has kernels for the device that `t` is on, the op's argument of that name.
void check_device(const char* op, const at::Tensor& t, const char* name);

// What this build has for CUDA; nothing in a build for the CPU alone.
struct CudaBuild {
  std::string version;  // of the toolkit it was compiled with, as "13.0"
  std::vector<int> binaries,
      ptx;          // compute capabilities, as 90 for 9.0: machine code, and code that the driver compiles
  std::string ops;  // that have CUDA kernels, with commas between
};
const CudaBuild& cuda_build();

// Whether a device of this compute capability can run the build's kernels: machine code runs on its own major version
// from its minor version on, PTX on everything from its version on.
bool cuda_build_runs_on(int capability);

#ifdef FASTNORM_WITH_CUDA

// While it lives, the device of `t` is the current one, and what queue() gave is there to be used in stream order.
class OnCuda {
 public:
  explicit OnCuda(const at::Tensor& t) : guard_(t.device()) {}
  cuda::Queue queue(int64_t workspace_bytes);

 private:
  c10::DeviceGuard guard_;
  at::DataPtr workspace_;
};

// Whether a CUDA graph is being captured from the current stream of the device of `t`.
bool is_captured(const at::Tensor& t);

// The state of one mask (dropout.h) from a CUDA generator, the default one of the input's device if none is given. Its
// two numbers are on the CPU; while a graph is captured on the device, for the generator to count on at each replay.
at::Tensor cuda_dropout_state(const std::optional<at::Generator>& generator, const at::Tensor& input);

// The op's kernel on the device of the tensor `t`.
#define FASTNORM_RUN(op, args, t)                              \
  do {                                                         \
    if ((t).is_cuda()) {                                       \
      OnCuda there(t);                                         \
      cuda::op(args, there.queue(cuda::op##_workspace(args))); \
    } else {                                                   \
      cpu::op(args);                                           \
    }                                                          \
  } while (false)

#else
#define FASTNORM_RUN(op, args, t) cpu::op(args)
#endif

}  // namespace fastnorm
