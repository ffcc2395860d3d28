// Small kernels for test_emulator.py: one that uses all of what the emulator has and is right, and ones with one fault
// each, which the emulator must report. Every kernel takes n floats at x and y and a zeroed ticket.
#include <cstring>
#include <exception>
#include <map>
#include <string>

#include "launch.cuh"

namespace fastnorm::cuda {
namespace {

constexpr int kThreads = 64;

__device__ float sum_of_warp(float v) {
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(~0u, v, offset);
  return v;
}

// Whether this block is the last of `blocks` to come here; what the others wrote to global memory before is then seen
// by all of its threads. By all threads of the block; `ticket` is a zeroed number in global memory, zero again
// afterwards. `shared`: one int of shared memory.
__device__ inline bool is_last_block(unsigned* ticket, unsigned blocks, int* shared) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    const unsigned before = atomicAdd(ticket, 1u);
    *shared = before == blocks - 1;
    if (*shared) *ticket = 0;
    __threadfence();
  }
  __syncthreads();
  return *shared != 0;
}

// y[i] = the sum of x over the cluster's part of it; the last block writes the sum of y to y[n].
__global__ void correct(const float* x, float* y, int n, unsigned* ticket) {
  float* const part = dynamic_shared<float>();
  SMEM_ARRAY(float, sums, kThreads / 32);
  SMEM_ARRAY(float, block_sum, 1);
  SMEM_ARRAY(int, is_last, 1);
  const int per_block = n / static_cast<int>(gridDim.x), first = static_cast<int>(blockIdx.x) * per_block;
  const int t = static_cast<int>(threadIdx.x);
  for (int i = t; i < per_block; i += kThreads) part[i] = x[first + i];
  __syncthreads();
  float sum = 0;
  for (int i = t; i < per_block; i += kThreads) sum += part[per_block - 1 - i];  // another thread's
  sum = sum_of_warp(sum);
  if (t % 32 == 0) sums[t / 32] = sum;
  __syncthreads();
  if (t == 0) {
    block_sum[0] = 0;
    for (int w = 0; w < kThreads / 32; ++w) block_sum[0] += sums[w];
  }
  cluster_sync();
  float total = 0;
  for (unsigned rank = 0; rank < cluster_size(); ++rank) total += *map_shared_rank(block_sum, rank);
  for (int i = t; i < per_block; i += kThreads) y[first + i] = total;
  cluster_sync();
  if (is_last_block(ticket, gridDim.x, is_last)) {
    float all = 0;
    for (int i = t; i < n; i += kThreads) all += y[i];  // of all blocks
    all = sum_of_warp(all);
    if (t % 32 == 0) sums[t / 32] = all;
    __syncthreads();
    if (t == 0) y[n] = sums[0] + sums[1];
  }
}

__global__ void copies(const float* x, float* y, int n, unsigned*) {  // y = x, 16 bytes a thread
  for (int i = static_cast<int>(threadIdx.x) * 4; i < n; i += kThreads * 4)
    *reinterpret_cast<float4*>(y + i) = *reinterpret_cast<const float4*>(x + i);
}

__global__ void scalar_copies(const float* x, float* y, int n, unsigned*) {  // the same, badly: strided by 16 bytes
  for (int i = static_cast<int>(threadIdx.x) * 4; i < n; i += kThreads * 4)
    for (int j = 0; j < 4; ++j) y[i + j] = x[i + j];
}

__global__ void race(const float* x, float* y, int, unsigned*) {
  SMEM_ARRAY(float, s, kThreads);
  s[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = s[kThreads - 1 - threadIdx.x];  // no __syncthreads() between
}

__global__ void same_value_race(const float* x, float* y, int, unsigned*) {
  SMEM_ARRAY(float, s, 1);
  s[0] = x[0];  // by all threads
  __syncthreads();
  y[threadIdx.x] = s[0];
}

__global__ void race_of_warps_without_syncwarp(const float* x, float* y, int, unsigned*) {
  SMEM_ARRAY(float, s, kThreads);
  s[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = s[threadIdx.x ^ 1];
}

__global__ void race_between_blocks(const float* x, float* y, int, unsigned*) {
  y[threadIdx.x] = x[threadIdx.x] + static_cast<float>(blockIdx.x);
}

__global__ void ticket_without_fence(const float* x, float* y, int, unsigned* ticket) {
  SMEM_ARRAY(unsigned, before, 1);
  y[blockIdx.x * kThreads + threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  if (threadIdx.x == 0) before[0] = atomicAdd(ticket, 1u);
  __syncthreads();
  if (before[0] == gridDim.x - 1 && threadIdx.x == 0)
    for (unsigned i = 0; i < gridDim.x; ++i) y[gridDim.x * kThreads + i] = y[i * kThreads];
}

__global__ void unwritten_shared(const float*, float* y, int, unsigned*) {
  SMEM_ARRAY(float, s, kThreads);
  if (threadIdx.x > 0) s[threadIdx.x] = 1;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
}

__global__ void divergent_barrier(const float*, float* y, int, unsigned*) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
  y[threadIdx.x] = 1;
}

__global__ void return_before_barrier(const float*, float* y, int, unsigned*) {
  if (threadIdx.x == 5) return;
  __syncthreads();
  y[threadIdx.x] = 1;
}

__global__ void barrier_in_a_warp(const float*, float* y, int, unsigned*) {
  if (threadIdx.x < 32) __syncthreads();
  if (threadIdx.x >= 32) __syncwarp();
  y[threadIdx.x] = 1;
}

__global__ void deadlock(const float*, float* y, int, unsigned*) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    cluster_sync();
  y[threadIdx.x] = 1;
}

__global__ void out_of_bounds(const float* x, float* y, int n, unsigned*) {
  for (int i = static_cast<int>(threadIdx.x); i <= n; i += kThreads) y[i] = x[i];
}

__global__ void shared_out_of_bounds(const float* x, float* y, int, unsigned*) {
  SMEM_ARRAY(float, s, kThreads);
  s[threadIdx.x + 1] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = threadIdx.x ? s[threadIdx.x] : 0;
}

__global__ void mask_without_the_lane(const float* x, float* y, int, unsigned*) {
  y[threadIdx.x] = __shfl_xor_sync(0xffffu, x[threadIdx.x], 1);
}

__global__ void mask_with_an_ended_lane(const float* x, float* y, int, unsigned*) {
  if (threadIdx.x % 32 >= 16) return;
  y[threadIdx.x] = __shfl_xor_sync(~0u, x[threadIdx.x], 1);
}

__global__ void source_outside_of_the_mask(const float* x, float* y, int, unsigned*) {
  if (threadIdx.x % 32 >= 16) return;
  y[threadIdx.x] = __shfl_xor_sync(0xffffu, x[threadIdx.x], 16);
}

__global__ void misaligned_vector(const float* x, float* y, int, unsigned*) {
  const float4 v = *reinterpret_cast<const float4*>(x + 1);
  y[threadIdx.x] = v.x;
}

__global__ void reaches_too_early(const float*, float* y, int, unsigned*) {
  SMEM_ARRAY(float, s, 1);
  s[0] = 1;
  if (threadIdx.x == 0 && cluster_rank() == 0) y[0] = *map_shared_rank(s, 1);
  cluster_sync();
}

__global__ void reaches_too_late(const float*, float* y, int, unsigned*) {
  SMEM_ARRAY(float, s, 1);
  if (threadIdx.x == 0) s[0] = 1;
  cluster_sync();
  const float* const other = map_shared_rank(s, cluster_rank() ^ 1);
  if (cluster_rank() == 0) __syncwarp();  // the other block may end before this one reads
  if (threadIdx.x == 0 && cluster_rank() == 0) y[0] = *other;
}

__global__ void bank_conflicts(const float* x, float* y, int, unsigned*) {  // a stride of 32 words: one bank
  SMEM_ARRAY(float, s, kThreads * 32);
  s[threadIdx.x * 32] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x * 32];
}

__global__ void nothing(const float*, float*, int, unsigned*) {}

__global__ void too_much_static_shared_memory(const float*, float* y, int, unsigned*) {
  SMEM_ARRAY(float, s, 520);
  s[threadIdx.x] = 0;
  y[threadIdx.x] = s[threadIdx.x];
}

using Kernel = void (*)(const float*, float*, int, unsigned*);

struct Toy {
  Kernel kernel;
  Grid grid;
};

const std::map<std::string, Toy> kToys = {
#define TOY(name, blocks, cluster, shared)              \
  {                                                     \
    #name, {                                            \
      name, { dim3(blocks), kThreads, cluster, shared } \
    }                                                   \
  }
    TOY(correct, 8, 4, 4096),
    TOY(copies, 1, 1, 0),
    TOY(scalar_copies, 1, 1, 0),
    TOY(race, 1, 1, 0),
    TOY(same_value_race, 1, 1, 0),
    TOY(race_of_warps_without_syncwarp, 1, 1, 0),
    TOY(race_between_blocks, 2, 1, 0),
    TOY(ticket_without_fence, 2, 1, 0),
    TOY(unwritten_shared, 1, 1, 0),
    TOY(divergent_barrier, 1, 1, 0),
    TOY(return_before_barrier, 1, 1, 0),
    TOY(barrier_in_a_warp, 1, 1, 0),
    TOY(deadlock, 1, 1, 0),
    TOY(out_of_bounds, 1, 1, 0),
    TOY(shared_out_of_bounds, 1, 1, 0),
    TOY(mask_without_the_lane, 1, 1, 0),
    TOY(mask_with_an_ended_lane, 1, 1, 0),
    TOY(source_outside_of_the_mask, 1, 1, 0),
    TOY(misaligned_vector, 1, 1, 0),
    TOY(reaches_too_early, 2, 2, 0),
    TOY(reaches_too_late, 2, 2, 0),
    TOY(bank_conflicts, 1, 1, 0),
    {"too_much_shared_memory", {nothing, {dim3(1), kThreads, 1, 228 << 10}}},
    {"no_room_for_static_shared_memory", {nothing, {dim3(1), kThreads, 1, 226 << 10}}},
    TOY(too_much_static_shared_memory, 1, 1, 4096),
    {"cluster_does_not_divide", {nothing, {dim3(6), kThreads, 4, 0}}},
    {"cluster_too_large", {nothing, {dim3(32), kThreads, 32, 0}}},
    {"too_many_threads", {nothing, {dim3(1), 2048, 1, 0}}},
    {"not_whole_warps", {nothing, {dim3(1), 48, 1, 0}}},
#undef TOY
};

std::string message;

}  // namespace
}  // namespace fastnorm::cuda

extern "C" __attribute__((visibility("default"))) const char* entry_error() { return fastnorm::cuda::message.c_str(); }

extern "C" __attribute__((visibility("default"))) int run_toy(const char* name, const float* x, float* y, int n,
                                                              unsigned* ticket) {
  using namespace fastnorm::cuda;
  try {
    const Toy& toy = kToys.at(name);
    launch(name, toy.kernel, toy.grid, nullptr, x, y, n, ticket);
    return 0;
  } catch (const std::exception& e) {
    message = e.what();
    return 1;
  }
}
