// vectors.h with SSE2, which every x86-64 has. at::vec has arrays for it and leaves it to the compiler to find vectors in
// loops over them, which -O1 does not: a tenth of the speed or less. Here `vec` is what the kernels use of at::vec.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <emmintrin.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <type_traits>

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

namespace vec {

// What types differ in.
template <typename T>
struct Register {  // float16 and bfloat16, which are only loaded and stored
  using type = __m128i;
  static type loadu(const T* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  static void store(T* p, type v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), v); }
  static type all(T value) { return _mm_set1_epi16(static_cast<int16_t>(value.x)); }
};
template <>
struct Register<float> {
  using type = __m128;
  static type loadu(const float* p) { return _mm_loadu_ps(p); }
  static void store(float* p, type v) { _mm_storeu_ps(p, v); }
  static type all(float value) { return _mm_set1_ps(value); }
  static type less(type a, type b) { return _mm_cmplt_ps(a, b); }
  static type less_or_equal(type a, type b) { return _mm_cmple_ps(a, b); }
  static type equal(type a, type b) { return _mm_cmpeq_ps(a, b); }
  static type unordered(type a, type b) { return _mm_cmpunord_ps(a, b); }
  static type both(type a, type b) { return _mm_and_ps(a, b); }
  static type only_second(type a, type b) { return _mm_andnot_ps(a, b); }
  static type either(type a, type b) { return _mm_or_ps(a, b); }
  static type exclusive_or(type a, type b) { return _mm_xor_ps(a, b); }
  static type max(type a, type b) { return _mm_max_ps(a, b); }  // b where one of them is NaN, and so is min
  static type min(type a, type b) { return _mm_min_ps(a, b); }
  static type sqrt(type a) { return _mm_sqrt_ps(a); }
  static int signs(type a) { return _mm_movemask_ps(a); }
};
template <>
struct Register<double> {
  using type = __m128d;
  static type loadu(const double* p) { return _mm_loadu_pd(p); }
  static void store(double* p, type v) { _mm_storeu_pd(p, v); }
  static type all(double value) { return _mm_set1_pd(value); }
  static type less(type a, type b) { return _mm_cmplt_pd(a, b); }
  static type less_or_equal(type a, type b) { return _mm_cmple_pd(a, b); }
  static type equal(type a, type b) { return _mm_cmpeq_pd(a, b); }
  static type unordered(type a, type b) { return _mm_cmpunord_pd(a, b); }
  static type both(type a, type b) { return _mm_and_pd(a, b); }
  static type only_second(type a, type b) { return _mm_andnot_pd(a, b); }
  static type either(type a, type b) { return _mm_or_pd(a, b); }
  static type exclusive_or(type a, type b) { return _mm_xor_pd(a, b); }
  static type max(type a, type b) { return _mm_max_pd(a, b); }
  static type sqrt(type a) { return _mm_sqrt_pd(a); }
  static int signs(type a) { return _mm_movemask_pd(a); }
};

template <typename T>
class Vectorized {
  using R = Register<T>;
  using Values = typename R::type;
  Values v_;

 public:
  using value_type = T;
  static constexpr int size() { return sizeof(Values) / sizeof(T); }

  Vectorized() = default;
  Vectorized(Values values) : v_(values) {}
  Vectorized(T value) : v_(R::all(value)) {}
  operator Values() const { return v_; }

  static Vectorized loadu(const T* p) { return R::loadu(p); }
  static Vectorized loadu(const T* p, int n) {
    T lane[size()] = {};
    for (int i = 0; i < std::min(n, size()); ++i) lane[i] = p[i];
    return R::loadu(lane);
  }
  void store(T* p) const { R::store(p, v_); }
  void store(T* p, int n) const {
    T lane[size()];
    R::store(lane, v_);
    for (int i = 0; i < std::min(n, size()); ++i) p[i] = lane[i];
  }

  friend Vectorized operator+(const Vectorized& a, const Vectorized& b) { return a.v_ + b.v_; }
  friend Vectorized operator-(const Vectorized& a, const Vectorized& b) { return a.v_ - b.v_; }
  friend Vectorized operator*(const Vectorized& a, const Vectorized& b) { return a.v_ * b.v_; }
  friend Vectorized operator/(const Vectorized& a, const Vectorized& b) { return a.v_ / b.v_; }
  friend Vectorized operator<(const Vectorized& a, const Vectorized& b) { return R::less(a, b); }
  friend Vectorized operator<=(const Vectorized& a, const Vectorized& b) { return R::less_or_equal(a, b); }

  Vectorized neg() const { return R::exclusive_or(R::all(T(-0.0)), v_); }
  Vectorized abs() const { return R::only_second(R::all(T(-0.0)), v_); }
  Vectorized sqrt() const { return R::sqrt(v_); }
  Vectorized reciprocal() const { return R::all(T(1)) / v_; }
  Vectorized round() const {  // of float32 that an int32 holds
    static_assert(std::is_same_v<T, float>);
    return _mm_cvtepi32_ps(_mm_cvtps_epi32(v_));
  }
  Vectorized isnan() const { return R::unordered(v_, v_); }
  bool has_inf_nan() const { return R::signs(R::unordered(v_ - v_, v_ - v_)) != 0; }
  int zero_mask() const { return R::signs(R::equal(v_, R::all(T(0)))); }

  Vectorized exp() const {
    return each([](T x) { return std::exp(x); });
  }
  Vectorized erfc() const {
    return each([](T x) { return std::erfc(x); });
  }
  Vectorized pow(const Vectorized& exponent) const {
    T e[size()];
    exponent.store(e);
    const T* power = e;
    return each([&](T x) { return std::pow(x, *power++); });
  }

  // b where the mask is set, a elsewhere
  static Vectorized blendv(const Vectorized& a, const Vectorized& b, const Vectorized& mask) {
    return R::either(R::both(mask, b), R::only_second(mask, a));
  }

 private:
  template <typename F>
  Vectorized each(const F& f) const {
    T lane[size()];
    store(lane);
    for (T& e : lane) e = f(e);
    return loadu(lane);
  }
};

template <typename T>
Vectorized<T> fmadd(const Vectorized<T>& a, const Vectorized<T>& b, const Vectorized<T>& c) {
  return a * b + c;
}
template <typename T>
Vectorized<T> fmsub(const Vectorized<T>& a, const Vectorized<T>& b, const Vectorized<T>& c) {
  return a * b - c;
}
template <typename T>
Vectorized<T> clamp_min(const Vectorized<T>& x, const Vectorized<T>& least) {
  return Register<T>::max(least, x);
}

template <typename T>
Vectorized<T> clamp(const Vectorized<T>& x, const Vectorized<T>& least, const Vectorized<T>& most) {
  return Register<T>::min(most, Register<T>::max(least, x));
}

template <typename T, typename Op>
T vec_reduce_all(const Op& op, const Vectorized<T>& v) {
  T lane[Vectorized<T>::size()];
  v.store(lane);
  Vectorized<T> total(lane[0]);
  for (int i = 1; i < Vectorized<T>::size(); ++i) {
    Vectorized<T> next(lane[i]);
    total = op(total, next);
  }
  total.store(lane);
  return lane[0];
}

}  // namespace vec

// a where the mask is set, b elsewhere
inline __m128i select(__m128i mask, __m128i a, __m128i b) {
  return _mm_or_si128(_mm_and_si128(mask, a), _mm_andnot_si128(mask, b));
}

// float16 in the lower halves of 32 bits, the upper ones zero. A subnormal number is its bits times 2^-24; others have
// their exponent 112 higher in float32, infinity and NaN twice that.
inline __m128 widen_float16(__m128i x) {
  const __m128i magnitude = _mm_and_si128(x, _mm_set1_epi32(0x7FFF)), bias = _mm_set1_epi32(112 << 23);
  const __m128i above = _mm_and_si128(_mm_cmpgt_epi32(magnitude, _mm_set1_epi32(0x7BFF)), bias);
  const __m128i normal = _mm_add_epi32(_mm_slli_epi32(magnitude, 13), _mm_add_epi32(bias, above));
  const __m128 subnormal = _mm_mul_ps(_mm_cvtepi32_ps(magnitude), _mm_set1_ps(0x1p-24f));
  const __m128i sign = _mm_slli_epi32(_mm_xor_si128(x, magnitude), 16);
  const __m128i is_subnormal = _mm_cmplt_epi32(magnitude, _mm_set1_epi32(0x0400));
  return _mm_castsi128_ps(_mm_or_si128(sign, select(is_subnormal, _mm_castps_si128(subnormal), normal)));
}

// To the nearest, ties to even, in the lower half with its sign extended. NaN is 0x7E00 with its sign, as c10's.
inline __m128i narrow_to_float16(__m128 x) {
  const __m128i bits = _mm_castps_si128(x), magnitude = _mm_and_si128(bits, _mm_set1_epi32(0x7FFFFFFF));
  const __m128i odd = _mm_and_si128(_mm_srli_epi32(magnitude, 13), _mm_set1_epi32(1));
  const __m128i rounded = _mm_add_epi32(magnitude, _mm_add_epi32(odd, _mm_set1_epi32(0x0FFF)));
  __m128i half = _mm_srli_epi32(_mm_sub_epi32(rounded, _mm_set1_epi32(112 << 23)), 13);
  const __m128i overflows = _mm_cmpgt_epi32(rounded, _mm_set1_epi32((143 << 23) - 1));  // 2^16 and more
  half = select(overflows, _mm_set1_epi32(0x7C00), half);
  half = select(_mm_castps_si128(_mm_cmpunord_ps(x, x)), _mm_set1_epi32(0x7E00), half);
  const __m128i subnormal = _mm_cvtps_epi32(_mm_mul_ps(_mm_castsi128_ps(magnitude), _mm_set1_ps(0x1p24f)));
  half = select(_mm_cmplt_epi32(magnitude, _mm_set1_epi32(113 << 23)), subnormal, half);
  const __m128i sign = _mm_slli_epi32(_mm_srai_epi32(bits, 31), 15);
  return _mm_or_si128(half, sign);
}

// bfloat16 to the nearest, ties to even, in the lower half with its sign extended. NaN is -1, as at::vec's.
inline __m128i narrow_to_bfloat16(__m128 x) {
  const __m128i bits = _mm_castps_si128(x), odd = _mm_and_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(1));
  const __m128i rounded = _mm_add_epi32(bits, _mm_add_epi32(odd, _mm_set1_epi32(0x7FFF)));
  return _mm_or_si128(_mm_srai_epi32(rounded, 16), _mm_castps_si128(_mm_cmpunord_ps(x, x)));
}

template <typename T>
std::tuple<vec::Vectorized<float>, vec::Vectorized<float>> widen(const vec::Vectorized<T>& x) {
  const __m128i zero = _mm_setzero_si128();
  if constexpr (std::is_same_v<T, c10::BFloat16>) {  // the upper half of a float32
    return {_mm_castsi128_ps(_mm_unpacklo_epi16(zero, x)), _mm_castsi128_ps(_mm_unpackhi_epi16(zero, x))};
  } else {
    return {widen_float16(_mm_unpacklo_epi16(x, zero)), widen_float16(_mm_unpackhi_epi16(x, zero))};
  }
}
template <typename T>
vec::Vectorized<T> narrow(const vec::Vectorized<float>& low, const vec::Vectorized<float>& high) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    return _mm_packs_epi32(narrow_to_bfloat16(low), narrow_to_bfloat16(high));
  } else {
    return _mm_packs_epi32(narrow_to_float16(low), narrow_to_float16(high));
  }
}

template <typename T>
vec::Vectorized<T> load_lanes(const T* p, int n) {
  return vec::Vectorized<T>::loadu(p, n);
}
template <typename T>
void store_lanes(T* p, int n, const vec::Vectorized<T>& v) {
  v.store(p, n);
}

inline vec::Vectorized<float> keep_lanes(int n, const vec::Vectorized<float>& v) {
  return _mm_and_ps(_mm_castsi128_ps(_mm_cmpgt_epi32(_mm_set1_epi32(n), _mm_setr_epi32(0, 1, 2, 3))), v);
}
inline vec::Vectorized<double> keep_lanes(int n, const vec::Vectorized<double>& v) {
  return _mm_and_pd(_mm_castsi128_pd(_mm_cmpgt_epi32(_mm_set1_epi32(n), _mm_setr_epi32(0, 0, 1, 1))), v);
}

inline __m128i lanes_set(uint32_t bits, __m128i lane) {
  return _mm_cmpeq_epi32(_mm_and_si128(_mm_set1_epi32(static_cast<int>(bits)), lane), lane);
}
inline vec::Vectorized<float> choose(uint32_t bits, int first, const vec::Vectorized<float>& a,
                                     const vec::Vectorized<float>& b) {
  return vec::Vectorized<float>::blendv(b, a, _mm_castsi128_ps(lanes_set(bits >> first, _mm_setr_epi32(1, 2, 4, 8))));
}
inline vec::Vectorized<double> choose(uint32_t bits, int first, const vec::Vectorized<double>& a,
                                      const vec::Vectorized<double>& b) {
  return vec::Vectorized<double>::blendv(b, a, _mm_castsi128_pd(lanes_set(bits >> first, _mm_setr_epi32(1, 1, 2, 2))));
}

inline double lane_sum(const vec::Vectorized<double>& v) { return _mm_cvtsd_f64(_mm_add_sd(v, _mm_unpackhi_pd(v, v))); }
inline double lane_sum(const vec::Vectorized<float>& v) {
  return lane_sum(vec::Vectorized<double>(_mm_add_pd(_mm_cvtps_pd(v), _mm_cvtps_pd(_mm_movehl_ps(v, v)))));
}

inline vec::Vectorized<float> power_of_2_below(const vec::Vectorized<float>& rounded) {
  return _mm_castsi128_ps(_mm_add_epi32(_mm_slli_epi32(_mm_castps_si128(rounded), 23), _mm_set1_epi32(126 << 23)));
}

inline void stream_vector(float* p, const vec::Vectorized<float>& v) { _mm_stream_ps(p, v); }
inline void stream_vector(double* p, const vec::Vectorized<double>& v) { _mm_stream_pd(p, v); }
template <typename T>
void stream_vector(T* p, const vec::Vectorized<T>& v) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), v);
}

}  // namespace
}  // namespace fastnorm::cpu::CPU_CAPABILITY
