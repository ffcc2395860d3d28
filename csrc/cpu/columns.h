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
  operator PerColumn<T>() const { return PerColumn<T>(values_.data()); }

 private:
  ScratchArray<acc_type<T>> values_;
};

// Packs a tile: four vectors of each accumulator fit the registers.
template <typename T>
constexpr int tile_packs() {
  return std::max(1, 4 / Pack<T>::kVecs);
}

// Calls f(first column, integral_constant packs, Full | Partial) for every tile of a row of `width` elements.
template <typename T, typename F>
void for_tiles(int64_t width, const F& f) {
  constexpr int64_t kSize = Pack<T>::kSize, kTile = tile_packs<T>();
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

// Sums of dz and dz * xhat over rows begin .. end of a tile, added to dz[] and dz_xhat[]. gradient_at(row) gives the
// row's RunGradient.
template <Activation kAct, int kTile, typename T, typename Count, typename Rows>
FASTNORM_LOOP void add_tile_sums(const Rows& gradient_at, int64_t begin, int64_t end, int64_t j, Count count,
                                 const Affine<PerColumn<T>>& affine, const Standardize<PerColumn<T>>& standardize,
                                 double* dz, double* dz_xhat) {
  using P = Pack<T>;
  P s[kTile], sx[kTile];
  for (int t = 0; t < kTile; ++t) s[t] = sx[t] = P(0);
  for (int64_t r = begin; r < end; ++r) {
    const RunGradient<T> g = gradient_at(r);
    for (int t = 0; t < kTile; ++t) {
      const int64_t i = j + t * P::kSize;
      const P x = P::load(g.x + i, count);
      const P d = g.template dz<kAct>(i, count, x, affine);
      s[t] = s[t] + d;
      sx[t] = fmadd(d, standardize(x, i), sx[t]);
    }
  }
  acc_type<T> lane[kTile * P::kSize];
  const int columns = tile_columns<kTile, T>(count);
  for (int t = 0; t < kTile; ++t) s[t].store_acc(lane + t * P::kSize);
  for (int i = 0; i < columns; ++i) dz[i] += lane[i];
  for (int t = 0; t < kTile; ++t) sx[t].store_acc(lane + t * P::kSize);
  for (int i = 0; i < columns; ++i) dz_xhat[i] += lane[i];
}

}  // namespace
}  // namespace fastnorm::cpu::CPU_CAPABILITY
