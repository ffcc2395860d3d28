// Philox blocks side by side, reduced to keep bits: 64 elements a group of eight blocks.
#pragma once

#include "../philox.h"
#include "vec.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

constexpr int kGroupBlocks = 64 / kElementsPerPhilox;

// 32-bit words live in the low halves of 64-bit lanes; what a product leaves in the high halves is ignored by the next
// one. exclusive_or() of three comes to the first of them last, which is a product's and has others wait for it. keep():
// byte i has a bit for each of lane i's eight 16-bit numbers, whether it is >= threshold. A lane's numbers come as r[0]
// and r[1] have them, but with the words of each exchanged: high half first.
#if defined(CPU_CAPABILITY_AVX512)
struct Lanes {
  static constexpr int kSize = 8, kAtOnce = 6;  // 4 of 32 registers each
  __m512i v;

  static Lanes consecutive(uint64_t first) {
    return {_mm512_add_epi64(all(first).v, _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7))};
  }
  static Lanes all(uint64_t x) { return {_mm512_set1_epi64(static_cast<int64_t>(x))}; }
  Lanes times(Lanes m) const { return {_mm512_mul_epu32(v, m.v)}; }
  Lanes high_to_low() const { return {_mm512_srli_epi64(v, 32)}; }
  Lanes low_to_high() const { return {_mm512_slli_epi64(v, 32)}; }
  static Lanes exclusive_or(Lanes a, Lanes b) { return {_mm512_xor_si512(a.v, b.v)}; }
  static Lanes exclusive_or(Lanes a, Lanes b, Lanes c) { return {_mm512_ternarylogic_epi64(a.v, b.v, c.v, 0x96)}; }

  static uint64_t keep(const Lanes (&r)[2], uint32_t threshold) {
    const __m512i t = _mm512_set1_epi16(static_cast<int16_t>(threshold));
    const uint64_t bits = _pdep_u64(_mm512_cmpge_epu16_mask(r[0].v, t), 0x0F0F0F0F0F0F0F0Full) |
                          _pdep_u64(_mm512_cmpge_epu16_mask(r[1].v, t), 0xF0F0F0F0F0F0F0F0ull);
    return exchange_words(bits);
  }

  // Each pair of bits, a word's, with its neighbour.
  static uint64_t exchange_words(uint64_t bits) {
    constexpr uint64_t kLow = 0x3333333333333333ull;
    return (bits >> 2 & kLow) | (bits & kLow) << 2;
  }
};
#elif defined(CPU_CAPABILITY_AVX2)
struct Lanes {
  static constexpr int kSize = 4, kAtOnce = 3;  // 4 of 16 registers each
  __m256i v;

  static Lanes consecutive(uint64_t first) { return {_mm256_add_epi64(all(first).v, _mm256_setr_epi64x(0, 1, 2, 3))}; }
  static Lanes all(uint64_t x) { return {_mm256_set1_epi64x(static_cast<int64_t>(x))}; }
  Lanes times(Lanes m) const { return {_mm256_mul_epu32(v, m.v)}; }
  Lanes high_to_low() const { return {_mm256_srli_epi64(v, 32)}; }
  Lanes low_to_high() const { return {_mm256_slli_epi64(v, 32)}; }
  static Lanes exclusive_or(Lanes a, Lanes b) { return {_mm256_xor_si256(a.v, b.v)}; }
  static Lanes exclusive_or(Lanes a, Lanes b, Lanes c) { return exclusive_or(a, exclusive_or(b, c)); }

  static uint64_t keep(const Lanes (&r)[2], uint32_t threshold) {
    const __m256i t = _mm256_set1_epi16(static_cast<int16_t>(threshold));
    const auto at_least = [&](__m256i x) { return _mm256_cmpeq_epi16(_mm256_max_epu16(x, t), x); };
    // In each half of a vector four bytes for each lane of r[0], then of r[1]; words of two bytes are exchanged.
    const __m256i order = _mm256_setr_epi8(2, 3, 0, 1, 10, 11, 8, 9, 6, 7, 4, 5, 14, 15, 12, 13, 2, 3, 0, 1, 10, 11, 8,
                                           9, 6, 7, 4, 5, 14, 15, 12, 13);
    const __m256i bytes = _mm256_packs_epi16(at_least(r[0].v), at_least(r[1].v));
    return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_shuffle_epi8(bytes, order)));
  }
};
#elif defined(__x86_64__)
struct Lanes {
  static constexpr int kSize = 2, kAtOnce = 2;  // 4 of 16 registers each
  __m128i v;

  static Lanes consecutive(uint64_t first) { return {_mm_add_epi64(all(first).v, _mm_set_epi64x(1, 0))}; }
  static Lanes all(uint64_t x) { return {_mm_set1_epi64x(static_cast<int64_t>(x))}; }
  Lanes times(Lanes m) const { return {_mm_mul_epu32(v, m.v)}; }
  Lanes high_to_low() const { return {_mm_srli_epi64(v, 32)}; }
  Lanes low_to_high() const { return {_mm_slli_epi64(v, 32)}; }
  static Lanes exclusive_or(Lanes a, Lanes b) { return {_mm_xor_si128(a.v, b.v)}; }
  static Lanes exclusive_or(Lanes a, Lanes b, Lanes c) { return exclusive_or(a, exclusive_or(b, c)); }

  static uint64_t keep(const Lanes (&r)[2], uint32_t threshold) {
    const __m128i t = _mm_set1_epi16(static_cast<int16_t>(threshold));
    const auto at_least = [&](__m128i x) {
      x = _mm_shuffle_epi32(x, _MM_SHUFFLE(2, 3, 0, 1));
      return _mm_cmpeq_epi16(_mm_subs_epu16(t, x), _mm_setzero_si128());
    };
    const __m128i even = at_least(_mm_unpacklo_epi64(r[0].v, r[1].v)),
                  odd = at_least(_mm_unpackhi_epi64(r[0].v, r[1].v));
    return static_cast<uint32_t>(_mm_movemask_epi8(_mm_packs_epi16(even, odd)));
  }
};
#else
struct Lanes {
  static constexpr int kSize = 8, kAtOnce = 1;
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
  Lanes high_to_low() const {
    return each([&](int i) { return v[i] >> 32; });
  }
  Lanes low_to_high() const {
    return each([&](int i) { return v[i] << 32; });
  }
  static Lanes exclusive_or(Lanes a, Lanes b) {
    return each([&](int i) { return a.v[i] ^ b.v[i]; });
  }
  static Lanes exclusive_or(Lanes a, Lanes b, Lanes c) { return exclusive_or(a, exclusive_or(b, c)); }

  static uint64_t keep(const Lanes (&r)[2], uint32_t threshold) {
    uint64_t bits = 0;
    for (int i = 0; i < kSize; ++i)
      for (int e = 0; e < kElementsPerPhilox; ++e) {
        const uint64_t number = r[e / 4].v[i] >> ((e % 4 ^ 2) * 16) & 0xFFFF;
        bits |= static_cast<uint64_t>(number >= threshold) << (i * 8 + e);
      }
    return bits;
  }
};
#endif

// Scalar math: bit i of a result is set iff half word i % 8 of dropout_bits(seed, offset, block + i / 8) >= threshold.
//
// Rounds depend on each other, so groups are drawn several at once. Of what the first two rounds multiply, `offset` and
// what comes of a block's upper half are the same for all that are drawn together; the last round leaves its products'
// words where they are: low half first.
class KeepBits {
 public:
  KeepBits(uint64_t seed, uint64_t offset, uint32_t threshold) : seed_(seed), offset_(offset), threshold_(threshold) {
    for (int round = kSharedRounds; round < kPhiloxRounds; ++round) {
      const int shift = round == kPhiloxRounds - 1 ? 32 : 0;
      for (int i = 0; i < 2; ++i)
        key_[round - kSharedRounds][i] = Lanes::all(static_cast<uint64_t>(key(round, i)) << shift);
    }
    third_word_ = Lanes::all(static_cast<uint32_t>(offset >> 32) ^ key(0, 1));
    first_word_ = Lanes::all(static_cast<uint32_t>(offset_product()) ^ key(1, 0));
    low_blocks_ = blocks_above(0);
  }

  // The 64 elements from 8 * block on.
  uint64_t of_group(uint64_t block) const {
    uint64_t bits;
    draw<1>(&block, &bits);
    return bits;
  }

  // `count` such groups; next_block() gives the first block of one after the other, each above the one before it.
  template <typename F>
  FASTNORM_LOOP void of_groups(int64_t count, uint64_t* bits, const F& next_block) const {
    constexpr int kGroups = Lanes::kAtOnce;
    uint64_t blocks[kGroups];
    for (; count >= kGroups; count -= kGroups, bits += kGroups) {
#pragma GCC unroll 8
      for (int i = 0; i < kGroups; ++i) blocks[i] = next_block();
      draw<kGroups>(blocks, bits);
    }
    for (; count > 0; --count, ++bits) *bits = of_group(next_block());
  }

 private:
  static constexpr int kParts = kGroupBlocks / Lanes::kSize;  // of a group
  static constexpr int kSharedRounds = 2;                     // of which blocks drawn together share a part
  static constexpr int kOwnRounds = kPhiloxRounds - kSharedRounds;

  // Of the second round, for blocks with one upper half: the product of the first word, and what its high half and the
  // key make of the third.
  struct SameUpperHalf {
    Lanes product, third_word;
  };

  uint32_t key(uint32_t round, int i) const {
    return static_cast<uint32_t>(seed_ >> (32 * i)) + round * (i ? kPhiloxW1 : kPhiloxW0);
  }
  uint64_t offset_product() const { return uint64_t{kPhiloxM1} * static_cast<uint32_t>(offset_); }
  SameUpperHalf blocks_above(uint32_t upper_half) const {
    const uint32_t first_word = static_cast<uint32_t>(offset_product() >> 32) ^ upper_half ^ key(0, 0);
    const uint64_t product = uint64_t{kPhiloxM0} * first_word;
    return {Lanes::all(product), Lanes::all(static_cast<uint32_t>(product >> 32) ^ key(1, 1))};
  }

  template <int kGroups>
  void draw(const uint64_t* blocks, uint64_t* bits) const {
    uint64_t apart = 0;
    for (int i = 0; i < kGroups; ++i) apart |= (blocks[i] + kGroupBlocks - 1) ^ blocks[0];
    if (apart >> 32) {
      for (int i = 0; i < kGroups; ++i) bits[i] = draw_one_by_one(blocks[i]);
      return;
    }
    const uint32_t upper_half = static_cast<uint32_t>(blocks[0] >> 32);
    const SameUpperHalf same = upper_half == 0 ? low_blocks_ : blocks_above(upper_half);
    constexpr int kAll = kGroups * kParts, kCount = std::min(kAll, Lanes::kAtOnce);
    static_assert(kAll % kCount == 0);
    uint8_t* bytes = reinterpret_cast<uint8_t*>(bits);
#pragma GCC unroll 1
    for (int first = 0; first < kAll; first += kCount) {
      Lanes counters[kCount];
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i)
        counters[i] = Lanes::consecutive(blocks[(first + i) / kParts] + (first + i) % kParts * Lanes::kSize);
      draw_lanes<kCount>(counters, same, bytes + first * Lanes::kSize);
    }
  }

  // Where the upper half changes, once in 2^35 elements.
  __attribute__((noinline, cold)) uint64_t draw_one_by_one(uint64_t block) const {
    uint64_t bits = 0;
    for (int e = 0; e < 64; ++e) {
      const Philox4x32 drawn = dropout_bits(seed_, offset_, block + e / kElementsPerPhilox);
      const uint32_t number = drawn.word[e % kElementsPerPhilox / 2] >> (e % 2 * 16) & 0xFFFF;
      bits |= static_cast<uint64_t>(number >= threshold_) << e;
    }
    return bits;
  }

  // A byte for each lane of the counters.
  template <int kCount>
  void draw_lanes(const Lanes (&counter)[kCount], const SameUpperHalf& same, uint8_t* bytes) const {
    static_assert(kPhiloxRounds > kSharedRounds);
    const Lanes m0 = Lanes::all(kPhiloxM0), m1 = Lanes::all(kPhiloxM1);
    Lanes c[kCount][4];
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      const Lanes p0 = counter[i].times(m0);
      const Lanes p1 = Lanes::exclusive_or(p0.high_to_low(), third_word_).times(m1);
      c[i][0] = Lanes::exclusive_or(p1.high_to_low(), first_word_);
      c[i][1] = p1;
      c[i][2] = Lanes::exclusive_or(p0, same.third_word);
      c[i][3] = same.product;
    }
#pragma GCC unroll 1  // so that the state stays in registers and the keys in memory, and not the other way
    for (int round = 0; round < kOwnRounds - 1; ++round) {
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i) {
        const Lanes p0 = c[i][0].times(m0), p1 = c[i][2].times(m1);
        c[i][0] = Lanes::exclusive_or(p1.high_to_low(), c[i][1], key_[round][0]);
        c[i][2] = Lanes::exclusive_or(p0.high_to_low(), c[i][3], key_[round][1]);
        c[i][1] = p1;
        c[i][3] = p0;
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      const Lanes(&last)[2] = key_[kOwnRounds - 1];
      const Lanes words[2] = {Lanes::exclusive_or(c[i][2].times(m1), c[i][1].low_to_high(), last[0]),
                              Lanes::exclusive_or(c[i][0].times(m0), c[i][3].low_to_high(), last[1])};
      const uint64_t kept = Lanes::keep(words, threshold_);
      std::memcpy(bytes + i * Lanes::kSize, &kept, Lanes::kSize);
    }
  }

  uint64_t seed_, offset_;
  uint32_t threshold_;
  Lanes key_[kOwnRounds][2];  // of the rounds after the shared ones; the last one's in the high halves
  // What the offset and the key make of a word: of the first round's third, but for a counter's product, and of the
  // second round's first, but for the product of that third.
  Lanes third_word_, first_word_;
  SameUpperHalf low_blocks_;
};

}  // namespace
}  // namespace fastnorm::cpu::CPU_CAPABILITY
