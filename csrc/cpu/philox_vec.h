// Eight Philox blocks at once, reduced to keep bits: 64 elements a call.
#pragma once

#include "../philox.h"
#include "vec.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

// 32-bit words live in the low halves of 64-bit lanes; what a product leaves in the high halves is ignored by the next
// one.
#if defined(CPU_CAPABILITY_AVX512)
struct Lanes {
  static constexpr int kSize = 8;
  __m512i v;

  static Lanes consecutive(uint64_t first) {
    return {_mm512_add_epi64(all(first).v, _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7))};
  }
  static Lanes all(uint64_t x) { return {_mm512_set1_epi64(static_cast<int64_t>(x))}; }
  Lanes times(Lanes m) const { return {_mm512_mul_epu32(v, m.v)}; }
  Lanes high() const { return {_mm512_srli_epi64(v, 32)}; }
  static Lanes exclusive_or(Lanes a, Lanes b, Lanes c) { return {_mm512_ternarylogic_epi64(a.v, b.v, c.v, 0x96)}; }

  // Byte i: which of lane i's eight 16-bit numbers, read from r0's low half up, are >= threshold.
  static uint64_t keep(const Lanes (&r)[4], uint32_t threshold) {
    const __m512i t = _mm512_set1_epi16(static_cast<int16_t>(threshold));
    const __m512i a = _mm512_mask_blend_epi32(0xAAAA, r[0].v, _mm512_slli_epi64(r[1].v, 32));
    const __m512i b = _mm512_mask_blend_epi32(0xAAAA, r[2].v, _mm512_slli_epi64(r[3].v, 32));
    const uint32_t even = _mm512_cmpge_epu16_mask(_mm512_unpacklo_epi64(a, b), t);  // lanes 0 2 4 6, a byte each
    const uint32_t odd = _mm512_cmpge_epu16_mask(_mm512_unpackhi_epi64(a, b), t);   // lanes 1 3 5 7
    return spread_bytes(even) | spread_bytes(odd) << 8;
  }

 private:
  // bytes 3 2 1 0 -> 0 3 0 2 0 1 0 0
  static uint64_t spread_bytes(uint64_t x) {
    x = (x | x << 16) & 0x0000FFFF0000FFFFull;
    return (x | x << 8) & 0x00FF00FF00FF00FFull;
  }
};
#elif defined(CPU_CAPABILITY_AVX2)
struct Lanes {
  static constexpr int kSize = 4;
  __m256i v;

  static Lanes consecutive(uint64_t first) { return {_mm256_add_epi64(all(first).v, _mm256_setr_epi64x(0, 1, 2, 3))}; }
  static Lanes all(uint64_t x) { return {_mm256_set1_epi64x(static_cast<int64_t>(x))}; }
  Lanes times(Lanes m) const { return {_mm256_mul_epu32(v, m.v)}; }
  Lanes high() const { return {_mm256_srli_epi64(v, 32)}; }
  static Lanes exclusive_or(Lanes a, Lanes b, Lanes c) { return {_mm256_xor_si256(_mm256_xor_si256(a.v, b.v), c.v)}; }

  static uint64_t keep(const Lanes (&r)[4], uint32_t threshold) {
    const __m256i t = _mm256_set1_epi16(static_cast<int16_t>(threshold));
    const __m256i a = _mm256_blend_epi32(r[0].v, _mm256_slli_epi64(r[1].v, 32), 0xAA);
    const __m256i b = _mm256_blend_epi32(r[2].v, _mm256_slli_epi64(r[3].v, 32), 0xAA);
    const auto at_least = [&](__m256i x) { return _mm256_cmpeq_epi16(_mm256_max_epu16(x, t), x); };
    const __m256i even = at_least(_mm256_unpacklo_epi64(a, b)), odd = at_least(_mm256_unpackhi_epi64(a, b));
    return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_packs_epi16(even, odd)));
  }
};
#else
struct Lanes {
  static constexpr int kSize = 8;
  uint64_t v[kSize];

  template <typename F>
  static Lanes each(const F& f) {
    Lanes r;
    for (int i = 0; i < kSize; ++i) r.v[i] = f(i);
    return r;
  }
  static Lanes consecutive(uint64_t first) {
    return each([&](int i) { return first + i; });
  }
  static Lanes all(uint64_t x) {
    return each([&](int) { return x; });
  }
  Lanes times(Lanes m) const {
    return each([&](int i) { return (v[i] & 0xFFFFFFFFu) * (m.v[i] & 0xFFFFFFFFu); });
  }
  Lanes high() const {
    return each([&](int i) { return v[i] >> 32; });
  }
  static Lanes exclusive_or(Lanes a, Lanes b, Lanes c) {
    return each([&](int i) { return a.v[i] ^ b.v[i] ^ c.v[i]; });
  }

  static uint64_t keep(const Lanes (&r)[4], uint32_t threshold) {
    uint64_t bits = 0;
    for (int i = 0; i < kSize; ++i)
      for (int e = 0; e < kElementsPerPhilox; ++e)
        bits |= static_cast<uint64_t>((r[e / 2].v[i] >> (e % 2 * 16) & 0xFFFF) >= threshold) << (i * 8 + e);
    return bits;
  }
};
#endif

// Scalar math: bit i of a result is set iff half word i % 8 of philox4x32({block + i / 8, offset}, seed) >= threshold.
class KeepBits {
 public:
  KeepBits(uint64_t seed, uint64_t offset, uint32_t threshold) : offset_(offset), threshold_(threshold) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1) key_[round] = {k0, k1};
  }

  // The 64 elements from 8 * block on.
  uint64_t of_group(uint64_t block) const {
    uint64_t bits = 0;
    for (int i = 0; i < kElementsPerPhilox; i += Lanes::kSize)
      bits |= of_lanes(Lanes::consecutive(block + static_cast<uint64_t>(i))) << (i * 8);
    return bits;
  }

  // `count` such groups, one after the other.
  FASTNORM_LOOP void of_groups(uint64_t block, int64_t count, uint64_t* bits) const {
    const KeepBits local = *this;  // in registers: a store to bits might be one to what is only referred to
    int64_t i = 0;
    for (; i + 2 <= count; i += 2, block += 2 * kElementsPerPhilox) {
      bits[i] = local.of_group(block);
      bits[i + 1] = local.of_group(block + kElementsPerPhilox);
    }
    if (i < count) bits[i] = local.of_group(block);
  }

 private:
  uint64_t of_lanes(Lanes block) const {
    const Lanes m0 = Lanes::all(kPhiloxM0), m1 = Lanes::all(kPhiloxM1);
    Lanes c[4] = {block, block.high(), Lanes::all(offset_), Lanes::all(offset_ >> 32)};
#pragma GCC unroll 10
    for (int round = 0; round < kPhiloxRounds; ++round) {
      const Lanes p0 = c[0].times(m0), p1 = c[2].times(m1);
      c[0] = Lanes::exclusive_or(p1.high(), c[1], Lanes::all(key_[round].k0));
      c[2] = Lanes::exclusive_or(p0.high(), c[3], Lanes::all(key_[round].k1));
      c[1] = p1;
      c[3] = p0;
    }
    return Lanes::keep(c, threshold_);
  }

  struct Key {
    uint32_t k0, k1;
  };
  Key key_[kPhiloxRounds];
  uint64_t offset_;
  uint32_t threshold_;
};

}  // namespace
}  // namespace fastnorm::cpu::CPU_CAPABILITY
