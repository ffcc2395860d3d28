// Mask bits of planes that a kernel takes as one run: together in the run, each plane's from a byte on in the mask.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

static_assert(std::endian::native == std::endian::little, "bit i of eight bytes is bit i of a word");

constexpr int64_t kBitsAtOnce = 56;  // seven bytes: beside them a word has room for up to seven bits of a byte before

inline uint64_t low_bits(uint64_t word, int64_t n) { return word & ((uint64_t{1} << n) - 1); }

// Calls f(bit of the run, first byte of the mask, bits) for each piece of up to kBitsAtOnce bits, in order.
template <typename F>
void for_pieces(int64_t planes, int64_t plane, const F& f) {
  const int64_t bytes = (plane + 7) / 8;
  for (int64_t p = 0; p < planes; ++p)
    for (int64_t i = 0; i < plane; i += kBitsAtOnce)
      f(p * plane + i, p * bytes + i / 8, std::min(kBitsAtOnce, plane - i));
}

// Neither is inlined, which would be once an activation; a call is little beside the bits of a row.

// The bits of `planes` planes of `plane` elements, from a run of them to the mask. The run can be read a word past its end.
__attribute__((noinline)) void split_bits(const uint8_t* run, int64_t planes, int64_t plane, uint8_t* mask) {
  const int64_t end = planes * ((plane + 7) / 8);
  for_pieces(planes, plane, [&](int64_t bit, int64_t byte, int64_t n) {
    uint64_t word;
    std::memcpy(&word, run + bit / 8, sizeof word);
    word = low_bits(word >> bit % 8, n);
    if (byte + 8 <= end) {  // what comes next overwrites the rest
      std::memcpy(mask + byte, &word, sizeof word);
    } else {
      for (; byte < end; ++byte, word >>= 8) mask[byte] = static_cast<uint8_t>(word);
    }
  });
}

// The reverse. The run can be written a word past its end.
__attribute__((noinline)) void join_bits(const uint8_t* mask, int64_t planes, int64_t plane, uint8_t* run) {
  const int64_t end = planes * ((plane + 7) / 8);
  uint64_t before = 0;  // the bits of the byte that this piece begins in
  for_pieces(planes, plane, [&](int64_t bit, int64_t byte, int64_t n) {
    uint64_t word = 0;
    if (byte + 8 <= end) {
      std::memcpy(&word, mask + byte, sizeof word);
    } else {
      for (int64_t i = byte; i < end; ++i) word |= static_cast<uint64_t>(mask[i]) << 8 * (i - byte);
    }
    word = before | low_bits(word, n) << bit % 8;
    std::memcpy(run + bit / 8, &word, sizeof word);
    before = word >> (((bit + n) / 8 - bit / 8) * 8);
  });
}

}  // namespace
}  // namespace fastnorm::cpu::CPU_CAPABILITY
