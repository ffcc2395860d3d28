// The seed and offset of a mask, drawn anew at each replay of a captured graph. One thread: 24 bytes in, 16 out.
#include "dropout.h"
#include "launch.cuh"

namespace fastnorm::cuda {

static __global__ void dropout_state_kernel(DropoutState args) {
  if (threadIdx.x != 0) return;
  const uint64_t offset = static_cast<uint64_t>(*args.offset) + args.added;
  args.state[0] = static_cast<int64_t>(dropout_seed(static_cast<uint64_t>(*args.seed), offset));
  args.state[1] = 0;
}

void dropout_state(const DropoutState& args, const Queue& queue) {
  launch("dropout", dropout_state_kernel, {dim3(1), 32}, static_cast<cudaStream_t>(queue.stream), args);
}

}  // namespace fastnorm::cuda
