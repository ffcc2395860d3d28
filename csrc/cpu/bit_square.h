// Columns of bits become rows: a mask is drawn along each channel, and channels_last takes it across channels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "vec.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

// Bit c of rows[r * pitch] is bit r of columns[c], for r < count <= 64.
#if defined(CPU_CAPABILITY_AVX512)
// Bytes first. Two permutations bring byte r / 8 of eight columns together, and then that of all 64 columns is a vector,
// where a row is a test of bit r % 8.
inline void transpose_bits(const uint64_t (&columns)[64], int64_t count, uint64_t* rows, int64_t pitch) {
  using Words = long long __attribute__((vector_size(64)));  // the compiler computes with it
  constexpr Words kLane = {0, 1, 2, 3, 4, 5, 6, 7};
  constexpr Words kGather = kLane * 0x0001'0001'0001'0001 + 0x0018'0010'0008'0000;  // word b of each 128 bits to lane b
  const __m512i interleave =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15));
  __m512i even[4], odd[4];  // 128 bits b / 2 of number j: columns 16 * j .. 16 * j + 15 of byte b
  for (int j = 0; j < 4; ++j) {
    const auto by_bytes = [&](const uint64_t* eight) {
      const __m512i pairs = _mm512_shuffle_epi8(_mm512_loadu_si512(eight), interleave);
      return _mm512_permutexvar_epi16(reinterpret_cast<__m512i>(kGather), pairs);
    };
    const __m512i a = by_bytes(columns + 16 * j), b = by_bytes(columns + 16 * j + 8);
    even[j] = _mm512_unpacklo_epi64(a, b);
    odd[j] = _mm512_unpackhi_epi64(a, b);
  }
  __m512i bytes[8];  // of all columns
  const auto transpose_quarters = [&](const __m512i(&q)[4], int first) {
    const __m512i a = _mm512_shuffle_i64x2(q[0], q[1], 0x88), b = _mm512_shuffle_i64x2(q[2], q[3], 0x88),
                  c = _mm512_shuffle_i64x2(q[0], q[1], 0xDD), d = _mm512_shuffle_i64x2(q[2], q[3], 0xDD);
    bytes[first] = _mm512_shuffle_i64x2(a, b, 0x88);
    bytes[first + 2] = _mm512_shuffle_i64x2(c, d, 0x88);
    bytes[first + 4] = _mm512_shuffle_i64x2(a, b, 0xDD);
    bytes[first + 6] = _mm512_shuffle_i64x2(c, d, 0xDD);
  };
  transpose_quarters(even, 0);
  transpose_quarters(odd, 1);
  const auto row = [&](int64_t r) { return _mm512_test_epi8_mask(bytes[r / 8], _mm512_set1_epi8(1 << (r % 8))); };
  int64_t r = 0;
  for (; r + 8 <= count; r += 8) {
#pragma GCC unroll 8
    for (int bit = 0; bit < 8; ++bit, rows += pitch) *rows = row(r + bit);
  }
  for (; r < count; ++r, rows += pitch) *rows = row(r);
}
#else
// Squares of 2 * kWidth bits: their upper right and lower left quarters change places.
template <int kWidth>
void exchange_quarters(uint64_t* rows, uint64_t right) {
  for (int square = 0; square < 64; square += 2 * kWidth) {
    for (int k = square; k < square + kWidth; ++k) {
      const uint64_t difference = (rows[k] >> kWidth ^ rows[k + kWidth]) & right;
      rows[k] ^= difference << kWidth;
      rows[k + kWidth] ^= difference;
    }
  }
}

// Hacker's Delight, 7-3.
inline void transpose_bits(const uint64_t (&columns)[64], int64_t count, uint64_t* rows, int64_t pitch) {
  uint64_t square[64];
  std::copy_n(columns, 64, square);
  exchange_quarters<32>(square, 0x00000000FFFFFFFFull);
  exchange_quarters<16>(square, 0x0000FFFF0000FFFFull);
  exchange_quarters<8>(square, 0x00FF00FF00FF00FFull);
  exchange_quarters<4>(square, 0x0F0F0F0F0F0F0F0Full);
  exchange_quarters<2>(square, 0x3333333333333333ull);
  exchange_quarters<1>(square, 0x5555555555555555ull);
  for (int64_t r = 0; r < count; ++r, rows += pitch) *rows = square[r];
}
#endif

}  // namespace
}  // namespace fastnorm::cpu::CPU_CAPABILITY
