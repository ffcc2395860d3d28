// Moments in one sweep and a bit: deviations are taken from the mean of the first few elements instead of that of all.
//
// With a shift m and n elements of which the first k gave m, |mean - m| <= std * sqrt(n / k), for those k alone already
// make the variance as large as k / n * (mean - m)^2. So the subtraction of squares loses a factor n / k at worst,
// whatever the data: k / n is an eighth or a sixteenth here, and beyond the sums are merged by Chan's formula. Where the
// first are so unlike the others that it loses more than half, as in sorted data, a second sweep is about the mean.
#pragma once

#include "columns.h"
#include "reduce.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

// The sum of a pack's elements as a tree, in the arithmetic's type: a few cycles less than lane_sum.
template <typename T>
double tree_sum(const Pack<T>& p) {
  using Vec = typename Pack<T>::Vec;
  Vec sum = p.v[0];
  for (int k = 1; k < Pack<T>::kVecs; ++k) sum = sum + p.v[k];
  return vec::vec_reduce_all<acc_type<T>>([](Vec& a, Vec& b) { return a + b; }, sum);
}

template <typename T, int kCount>
double tree_sum(Pack<T> (&sums)[kCount]) {
  for (int u = 1; u < kCount; ++u) sums[0] = sums[0] + sums[u];
  return tree_sum(sums[0]);
}

// The largest of the sums in the lanes of sums[first], sums[first + step], ...
template <typename T, int kCount>
acc_type<T> largest_lane(const Pack<T> (&sums)[kCount], int first = 0, int step = 1) {
  using Vec = typename Pack<T>::Vec;
  Vec largest = sums[first].v[0];
  for (int u = first; u < kCount; u += step)
    for (int k = 0; k < Pack<T>::kVecs; ++k) largest = vec::clamp_min(sums[u].v[k], largest);
  return vec::vec_reduce_all<acc_type<T>>([](Vec& a, Vec& b) { return vec::clamp_min(a, b); }, largest);
}

// Whether few elements have most of the squares of n. What is added to their lanes after them is rounded to their last
// bit, and where it is much alike always the same way: a hundred additions lose seven bits.
template <typename T>
bool has_outlier(int64_t n, double largest_lane, double squares) {
  constexpr int64_t kManyToALane = 512;
  return !std::is_same_v<acc_type<T>, double> && n >= kManyToALane && largest_lane > squares / 4;
}

// Whether a shift, from which n elements deviate by this sum, is more than a standard deviation from their mean.
template <typename T>
bool far_from_mean(double n, double deviations, double squares) {
  return !std::is_same_v<acc_type<T>, double> && deviations * deviations > n * squares / 2;
}

// The moments of a chunk whose mean is about m, for which no lane sums more than a few elements.
template <typename T>
FASTNORM_LOOP Moments chunk_moments_in_pieces(const T* x, const Runs& chunk, double m) {
  using P = Pack<T>;
  constexpr int64_t kPiece = 4 * P::kSize;
  const acc_type<T> near = static_cast<acc_type<T>>(m);
  const P shift(near);
  double deviations = 0, squares = 0;
  for (int64_t run = 0; run < chunk.count; ++run) {
    const T* const from = x + chunk.offset + run * chunk.stride;
    for (int64_t first = 0; first < chunk.length; first += kPiece) {
      P s1(0), s2(0);
      for_packs<T, 1, AnyOrder>(std::min(kPiece, chunk.length - first), [&](int64_t i, auto count, int) {
        const P d = (P::load(from + first + i, count) - shift).keep(count);
        s1 = s1 + d;
        s2 = fmadd(d, d, s2);
      });
      deviations += lane_sum(s1);
      squares += lane_sum(s2);
    }
  }
  return shifted_moments(static_cast<double>(chunk.numel()), near, deviations, squares);
}

// Of n contiguous elements, how many of the first give the shift.
template <typename T>
int64_t shift_elements(int64_t n) {
  constexpr int64_t kSize = Pack<T>::kSize;
  return n <= 128 ? std::min<int64_t>(n, 64) : std::max<int64_t>(64, n / 8 / kSize * kSize);
}

// The moments of a chunk from the sums of what its elements deviate from m by and of its squares, of which one lane has
// `largest`; from its elements again where those sums say little.
template <typename T>
Moments moments_about(const T* x, const Runs& chunk, acc_type<T> m, double deviations, double squares, double largest) {
  const double n = static_cast<double>(chunk.numel());
  if (!std::is_same_v<acc_type<T>, double> && out_of_range(m, deviations, squares))
    return chunk_moments_float64(x, chunk);
  if (has_outlier<T>(chunk.numel(), largest, squares)) return chunk_moments_in_pieces(x, chunk, m + deviations / n);
  return shifted_moments(n, m, deviations, squares);
}

// What elements deviate from a shift by and its squares, in sums that take kUnroll packs by turns.
template <typename T, int kUnroll>
struct Deviations {
  using P = Pack<T>;
  P sum[kUnroll], squares[kUnroll];

  void clear() {
    for (int u = 0; u < kUnroll; ++u) sum[u] = squares[u] = P(0);
  }
  // Adds n elements themselves to the first sums, for a shift.
  FASTNORM_INLINE void add_elements(const T* x, int64_t n) {
    P s[kUnroll];  // in registers
    std::copy(sum, sum + kUnroll, s);
    for_packs<T, kUnroll, AnyOrder>(n, [&](int64_t i, auto count, int u) { s[u] = s[u] + P::load(x + i, count); });
    std::copy(s, s + kUnroll, sum);
  }
  // Adds those of n elements. Prefetches what lies `ahead`, if not 0.
  FASTNORM_INLINE void add(const T* x, int64_t n, const P& shift, int64_t ahead) {
    Deviations s = *this;  // as above
    for_packs<T, kUnroll, AnyOrder>(n, [&](int64_t i, auto count, int u) {
      if (ahead) prefetch(x + i + ahead);
      const P d = (P::load(x + i, count) - shift).keep(count);
      s.sum[u] = s.sum[u] + d;
      s.squares[u] = fmadd(d, d, s.squares[u]);
    });
    *this = s;
  }
};

// The same of many parts. What the sums of squares lose when a part is added is summed beside them: where the first
// elements have most of the squares, all parts after them would be rounded to the same place.
template <typename T, int kUnroll>
struct DeviationsOfParts : Deviations<T, kUnroll> {
  Pack<T> lost[kUnroll];

  void clear() {
    Deviations<T, kUnroll>::clear();
    for (auto& of_sum : lost) of_sum = Pack<T>(0);
  }
  // Scalar math: lost += part - ((squares + part) - squares), exact where part <= squares (Dekker 1971)
  void operator+=(const Deviations<T, kUnroll>& part) {
    for (int u = 0; u < kUnroll; ++u) {
      const Pack<T> before = this->squares[u], after = before + part.squares[u];
      this->sum[u] = this->sum[u] + part.sum[u];
      this->squares[u] = after;
      lost[u] = lost[u] + (part.squares[u] - (after - before));
    }
  }
  // Adds n elements by pieces, for a run that may be long. Prefetches what lies `ahead`, if not 0.
  FASTNORM_INLINE void add_pieces(const T* x, int64_t n, const Pack<T>& shift, int64_t ahead) {
    for_sum_pieces<T, kUnroll>(n, [&](int64_t first, int64_t here) {
      Deviations<T, kUnroll> piece;
      piece.clear();
      piece.add(x + first, here, shift, ahead);
      *this += piece;
    });
  }
};

// Of n <= kChunk contiguous elements. The divisions are by n and so off the path from one sum to the next.
// Scalar math: m = sum(x[:k]) / k;  s1 = sum(x - m);  s2 = sum((x - m)^2)
template <typename T>
FASTNORM_LOOP Moments run_moments(const T* x, int64_t n) {
  using acc_t = acc_type<T>;
  using P = Pack<T>;
  constexpr int kUnroll = kSumPacks<T>;
  const int64_t first = shift_elements<T>(n);
  const double reciprocal = 1.0 / static_cast<double>(n), reciprocal_of_first = 1.0 / static_cast<double>(first);
  const bool one_piece = n <= kSumPiece<T, kUnroll>;

  DeviationsOfParts<T, kUnroll> sums;
  sums.clear();
  sums.add_elements(x, first);
  acc_t m = static_cast<acc_t>(tree_sum(sums.sum) * reciprocal_of_first), largest = 0;
  double deviations = 0, squares = 0, d = 0;
  for (bool again = false;; again = true) {
    sums.clear();
    one_piece ? sums.add(x, n, P(m), 0) : sums.add_pieces(x, n, P(m), 0);
    largest = largest_lane(sums.squares);  // before its sums are added up in place
    deviations = tree_sum(sums.sum);
    squares = tree_sum(sums.squares) + (one_piece ? 0 : tree_sum(sums.lost));
    d = deviations * reciprocal;
    if (again || !far_from_mean<T>(static_cast<double>(n), deviations, squares)) break;
    m = static_cast<acc_t>(m + d);
  }
  if constexpr (!std::is_same_v<acc_t, double>)
    if (out_of_range(m, deviations, squares)) return chunk_moments_float64(x, Runs{0, 1, 0, n});
  if (has_outlier<T>(n, largest, squares)) return chunk_moments_in_pieces(x, Runs{0, 1, 0, n}, m + d);
  const double m2 = squares - deviations * d;
  return {static_cast<double>(n), m + d, m2 < 0 ? 0 : m2};
}

constexpr int kMostSlices = 8;  // that chunk_moments takes together

// Not cloned for one slice: it would gain nothing and be compiled twice.
template <int kUnroll, typename T>
FASTNORM_LOOP __attribute__((noclone)) void chunk_moments_by(const T* x, const Runs& chunk, int slices, int64_t apart,
                                                             int64_t ahead, Moments* result) {
  using acc_t = acc_type<T>;
  using P = Pack<T>;
  Runs first = chunk;  // the runs that give the shift, or the beginning of the only one
  if (chunk.count > 1) {
    first.count = (chunk.count + 7) / 8;
  } else {
    first.length = shift_elements<T>(chunk.length);
  }
  const auto for_runs = [&](const Runs& runs, const auto& f) {
    for (int64_t run = 0; run < runs.count; ++run)
      for (int s = 0; s < slices; ++s) f(s, x + s * apart + runs.offset + run * runs.stride);
  };

  DeviationsOfParts<T, kUnroll> sums[kMostSlices];
  const auto clear = [&](auto& of) {
    for (int s = 0; s < slices; ++s) of[s].clear();
  };
  clear(sums);
  for_runs(first, [&](int s, const T* row) { sums[s].add_elements(row, first.length); });
  acc_t m[kMostSlices];
  for (int s = 0; s < slices; ++s)
    m[s] = static_cast<acc_t>(lane_sum(sums[s].sum) / static_cast<double>(first.numel()));

  const double n = static_cast<double>(chunk.numel());
  const int64_t part_runs = sum_runs<T, kUnroll>(chunk.length);
  double deviations[kMostSlices], sum_of_squares[kMostSlices];
  for (bool again = false, far = true; far; again = true) {
    clear(sums);
    if (part_runs < 4) {  // runs so long are summed each by itself: to add up few of them takes as long
      for_runs(chunk, [&](int s, const T* row) { sums[s].add_pieces(row, chunk.length, P(m[s]), ahead); });
    } else {
      for (int64_t run = 0; run < chunk.count; run += part_runs) {
        Deviations<T, kUnroll> part[kMostSlices];
        clear(part);
        for_runs(chunk.part(run, part_runs),
                 [&](int s, const T* row) { part[s].add(row, chunk.length, P(m[s]), ahead); });
        for (int s = 0; s < slices; ++s) sums[s] += part[s];
      }
    }
    far = false;
    for (int s = 0; s < slices; ++s) {
      deviations[s] = lane_sum(sums[s].sum);
      sum_of_squares[s] = lane_sum(sums[s].squares) + lane_sum(sums[s].lost);
      if (again || !far_from_mean<T>(n, deviations[s], sum_of_squares[s])) continue;
      m[s] = static_cast<acc_t>(m[s] + deviations[s] / n);
      far = true;
    }
  }
  for (int s = 0; s < slices; ++s)
    result[s] =
        moments_about(x + s * apart, chunk, m[s], deviations[s], sum_of_squares[s], largest_lane(sums[s].squares));
}

// The moments of a chunk of each of at most kMostSlices slices that begin `apart` elements from each other, whose runs
// are taken by turns: what lies near each other is read together.
// Scalar math: m = sum of the first x / their number;  s1 = sum(x - m);  s2 = sum((x - m)^2). Prefetches what lies
// `ahead` of the chunk, if not 0.
template <typename T>
void chunk_moments(const T* x, const Runs& chunk, int slices, int64_t apart, int64_t ahead, Moments* result) {
  constexpr int kUnroll = kSumPacks<T>;
  if (chunk.length < kUnroll * Pack<T>::kSize) return chunk_moments_by<1>(x, chunk, slices, apart, ahead, result);
  chunk_moments_by<kUnroll>(x, chunk, slices, apart, ahead, result);
}

// Of one slice.
template <typename T>
Moments chunk_moments(const T* x, const Runs& chunk) {
  Moments moments;
  chunk_moments(x, chunk, 1, 0, 0, &moments);
  return moments;
}

// Rows that one shift may serve; it is the mean of the first sixteenth of them, or of the first few.
constexpr int64_t kShiftRows = 16 * kBlockRows, kLeastShiftRows = 16;

// Adds `rows` rows of `columns` elements to sum[].
template <typename T>
FASTNORM_LOOP void add_rows(const T* x, int64_t stride, int64_t rows, int64_t columns, acc_type<T>* sum) {
  using P = Pack<T>;
  for_row_groups(Known<Activation::kNone>{}, rows, [&](int64_t row, auto here, int64_t apart) {
    const T* const first = x + row * stride;
    const int64_t to_next = apart * stride;
    for_packs<T>(columns, [&](int64_t i, auto count, int) {
      P s = P::load_acc(sum + i);
      for_each_row(here, count, [&](int r) { s = s + P::load(first + r * to_next + i, count); });
      s.store_acc(sum + i);
    });
  });
}

// Scalar math: s1[j] += sum_r (x[r][j] - shift[j]);  s2[j] += sum_r (x[r][j] - shift[j])^2
template <typename T>
FASTNORM_LOOP void add_row_deviations(const T* x, int64_t stride, int64_t rows, int64_t columns,
                                      const acc_type<T>* shift, acc_type<T>* s1, acc_type<T>* s2) {
  using P = Pack<T>;
  for_row_groups(Known<Activation::kNone>{}, rows, [&](int64_t row, auto here, int64_t apart) {
    const T* const first = x + row * stride;
    const int64_t to_next = apart * stride;
    for_packs<T>(columns, [&](int64_t i, auto count, int) {
      const P m = P::load_acc(shift + i);
      P sum(0), squares(0);
      for_each_row(here, count, [&](int r) {
        const P d = P::load(first + r * to_next + i, count) - m;
        sum = r == 0 ? d : sum + d;
        squares = r == 0 ? d * d : fmadd(d, d, squares);
      });
      (P::load_acc(s1 + i) + sum).store_acc(s1 + i);
      (P::load_acc(s2 + i) + squares).store_acc(s2 + i);
    });
  });
}

// The same for all rows of a strip of columns, in float64 beyond a block of them.
template <typename T>
void strip_deviations(const T* x, int64_t stride, int64_t rows, int64_t columns, const acc_type<T>* shift, double* s1,
                      double* s2) {
  using acc_t = acc_type<T>;
  acc_t sum[kStrip + Pack<T>::kSize], squares[kStrip + Pack<T>::kSize];
  std::fill(s1, s1 + columns, 0.0);
  std::fill(s2, s2 + columns, 0.0);
  for_row_blocks(0, rows, [&](int64_t row, int64_t here) {
    std::fill(sum, sum + columns + Pack<T>::kSize, acc_t(0));
    std::fill(squares, squares + columns + Pack<T>::kSize, acc_t(0));
    add_row_deviations(x + row * stride, stride, here, columns, shift, sum, squares);
    for (int64_t j = 0; j < columns; ++j) s1[j] += sum[j];
    for (int64_t j = 0; j < columns; ++j) s2[j] += squares[j];
  });
}

// The moments of each column of a matrix of at most kShiftRows rows, `stride` elements from row to row. `shift` holds a
// pack more than `columns`.
template <typename T>
void column_moments(const T* x, int64_t stride, int64_t rows, int64_t columns, acc_type<T>* shift, double* mean,
                    double* m2) {
  using acc_t = acc_type<T>;
  double *s1 = mean, *s2 = m2;
  const int64_t shift_rows = std::min(rows, std::max(kLeastShiftRows, rows / 16));
  const double n = static_cast<double>(rows), reciprocal = 1.0 / n;
  for (int64_t first = 0; first < columns; first += kStrip) {
    const int64_t end = std::min(columns, first + kStrip), here = end - first;
    std::fill(shift + first, shift + end, acc_t(0));
    add_rows(x + first, stride, shift_rows, here, shift + first);
    for (int64_t j = first; j < end; ++j) shift[j] *= static_cast<acc_t>(1.0 / static_cast<double>(shift_rows));
    for (bool again = false, far = true; far; again = true) {
      strip_deviations(x + first, stride, rows, here, shift + first, s1 + first, s2 + first);
      far = false;
      if (again) break;
      for (int64_t j = first; j < end; ++j) far |= far_from_mean<T>(n, s1[j], s2[j]);  // a loop of vectors
      for (int64_t j = first; far && j < end; ++j)
        if (far_from_mean<T>(n, s1[j], s2[j])) shift[j] = static_cast<acc_t>(shift[j] + s1[j] * reciprocal);
    }
  }
  bool exact = true;
  if constexpr (!std::is_same_v<acc_type<T>, double>)
    for (int64_t j = 0; j < columns; ++j) exact &= !out_of_range(shift[j], s1[j], s2[j]);
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
