// Reductions over a warp, a block and a cluster, in an order that the number of threads alone fixes: the same input
// gives the same bits, run after run.
#pragma once

#include "../moments.h"
#include "launch.cuh"
#include "sizes.h"

namespace fastnorm::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kMaxWarps = 32;

// Several sums at once. v[k] of all lanes whose numbers differ only in multiples of `first` (a power of two) below
// `lanes`: 1 and 32 for the whole warp. Every one of those lanes gets the result.
template <int n, typename acc_t>
__device__ inline void warp_sum(acc_t (&v)[n], int first = 1, int lanes = kWarp) {
  for (int distance = first; distance < lanes; distance *= 2) {
#pragma unroll
    for (int k = 0; k < n; ++k) v[k] += __shfl_xor_sync(kAllLanes, v[k], distance);
  }
}

template <typename acc_t>
__device__ inline acc_t warp_sum(acc_t v) {
  acc_t one[1] = {v};
  warp_sum(one);
  return one[0];
}

// The sums over each `warps` neighbouring warps of the block, in their order, of what all lanes of a warp have alike;
// every thread gets that of its own neighbours. `scratch`: n * kMaxWarps doubles of shared memory. By all threads; they
// may call again with the same scratch at once.
template <int n>
__device__ inline void sum_of_warps(double (&v)[n], int warps, double* scratch) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, first = warp / warps * warps;
  __syncthreads();  // the last call's readers are done
  if (lane == 0) {
#pragma unroll
    for (int k = 0; k < n; ++k) scratch[k * kMaxWarps + warp] = v[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < n; ++k) {
    v[k] = 0;
    for (int w = first; w < first + warps; ++w) v[k] += scratch[k * kMaxWarps + w];
  }
}

// The sums over the block's threads, in double from the warps' on; every thread gets them. `scratch` as above.
template <int n, typename acc_t>
__device__ inline void block_sum(const acc_t (&v)[n], double (&total)[n], double* scratch) {
  acc_t sum[n];
#pragma unroll
  for (int k = 0; k < n; ++k) sum[k] = v[k];
  warp_sum(sum);
#pragma unroll
  for (int k = 0; k < n; ++k) total[k] = static_cast<double>(sum[k]);
  sum_of_warps(total, static_cast<int>(blockDim.x) / kWarp, scratch);
}

// Moments of a set from those of its parts, part(k), k < parts, by `threads` threads together, of which this is number
// `thread` and whose sums of n doubles sum(v) leaves in each. Mean first, then the deviations of the parts' means from
// it: as exact as merging them one by one and without a division each.
template <typename Part, typename Sum>
__device__ inline Moments merge_moments(int thread, int threads, int64_t parts, const Part& part, const Sum& sum) {
  double sums[2] = {0, 0};
#pragma unroll 4
  for (int64_t k = thread; k < parts; k += threads) {
    const Moments m = part(k);
    sums[0] += m.count;
    if (m.count > 0) sums[1] += m.count * m.mean;
  }
  sum(sums);
  const double mean = sums[1] / sums[0];
  double m2[1] = {0};
#pragma unroll 4
  for (int64_t k = thread; k < parts; k += threads) {
    const Moments m = part(k);
    const double delta = m.mean - mean;
    if (m.count > 0) m2[0] += m.m2 + m.count * delta * delta;
  }
  sum(m2);
  return {sums[0], mean, m2[0]};
}

// Of n > 0 numbers, from the sums of (x - shift) and (x - shift)^2, shift being any number near their mean.
__device__ inline Moments shifted_moments(double n, double shift, double sum, double sum_of_squares) {
  const double d = sum / n, m2 = sum_of_squares - sum * d;
  return {n, shift + d, m2 < 0 ? 0 : m2};  // a NaN stays one
}

}  // namespace fastnorm::cuda
