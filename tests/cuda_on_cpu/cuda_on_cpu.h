// What the kernels of csrc/cuda use of CUDA, for g++: launch.cuh includes this where nvcc is not the compiler. The names
// and meanings are CUDA's; what waits or is shared between threads is in emulator.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>

#include "cuda_types.h"
#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__

// Rewritten at each switch of fibers.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// A static of a function names the array; each block has its own memory for it.
#define SMEM_ARRAY(T, name, n) \
  static char name##_key;      \
  T* const name = static_cast<T*>(emulator::shared_array(&name##_key, sizeof(T) * (n)))

// ---- barriers and warps

inline void __syncthreads(emulator::Site site = emulator::Site::here()) { emulator::block_barrier(site); }
inline void __syncwarp(unsigned mask = ~0u, emulator::Site site = emulator::Site::here()) {
  emulator::warp_barrier(mask, site);
}
inline unsigned __activemask() { return emulator::active_mask(); }

namespace emulator {

template <typename T>
T shuffle(unsigned mask, T value, int source, Site site) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = warp(Warp::kShuffle, mask, bits, source, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulator

// A source outside of the lane's segment of `width` lanes is the lane itself.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, emulator::Site site = emulator::Site::here()) {
  const int lane = static_cast<int>(emulator::lane());
  return emulator::shuffle(mask, value, (lane & ~(width - 1)) | (source & (width - 1)), site);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, emulator::Site site = emulator::Site::here()) {
  const int lane = static_cast<int>(emulator::lane()), source = lane ^ bits;
  return emulator::shuffle(mask, value, source < (lane & ~(width - 1)) + width ? source : lane, site);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   emulator::Site site = emulator::Site::here()) {
  const int lane = static_cast<int>(emulator::lane()), source = lane + static_cast<int>(delta);
  return emulator::shuffle(mask, value, source < (lane & ~(width - 1)) + width ? source : lane, site);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, emulator::Site site = emulator::Site::here()) {
  const int lane = static_cast<int>(emulator::lane()), source = lane - static_cast<int>(delta);
  return emulator::shuffle(mask, value, source >= (lane & ~(width - 1)) ? source : lane, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, emulator::Site site = emulator::Site::here()) {
  return static_cast<unsigned>(emulator::warp(emulator::Warp::kBallot, mask, predicate != 0, 0, site));
}
inline int __any_sync(unsigned mask, int predicate, emulator::Site site = emulator::Site::here()) {
  return __ballot_sync(mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, emulator::Site site = emulator::Site::here()) {
  return __ballot_sync(mask, predicate, site) == mask;
}
#define CUDA_ON_CPU_REDUCE(name, operation)                                                                   \
  template <typename T>                                                                                       \
  T __reduce_##name##_sync(unsigned mask, T value, emulator::Site site = emulator::Site::here()) {            \
    static_assert(sizeof(T) == 4 && std::is_integral_v<T>);                                                   \
    constexpr uint32_t kBias = std::is_signed_v<T> && (#name[0] == 'm') ? 0x80000000u : 0u; /* keeps order */ \
    const uint32_t biased = static_cast<uint32_t>(value) ^ kBias;                                             \
    return static_cast<T>(static_cast<uint32_t>(emulator::warp(operation, mask, biased, 0, site)) ^ kBias);   \
  }
CUDA_ON_CPU_REDUCE(add, emulator::Warp::kAdd)
CUDA_ON_CPU_REDUCE(min, emulator::Warp::kMin)
CUDA_ON_CPU_REDUCE(max, emulator::Warp::kMax)
CUDA_ON_CPU_REDUCE(and, emulator::Warp::kAnd)
CUDA_ON_CPU_REDUCE(or, emulator::Warp::kOr)
CUDA_ON_CPU_REDUCE(xor, emulator::Warp::kXor)
#undef CUDA_ON_CPU_REDUCE

// ---- memory

inline void __threadfence() { emulator::fence(true); }
inline void __threadfence_block() { emulator::fence(false); }

// Integers only: sums of floating-point numbers by atomics differ from run to run.
inline unsigned atomicAdd(unsigned* p, unsigned v) { return emulator::atomic(emulator::Atomic::kAdd, p, v); }
inline int atomicAdd(int* p, int v) {
  return static_cast<int>(emulator::atomic(emulator::Atomic::kAdd, p, static_cast<uint32_t>(v)));
}
inline unsigned long long atomicAdd(unsigned long long* p, unsigned long long v) {
  return emulator::atomic_add64(p, v);
}
inline unsigned atomicExch(unsigned* p, unsigned v) { return emulator::atomic(emulator::Atomic::kExchange, p, v); }
inline unsigned atomicCAS(unsigned* p, unsigned compare, unsigned v) {
  return emulator::atomic(emulator::Atomic::kCompareExchange, p, v, compare);
}
inline unsigned atomicMin(unsigned* p, unsigned v) { return emulator::atomic(emulator::Atomic::kMin, p, v); }
inline unsigned atomicMax(unsigned* p, unsigned v) { return emulator::atomic(emulator::Atomic::kMax, p, v); }
inline int atomicMin(int* p, int v) {
  return static_cast<int>(emulator::atomic(emulator::Atomic::kMin, p, static_cast<uint32_t>(v), 0, true));
}
inline int atomicMax(int* p, int v) {
  return static_cast<int>(emulator::atomic(emulator::Atomic::kMax, p, static_cast<uint32_t>(v), 0, true));
}
inline unsigned atomicAnd(unsigned* p, unsigned v) { return emulator::atomic(emulator::Atomic::kAnd, p, v); }
inline unsigned atomicOr(unsigned* p, unsigned v) { return emulator::atomic(emulator::Atomic::kOr, p, v); }

// Caching hints change no value.
#define CUDA_ON_CPU_LOAD(name)         \
  template <typename T>                \
  __forceinline__ T name(const T* p) { \
    return *p;                         \
  }
CUDA_ON_CPU_LOAD(__ldg)
CUDA_ON_CPU_LOAD(__ldca)
CUDA_ON_CPU_LOAD(__ldcg)
CUDA_ON_CPU_LOAD(__ldcs)
CUDA_ON_CPU_LOAD(__ldcv)
CUDA_ON_CPU_LOAD(__ldlu)
#undef CUDA_ON_CPU_LOAD
#define CUDA_ON_CPU_STORE(name)                 \
  template <typename T>                         \
  __forceinline__ void name(T* p, const T& v) { \
    *p = v;                                     \
  }
CUDA_ON_CPU_STORE(__stwb)
CUDA_ON_CPU_STORE(__stcg)
CUDA_ON_CPU_STORE(__stcs)
CUDA_ON_CPU_STORE(__stwt)
#undef CUDA_ON_CPU_STORE

// ---- arithmetic. The approximate functions are the exact ones here.

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __frsqrt_rn(float a) { return 1.0f / std::sqrt(a); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float a) { return std::exp(a); }
inline float __exp10f(float a) { return std::pow(10.0f, a); }
inline float __logf(float a) { return std::log(a); }
inline float __log2f(float a) { return std::log2(a); }
inline float __powf(float a, float b) { return std::pow(a, b); }
inline float __saturatef(float a) { return a > 0.0f ? (a < 1.0f ? a : 1.0f) : 0.0f; }
inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }
inline double rsqrt(double a) { return 1.0 / std::sqrt(a); }
inline float normcdff(float a) { return 0.5f * std::erfc(-a * 0.70710678f); }
inline double normcdf(double a) { return 0.5 * std::erfc(-a * 0.70710678118654752); }
using std::isfinite;
using std::isinf;
using std::isnan;

inline float __uint_as_float(unsigned u) { return std::bit_cast<float>(u); }
inline float __int_as_float(int i) { return std::bit_cast<float>(i); }
inline unsigned __float_as_uint(float f) { return std::bit_cast<unsigned>(f); }
inline int __float_as_int(float f) { return std::bit_cast<int>(f); }
inline double __longlong_as_double(long long i) { return std::bit_cast<double>(i); }
inline long long __double_as_longlong(double d) { return std::bit_cast<long long>(d); }
inline float __double2float_rn(double d) { return static_cast<float>(d); }
inline float __uint2float_rn(unsigned u) { return static_cast<float>(u); }
inline float __int2float_rn(int i) { return static_cast<float>(i); }
inline int __float2int_rn(float f) { return static_cast<int>(std::nearbyint(f)); }

inline int __popc(unsigned u) { return std::popcount(u); }
inline int __popcll(unsigned long long u) { return std::popcount(u); }
inline int __clz(int i) { return std::countl_zero(static_cast<unsigned>(i)); }
inline int __clzll(long long i) { return std::countl_zero(static_cast<unsigned long long>(i)); }
inline int __ffs(int i) { return i == 0 ? 0 : std::countr_zero(static_cast<unsigned>(i)) + 1; }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) << (shift & 31) >> 32);
}
#define CUDA_ON_CPU_MIN_MAX(T)                        \
  constexpr T min(T a, T b) { return b < a ? b : a; } \
  constexpr T max(T a, T b) { return a < b ? b : a; }
CUDA_ON_CPU_MIN_MAX(int)
CUDA_ON_CPU_MIN_MAX(unsigned)
CUDA_ON_CPU_MIN_MAX(long)
CUDA_ON_CPU_MIN_MAX(unsigned long)
CUDA_ON_CPU_MIN_MAX(long long)
CUDA_ON_CPU_MIN_MAX(unsigned long long)
#undef CUDA_ON_CPU_MIN_MAX
inline float min(float a, float b) { return std::fmin(a, b); }  // a NaN loses, as on the device
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }

inline void __trap(emulator::Site site = emulator::Site::here()) { emulator::trap(site); }
#define __builtin_assume(condition) ((void)0)

// ---- the run time

using cudaError_t = emulator::Error;
constexpr cudaError_t cudaSuccess = emulator::Error::kNone;
constexpr cudaError_t cudaErrorInvalidValue = emulator::Error::kInvalidValue;
constexpr cudaError_t cudaErrorInvalidConfiguration = emulator::Error::kInvalidConfiguration;
constexpr cudaError_t cudaErrorLaunchFailure = emulator::Error::kLaunchFailure;
inline const char* cudaGetErrorString(cudaError_t error) { return emulator::describe(error); }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }  // every call here returns its own error

using cudaStream_t = struct CUstream_st*;

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 13,
};
inline cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  switch (attribute) {
    case cudaFuncAttributeMaxDynamicSharedMemorySize: return emulator::set_max_shared(function, value);
    case cudaFuncAttributeNonPortableClusterSizeAllowed: return emulator::allow_large_clusters(function);
    case cudaFuncAttributePreferredSharedMemoryCarveout: return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension = 4,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6,
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

template <typename... Parameters, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Args&&... args) {
  emulator::Grid grid{{config->gridDim.x, config->gridDim.y, config->gridDim.z},
                      {config->blockDim.x, config->blockDim.y, config->blockDim.z},
                      1,
                      config->dynamicSmemBytes};
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id != cudaLaunchAttributeClusterDimension) continue;
    if (attribute.val.clusterDim.y != 1 || attribute.val.clusterDim.z != 1) return cudaErrorInvalidConfiguration;
    grid.cluster = attribute.val.clusterDim.x;
  }
  return emulator::launch(grid, reinterpret_cast<const void*>(kernel), [&] { kernel(args...); });
}

inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  return emulator::memset(p, value, bytes);
}

// ---- launch.cuh's own names

namespace fastnorm::cuda {

inline float rough_root(float s) { return std::sqrt(s); }
inline float rough_reciprocal_root(float s) { return 1.0f / std::sqrt(s); }

template <typename T>
T* dynamic_shared() {
  return static_cast<T*>(emulator::dynamic_shared(128));
}

#if FASTNORM_HAS_CLUSTERS

inline unsigned cluster_size() { return emulator::cluster_size(); }
inline unsigned cluster_rank() { return emulator::cluster_rank(); }
inline void cluster_sync(emulator::Site site = emulator::Site::here()) { emulator::cluster_barrier(site); }
template <typename T>
T* map_shared_rank(T* p, unsigned rank, emulator::Site site = emulator::Site::here()) {
  return static_cast<T*>(emulator::map_shared_rank(p, rank, site));
}

#endif

}  // namespace fastnorm::cuda
