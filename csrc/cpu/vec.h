// Pack<T>: the unit every CPU kernel works in. A pack is a whole number of at::vec vectors in the arithmetic's type
// (float64 for float64, float32 for the rest) that holds as many elements as one vector of T, and at least eight, so
// that its mask bits are whole bytes on every instruction set.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdlib>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "../dtype.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

// On a loop over packs: everything it calls is inlined, so that coefficients stay in registers. Left to itself the
// compiler outlines a lambda now and then, which costs three times the loop. Not for x86-64 without AVX2: those processors are
// old, and their code would take a third of the whole build.
#if defined(__x86_64__) && defined(CPU_CAPABILITY_DEFAULT)
#define FASTNORM_LOOP
#else
#define FASTNORM_LOOP __attribute__((flatten))
#endif

template <typename T>
using acc_type = std::conditional_t<std::is_same_v<T, double>, double, float>;

// bfloat16 is the upper half of a float32, so with AVX512 one permutation of halves widens a vector of it, and another
// takes the upper halves of two: two thirds of the instructions that at::vec has for the same bits.
#if defined(CPU_CAPABILITY_AVX512)
namespace bfloat16 {

using Wide = at::vec::Vectorized<float>;
using Indices = int __attribute__((vector_size(64)));  // the compiler computes with it
constexpr Indices kLane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

inline Wide widen_from(Indices first, __m512i x) {
  constexpr __mmask32 kUpper = 0xAAAAAAAA;  // the lower halves are zero
  return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(kUpper, reinterpret_cast<__m512i>(first << 16), x));
}

// To the nearest, ties to even, in the upper half. NaN is -1, as at::vec's.
inline __m512i round(const Wide& x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF));
  return _mm512_mask_add_epi32(_mm512_set1_epi32(-1), _mm512_cmp_ps_mask(x, x, _CMP_ORD_Q), bits, half);
}

inline __m512i upper_halves(__m512i low, __m512i high) {
  constexpr Indices kOdd = kLane * 0x00040004 + 0x00030001;  // half words 1, 3, 5 ...
  return _mm512_permutex2var_epi16(low, reinterpret_cast<__m512i>(kOdd), high);
}

}  // namespace bfloat16
#endif

// A vector of float16 or bfloat16 as two of float32, and back.
template <typename T>
std::tuple<at::vec::Vectorized<float>, at::vec::Vectorized<float>> widen(const at::vec::Vectorized<T>& x) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, c10::BFloat16>)
    return {bfloat16::widen_from(bfloat16::kLane, x), bfloat16::widen_from(bfloat16::kLane + 16, x)};
#endif
  return at::vec::convert_to_float<T>(x);
}
template <typename T>
at::vec::Vectorized<T> narrow(const at::vec::Vectorized<float>& low, const at::vec::Vectorized<float>& high) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, c10::BFloat16>)
    return bfloat16::upper_halves(bfloat16::round(low), bfloat16::round(high));
#endif
  return at::vec::convert_from_float<T>(low, high);
}

// How many elements of a pack are there: all, known to the compiler, or the first few.
struct Full {};
struct Partial {
  int count;
};

constexpr size_t kStreamAlignment = 64;

template <typename T>
struct Pack {
  using acc_t = acc_type<T>;
  using Vec = at::vec::Vectorized<acc_t>;
  using Storage = at::vec::Vectorized<T>;
  static constexpr bool kConverts = !std::is_same_v<T, acc_t>;
  static constexpr int kSize = Storage::size() < 8 ? 8 : Storage::size();
  static constexpr int kVecs = kSize / Vec::size();
  static constexpr int kStorages = kSize / Storage::size();

  Vec v[kVecs];

  Pack() = default;
  explicit Pack(acc_t value) {
    for (auto& e : v) e = Vec(value);
  }

  static Pack load(const T* p, Full = {}) {
    return load_each([&](int k) { return Storage::loadu(p + k * Storage::size()); });
  }
  // The elements that are not there read as zero.
  static Pack load(const T* p, Partial n) {
    return load_each([&](int k) {
      const int here = clamp(n.count - k * Storage::size());
      return here > 0 ? Storage::loadu(p + k * Storage::size(), here) : Storage(T(0));
    });
  }

  void store(T* p, Full = {}) const {
    store_each([&](int k, const Storage& s) { s.store(p + k * Storage::size()); });
  }
  void store(T* p, Partial n) const {
    store_each([&](int k, const Storage& s) {
      const int here = clamp(n.count - k * Storage::size());
      if (here > 0) s.store(p + k * Storage::size(), here);
    });
  }
  // Past the caches; p is aligned to kStreamAlignment.
  void stream(T* p) const {
    store_each([&](int k, const Storage& s) { stream_storage(p + k * Storage::size(), s); });
  }

  // From and to arrays of the arithmetic's type that are at least a pack long.
  static Pack load_acc(const acc_t* p) {
    Pack r;
    for (int k = 0; k < kVecs; ++k) r.v[k] = Vec::loadu(p + k * Vec::size());
    return r;
  }
  void store_acc(acc_t* p) const {
    for (int k = 0; k < kVecs; ++k) v[k].store(p + k * Vec::size());
  }

  // The same with the elements from the count on set to zero: for tails of sums of anything but products with x.
  Pack keep(Full) const { return *this; }
  Pack keep(Partial n) const {
    Pack r;
    for (int k = 0; k < kVecs; ++k) {
      const int here = std::min(std::max(n.count - k * Vec::size(), 0), static_cast<int>(Vec::size()));
      r.v[k] = Vec::set(Vec(0), v[k], here);
    }
    return r;
  }

 private:
  static int clamp(int n) { return std::min(n, static_cast<int>(Storage::size())); }

  template <typename F>
  static Pack load_each(const F& storage) {
    Pack r;
    for (int k = 0; k < kStorages; ++k) {
      if constexpr (kConverts) {
        static_assert(Storage::size() == 2 * Vec::size());
        std::tie(r.v[2 * k], r.v[2 * k + 1]) = widen<T>(storage(k));
      } else {
        r.v[k] = storage(k);
      }
    }
    return r;
  }

  template <typename F>
  void store_each(const F& put) const {
    for (int k = 0; k < kStorages; ++k) {
      if constexpr (kConverts) {
        put(k, narrow<T>(v[2 * k], v[2 * k + 1]));
      } else {
        put(k, v[k]);
      }
    }
  }

  static void stream_storage(T* p, const Storage& s) {
#if defined(CPU_CAPABILITY_AVX512)
    if constexpr (std::is_same_v<T, float>) {
      _mm512_stream_ps(p, s);
    } else if constexpr (std::is_same_v<T, double>) {
      _mm512_stream_pd(p, s);
    } else {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(p), s);
    }
#elif defined(CPU_CAPABILITY_AVX2)
    if constexpr (std::is_same_v<T, float>) {
      _mm256_stream_ps(p, s);
    } else if constexpr (std::is_same_v<T, double>) {
      _mm256_stream_pd(p, s);
    } else {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(p), s);
    }
#else
    s.store(p);
#endif
  }
};

// Streaming stores are not ordered with other stores: once after the last, before another thread may read.
inline void stream_fence() {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  _mm_sfence();
#endif
}

// Whether n elements from p on are whole cache lines: only those are worth streaming, a part of one is read back.
template <typename T>
bool fills_lines(const T* p, int64_t n) {
  return reinterpret_cast<uintptr_t>(p) % kStreamAlignment == 0 && n * sizeof(T) % kStreamAlignment == 0;
}

// Asks for the cache line at p, which may lie past the end of what may be read, to come to the second-level cache. For
// sweeps of several rows side by side, which the processor's own prefetchers do not foresee.
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
inline void prefetch_to_write(const void* p) { __builtin_prefetch(p, 1, 2); }

template <typename T, typename Count>
void put(const Pack<T>& pack, T* p, Count count, bool stream) {
  if constexpr (std::is_same_v<Count, Full>) {
    if (stream) return pack.stream(p);
  }
  pack.store(p, count);
}

template <typename T, typename F, typename... P>
Pack<T> map(const F& f, const P&... packs) {
  Pack<T> r;
  for (int k = 0; k < Pack<T>::kVecs; ++k) r.v[k] = f(packs.v[k]...);
  return r;
}

template <typename T>
Pack<T> operator+(const Pack<T>& a, const Pack<T>& b) {
  return map<T>([](auto x, auto y) { return x + y; }, a, b);
}
template <typename T>
Pack<T> operator-(const Pack<T>& a, const Pack<T>& b) {
  return map<T>([](auto x, auto y) { return x - y; }, a, b);
}
template <typename T>
Pack<T> operator*(const Pack<T>& a, const Pack<T>& b) {
  return map<T>([](auto x, auto y) { return x * y; }, a, b);
}
template <typename T>
Pack<T> fmadd(const Pack<T>& a, const Pack<T>& b, const Pack<T>& c) {
  return map<T>([](auto x, auto y, auto z) { return at::vec::fmadd(x, y, z); }, a, b, c);
}

// Bit i of the result: whether !(z[i] <= 0), so true for NaN.
template <typename T>
uint32_t positive_bits(const Pack<T>& z) {
  using Vec = typename Pack<T>::Vec;
  uint32_t bits = 0;
  for (int k = 0; k < Pack<T>::kVecs; ++k)
    bits |= static_cast<uint32_t>((z.v[k] <= Vec(0)).zero_mask()) << (k * Vec::size());
  return bits;
}

// lane i of the result: a where bit i is set, b elsewhere
inline at::vec::Vectorized<float> choose(uint32_t bits, at::vec::Vectorized<float> a, at::vec::Vectorized<float> b) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_mask_blend_ps(static_cast<__mmask16>(bits), b, a);
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane), lane);
  return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(set));
#else
  using Vec = at::vec::Vectorized<float>;
  float x[Vec::size()], y[Vec::size()];
  a.store(x);
  b.store(y);
  for (int i = 0; i < Vec::size(); ++i) x[i] = bits >> i & 1 ? x[i] : y[i];
  return Vec::loadu(x);
#endif
}
inline at::vec::Vectorized<double> choose(uint32_t bits, at::vec::Vectorized<double> a, at::vec::Vectorized<double> b) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_mask_blend_pd(static_cast<__mmask8>(bits), b, a);
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256i lane = _mm256_setr_epi64x(1, 2, 4, 8);
  const __m256i set = _mm256_cmpeq_epi64(_mm256_and_si256(_mm256_set1_epi64x(static_cast<int>(bits)), lane), lane);
  return _mm256_blendv_pd(b, a, _mm256_castsi256_pd(set));
#else
  using Vec = at::vec::Vectorized<double>;
  double x[Vec::size()], y[Vec::size()];
  a.store(x);
  b.store(y);
  for (int i = 0; i < Vec::size(); ++i) x[i] = bits >> i & 1 ? x[i] : y[i];
  return Vec::loadu(x);
#endif
}

template <typename T>
Pack<T> choose(uint32_t bits, const Pack<T>& a, const Pack<T>& b) {
  Pack<T> r;
  for (int k = 0; k < Pack<T>::kVecs; ++k) r.v[k] = choose(bits >> (k * Pack<T>::Vec::size()), a.v[k], b.v[k]);
  return r;
}

// A pack's mask bits in memory: kSize / 8 bytes, fewer at the end of a row.
template <typename T>
uint32_t load_bits(const uint8_t* p, Full = {}) {
  uint32_t bits = 0;
  std::memcpy(&bits, p, Pack<T>::kSize / 8);
  return bits;
}
template <typename T>
uint32_t load_bits(const uint8_t* p, Partial n) {
  uint32_t bits = p[0];  // byte by byte: memcpy of as many as the compiler does not know is a call
  if constexpr (Pack<T>::kSize > 8) bits |= n.count > 8 ? uint32_t{p[1]} << 8 : 0;
  if constexpr (Pack<T>::kSize > 16) bits |= n.count > 16 ? uint32_t{p[2]} << 16 : 0;
  if constexpr (Pack<T>::kSize > 24) bits |= n.count > 24 ? uint32_t{p[3]} << 24 : 0;
  return bits;
}
template <typename T>
void store_bits(uint8_t* p, uint32_t bits, Full = {}) {
  std::memcpy(p, &bits, Pack<T>::kSize / 8);
}
template <typename T>
void store_bits(uint8_t* p, uint32_t bits, Partial n) {
  p[0] = static_cast<uint8_t>(bits);
  if constexpr (Pack<T>::kSize > 8)
    if (n.count > 8) p[1] = static_cast<uint8_t>(bits >> 8);
  if constexpr (Pack<T>::kSize > 16)
    if (n.count > 16) p[2] = static_cast<uint8_t>(bits >> 16);
  if constexpr (Pack<T>::kSize > 24)
    if (n.count > 24) p[3] = static_cast<uint8_t>(bits >> 24);
}

// The sum of the lanes in float64, in a tree: what a row or chunk costs once, so in few instructions.
inline double lane_sum(at::vec::Vectorized<double> v) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_reduce_add_pd(v);
#else
  double lane[at::vec::Vectorized<double>::size()], total = 0;
  v.store(lane);
  for (const double e : lane) total += e;
  return total;
#endif
}
inline double lane_sum(at::vec::Vectorized<float> v) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_reduce_add_pd(
      _mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(v)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1))));
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256d four =
      _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(v)), _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)));
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
#else
  float lane[at::vec::Vectorized<float>::size()];
  v.store(lane);
  double total = 0;
  for (const float e : lane) total += e;
  return total;
#endif
}
template <typename T>
double lane_sum(const Pack<T>& p) {
  auto all = p.v[0];
  for (int k = 1; k < Pack<T>::kVecs; ++k) all = all + p.v[k];
  return lane_sum(all);
}

template <typename T, int kCount>
double lane_sum(const Pack<T> (&sums)[kCount]) {
  Pack<T> all = sums[0];
  for (int u = 1; u < kCount; ++u) all = all + sums[u];
  return lane_sum(all);
}

// Elements from p on before the first place where a pack can be streamed to: a cache line's beginning, or its middle.
template <typename T>
int64_t elements_before_pack(const T* p) {
  return static_cast<int64_t>(-reinterpret_cast<uintptr_t>(p) % (Pack<T>::kSize * sizeof(T)) / sizeof(T));
}

// Calls f(i, Full, u) for each whole pack of n elements, kUnroll of them together with u = 0 .. kUnroll - 1
// (independent accumulators hide the latency of an addition, 4 cycles), and f(i, Partial, 0) for what is left.
template <typename T, int kUnroll = 1, typename F>
void for_packs(int64_t n, const F& f) {
  constexpr int kSize = Pack<T>::kSize;
  int64_t i = 0;
  if constexpr (kUnroll > 1) {
    for (; i + kUnroll * kSize <= n; i += kUnroll * kSize) {
#pragma GCC unroll 8
      for (int u = 0; u < kUnroll; ++u) f(i + u * kSize, Full{}, u);
    }
  }
  for (; i + kSize <= n; i += kSize) f(i, Full{}, 0);
  if (i < n) f(i, Partial{static_cast<int>(n - i)}, 0);
}

// Adds to two sums what add(i, Full | Partial, its sum, its other sum) adds for each pack of n elements. kUnroll pairs of
// sums where there are as many whole packs; a shorter run has no use for them, and one pair stays in registers.
template <typename T, int kUnroll, typename F>
void sum_packs(int64_t n, Pack<T>& sum, Pack<T>& other_sum, const F& add) {
  constexpr int64_t kSize = Pack<T>::kSize;
  Pack<T> a = sum, b = other_sum;
  int64_t begin = 0;
  if constexpr (kUnroll > 1) {
    if (n >= kUnroll * kSize) {
      Pack<T> more_a[kUnroll - 1], more_b[kUnroll - 1];
      for (int u = 0; u < kUnroll - 1; ++u) more_a[u] = more_b[u] = Pack<T>(0);
      for (; begin + kUnroll * kSize <= n; begin += kUnroll * kSize) {
        add(begin, Full{}, a, b);
#pragma GCC unroll 8
        for (int u = 0; u < kUnroll - 1; ++u) add(begin + (u + 1) * kSize, Full{}, more_a[u], more_b[u]);
      }
      for (int u = 0; u < kUnroll - 1; ++u) {
        a = a + more_a[u];
        b = b + more_b[u];
      }
    }
  }
  for_packs<T>(n - begin, [&](int64_t i, auto count, int) { add(begin + i, count, a, b); });
  sum = a;
  other_sum = b;
}

// As for_packs, for a run whose whole packs begin after `head` elements, less than a pack. These come last, so that a pack
// that is not whole takes one copy of f's code.
template <typename T, typename F>
void for_packs_after(int64_t head, int64_t n, const F& f) {
  constexpr int64_t kSize = Pack<T>::kSize;
  int64_t begin = head, end = n;
  for (; begin + kSize <= n; begin += kSize) f(begin, Full{}, 0);
  for (;;) {
    if (begin < end) f(begin, Partial{static_cast<int>(end - begin)}, 0);
    if (head == 0 || begin == 0) return;
    begin = 0, end = head;
  }
}

template <typename T>
T* offset_by(T* p, int64_t n) {
  return p ? p + n : nullptr;
}

// Calls f with a value of the C++ type of dtype.
template <typename F>
void visit_any(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kFloat64: return f(double{});
    case Dtype::kFloat32: return f(float{});
    case Dtype::kBFloat16: return f(c10::BFloat16{});
    case Dtype::kFloat16: return f(c10::Half{});
  }
}

// The same for a kernel, of the types that this instruction set has kernels for (isa.h).
template <typename F>
void visit(Dtype dtype, const F& f) {
#if defined(CPU_CAPABILITY_AVX512)
  switch (dtype) {
    case Dtype::kFloat64: std::abort();  // isa_for() takes AVX2's
    case Dtype::kFloat32: return f(float{});
    case Dtype::kBFloat16: return f(c10::BFloat16{});
    case Dtype::kFloat16: return f(c10::Half{});
  }
#else
  visit_any(dtype, f);
#endif
}

// Element i of a parameter or statistic; `missing` where there is none.
inline double read(const void* p, Dtype dtype, int64_t i, double missing) {
  if (p == nullptr) return missing;
  double value = 0;
  visit_any(dtype, [&](auto type) { value = static_cast<double>(static_cast<const decltype(type)*>(p)[i]); });
  return value;
}
inline void write(void* p, Dtype dtype, int64_t i, double value) {
  visit_any(dtype, [&](auto type) { static_cast<decltype(type)*>(p)[i] = static_cast<decltype(type)>(value); });
}

// The same for elements 0 .. n - 1.
inline void read_all(const void* p, Dtype dtype, int64_t n, double missing, double* values) {
  if (p == nullptr) {
    std::fill(values, values + n, missing);
    return;
  }
  visit_any(dtype, [&](auto type) {
    const auto from = static_cast<const decltype(type)*>(p);
    for (int64_t i = 0; i < n; ++i) values[i] = static_cast<double>(from[i]);
  });
}
inline void write_all(void* p, Dtype dtype, int64_t n, const double* values) {
  visit_any(dtype, [&](auto type) {
    const auto to = static_cast<decltype(type)*>(p);
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<decltype(type)>(values[i]);
  });
}

}  // namespace
}  // namespace fastnorm::cpu::CPU_CAPABILITY
