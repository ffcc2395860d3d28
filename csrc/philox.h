// Philox4x32-7, the counter-based generator of Salmon et al. 2011 ("Parallel random numbers: as easy as 1, 2, 3"), and
// how a dropout mask is read from it. A mask is a pure function of (seed, offset, p, index), so it is the same for any
// data type, layout, thread count, instruction set and device, and backward draws it again instead of keeping it.
#pragma once

#include <cmath>
#include <cstdint>

#include "moments.h"  // FASTNORM_HOST_DEVICE

namespace fastnorm {

struct Philox4x32 {
  uint32_t word[4];
};

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;  // multipliers
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u,
                   kPhiloxW1 = 0xBB67AE85u;  // Weyl increments of the key: golden ratio, sqrt(3) - 1
// Seven are the fewest with which it passes all of BigCrush (table 2 there). What is drawn for simulations takes ten, to
// be safe; dropout needs no more than numbers without a pattern, and its rounds are most of its work.
constexpr int kPhiloxRounds = 7;
constexpr int kElementsPerPhilox = 8;

namespace {  // internal linkage: see isa.h

template <int kRounds>
FASTNORM_HOST_DEVICE inline Philox4x32 philox4x32(Philox4x32 counter, uint64_t key) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  uint32_t* c = counter.word;
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c[0], p1 = static_cast<uint64_t>(kPhiloxM1) * c[2];
    const uint32_t hi0 = static_cast<uint32_t>(p0 >> 32), hi1 = static_cast<uint32_t>(p1 >> 32);
    counter = {{hi1 ^ c[1] ^ k0, static_cast<uint32_t>(p1), hi0 ^ c[3] ^ k1, static_cast<uint32_t>(p0)}};
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return counter;
}

// One call gives 128 bits: 16 for each of the eight elements with indices 8 * block .. 8 * block + 7, low halves first.
FASTNORM_HOST_DEVICE inline Philox4x32 dropout_bits(uint64_t seed, uint64_t offset, uint64_t block) {
  return philox4x32<kPhiloxRounds>({{static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32),
                                     static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32)}},
                                   seed);
}

// The seed of a mask from the seed and offset of a CUDA generator of torch's: a draw of Philox at a place that torch's
// own kernels, of ten rounds with counters (offset, thread), do not reach. So a mask shares no bits with other random
// numbers.
FASTNORM_HOST_DEVICE inline uint64_t dropout_seed(uint64_t seed, uint64_t offset) {
  constexpr uint32_t kPlace = 0xFFFFFFFFu;
  const Philox4x32 drawn =
      philox4x32<10>({{static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32), kPlace, kPlace}}, seed);
  return drawn.word[0] | static_cast<uint64_t>(drawn.word[1]) << 32;
}

}  // namespace

// The probability that is drawn: p rounded to a multiple of 2^-16. An element is dropped iff its 16 bits are below
// `threshold`, and the kept ones are scaled by the reciprocal of exactly what is kept, so that E[y] = x whatever the
// rounding did. p = 1 is "all kept, times zero".
struct DropoutLevel {
  uint32_t threshold;  // 0 (nothing dropped: p < 2^-17) .. 65535
  double scale;        // 1 / (1 - threshold / 65536), or 0 for p = 1
  // Alpha dropout's (dropout.h): what is added to kept and to dropped elements.
  double shift_kept = 0, shift_dropped = 0;
};

namespace {

inline DropoutLevel dropout_level(double p) {
  if (p >= 1) return {0u, 0.0};
  const uint32_t rounded = static_cast<uint32_t>(std::lrint(p * 65536.0));
  const uint32_t threshold = rounded > 65535u ? 65535u : rounded;
  return {threshold, 65536.0 / (65536.0 - threshold)};
}

}  // namespace

}  // namespace fastnorm
