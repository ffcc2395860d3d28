// Elements in memory and in arithmetic: conversions, and all loads and stores of global and shared memory.
//
// A window is the kWindow<T> elements of 16 bytes, the widest access there is. Kernels cut tensors into windows by the
// index of the element, so that a plane or row that starts anywhere is full windows but for its first and its last.
#pragma once

#include <cmath>
#include <type_traits>

#include "../dtype.h"
#include "../moments.h"  // FASTNORM_HOST_DEVICE
#include "launch.cuh"

namespace fastnorm::cuda {

// ---- types

// What arithmetic on elements of type T is done in.
template <typename T>
using acc_type = std::conditional_t<std::is_same_v<T, double>, double, float>;

// T of a Dtype, as std::type_identity<T>.
template <typename F>
void visit(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kFloat64: return f(std::type_identity<double>{});
    case Dtype::kFloat32: return f(std::type_identity<float>{});
    case Dtype::kBFloat16: return f(std::type_identity<__nv_bfloat16>{});
    case Dtype::kFloat16: return f(std::type_identity<__half>{});
  }
}

__device__ inline double to_acc(double v) { return v; }
__device__ inline float to_acc(float v) { return v; }
__device__ inline float to_acc(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline float to_acc(__half v) { return __half2float(v); }

// Rounds to nearest even.
template <typename T>
__device__ inline T from_acc(acc_type<T> v) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(v);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(v);
  } else {
    return v;
  }
}

// Two neighbours in one word, the first in its lower half: words need half the registers that 16-bit numbers do.
template <typename T>
struct Pair;
template <>
struct Pair<__nv_bfloat16> {
  __device__ static float2 unpack(unsigned word) {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
  }
  __device__ static __nv_bfloat162 pack(float x, float y) { return __floats2bfloat162_rn(x, y); }
};
template <>
struct Pair<__half> {
  __device__ static float2 unpack(unsigned word) {
    __half2 pair;
    memcpy(&pair, &word, sizeof(pair));
    return __half22float2(pair);
  }
  __device__ static __half2 pack(float x, float y) { return __floats2half2_rn(x, y); }
};

// a * b + c, rounded once: named wherever backward must find again what forward computed, bit for bit.
__device__ inline float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ inline double multiply_add(double a, double b, double c) { return fma(a, b, c); }

// Element i of an array whose type is known at run time, or `otherwise` if there is no array. For parameters: a
// uniform branch costs less than a kernel for each pair of types.
template <typename acc_t>
__device__ inline acc_t read(const void* p, Dtype dtype, int64_t i, acc_t otherwise) {
  if (p == nullptr) return otherwise;
  switch (dtype) {
    case Dtype::kFloat64: return static_cast<acc_t>(static_cast<const double*>(p)[i]);
    case Dtype::kFloat32: return static_cast<acc_t>(static_cast<const float*>(p)[i]);
    case Dtype::kBFloat16: return static_cast<acc_t>(to_acc(static_cast<const __nv_bfloat16*>(p)[i]));
    case Dtype::kFloat16: return static_cast<acc_t>(to_acc(static_cast<const __half*>(p)[i]));
  }
  return otherwise;
}

template <typename acc_t>
__device__ inline void write(void* p, Dtype dtype, int64_t i, acc_t v) {
  switch (dtype) {
    case Dtype::kFloat64: static_cast<double*>(p)[i] = static_cast<double>(v); break;
    case Dtype::kFloat32: static_cast<float*>(p)[i] = static_cast<float>(v); break;
    case Dtype::kBFloat16: static_cast<__nv_bfloat16*>(p)[i] = from_acc<__nv_bfloat16>(static_cast<float>(v)); break;
    case Dtype::kFloat16: static_cast<__half*>(p)[i] = from_acc<__half>(static_cast<float>(v)); break;
  }
}

__device__ inline bool is_finite_as(Dtype dtype, double v) {
  switch (dtype) {
    case Dtype::kFloat64: return isfinite(v);
    case Dtype::kFloat32: return isfinite(static_cast<float>(v));
    case Dtype::kBFloat16: return isfinite(to_acc(from_acc<__nv_bfloat16>(static_cast<float>(v))));
    case Dtype::kFloat16: return isfinite(to_acc(from_acc<__half>(static_cast<float>(v))));
  }
  return false;
}

// p + i where p may be null.
template <typename T>
FASTNORM_HOST_DEVICE T* offset_by(T* p, int64_t i) {
  return p ? p + i : nullptr;
}

// ---- packs

constexpr int kAccess = 16;  // bytes

template <typename T>
constexpr int kWindow = kAccess / static_cast<int>(sizeof(T));

// Whether all of the pointers (null counts as yes) may be accessed 16 bytes at a time.
template <typename... P>
bool is_aligned(const P*... p) {
  return ((reinterpret_cast<uintptr_t>(p) % kAccess == 0) && ...);
}

template <int kBytes>
struct Bits;
template <>
struct Bits<2> {
  using type = unsigned short;
};
template <>
struct Bits<4> {
  using type = unsigned;
};
template <>
struct Bits<8> {
  using type = uint2;
};
template <>
struct Bits<16> {
  using type = uint4;
};

// n neighbouring elements that one instruction loads or stores: n * sizeof(T) is 2, 4, 8 or 16 bytes, and so is the
// alignment of p below.
template <typename T, int n>
struct alignas(n * sizeof(T)) Pack {
  using Word = typename Bits<n * sizeof(T)>::type;
  T v[n];

  // Ordinary accesses: shared memory, and global memory that is read again soon.
  __device__ static Pack load(const T* p) { return from_word(*reinterpret_cast<const Word*>(p)); }
  __device__ void store(T* p) const { *reinterpret_cast<Word*>(p) = word(); }

  // Global memory that is used once: first to leave the caches.
  __device__ static Pack load_streaming(const T* p) { return from_word(__ldcs(reinterpret_cast<const Word*>(p))); }
  __device__ void store_streaming(T* p) const { __stcs(reinterpret_cast<Word*>(p), word()); }

  // The elements in arithmetic's type, and back.
  __device__ void unpack(acc_type<T> (&values)[n]) const {
    if constexpr (kHasPairs) {
#pragma unroll
      for (int j = 0; j < n; j += 2) {
        unsigned word;
        memcpy(&word, v + j, sizeof(word));
        const float2 pair = Pair<T>::unpack(word);
        values[j] = pair.x, values[j + 1] = pair.y;
      }
    } else {
#pragma unroll
      for (int j = 0; j < n; ++j) values[j] = to_acc(v[j]);
    }
  }
  __device__ static Pack pack(const acc_type<T> (&values)[n]) {
    Pack p;
    if constexpr (kHasPairs) {
#pragma unroll
      for (int j = 0; j < n; j += 2) {
        const auto pair = Pair<T>::pack(values[j], values[j + 1]);
        memcpy(p.v + j, &pair, sizeof(pair));
      }
    } else {
#pragma unroll
      for (int j = 0; j < n; ++j) p.v[j] = from_acc<T>(values[j]);
    }
    return p;
  }

 private:
  static constexpr bool kHasPairs = sizeof(T) == 2 && n % 2 == 0;

  // By value: from a reference memcpy would read memory itself, a byte at a time, for it knows of no alignment.
  __device__ static Pack from_word(const Word word) {
    Pack p;
    memcpy(&p, &word, sizeof(p));
    return p;
  }
  __device__ Word word() const {
    Word w;
    memcpy(&w, this, sizeof(w));
    return w;
  }
};

// n neighbouring numbers of arithmetic's type, in as few accesses as they take; p is aligned to 16 bytes, or to them all.
template <int n, typename acc_t>
__device__ inline void load_numbers(const acc_t* p, acc_t (&v)[n]) {
  constexpr int kSize = n < kWindow<acc_t> ? n : kWindow<acc_t>;
#pragma unroll
  for (int j = 0; j < n; j += kSize) {
    const auto pack = Pack<acc_t, kSize>::load(p + j);
#pragma unroll
    for (int e = 0; e < kSize; ++e) v[j + e] = pack.v[e];
  }
}
template <int n, typename acc_t>
__device__ inline void store_numbers(acc_t* p, const acc_t (&v)[n]) {
  constexpr int kSize = n < kWindow<acc_t> ? n : kWindow<acc_t>;
#pragma unroll
  for (int j = 0; j < n; j += kSize) {
    Pack<acc_t, kSize> pack;
#pragma unroll
    for (int e = 0; e < kSize; ++e) pack.v[e] = v[j + e];
    pack.store(p + j);
  }
}

// Elements begin .. end - 1 of the n at p, the others zero: 0 <= begin, end <= n. One access if `whole` says that all n
// may be read and that p is aligned, else an access an element. kOnce: nothing reads them again.
template <int n, bool kOnce = false, typename T>
__device__ inline Pack<T, n> load_part(const T* p, int begin, int end, bool whole) {
  if (whole) return kOnce ? Pack<T, n>::load_streaming(p) : Pack<T, n>::load(p);
  Pack<T, n> pack;
#pragma unroll
  for (int j = 0; j < n; ++j) pack.v[j] = j >= begin && j < end ? p[j] : from_acc<T>(0);
  return pack;
}

// Stores elements begin .. end - 1; one access if they are all n and p is aligned.
template <int n, typename T>
__device__ inline void store_part(const Pack<T, n>& pack, T* p, int begin, int end, bool aligned = true) {
  if (aligned && begin == 0 && end == n) return pack.store_streaming(p);
#pragma unroll
  for (int j = 0; j < n; ++j)
    if (j >= begin && j < end) p[j] = pack.v[j];
}

}  // namespace fastnorm::cuda
