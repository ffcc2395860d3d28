// vectors.h with AVX512. Bits of a mask register are lanes.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <type_traits>

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

namespace vec = at::vec;

// bfloat16 is the upper half of a float32, so one permutation of halves widens a vector of it, and another takes the
// upper halves of two: two thirds of the instructions that at::vec has for the same bits.
namespace bfloat16 {

using Wide = vec::Vectorized<float>;
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

template <typename T>
std::tuple<vec::Vectorized<float>, vec::Vectorized<float>> widen(const vec::Vectorized<T>& x) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    return {bfloat16::widen_from(bfloat16::kLane, x), bfloat16::widen_from(bfloat16::kLane + 16, x)};
  } else {
    return vec::convert_to_float<T>(x);
  }
}
template <typename T>
vec::Vectorized<T> narrow(const vec::Vectorized<float>& low, const vec::Vectorized<float>& high) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    return bfloat16::upper_halves(bfloat16::round(low), bfloat16::round(high));
  } else {
    return vec::convert_from_float<T>(low, high);
  }
}

inline uint32_t lane_mask(int n) { return _bzhi_u32(~0u, std::max(n, 0)); }  // all bits from n = 32 on

inline vec::Vectorized<float> load_lanes(const float* p, int n) { return _mm512_maskz_loadu_ps(lane_mask(n), p); }
inline vec::Vectorized<double> load_lanes(const double* p, int n) { return _mm512_maskz_loadu_pd(lane_mask(n), p); }
template <typename T>
vec::Vectorized<T> load_lanes(const T* p, int n) {
  return _mm512_maskz_loadu_epi16(lane_mask(n), p);
}

inline void store_lanes(float* p, int n, const vec::Vectorized<float>& v) { _mm512_mask_storeu_ps(p, lane_mask(n), v); }
inline void store_lanes(double* p, int n, const vec::Vectorized<double>& v) {
  _mm512_mask_storeu_pd(p, lane_mask(n), v);
}
template <typename T>
void store_lanes(T* p, int n, const vec::Vectorized<T>& v) {
  _mm512_mask_storeu_epi16(p, lane_mask(n), v);
}

inline vec::Vectorized<float> keep_lanes(int n, const vec::Vectorized<float>& v) {
  return _mm512_maskz_mov_ps(lane_mask(n), v);
}
inline vec::Vectorized<double> keep_lanes(int n, const vec::Vectorized<double>& v) {
  return _mm512_maskz_mov_pd(lane_mask(n), v);
}

inline vec::Vectorized<float> choose(uint32_t bits, int first, vec::Vectorized<float> a, vec::Vectorized<float> b) {
  return _mm512_mask_blend_ps(static_cast<__mmask16>(bits >> first), b, a);
}
inline vec::Vectorized<double> choose(uint32_t bits, int first, vec::Vectorized<double> a, vec::Vectorized<double> b) {
  return _mm512_mask_blend_pd(static_cast<__mmask8>(bits >> first), b, a);
}

inline double lane_sum(vec::Vectorized<double> v) { return _mm512_reduce_add_pd(v); }
inline double lane_sum(vec::Vectorized<float> v) {
  return _mm512_reduce_add_pd(
      _mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(v)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1))));
}

// 2^(i / 16): a register of them, from which a permutation takes a vector's.
constexpr float kPowersOf2[] = {1.0f,        1.04427378f, 1.09050773f, 1.13878863f, 1.18920712f, 1.24185781f,
                                1.29683955f, 1.35425555f, 1.41421356f, 1.47682615f, 1.54221083f, 1.61049033f,
                                1.68179283f, 1.75625216f, 1.83400809f, 1.91520656f};

// A table of sixteen powers leaves a remainder of at most ln 2 / 32, for which a polynomial of three terms does.
// Scalar math: n = round(16 x / ln 2) / 16;  r = x - n ln 2;  exp = 2^floor(n) * 2^(n - floor(n)) * (1 + r + r^2 (1/2 + r/6))
inline vec::Vectorized<float> exponential(const vec::Vectorized<float>& x_) {
  constexpr int kNearerToZero = 0b0010;                                      // of two, with the first one's sign
  const __m512 x = _mm512_range_ps(x_, _mm512_set1_ps(104), kNearerToZero);  // beyond are 0 and infinity
  const __m512 sixteenths = _mm512_set1_ps(0x1.8p19f);  // a number added to it is rounded to those, its last four bits
  const __m512 rounded = _mm512_fmadd_ps(x, _mm512_set1_ps(static_cast<float>(M_LOG2E)), sixteenths);
  const __m512 n = _mm512_sub_ps(rounded, sixteenths);
  const __m512 power = _mm512_permutexvar_ps(_mm512_castps_si512(rounded), _mm512_loadu_ps(kPowersOf2));
  __m512 r = _mm512_fmadd_ps(n, _mm512_set1_ps(-0.693359375f), x);  // ln 2 in two parts
  r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
  __m512 q = _mm512_fmadd_ps(r, _mm512_set1_ps(1.0f / 6), _mm512_set1_ps(0.5f));
  q = _mm512_fmadd_ps(_mm512_mul_ps(r, r), q, r);
  return _mm512_scalef_ps(_mm512_fmadd_ps(power, q, power), n);  // by 2^floor(n)
}

inline void stream_vector(float* p, const vec::Vectorized<float>& v) { _mm512_stream_ps(p, v); }
inline void stream_vector(double* p, const vec::Vectorized<double>& v) { _mm512_stream_pd(p, v); }
template <typename T>
void stream_vector(T* p, const vec::Vectorized<T>& v) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), v);
}

}  // namespace
}  // namespace fastnorm::cpu::CPU_CAPABILITY
