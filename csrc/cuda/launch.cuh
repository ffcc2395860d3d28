// The one place that knows CUDA's compiler, PTX and run time apart from the emulator of tests/cuda_on_cpu: every
// `#ifdef __CUDACC__` and all assembly is here. Kernels are plain CUDA C++ beside that, under these rules:
//
//   - shared memory only through SMEM_ARRAY and dynamic_shared(), never a bare __shared__
//   - global and shared vector accesses through pack.cuh, reductions through reduce.cuh
//   - launches through launch(), never <<<>>>; blocks of a multiple of 32 threads
//   - no return before a barrier; shuffle masks name live lanes only
//   - kStaticShared (sizes.h) bytes of shared memory at most beside the dynamic
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

#include "sizes.h"

// Whether what is being compiled has clusters: code for sm_90 and later, and the host's.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define FASTNORM_HAS_CLUSTERS 1
#else
#define FASTNORM_HAS_CLUSTERS 0
#endif

#ifdef __CUDACC__
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// T name[n] in shared memory; `name` is a pointer to its first element.
#define SMEM_ARRAY(T, name, n)                                          \
  __shared__ __align__(16) unsigned char name##_bytes[sizeof(T) * (n)]; \
  T* const name = reinterpret_cast<T*>(name##_bytes)
#else
#include "cuda_on_cpu.h"
#endif

namespace fastnorm::cuda {

inline void check(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // so that the next op does not report it again
  throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(error));
}

// ---- the device that is current

struct Device {
  int multiprocessors;
  size_t shared_per_block;  // the most shared memory that a block may ask for
  size_t l2;                // bytes
  int major, minor;         // compute capability
  int compiled_for;  // that of the code which runs there, as 90: the driver may have compiled PTX of an older one

  // Of shared_per_block, which counts both.
  int64_t dynamic_shared() const { return most_dynamic_shared(static_cast<int64_t>(shared_per_block)); }
  bool has_clusters() const { return std::min(major, compiled_for / 10) >= 9; }
};

#ifdef __CUDACC__
// Stands for all kernels: they are compiled for the same architectures.
template <typename = void>
__global__ void any_kernel() {}
#endif

// Read once a device; the emulator has the one that a test set.
inline const Device& device() {
#ifdef __CUDACC__
  constexpr int kDevices = 64;
  static Device known[kDevices];
  static std::once_flag once[kDevices];
  int index = 0;
  check("fastnorm", cudaGetDevice(&index));
  if (index >= kDevices) throw std::runtime_error("fastnorm: more than 64 CUDA devices");
  std::call_once(once[index], [index] {
    const auto read = [index](cudaDeviceAttr what) {
      int value = 0;
      check("fastnorm", cudaDeviceGetAttribute(&value, what, index));
      return value;
    };
    cudaFuncAttributes code{};
    check("fastnorm", cudaFuncGetAttributes(&code, reinterpret_cast<const void*>(any_kernel<>)));
    Device& d = known[index];
    d.multiprocessors = read(cudaDevAttrMultiProcessorCount);
    d.shared_per_block = static_cast<size_t>(read(cudaDevAttrMaxSharedMemoryPerBlockOptin));
    d.l2 = static_cast<size_t>(read(cudaDevAttrL2CacheSize));
    d.major = read(cudaDevAttrComputeCapabilityMajor);
    d.minor = read(cudaDevAttrComputeCapabilityMinor);
    d.compiled_for = code.ptxVersion;
  });
  return known[index];
#else
  return emulator::device<Device>();
#endif
}

// ---- launches

// A block of `threads` threads, `cluster` blocks a cluster along x, `shared` bytes of dynamic shared memory.
struct Grid {
  dim3 blocks;
  int threads;
  int cluster = 1;
  size_t shared = 0;
};

// Lets a kernel have all the dynamic shared memory of the device: the limit belongs to the kernel and not to a launch,
// so that a lower one would be in the way of another thread's.
inline cudaError_t allow_dynamic_shared(const void* function) {
  return cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(device().dynamic_shared()));
}

// Starts kernel(args...) on `stream`. Throws std::runtime_error with the op's name where CUDA refuses.
template <typename... Parameters, typename... Args>
void launch(const char* op, void (*kernel)(Parameters...), const Grid& grid, cudaStream_t stream, const Args&... args) {
  constexpr int64_t kSharedWithoutAsking = 48 << 10;  // static and dynamic
  if (grid.blocks.x == 0 || grid.blocks.y == 0 || grid.blocks.z == 0) return;
  const auto function = reinterpret_cast<const void*>(kernel);
  if (static_cast<int64_t>(grid.shared) > most_dynamic_shared(kSharedWithoutAsking))
    check(op, allow_dynamic_shared(function));
  constexpr int kPortableCluster = 8;
  if (grid.cluster > kPortableCluster)
    check(op, cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  cudaLaunchConfig_t config{};
  config.gridDim = grid.blocks;
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = grid.shared;
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(grid.cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = grid.cluster > 1 ? 1 : 0;
  check(op, cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(args)...));
}

// Sets bytes to zero in the order of the stream.
inline void zero(const char* op, void* p, size_t bytes, cudaStream_t stream) {
  if (bytes > 0) check(op, cudaMemsetAsync(p, 0, bytes, stream));
}

#ifdef __CUDACC__
inline int64_t clusters_at_once(const void* function, int blocks, int threads, size_t shared) {
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, int, int, size_t>, int> known;
  int index = 0;
  check("fastnorm", cudaGetDevice(&index));
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [found, is_new] = known.try_emplace({index, function, blocks, threads, shared}, 0);
  if (!is_new) return found->second;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(blocks);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  config.attrs = &attribute;
  config.numAttrs = 1;
  if (allow_dynamic_shared(function) ||
      cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) ||
      cudaOccupancyMaxActiveClusters(&found->second, function, &config)) {
    (void)cudaGetLastError();
    found->second = 0;
  }
  return found->second;
}
#endif

// How many clusters of `blocks` blocks the device runs at once, 0 if it cannot hold one: a cluster finds place only among
// multiprocessors that are wired together. CUDA is asked once for each device, kernel and size.
template <typename... Parameters>
int64_t clusters_at_once(void (*kernel)(Parameters...), int blocks, int threads, size_t shared) {
#ifdef __CUDACC__
  return clusters_at_once(reinterpret_cast<const void*>(kernel), blocks, threads, shared);
#else
  return emulator::clusters_at_once(blocks, threads, shared);
#endif
}

#ifdef __CUDACC__

// ---- arithmetic

// The square root and its reciprocal within 2^-22 of them, relative, in one instruction each; denormals count as zero.
__device__ inline float rough_root(float s) {
  float root;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(s));
  return root;
}
__device__ inline float rough_reciprocal_root(float s) {
  float root;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(s));
  return root;
}

// ---- shared memory

// The block's dynamic shared memory, aligned to 128 bytes.
template <typename T>
__device__ inline T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char fastnorm_dynamic_shared[];
  return reinterpret_cast<T*>(fastnorm_dynamic_shared);
}

#endif  // __CUDACC__

// ---- clusters: blocks that run at the same time and reach each other's shared memory. A block launched without one
// is a cluster of its own, also below sm_90.

#if !FASTNORM_HAS_CLUSTERS  // for the emulator as for nvcc

__device__ inline unsigned cluster_size() { return 1; }
__device__ inline unsigned cluster_rank() { return 0; }
__device__ inline void cluster_sync() { __syncthreads(); }
template <typename T>
__device__ inline T* map_shared_rank(T* p, unsigned) {
  return p;
}

#elif defined(__CUDACC__)

__device__ inline unsigned cluster_size() { return cooperative_groups::this_cluster().num_blocks(); }
__device__ inline unsigned cluster_rank() { return cooperative_groups::this_cluster().block_rank(); }
// All threads of all blocks of the cluster: what each wrote to shared memory is seen by all after it.
__device__ inline void cluster_sync() { cooperative_groups::this_cluster().sync(); }
// Where `p`, a place in this block's shared memory, lies in the block of that rank.
template <typename T>
__device__ inline T* map_shared_rank(T* p, unsigned rank) {
  return cooperative_groups::this_cluster().map_shared_rank(p, rank);
}

#endif

}  // namespace fastnorm::cuda
