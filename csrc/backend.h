// How the kernels of a contract are declared: on the CPU once per instruction set (isa.h), on CUDA devices once.
#pragma once

#include <cstdint>

#include "isa.h"

namespace fastnorm::cuda {

// Where a kernel runs. No CUDA header is needed to name it.
struct Queue {
  void* stream;     // cudaStream_t of the current device
  void* workspace;  // what <op>_workspace() asked for, in device memory, aligned to 256 bytes, of any content
};

}  // namespace fastnorm::cuda

// cpu::name(args); cuda::name(args, queue) and the bytes of device memory that it wants beside its arguments. Only a
// build with CUDA defines the last two (FASTNORM_WITH_CUDA).
#define FASTNORM_DECLARE_KERNEL(name, Args) \
  FASTNORM_DECLARE_CPU_KERNEL(name, Args)   \
  FASTNORM_DECLARE_CUDA_KERNEL(name, Args)

#define FASTNORM_DECLARE_CUDA_KERNEL(name, Args) \
  namespace fastnorm::cuda {                     \
  int64_t name##_workspace(const Args& args);    \
  void name(const Args& args, const Queue&);     \
  }
