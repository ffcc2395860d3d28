// Running statistics of instance normalisation on CUDA devices; the normalisation itself is group_norm.cu's, with G =
// C.
#include "../instance_norm.h"

#include "pack.cuh"
#include "reduce.cuh"

namespace fastnorm::cuda {
namespace {

constexpr int kThreads = 256;

// A lane a channel, the warps of a block every so many samples, in double.
__global__ void __launch_bounds__(kThreads) update_running(const __grid_constant__ InstanceNormRunning a) {
  SMEM_ARRAY(double, partial, 2 * kThreads);
  const int64_t N = a.shape.N, C = a.shape.C;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t c = blockIdx.x * static_cast<int64_t>(kWarp) + lane;
  double mean = 0, variance = 0;
  for (int64_t n = warp; n < N && c < C; n += kThreads / kWarp) {
    mean += a.mean[n * C + c];
    variance += a.variance[n * C + c];
  }
  partial[threadIdx.x] = mean;
  partial[kThreads + threadIdx.x] = variance;
  __syncthreads();
  if (warp != 0 || c >= C) return;
  for (int w = 1; w < kThreads / kWarp; ++w) {
    mean += partial[w * kWarp + lane];
    variance += partial[kThreads + w * kWarp + lane];
  }
  const double samples = static_cast<double>(N), count = static_cast<double>(a.shape.S);
  const auto average = [&](void* running, double value) {
    write(running, a.stats_dtype, c, (1 - a.momentum) * read(running, a.stats_dtype, c, 0.0) + a.momentum * value);
  };
  average(a.running_mean, mean / samples);
  average(a.running_var, variance / samples * (count / (count - 1)));
}

}  // namespace

int64_t instance_norm_running_workspace(const InstanceNormRunning&) { return 0; }

void instance_norm_running(const InstanceNormRunning& a, const Queue& queue) {
  if (a.shape.numel() == 0) return;
  const Grid grid{dim3(static_cast<unsigned>((a.shape.C + kWarp - 1) / kWarp)), kThreads};
  launch("instance_norm", update_running, grid, static_cast<cudaStream_t>(queue.stream), a);
}

}  // namespace fastnorm::cuda
