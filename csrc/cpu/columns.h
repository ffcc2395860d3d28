// Matrices whose columns are reduced: every channels_last norm, and the parameter gradients of those along rows.
#pragma once

#include "normalize.h"
#include "parallel.h"
#include "reduce.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

constexpr int64_t kBlockRows = 64;          // rows whose column sums are float32
constexpr int64_t kPartElements = 1 << 16;  // elements a task owns, at least
constexpr int64_t kMaxParts = 64;           // each part keeps a row of float64 partials

// Splits `rows` rows of `width` elements among tasks, in whole blocks, by the shape alone.
struct RowParts {
  int64_t rows, width, rows_per_part;

  RowParts(int64_t rows_, int64_t width_) : rows(rows_), width(width_) {
    const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
    const int64_t enough = (kPartElements + kBlockRows * width - 1) / (kBlockRows * width);
    rows_per_part = std::max(enough, (blocks + kMaxParts - 1) / kMaxParts) * kBlockRows;
  }

  int64_t size() const { return (rows + rows_per_part - 1) / rows_per_part; }
  int64_t begin(int64_t part) const { return part * rows_per_part; }
  int64_t end(int64_t part) const { return std::min(rows, begin(part) + rows_per_part); }
};

// One value a column, in the arithmetic's type; a pack may be read past the end.
template <typename T>
class ColumnArray {
 public:
  explicit ColumnArray(int64_t width) : values_(width + Pack<T>::kSize) {
    for (int64_t i = width; i < width + Pack<T>::kSize; ++i) values_[i] = 0;
  }
  acc_type<T>& operator[](int64_t i) const { return values_[i]; }
  // The first `period` values again and again, `width` in all.
  void repeat(int64_t period, int64_t width) const {
    for (int64_t i = period; i < width; i += period) std::copy(&values_[0], &values_[period], &values_[i]);
  }
  operator PerColumn<T>() const { return PerColumn<T>(values_.data()); }

 private:
  ScratchArray<acc_type<T>> values_;
};

// The coefficients of SliceAffine, those of each column.
template <typename T>
struct ColumnAffine {
  ColumnArray<T> mean, scale, shift;

  explicit ColumnAffine(int64_t width) : mean(width), scale(width), shift(width) {}
  void set(int64_t j, const SliceAffine<acc_type<T>>& affine) const {
    mean[j] = affine.mean;
    scale[j] = affine.scale;
    shift[j] = affine.shift;
  }
  // Of n columns from the first on; a fill of few takes longer than as many of the above.
  void set(int64_t first, int64_t n, const SliceAffine<acc_type<T>>& affine) const {
    std::fill_n(&mean[first], n, affine.mean);
    std::fill_n(&scale[first], n, affine.scale);
    std::fill_n(&shift[first], n, affine.shift);
  }
  operator Affine<PerColumn<T>>() const { return {mean, scale, shift}; }
};

// Packs of neighbouring columns whose sums go down the rows together, in registers.
template <typename T>
constexpr int kTilePacks = std::max(1, 4 / Pack<T>::kVecs);

// Calls f(first column, integral_constant packs, Full | Partial) for every tile of a row of `width` elements.
template <typename T, typename F>
void for_tiles(int64_t width, const F& f) {
  constexpr int64_t kSize = Pack<T>::kSize, kTile = kTilePacks<T>;
  int64_t j = 0;
  for (; j + kTile * kSize <= width; j += kTile * kSize) f(j, std::integral_constant<int, kTile>{}, Full{});
  for (; j + kSize <= width; j += kSize) f(j, std::integral_constant<int, 1>{}, Full{});
  if (j < width) f(j, std::integral_constant<int, 1>{}, Partial{static_cast<int>(width - j)});
}

template <int kTile, typename T>
int tile_columns(Full) {
  return kTile * Pack<T>::kSize;
}
template <int kTile, typename T>
int tile_columns(Partial n) {
  return n.count;
}

// Sums of x * y over rows begin .. end of a tile, added to sum[].
template <int kTile, typename T, typename Count>
FASTNORM_LOOP void add_tile_products(const T* x, const T* y, int64_t stride, int64_t begin, int64_t end, Count count,
                                     double* sum) {
  using P = Pack<T>;
  P s[kTile];
  for (auto& e : s) e = P(0);
  for (int64_t r = begin; r < end; ++r) {
    for (int t = 0; t < kTile; ++t) {
      const int64_t i = r * stride + t * P::kSize;
      s[t] = fmadd(P::load(x + i, count), P::load(y + i, count), s[t]);
    }
  }
  acc_type<T> lane[kTile * P::kSize];
  for (int t = 0; t < kTile; ++t) s[t].store_acc(lane + t * P::kSize);
  const int columns = tile_columns<kTile, T>(count);
  for (int i = 0; i < columns; ++i) sum[i] += lane[i];
}

// Calls f(first row, rows) for blocks of kBlockRows rows to twice as many less one: a few rows alone would cost as
// much.
template <typename F>
void for_row_blocks(int64_t begin, int64_t end, const F& f) {
  const int64_t blocks = std::max<int64_t>(1, (end - begin) / kBlockRows), size = (end - begin + blocks - 1) / blocks;
  for (int64_t row = begin; row < end; row += size) f(row, std::min(size, end - row));
}

// Rows swept together: a column's sums, which stay in the first-level cache, are loaded and stored once for all of them.
constexpr int kRowGroup = 4;
// Columns that are swept together. Their sums would leave more room in that cache if they were fewer, but a row is better
// read in one stretch.
constexpr int64_t kStrip = 2048;

// A matrix (its rows, their width, and the elements of one more that is not full) with several rows as one, where they
// are short and many: a row costs what some hundred elements do. A mask in which rows end within a byte forbids it.
template <typename Rows>
Rows long_rows(Rows matrix, const uint8_t* mask) {
  constexpr int64_t kShort = 256, kLeastRows = 16;  // fewer rows would not be worth the coefficients of one
  if (mask && matrix.width % 8) return matrix;
  int64_t fold = 1;
  while (fold * matrix.width < kShort && 2 * fold * kLeastRows <= matrix.rows) fold *= 2;
  matrix.rest += matrix.rows % fold * matrix.width;
  matrix.rows /= fold;
  matrix.width *= fold;
  return matrix;
}

// Calls f(first row, rows, from each to the next) for `rows` rows in groups. Their rows are a quarter of all from each
// other, so that each is read as a stretch of memory of its own, which the processor's prefetchers follow: among neighbours
// that are read side by side they lose their way. Whole groups are known to the compiler where unrolled code is worth its
// size: not around an exponential.
struct WholeGroup {
  constexpr operator int() const { return kRowGroup; }
};
template <typename Act, typename F>
void for_row_groups(Act, int64_t rows, const F& f) {
  const int64_t apart = rows / kRowGroup, rest = rows % kRowGroup;
  if constexpr (!kMayBeSmooth<Act>) {
    for (int64_t row = 0; row < apart; ++row) f(row, WholeGroup{}, apart);
    if (rest) f(rows - rest, static_cast<int>(rest), int64_t{1});
  } else {
    for (int64_t row = 0; row < apart + (rest > 0); ++row) {
      const bool whole = row < apart;
      f(whole ? row : rows - rest, whole ? kRowGroup : static_cast<int>(rest), whole ? apart : 1);
    }
  }
}

// Calls f(r) for the rows of a group; unrolled for whole groups, but at the end of rows.
template <typename Rows, typename Count, typename F>
void for_each_row(Rows rows, Count, const F& f) {
  if constexpr (std::is_same_v<Rows, WholeGroup> && std::is_same_v<Count, Full>) {
#pragma GCC unroll 4
    for (int r = 0; r < kRowGroup; ++r) f(r);
  } else {
    int n = rows;
    asm("" : "+r"(n));  // kept from the compiler, which would unroll what is not worth its code
    for (int r = 0; r < n; ++r) f(r);
  }
}

// From row to row of a matrix: elements, and bytes of the mask.
struct Strides {
  int64_t elements, mask_bytes;
};

template <typename T>
RunGradient<T> offset_by(const RunGradient<T>& g, int64_t elements, int64_t mask_bytes) {
  return {g.x + elements, g.dy + elements, offset_by(g.residual, elements), offset_by(g.mask, mask_bytes),
          offset_by(g.kept, elements)};
}

// Scalar math: s[j] += sum_r dz[r][j];  sx[j] += sum_r dz[r][j] * summand[r][j]
template <typename Act, typename T>
FASTNORM_LOOP void add_row_gradients(Act act, const RunGradient<T>& g, const Strides& stride, int64_t rows,
                                     int64_t columns, const Affine<PerColumn<T>>& affine,
                                     const Summand<PerColumn<T>>& summand, acc_type<T>* dz, acc_type<T>* dz_summand) {
  using P = Pack<T>;
  const Affine<PerColumn<T>> z = affine;
  const Summand<PerColumn<T>> times = summand;
  const Strides to_next = stride;
  for_row_groups(act, rows, [&](int64_t row, auto here, int64_t apart) {
    RunGradient<T> from[kRowGroup];
    for (int r = 0; r < here; ++r) {
      const int64_t at = row + r * apart;
      from[r] = offset_by(g, at * to_next.elements, at * to_next.mask_bytes);
    }
    for_packs<T>(columns, [&](int64_t i, auto count, int) {
      P s(0), sx(0);
      const P mean = times.mean[i], power = times.power[i];
      for_each_row(here, count, [&](int r) {
        const P x = P::load(from[r].x + i, count);
        const P d = from[r].dz(act, i, count, x, z);
        from[r].keep(act, i, d);
        const P summand = (x - mean) * power;
        s = r == 0 ? d : s + d;
        sx = r == 0 ? d * summand : fmadd(d, summand, sx);
      });
      (P::load_acc(dz + i) + s).store_acc(dz + i);
      (P::load_acc(dz_summand + i) + sx).store_acc(dz_summand + i);
    });
  });
}

// The sums over rows of dz and dz * summand of each column, added to dz[] and dz_summand[]; g is at the first row.
template <typename Act, typename T>
void add_column_gradients(Act act, const RunGradient<T>& g, const Strides& stride, int64_t rows, int64_t columns,
                          const Affine<PerColumn<T>>& affine, const Summand<PerColumn<T>>& summand, double* dz,
                          double* dz_summand) {
  using acc_t = acc_type<T>;
  for (int64_t first = 0; first < columns; first += kStrip) {
    const int64_t n = std::min(kStrip, columns - first);
    acc_t s[kStrip + Pack<T>::kSize], sx[kStrip + Pack<T>::kSize];
    const auto at = [&](const PerColumn<T>& c) { return PerColumn<T>(c.values + first); };
    const Affine<PerColumn<T>> z{at(affine.mean), at(affine.scale), at(affine.shift)};
    const Summand<PerColumn<T>> times{at(summand.mean), at(summand.power)};
    for_row_blocks(0, rows, [&](int64_t row, int64_t here) {
      std::fill(s, s + n + Pack<T>::kSize, acc_t(0));
      std::fill(sx, sx + n + Pack<T>::kSize, acc_t(0));
      add_row_gradients(act, offset_by(g, row * stride.elements + first, row * stride.mask_bytes + first / 8), stride,
                        here, n, z, times, s, sx);
      for (int64_t j = 0; j < n; ++j) dz[first + j] += s[j];
      for (int64_t j = 0; j < n; ++j) dz_summand[first + j] += sx[j];
    });
  }
}

}  // namespace
}  // namespace fastnorm::cpu::CPU_CAPABILITY
