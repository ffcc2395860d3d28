// Running statistics of instance normalisation on CUDA devices; the normalisation itself is group_norm.cu's, with G =
// C.
#include "../instance_norm.h"

#include "reduce.cuh"
#include "running.cuh"

namespace fastnorm::cuda {
namespace {

constexpr int kThreads = 256;

// A lane a channel, the warps of a block every so many samples, in double.
__global__ void __launch_bounds__(kThreads)
    update_running(const __grid_constant__ InstanceNormRunning a, RunningUpdate update) {
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
  update.average(c, mean / static_cast<double>(N), variance / static_cast<double>(N));
}

}  // namespace

int64_t instance_norm_running_workspace(const InstanceNormRunning&) { return 0; }

void instance_norm_running(const InstanceNormRunning& a, const Queue& queue) {
  if (a.shape.numel() == 0) return;
  const Grid grid{dim3(static_cast<unsigned>((a.shape.C + kWarp - 1) / kWarp)), kThreads};
  const double count = static_cast<double>(a.shape.S);
  const RunningUpdate update{a.running_mean, a.running_var, a.stats_dtype, nullptr, a.momentum, count / (count - 1)};
  launch("instance_norm", update_running, grid, static_cast<cudaStream_t>(queue.stream), a, update);
}

}  // namespace fastnorm::cuda
