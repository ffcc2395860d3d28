// Layer and RMS normalisation on the CPU: each row is reduced by itself, and read once from memory.
//
// Forward. A task owns some rows, and takes short ones by groups: one sweep for the moments, about the mean of the
// row's first elements, then one that normalises, both in the first-level cache. Rows beyond kChunk elements go by
// chunks. A few long rows are split: every thread takes chunks of them.
//
// Backward by rows. A task owns a part of the rows. A first sweep of a row reduces g and g * xhat; a second writes dx
// and adds dz and dz * xhat to one float32 sum a column, flushed to float64 every kSumRows rows. The parts' sums are
// merged at the end. Several rows at once would load a column's sums less often, but the processor's prefetchers lose
// such a pattern, and memory is the limit.
//
// Backward by strips, for few rows or very long ones. Blocks of rows that stay in the last-level cache are reduced by
// chunks and then written by strips of columns; one task sums a strip over all rows of the block.
//
// Sums are float32 within a chunk or block and float64 beyond. A row's result depends on nothing but the row: neither
// on the number of threads nor on the rows around it.
#include "../layer_norm.h"

#include <cmath>

#include "columns.h"
#include "shifted.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

// Short rows are swept together, forward: their accumulators hide each other's latency. Longer ones hide their own, and
// one after the other is what the processor's prefetchers like.
constexpr int64_t kShortRow = 512;  // elements
constexpr int kGroup = 4;

// ---- parameters

// A weight and a bias for each column, in the arithmetic's type, readable in whole packs from any column on.
template <typename T>
struct ColumnParameters {
  PerColumn<T> weight, bias;

  Pack<T> operator()(const Pack<T>& xhat, int64_t i) const { return fmadd(xhat, weight[i], bias[i]); }
};

// Columns first .. first + n of them: where they lie, or in a copy; ones and zeros where there are none, for a test in
// the loop would double its code.
template <typename T>
class ParameterArrays {
 public:
  using acc_t = acc_type<T>;

  template <typename Args>
  ParameterArrays(const Args& a, int64_t first, int64_t n)
      : in_place_(a.weight && a.bias && a.param_dtype == kAccDtype && are_readable(first, n, a.N)),
        stride_((n + 2 * Pack<T>::kSize - 1) / Pack<T>::kSize * Pack<T>::kSize),
        copies_(in_place_ ? 0 : 2 * stride_),
        parameters_{PerColumn<T>(place(a.weight, a.param_dtype, first, n, 0)),
                    PerColumn<T>(place(a.bias, a.param_dtype, first, n, 1))} {}

  const ColumnParameters<T>& operator*() const { return parameters_; }

 private:
  static constexpr Dtype kAccDtype = std::is_same_v<acc_t, double> ? Dtype::kFloat64 : Dtype::kFloat32;

  // Whether columns of N are readable where they lie. Packs of a row that is streamed begin where it does within one
  // (for_packs_after), so the last reaches past n unless rows are whole packs.
  static bool are_readable(int64_t first, int64_t n, int64_t N) {
    constexpr int64_t kSize = Pack<T>::kSize;
    return n % kSize == 0 && (N % kSize == 0 || first + n + kSize <= N);
  }

  const acc_t* place(const void* from, Dtype dtype, int64_t first, int64_t n, int64_t index) const {
    if (in_place_) return static_cast<const acc_t*>(from) + first;
    acc_t* to = copies_.data() + index * stride_;
    std::fill(from ? to + n : to, to + stride_, acc_t(index == 0 ? 1 : 0));
    if (from == nullptr) return to;
    visit(dtype, [&](auto type) {
      using U = decltype(type);
      if constexpr (std::is_same_v<acc_type<U>, acc_t>)
        for_packs<U>(n, [&](int64_t i, auto count, int) {
          Pack<U>::load(static_cast<const U*>(from) + first + i, count).store_acc(to + i);
        });
    });
    return to;
  }

  bool in_place_;
  int64_t stride_;
  ScratchArray<acc_t> copies_;
  ColumnParameters<T> parameters_;
};

// Writes a gradient, rounded to the parameter's type; nothing where it is not wanted.
template <typename V>
void write_parameter(void* to, Dtype dtype, int64_t first, const V* values, int64_t n) {
  if (to == nullptr) return;
  visit(dtype, [&](auto type) {
    using U = decltype(type);
    for (int64_t i = 0; i < n; ++i) static_cast<U*>(to)[first + i] = static_cast<U>(values[i]);
  });
}

// What a row is normalised by.
template <typename T>
struct RowWise;
template <typename T>
struct Affine<RowWise<T>> {
  Standardize<Uniform<T>> standardize;
  ColumnParameters<T> parameters;

  Pack<T> operator()(const Pack<T>& x, int64_t i) const { return parameters(standardize(x, i), i); }
};

// ---- statistics

// The sum of squares where float32 cannot hold them. Rows of zeros are told apart first: padding is full of them.
template <typename T>
double sum_of_squares_float64(const T* x, int64_t n) {
  Pack<T> magnitudes(0);
  for_packs<T>(n, [&](int64_t i, auto count, int) {
    magnitudes = magnitudes + map<T>([](auto v) { return v.abs(); }, Pack<T>::load(x + i, count));
  });
  double squares = 0;
  if (lane_sum(magnitudes) == 0) return squares;
  for (int64_t i = 0; i < n; ++i) squares += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  return squares;
}

// Moments of kRows rows of n <= kChunk elements, N apart; about zero if the mean is not to be subtracted.
// Scalar math: m = sum of the first x / their number;  s1 = sum (x - m);  s2 = sum (x - m)^2
template <int kRows, int kUnroll, typename T>
FASTNORM_LOOP void row_moments(const T* x, int64_t N, int64_t n, bool subtract_mean, Moments* moments) {
  using P = Pack<T>;
  using acc_t = acc_type<T>;
  const int64_t first = shift_elements<T>(n);
  const double count_all = static_cast<double>(n), reciprocal_of_first = 1.0 / static_cast<double>(first);
  P s1[kRows * kUnroll], s2[kRows * kUnroll];
  const auto total = [](P(&sums)[kRows * kUnroll], int r) {
    P all = sums[r];
    for (int u = 1; u < kUnroll; ++u) all = all + sums[u * kRows + r];
    return lane_sum(all);
  };
  const auto clear = [](P(&sums)[kRows * kUnroll]) {
    for (auto& s : sums) s = P(0);
  };

  clear(s2);
  if (!subtract_mean) {
    for_sum_pieces<T, kUnroll>(n, [&](int64_t begin, int64_t here) {
      P squares[kRows * kUnroll];
      clear(squares);
      for_packs<T, kUnroll, AnyOrder>(here, [&](int64_t i, auto count, int u) {
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const P v = P::load(x + r * N + begin + i, count);
          squares[u * kRows + r] = fmadd(v, v, squares[u * kRows + r]);
        }
      });
      for (int i = 0; i < kRows * kUnroll; ++i) s2[i] = s2[i] + squares[i];
    });
    for (int r = 0; r < kRows; ++r) {
      double squares = total(s2, r);
      if constexpr (!std::is_same_v<acc_t, double>)
        if (out_of_range(1, squares, squares)) squares = sum_of_squares_float64(x + r * N, n);
      moments[r] = {count_all, 0, squares};
    }
    return;
  }

  clear(s1);
  for_packs<T, kUnroll, AnyOrder>(first, [&](int64_t i, auto count, int u) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) s1[u * kRows + r] = s1[u * kRows + r] + P::load(x + r * N + i, count);
  });
  const int64_t ahead = kRows > 1 ? kRows * N : std::max(n, kAhead<T>);  // the next rows, or what follows of a long one
  acc_t m[kRows];
  for (int r = 0; r < kRows; ++r) m[r] = static_cast<acc_t>(total(s1, r) * reciprocal_of_first);
  double deviations[kRows], squares[kRows];
  for (bool again = false, far = true; far; again = true) {
    P shift[kRows];
    for (int r = 0; r < kRows; ++r) shift[r] = P(m[r]);
    clear(s1);
    clear(s2);
    for_sum_pieces<T, kUnroll>(n, [&](int64_t begin, int64_t here) {
      P part1[kRows * kUnroll], part2[kRows * kUnroll];
      clear(part1);
      clear(part2);
      for_packs<T, kUnroll, AnyOrder>(here, [&](int64_t i, auto count, int u) {
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const T* const from = x + r * N + begin + i;
          if constexpr (std::is_same_v<decltype(count), AnyOrder>) prefetch(from + ahead);
          const P d = (P::load(from, count) - shift[r]).keep(count);
          part1[u * kRows + r] = part1[u * kRows + r] + d;
          part2[u * kRows + r] = fmadd(d, d, part2[u * kRows + r]);
        }
      });
      for (int i = 0; i < kRows * kUnroll; ++i) {
        s1[i] = s1[i] + part1[i];
        s2[i] = s2[i] + part2[i];
      }
    });
    far = false;
    for (int r = 0; r < kRows; ++r) {
      deviations[r] = total(s1, r);
      squares[r] = total(s2, r);
      if (again || !far_from_mean<T>(count_all, deviations[r], squares[r])) continue;
      m[r] = static_cast<acc_t>(m[r] + deviations[r] / count_all);
      far = true;
    }
  }
  for (int r = 0; r < kRows; ++r)
    moments[r] =
        moments_about(x + r * N, Runs{0, 1, 0, n}, m[r], deviations[r], squares[r], largest_lane(s2, r, kRows));
}

// ---- forward

template <typename T>
struct RowsForward {
  using acc_t = acc_type<T>;
  const LayerNormForward& a;
  const T* x = static_cast<const T*>(a.x);
  const T* residual = static_cast<const T*>(a.residual);
  T* y = static_cast<T*>(a.y);
  acc_t *mean = static_cast<acc_t*>(a.mean), *rstd = static_cast<acc_t*>(a.rstd), *rest = static_cast<acc_t*>(a.rest);
  const int64_t M = a.M, N = a.N, chunks = (N + kChunk - 1) / kChunk;
  const MaskRows mask = a.mask_rows();
  const bool stream = stream_output(M * N, a.dtype);

  SliceStandardize<acc_t> finish(int64_t row, const Moments& m) const {
    const SliceStandardize<acc_t> s(m.mean, 1.0 / std::sqrt(m.biased_variance() + a.eps));
    if (mean) mean[row] = s.mean;
    if (rstd) rstd[row] = s.rstd;
    if (rest) rest[row] = s.rest;
    return s;
  }

  int64_t chunk_length(int64_t chunk) const { return std::min(kChunk, N - chunk * kChunk); }

  Moments moments(int64_t row, int64_t chunk) const {
    Moments m;
    row_moments<1, kSumPacks<T>>(x + row * N + chunk * kChunk, N, chunk_length(chunk), a.subtract_mean, &m);
    return m;
  }

  // Columns first .. first + n of a row.
  template <typename Act>
  void normalize(Act act, int64_t row, int64_t first, int64_t n, const SliceStandardize<acc_t>& s,
                 const ColumnParameters<T>& parameters) const {
    const int64_t i = row * N + first;
    const Affine<RowWise<T>> affine{uniform<T>(s), parameters};
    normalize_run(act, x + i, offset_by(residual, i), y + i, offset_by(a.mask, row * mask.bytes_per_row() + first / 8),
                  n, affine, stream);
  }

  template <int kRows, typename Act>
  void short_rows(Act act, int64_t row, const ColumnParameters<T>& parameters) const {
    Moments m[kRows];
    row_moments<kRows, 1>(x + row * N, N, N, a.subtract_mean, m);
    for (int r = 0; r < kRows; ++r) normalize(act, row + r, 0, N, finish(row + r, m[r]), parameters);
  }

  template <typename Act>
  void whole_rows(Act act, int64_t begin, int64_t end, const ColumnParameters<T>& parameters) const {
    int64_t row = begin;
    if (N < kShortRow) {
      for (; row + kGroup <= end; row += kGroup) short_rows<kGroup>(act, row, parameters);
      for (; row < end; ++row) short_rows<1>(act, row, parameters);
    }
    for (; row < end; ++row) {
      Moments m;
      for (int64_t k = 0; k < chunks; ++k) m.merge(moments(row, k));
      normalize(act, row, 0, N, finish(row, m), parameters);
    }
  }

  void run() const {
    if (chunks > 1 && M < 2 * num_threads()) return long_rows();
    const ParameterArrays<T> parameters(a, 0, N);
    parallel_for_ranges((M + kGroup - 1) / kGroup, M * N, [&](int64_t begin, int64_t end) {
      visit<T>(a.activation,
               [&](auto act) { whole_rows(act, begin * kGroup, std::min(M, end * kGroup), *parameters); });
    });
  }

  void long_rows() const {
    const ScratchArray<Moments> partial(M * chunks);
    const ScratchArray<SliceStandardize<acc_t>> standardize(M);
    parallel_for(M * chunks, M * N, [&](int64_t i) { partial[i] = moments(i / chunks, i % chunks); });
    for (int64_t row = 0; row < M; ++row) {
      Moments m;
      for (int64_t k = 0; k < chunks; ++k) m.merge(partial[row * chunks + k]);
      standardize[row] = finish(row, m);
    }
    parallel_for(M * chunks, M * N, [&](int64_t i) {
      const int64_t row = i / chunks, first = i % chunks * kChunk, n = chunk_length(i % chunks);
      const ParameterArrays<T> parameters(a, first, n);
      visit<T>(a.activation, [&](auto act) { normalize(act, row, first, n, standardize[row], *parameters); });
    });
  }
};

// ---- backward

constexpr int64_t kLongRow = 1 << 15;      // elements; a group of longer rows would leave the second-level cache
constexpr int64_t kFewRows = 64;           // too few to be split into parts that keep a float64 sum a column each
constexpr int64_t kSmall = 1 << 16;        // elements one task takes anyway
constexpr int64_t kStripsBlock = 1 << 20;  // elements that stay in the last-level cache
constexpr int64_t kSumRows = 32;           // whose column sums are float32
constexpr int64_t kLeastPartRows = 16;
constexpr int64_t kLeastPartElements = 1 << 15;

// The rows a task owns, by the shape alone.
struct RowTasks {
  int64_t M, rows;

  RowTasks(int64_t M_, int64_t N)
      : M(M_), rows(std::max((M_ + kMaxParts - 1) / kMaxParts, (kLeastPartElements + N - 1) / N)) {
    rows = (rows + kLeastPartRows - 1) / kLeastPartRows * kLeastPartRows;
  }
  int64_t size() const { return (M + rows - 1) / rows; }
  int64_t begin(int64_t part) const { return part * rows; }
  int64_t end(int64_t part) const { return std::min(M, begin(part) + rows); }
};

template <typename T>
struct RowsBackward {
  using acc_t = acc_type<T>;
  using P = Pack<T>;
  const LayerNormBackward& a;
  const T* x = static_cast<const T*>(a.x);
  const T* dy = static_cast<const T*>(a.dy);
  const T* residual = static_cast<const T*>(a.residual);
  const acc_t* mean = static_cast<const acc_t*>(a.mean);
  const acc_t* rstd = static_cast<const acc_t*>(a.rstd);
  const acc_t* rest = static_cast<const acc_t*>(a.rest);
  T* dx = static_cast<T*>(a.dx);
  T* dresidual = static_cast<T*>(a.dresidual);
  const int64_t M = a.M, N = a.N, chunks = (N + kChunk - 1) / kChunk;
  const MaskRows mask = a.mask_rows();
  const bool stream = stream_output(M * N, a.dtype, /*inputs=*/2);
  const int64_t ahead = come_from_memory(M * N, a.dtype, /*inputs=*/2) ? kAhead<T> : 0;
  const bool wants_columns = a.dweight || a.dbias;

  int64_t chunk_length(int64_t chunk) const { return std::min(kChunk, N - chunk * kChunk); }

  RunGradient<T> gradient(int64_t row, int64_t first, acc_t* kept) const {
    const int64_t i = row * N + first;
    return {x + i, dy + i, offset_by(residual, i), offset_by(a.mask, row * mask.bytes_per_row() + first / 8), kept};
  }
  Affine<RowWise<T>> affine(int64_t row, const ColumnParameters<T>& parameters) const {
    const auto at = [&](const acc_t* p) { return Uniform<T>(p ? p[row] : acc_t(0)); };
    return {{at(mean), at(rstd), at(rest)}, parameters};
  }

  // The sums over n <= kChunk columns of g and g * xhat; dz to `kept` if it is not null.
  // Scalar math: g = dz * weight;  sums.dz += g;  sums.dz_xhat += g * xhat
  template <typename Act>
  FASTNORM_LOOP Sums reduce(Act act, int64_t row, int64_t first, int64_t n, const ColumnParameters<T>& parameters,
                            acc_t* kept = nullptr) const {
    constexpr int kUnroll = unroll_of<Act>(kSumPacks<T>);
    const RunGradient<T> from = gradient(row, first, kept);
    const Affine<RowWise<T>> z = affine(row, parameters);
    P g_sum(0), g_xhat_sum(0);
    sum_packs<T, kUnroll>(n, g_sum, g_xhat_sum, [&](int64_t i, auto count, P& s, P& sx) {
      const P x_i = P::load(from.x + i, count);
      P dz = from.dz(act, i, count, x_i, z);
      from.keep(act, i, dz);
      if constexpr (!kIsNone<Act>) dz = dz.keep(count);  // of elements past the end it need not be finite
      const P g = dz * z.parameters.weight[i];
      s = s + g;
      sx = fmadd(g, z.standardize(x_i, i).keep(count), sx);
    });
    return {lane_sum(g_sum), lane_sum(g_xhat_sum)};
  }

  // The means of g and g * xhat over a row: dx = (g - (xhat * mean_g_xhat + mean_g)) * rstd, exactly 0 if N = 1.
  struct RowGradient {
    acc_t mean_g, mean_g_xhat;
  };
  RowGradient row_gradient(const Sums& sums) const {
    const double n = static_cast<double>(N);
    return {a.subtract_mean ? static_cast<acc_t>(sums.dz / n) : acc_t(0), static_cast<acc_t>(sums.dz_xhat / n)};
  }

  // Writes dx and dresidual of n columns; adds dz and dz * xhat to dbias[] and dweight[], in whole packs. dz is what
  // reduce() kept, or computed again.
  template <typename Act>
  FASTNORM_LOOP void write(Act act, int64_t row, int64_t first, int64_t n, const ColumnParameters<T>& parameters,
                           const RowGradient& coefficients, acc_t* dweight, acc_t* dbias, acc_t* kept = nullptr) const {
    const int64_t at = row * N + first;
    const RunGradient<T> from = gradient(row, first, kept);
    const Affine<RowWise<T>> z = affine(row, parameters);
    const P mean_g(coefficients.mean_g), mean_g_xhat(coefficients.mean_g_xhat);
    T *const to = offset_by(dx, at), *const to_residual = offset_by(dresidual, at);
    const bool past_caches = stream && to != from.dy && fills_lines(to, n), adds = wants_columns;
    const bool residual_past_caches = stream && fills_lines(to_residual, n);
    const int64_t fetched = ahead;
    from.with_dz(act, [&](const auto& dz_at) {
      for_packs<T>(n, [&](int64_t i, auto count, int) {
        if (fetched) from.prefetch(i + fetched);
        const P x_i = P::load(from.x + i, count);
        const P dz = dz_at(i, count, x_i, z);
        const P xhat = z.standardize(x_i, i);
        if (adds) {
          (P::load_acc(dbias + i) + dz).store_acc(dbias + i);
          fmadd(dz, xhat, P::load_acc(dweight + i)).store_acc(dweight + i);
        }
        if (to_residual) put(dz, to_residual + i, count, residual_past_caches);
        if (to == nullptr) return;
        const P d = dz * z.parameters.weight[i] - fmadd(xhat, mean_g_xhat, mean_g);
        put(d * z.standardize.rstd[i], to + i, count, past_caches);
      });
    });
  }

  // dweight and dbias of n columns, side by side in `values`, or nothing: float32 sums, padded to whole packs.
  struct ColumnSums {
    acc_t *dweight, *dbias;

    static int64_t stride(int64_t n) { return (n / P::kSize + 1) * P::kSize; }
    static int64_t size(int64_t n) { return 2 * stride(n); }

    ColumnSums(acc_t* values, int64_t n) : dweight(values), dbias(values + stride(n)) {
      std::fill(values, values + size(n), acc_t(0));
    }

    // To float64, in place of what is there or added to it; and from zero again.
    void flush(bool first, int64_t n, double* to_dweight, double* to_dbias) const {
      const auto move = [&](acc_t* from, double* to) {
        for (int64_t j = 0; j < n; ++j) to[j] = (first ? 0.0 : to[j]) + from[j];
        std::fill(from, from + n, acc_t(0));
      };
      move(dweight, to_dweight);
      move(dbias, to_dbias);
    }
  };

  template <typename Act>
  void whole_rows(Act act, int64_t begin, int64_t end, const ColumnParameters<T>& parameters, const ColumnSums& sums,
                  acc_t* kept) const {
    for (int64_t row = begin; row < end; ++row) {
      Sums total;
      for (int64_t k = 0; k < (dx ? chunks : 0); ++k) {
        const ColumnParameters<T> at{PerColumn<T>(parameters.weight.values + k * kChunk),
                                     PerColumn<T>(parameters.bias.values + k * kChunk)};
        total += reduce(act, row, k * kChunk, chunk_length(k), at, offset_by(kept, k * kChunk));
      }
      write(act, row, 0, N, parameters, row_gradient(total), sums.dweight, sums.dbias, kept);
    }
  }

  void by_rows() const {
    const RowTasks tasks(M, N);
    const ParameterArrays<T> parameters(a, 0, N);
    // Of each task a row of dweight and one of dbias: the sums themselves, where a task has no more rows than these may
    // be of, else as float64.
    const bool one_block = tasks.rows <= kSumRows;
    const int64_t columns = wants_columns ? N : 0, size = ColumnSums::size(columns);
    const ScratchArray<acc_t> sums_of_tasks(one_block ? tasks.size() * size : 0);
    const ScratchArray<double> partial(one_block ? 0 : tasks.size() * 2 * columns);
    parallel_for(tasks.size(), M * N, [&](int64_t task) {
      const ScratchArray<acc_t> own(one_block ? 0 : size);
      const ColumnSums sums(one_block ? &sums_of_tasks[task * size] : own.data(), columns);
      // A row's dz, where computing it again would take longer than reading it.
      const bool keeps = is_smooth(a.activation) && dx;
      const ScratchArray<acc_t> row_dz(keeps ? N + P::kSize : 0);
      acc_t* const kept = keeps ? row_dz.data() : nullptr;
      double *dweight = partial.data() + task * 2 * columns, *dbias = dweight + columns;
      for (int64_t begin = tasks.begin(task); begin < tasks.end(task); begin += kSumRows) {
        const int64_t end = std::min(tasks.end(task), begin + kSumRows);
        visit<T>(a.activation, [&](auto act) { whole_rows(act, begin, end, *parameters, sums, kept); });
        if (!one_block) sums.flush(begin == tasks.begin(task), columns, dweight, dbias);
      }
    });
    if (!wants_columns) return;
    one_block ? merge(sums_of_tasks.data(), tasks.size(), ColumnSums::stride(N))
              : merge(partial.data(), tasks.size(), N);
  }

  // dweight and dbias from the parts' sums, each of which are `stride` from the next.
  template <typename V>
  void merge(const V* partial, int64_t parts, int64_t stride) const {
    constexpr int64_t kColumns = 256;
    parallel_for((N + kColumns - 1) / kColumns, parts * N, [&](int64_t task) {
      const int64_t first = task * kColumns, n = std::min(kColumns, N - first);
      for (int which = 0; which < 2; ++which) {
        double total[kColumns];
        std::fill(total, total + n, 0.0);
        for (int64_t part = 0; part < parts; ++part)
          for (int64_t j = 0; j < n; ++j) total[j] += partial[(2 * part + which) * stride + first + j];
        write_parameter(which == 0 ? a.dweight : a.dbias, a.param_dtype, first, total, n);
      }
    });
  }

  void by_strips() const {
    const int64_t rows = std::min({M, kBlockRows, std::max<int64_t>(1, kStripsBlock / N)});
    const bool one_block = rows == M;
    const ScratchArray<Sums> partial(dx ? rows * chunks : 0);
    const ScratchArray<RowGradient> coefficients(rows);
    const ScratchArray<double> total(wants_columns && !one_block ? 2 * N : 0);
    for (int64_t begin = 0; begin < M; begin += rows) {
      const int64_t end = std::min(M, begin + rows);
      if (dx) {
        parallel_for((end - begin) * chunks, (end - begin) * N, [&](int64_t i) {
          const int64_t row = begin + i / chunks, chunk = i % chunks, first = chunk * kChunk, n = chunk_length(chunk);
          const ParameterArrays<T> parameters(a, first, n);
          visit<T>(a.activation, [&](auto act) { partial[i] = reduce(act, row, first, n, *parameters); });
        });
      }
      for (int64_t row = begin; row < end; ++row) {
        Sums sums;
        for (int64_t k = 0; k < (dx ? chunks : 0); ++k) sums += partial[(row - begin) * chunks + k];
        coefficients[row - begin] = row_gradient(sums);
      }
      parallel_for(chunks, (end - begin) * N, [&](int64_t chunk) {
        const int64_t first = chunk * kChunk, n = chunk_length(chunk);
        const ParameterArrays<T> parameters(a, first, n);
        const int64_t columns = wants_columns ? n : 0;
        const ScratchArray<acc_t> values(ColumnSums::size(columns));
        const ColumnSums sums(values.data(), columns);
        visit<T>(a.activation, [&](auto act) {
          for (int64_t row = begin; row < end; ++row)
            write(act, row, first, n, *parameters, coefficients[row - begin], sums.dweight, sums.dbias);
        });
        if (!wants_columns) return;
        if (one_block) {
          write_parameter(a.dweight, a.param_dtype, first, sums.dweight, n);
          write_parameter(a.dbias, a.param_dtype, first, sums.dbias, n);
          return;
        }
        double *dweight = total.data() + first, *dbias = dweight + N;
        sums.flush(begin == 0, n, dweight, dbias);
        if (end == M) {
          write_parameter(a.dweight, a.param_dtype, first, dweight, n);
          write_parameter(a.dbias, a.param_dtype, first, dbias, n);
        }
      });
    }
  }

  void run() const {
    if (N > kLongRow || (M < kFewRows && M * N > kSmall)) return by_strips();
    by_rows();
  }
};

}  // namespace

void layer_norm_forward(const LayerNormForward& a) {
  visit(a.dtype, [&](auto type) { RowsForward<decltype(type)>{a}.run(); });
}

void layer_norm_backward(const LayerNormBackward& a) {
  visit(a.dtype, [&](auto type) { RowsBackward<decltype(type)>{a}.run(); });
}

}  // namespace fastnorm::cpu::CPU_CAPABILITY
