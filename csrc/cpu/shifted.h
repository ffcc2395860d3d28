// Moments in one sweep and a bit: deviations are taken from the mean of the first few elements instead of that of all.
//
// With a shift m and n elements of which the first k gave m, |mean - m| <= std * sqrt(n / k), for those k alone already
// make the variance as large as k / n * (mean - m)^2. So the subtraction of squares loses a factor n / k at worst,
// whatever the data: k / n is an eighth or a sixteenth here, and beyond the sums are merged by Chan's formula.
#pragma once

#include "columns.h"
#include "reduce.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

// The sum of a pack's elements as a tree, in the arithmetic's type: a few cycles where Pack::sum() takes a hundred.
template <typename T>
double tree_sum(const Pack<T>& p) {
  using Vec = typename Pack<T>::Vec;
  Vec sum = p.v[0];
  for (int k = 1; k < Pack<T>::kVecs; ++k) sum = sum + p.v[k];
  return at::vec::vec_reduce_all<acc_type<T>>([](Vec& a, Vec& b) { return a + b; }, sum);
}

template <typename T, int kCount>
double tree_sum(Pack<T> (&sums)[kCount]) {
  for (int u = 1; u < kCount; ++u) sums[0] = sums[0] + sums[u];
  return tree_sum(sums[0]);
}

// Of n <= kChunk contiguous elements. The divisions are by n and so off the path from one sum to the next.
// Scalar math: m = sum(x[:k]) / k;  s1 = sum(x - m);  s2 = sum((x - m)^2)
template <typename T>
FASTNORM_LOOP Moments run_moments(const T* x, int64_t n) {
  using acc_t = acc_type<T>;
  using P = Pack<T>;
  constexpr int kUnroll = std::max(1, 4 / P::kVecs);
  const int64_t first = n <= 128 ? std::min<int64_t>(n, 64) : std::max<int64_t>(64, n / 8 / P::kSize * P::kSize);
  const double reciprocal = 1.0 / static_cast<double>(n), reciprocal_of_first = 1.0 / static_cast<double>(first);

  P s1[kUnroll], s2[kUnroll];
  for (int u = 0; u < kUnroll; ++u) s1[u] = s2[u] = P(0);
  for_packs<T, kUnroll>(first, [&](int64_t i, auto count, int u) { s1[u] = s1[u] + P::load(x + i, count); });
  const acc_t m = static_cast<acc_t>(tree_sum(s1) * reciprocal_of_first);

  const P shift(m);
  for (int u = 0; u < kUnroll; ++u) s1[u] = P(0);
  for_packs<T, kUnroll>(n, [&](int64_t i, auto count, int u) {
    const P d = (P::load(x + i, count) - shift).keep(count);
    s1[u] = s1[u] + d;
    s2[u] = fmadd(d, d, s2[u]);
  });
  const double deviations = tree_sum(s1), squares = tree_sum(s2);
  if constexpr (!std::is_same_v<acc_t, double>)
    if (out_of_range(m, deviations, squares)) return chunk_moments_float64(x, Runs{0, 1, 0, n});
  const double d = deviations * reciprocal, m2 = squares - deviations * d;
  return {static_cast<double>(n), m + d, m2 < 0 ? 0 : m2};
}

// Rows that one shift may serve: sixteen blocks, the first of which gives it.
constexpr int64_t kShiftRows = 16 * kBlockRows;

// Calls f(first row, rows) for blocks of kBlockRows rows to twice as many less one: a few rows alone would cost as
// much.
template <typename F>
void for_row_blocks(int64_t begin, int64_t end, const F& f) {
  const int64_t blocks = std::max<int64_t>(1, (end - begin) / kBlockRows), size = (end - begin + blocks - 1) / blocks;
  for (int64_t row = begin; row < end; row += size) f(row, std::min(size, end - row));
}

// The means of `rows` rows in each column of a tile.
template <int kTile, typename T, typename Count>
FASTNORM_LOOP void tile_means(const T* x, int64_t stride, int64_t rows, Count count, acc_type<T>* mean) {
  using P = Pack<T>;
  P sum[kTile];
  for (int t = 0; t < kTile; ++t) sum[t] = P(0);
  for (int64_t r = 0; r < rows; ++r)
    for (int t = 0; t < kTile; ++t) sum[t] = sum[t] + P::load(x + r * stride + t * P::kSize, count);
  const P reciprocal(static_cast<acc_type<T>>(1.0 / static_cast<double>(rows)));
  for (int t = 0; t < kTile; ++t) (sum[t] * reciprocal).store_acc(mean + t * P::kSize);
}

// Adds the sums over `rows` rows of (x - shift) and (x - shift)^2 in each column of a tile to s1[] and s2[].
template <int kTile, typename T, typename Count>
FASTNORM_LOOP void add_tile_deviations(const T* x, int64_t stride, int64_t rows, Count count, const acc_type<T>* shift,
                                       double* s1, double* s2) {
  using P = Pack<T>;
  P m[kTile], sum[kTile], squares[kTile];
  for (int t = 0; t < kTile; ++t) {
    m[t] = P::load_acc(shift + t * P::kSize);
    sum[t] = squares[t] = P(0);
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int t = 0; t < kTile; ++t) {
      const P d = P::load(x + r * stride + t * P::kSize, count) - m[t];
      sum[t] = sum[t] + d;
      squares[t] = fmadd(d, d, squares[t]);
    }
  }
  acc_type<T> lane[kTile * P::kSize];
  const int columns = tile_columns<kTile, T>(count);
  for (int t = 0; t < kTile; ++t) sum[t].store_acc(lane + t * P::kSize);
  for (int j = 0; j < columns; ++j) s1[j] += lane[j];
  for (int t = 0; t < kTile; ++t) squares[t].store_acc(lane + t * P::kSize);
  for (int j = 0; j < columns; ++j) s2[j] += lane[j];
}

// The moments of each column of a matrix of at most kShiftRows rows, `stride` elements from row to row. `shift` holds a
// pack more than `columns`.
template <typename T>
void column_moments(const T* x, int64_t stride, int64_t rows, int64_t columns, acc_type<T>* shift, double* mean,
                    double* m2) {
  double *s1 = mean, *s2 = m2;
  std::fill(s1, s1 + columns, 0.0);
  std::fill(s2, s2 + columns, 0.0);
  for_row_blocks(0, rows, [&](int64_t row, int64_t here) {
    for_tiles<T>(columns, [&](int64_t j, auto tile, auto count) {
      constexpr int kTile = decltype(tile)::value;
      const T* at = x + row * stride + j;
      if (row == 0) tile_means<kTile>(at, stride, here, count, shift + j);
      add_tile_deviations<kTile>(at, stride, here, count, shift + j, s1 + j, s2 + j);
    });
  });
  bool exact = true;
  if constexpr (!std::is_same_v<acc_type<T>, double>)
    for (int64_t j = 0; j < columns; ++j) exact &= !out_of_range(shift[j], s1[j], s2[j]);
  const double n = static_cast<double>(rows), reciprocal = 1.0 / n;
  if (exact) {
    for (int64_t j = 0; j < columns; ++j) {
      const double d = s1[j] * reciprocal, squares = s2[j] - s1[j] * d;
      mean[j] = shift[j] + d;
      m2[j] = squares < 0 ? 0 : squares;
    }
    return;
  }
  for (int64_t j = 0; j < columns; ++j) {
    const Moments column = out_of_range(shift[j], s1[j], s2[j]) ? chunk_moments_float64(x + j, Runs{0, rows, stride, 1})
                                                                : shifted_moments(n, shift[j], s1[j], s2[j]);
    mean[j] = column.mean;
    m2[j] = column.m2;
  }
}

}  // namespace
}  // namespace fastnorm::cpu::CPU_CAPABILITY
