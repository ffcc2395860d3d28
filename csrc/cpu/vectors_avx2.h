// vectors.h with AVX2. A mask is a vector whose lanes are all ones or zero.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <tuple>
#include <type_traits>

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

namespace vec = at::vec;

// bfloat16 is the upper half of a float32, so half words of zeros below it widen it. Instructions work within the two
// halves of a vector; this permutation goes between quarters 0 1 2 3 and 0 2 1 3, either way.
namespace bfloat16 {

inline __m256i swap_quarters(__m256i x) { return _mm256_permute4x64_epi64(x, 0xD8); }

// To the nearest, ties to even, of both vectors at once: their upper halves side by side as half words, and their lower
// ones. NaN stays NaN, for a number larger than any cannot become larger.
inline __m256i narrow_even_odd(__m256i even, __m256i odd) {
  constexpr int kOdd = 0xAA;  // half words
  const __m256i upper = _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, kOdd);
  const __m256i lower = _mm256_blend_epi16(even, _mm256_slli_epi32(odd, 16), kOdd);
  const __m256i beyond_half = _mm256_xor_si256(lower, _mm256_set1_epi16(-0x8000));  // lower - 0x8000, signed
  const __m256i minus_odd = _mm256_sub_epi16(_mm256_setzero_si256(), _mm256_and_si256(upper, _mm256_set1_epi16(1)));
  const __m256i minus_one_up = _mm256_cmpgt_epi16(beyond_half, minus_odd);
  return _mm256_max_epu16(_mm256_subs_epi16(upper, minus_one_up), upper);
}

inline __m256i narrow(__m256i low, __m256i high) {
  const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15, 0, 1, 4, 5, 8, 9, 12, 13,
                                         2, 3, 6, 7, 10, 11, 14, 15);
  return swap_quarters(_mm256_shuffle_epi8(narrow_even_odd(low, high), order));
}

}  // namespace bfloat16

template <typename T>
std::tuple<vec::Vectorized<float>, vec::Vectorized<float>> widen(const vec::Vectorized<T>& x) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    const __m256i zero = _mm256_setzero_si256(), quarters = bfloat16::swap_quarters(x);
    return {_mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, quarters)),
            _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, quarters))};
  } else {
    return vec::convert_to_float<T>(x);
  }
}
template <typename T>
vec::Vectorized<T> narrow(const vec::Vectorized<float>& low, const vec::Vectorized<float>& high) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    return bfloat16::narrow(_mm256_castps_si256(low), _mm256_castps_si256(high));
  } else {
    return vec::convert_from_float<T>(low, high);
  }
}

// The elements of even places, and those of odd ones: no permutation either way.
template <typename T>
std::tuple<vec::Vectorized<float>, vec::Vectorized<float>> widen_any_order(const vec::Vectorized<T>& x) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    const __m256i upper_halves = _mm256_set1_epi32(-0x10000);
    return {_mm256_castsi256_ps(_mm256_slli_epi32(x, 16)), _mm256_castsi256_ps(_mm256_and_si256(x, upper_halves))};
  } else {
    return widen<T>(x);
  }
}
template <typename T>
vec::Vectorized<T> narrow_any_order(const vec::Vectorized<float>& even, const vec::Vectorized<float>& odd) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    return bfloat16::narrow_even_odd(_mm256_castps_si256(even), _mm256_castps_si256(odd));
  } else {
    return narrow<T>(even, odd);
  }
}

inline __m256i lane_mask_32(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline __m256i lane_mask_64(int n) { return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3)); }

inline vec::Vectorized<float> load_lanes(const float* p, int n) { return _mm256_maskload_ps(p, lane_mask_32(n)); }
inline vec::Vectorized<double> load_lanes(const double* p, int n) { return _mm256_maskload_pd(p, lane_mask_64(n)); }
// 16 bits: in pairs, which there are masks for, and the last one of an odd number by itself.
template <typename T>
vec::Vectorized<T> load_lanes(const T* p, int n) {
  const __m256i whole = lane_mask_32(n / 2), pairs = _mm256_maskload_epi32(reinterpret_cast<const int*>(p), whole);
  if (n % 2 == 0) return pairs;
  const __m256i next = _mm256_xor_si256(whole, lane_mask_32(n / 2 + 1));
  return _mm256_or_si256(pairs, _mm256_and_si256(next, _mm256_set1_epi32(p[n - 1].x)));
}

inline void store_lanes(float* p, int n, const vec::Vectorized<float>& v) {
  _mm256_maskstore_ps(p, lane_mask_32(n), v);
}
inline void store_lanes(double* p, int n, const vec::Vectorized<double>& v) {
  _mm256_maskstore_pd(p, lane_mask_64(n), v);
}
template <typename T>
void store_lanes(T* p, int n, const vec::Vectorized<T>& v) {
  _mm256_maskstore_epi32(reinterpret_cast<int*>(p), lane_mask_32(n / 2), v);
  if (n % 2 == 0) return;
  const __m256i last = _mm256_permutevar8x32_epi32(v, _mm256_set1_epi32(n / 2));
  p[n - 1].x = static_cast<uint16_t>(_mm256_cvtsi256_si32(last));
}

inline vec::Vectorized<float> keep_lanes(int n, const vec::Vectorized<float>& v) {
  return _mm256_and_ps(_mm256_castsi256_ps(lane_mask_32(n)), v);
}
inline vec::Vectorized<double> keep_lanes(int n, const vec::Vectorized<double>& v) {
  return _mm256_and_pd(_mm256_castsi256_pd(lane_mask_64(n)), v);
}

// Of the first lane the bit `first`, of each next one that `step` further on.
inline vec::Vectorized<float> choose_steps(uint32_t bits, int first, int step, vec::Vectorized<float> a,
                                           vec::Vectorized<float> b) {
  const auto bit = [&](int lane) { return 1 << (first + lane * step); };
  const __m256i lane = _mm256_setr_epi32(bit(0), bit(1), bit(2), bit(3), bit(4), bit(5), bit(6), bit(7));
  const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane), lane);
  return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(set));
}
inline vec::Vectorized<float> choose(uint32_t bits, int first, vec::Vectorized<float> a, vec::Vectorized<float> b) {
  return choose_steps(bits, first, 1, a, b);
}
inline vec::Vectorized<double> choose(uint32_t bits, int first, vec::Vectorized<double> a, vec::Vectorized<double> b) {
  const __m256i lane = _mm256_setr_epi64x(1 << first, 2 << first, 4 << first, 8 << first);
  const __m256i set = _mm256_cmpeq_epi64(_mm256_and_si256(_mm256_set1_epi64x(static_cast<int>(bits)), lane), lane);
  return _mm256_blendv_pd(b, a, _mm256_castsi256_pd(set));
}

// Of what widen_any_order<T> gives, first or second.
template <typename T, typename Vec>
Vec choose_any_order(uint32_t bits, int first, const Vec& a, const Vec& b) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    return choose_steps(bits, first / Vec::size(), 2, a, b);
  } else {
    return choose(bits, first, a, b);
  }
}

// Bit i: whether element i is zero in the vectors that widen_any_order<T> gives, whose lanes are zero or all ones.
template <typename T, typename Vec>
uint32_t zero_mask_any_order(const Vec& first, const Vec& second) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    constexpr int kOdd = 0xAA;  // half words
    const __m256i words = _mm256_blend_epi16(_mm256_castps_si256(first), _mm256_castps_si256(second), kOdd);
    const uint32_t ones = _mm256_movemask_epi8(_mm256_packs_epi16(words, words));  // each half's eight bits twice
    return ~((ones & 0xFF) | (ones >> 8 & 0xFF00)) & 0xFFFF;
  } else {
    return static_cast<uint32_t>(first.zero_mask()) | static_cast<uint32_t>(second.zero_mask()) << Vec::size();
  }
}

inline double lane_sum(__m256d v) {
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}
inline double lane_sum(vec::Vectorized<double> v) { return lane_sum(static_cast<__m256d>(v)); }
inline double lane_sum(vec::Vectorized<float> v) {
  return lane_sum(
      _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(v)), _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1))));
}

inline vec::Vectorized<float> power_of_2_below(const vec::Vectorized<float>& rounded) {
  return _mm256_castsi256_ps(
      _mm256_add_epi32(_mm256_slli_epi32(_mm256_castps_si256(rounded), 23), _mm256_set1_epi32(126 << 23)));
}

inline void stream_vector(float* p, const vec::Vectorized<float>& v) { _mm256_stream_ps(p, v); }
inline void stream_vector(double* p, const vec::Vectorized<double>& v) { _mm256_stream_pd(p, v); }
template <typename T>
void stream_vector(T* p, const vec::Vectorized<T>& v) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), v);
}

}  // namespace
}  // namespace fastnorm::cpu::CPU_CAPABILITY
