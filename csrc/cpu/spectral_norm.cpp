// Spectral normalisation on the CPU. One iteration of the power method reads the matrix once: W^T u is gathered row by
// row while W v is, for u is W v but for its length. A task owns some rows; each row is still in the first-level cache
// when it is added to the task's W^T (W v), whose float64 sums are merged in the order of the tasks.
#include "../spectral_norm.h"

#include <cmath>

#include "columns.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

constexpr int64_t kRowsTogether = 4;       // they share the loads of v and of the sums
constexpr int64_t kElements = 4 * kChunk;  // of an elementwise task

// Rows as tasks: at least 64 Ki elements each, at most 64 tasks.
struct Tasks {
  int64_t h, rows;

  Tasks(int64_t h_, int64_t w) : h(h_) {
    const int64_t enough = std::max((kPartElements + w - 1) / w, (h + kMaxParts - 1) / kMaxParts);
    rows = (enough + kRowsTogether - 1) / kRowsTogether * kRowsTogether;
  }
  int64_t size() const { return (h + rows - 1) / rows; }
  int64_t begin(int64_t i) const { return i * rows; }
  int64_t end(int64_t i) const { return std::min(h, (i + 1) * rows); }
};

template <typename T>
struct PowerMethod {
  using acc_t = acc_type<T>;
  using P = Pack<T>;
  const SpectralNormForward& a;
  const T* matrix = static_cast<const T*>(a.matrix);
  const int64_t h = a.h, w = a.w;
  const Tasks tasks{h, w};
  acc_t *u = static_cast<acc_t*>(a.kept_u), *v = static_cast<acc_t*>(a.kept_v);
  const ScratchArray<double> t{h}, s{w};
  const ScratchArray<double> partial{a.iterations > 0 ? tasks.size() * w : 0};

  // Scalar math: t[k] = sum_j rows[k][j] * v[j]
  template <int kRows>
  FASTNORM_LOOP void dot_rows(const T* rows, const ColumnArray<T>& v, double* t) const {
    constexpr int kUnroll = kRows == 1 ? 4 : 1;
    for (int k = 0; k < kRows; ++k) t[k] = 0;
    for (int64_t begin = 0; begin < w; begin += kChunk) {
      P sum[kRows * kUnroll];
      for (auto& e : sum) e = P(0);
      for_packs<T, kUnroll>(std::min(kChunk, w - begin), [&](int64_t i, auto count, int unroll) {
        const int64_t j = begin + i;
        const P v_j = P::load_acc(&v[j]);
        for (int k = 0; k < kRows; ++k) {
          P& e = sum[k * kUnroll + unroll];
          e = fmadd(P::load(rows + k * w + j, count), v_j, e);
        }
      });
      for (int k = 0; k < kRows; ++k) {
        for (int unroll = 1; unroll < kUnroll; ++unroll)
          sum[k * kUnroll] = sum[k * kUnroll] + sum[k * kUnroll + unroll];
        t[k] += lane_sum(sum[k * kUnroll]);
      }
    }
  }

  // Scalar math: sum[j] += sum_k rows[k][j] * t[k]
  template <int kRows>
  FASTNORM_LOOP void add_rows(const T* rows, const double* t, const ColumnArray<T>& sum) const {
    P factor[kRows];
    for (int k = 0; k < kRows; ++k) factor[k] = P(static_cast<acc_t>(t[k]));
    for_packs<T, 2>(w, [&](int64_t j, auto count, int) {
      P e = P::load_acc(&sum[j]);
      for (int k = 0; k < kRows; ++k) e = fmadd(P::load(rows + k * w + j, count), factor[k], e);
      e.store_acc(&sum[j]);
    });
  }

  // f(first row, integral_constant rows) for the rows of a task, four by four.
  template <typename F>
  void for_rows(int64_t begin, int64_t end, const F& f) const {
    for (; begin + kRowsTogether <= end; begin += kRowsTogether) f(begin, std::integral_constant<int, kRowsTogether>{});
    for (; begin < end; ++begin) f(begin, std::integral_constant<int, 1>{});
  }

  // t = W v if `multiply`, and s = W^T t if `transposed`. Sums of at most 64 rows are float32.
  void sweep(const ColumnArray<T>& v, bool multiply, bool transposed) const {
    parallel_for(tasks.size(), h * w, [&](int64_t task) {
      const int64_t first = tasks.begin(task), last = tasks.end(task);
      if (!transposed) {
        return for_rows(first, last,
                        [&](int64_t row, auto rows) { dot_rows<decltype(rows)::value>(matrix + row * w, v, &t[row]); });
      }
      const ColumnArray<T> sum(w);
      double* total = &partial[task * w];
      std::fill(total, total + w, 0.0);
      for (int64_t begin = first; begin < last; begin += kBlockRows) {
        std::fill(&sum[0], &sum[0] + w, acc_t(0));
        for_rows(begin, std::min(last, begin + kBlockRows), [&](int64_t row, auto rows) {
          if (multiply) dot_rows<decltype(rows)::value>(matrix + row * w, v, &t[row]);
          add_rows<decltype(rows)::value>(matrix + row * w, &t[row], sum);
        });
        for (int64_t j = 0; j < w; ++j) total[j] += sum[j];
      }
    });
    if (!transposed) return;
    for (int64_t j = 0; j < w; ++j) s[j] = partial[j];
    for (int64_t task = 1; task < tasks.size(); ++task)
      for (int64_t j = 0; j < w; ++j) s[j] += partial[task * w + j];
  }

  // |t|^2, summed in an order that vectors can take.
  static double sum_of_squares(const ScratchArray<double>& t, int64_t n) {
    constexpr int64_t kLanes = 8;
    double lane[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
      for (int64_t k = 0; k < kLanes; ++k) lane[k] += t[i + k] * t[i + k];
    for (; i < n; ++i) lane[0] += t[i] * t[i];
    double sum = 0;
    for (double e : lane) sum += e;
    return sum;
  }

  void run() const {
    const ColumnArray<T> v_now(w);
    for (int64_t i = 0; i < h; ++i) u[i] = static_cast<acc_t>(static_cast<const T*>(a.u)[i]);
    for (int64_t j = 0; j < w; ++j) v_now[j] = static_cast<acc_t>(static_cast<const T*>(a.v)[j]);
    double sigma = 0;
    if (a.iterations == 0) {
      sweep(v_now, true, false);
      for (int64_t i = 0; i < h; ++i) sigma += u[i] * t[i];
    }
    for (int64_t iteration = 0; iteration < a.iterations; ++iteration) {
      sweep(v_now, true, true);
      const double length = std::sqrt(sum_of_squares(t, h)), divisor = std::max(a.eps, length);
      for (int64_t i = 0; i < h; ++i) t[i] /= divisor;
      // the products with t were of the order of length^2, which must be well inside float32's range
      const bool in_range = std::is_same_v<acc_t, double> || (length > 1e-12 && length < 1e12);
      if (!in_range) sweep(v_now, false, true);
      const double scale = in_range ? 1 / divisor : 1;
      for (int64_t j = 0; j < w; ++j) s[j] *= scale;
      const double squares = sum_of_squares(s, w), divisor_v = std::max(a.eps, std::sqrt(squares));
      for (int64_t j = 0; j < w; ++j) v_now[j] = static_cast<acc_t>(s[j] / divisor_v);
      sigma = squares / divisor_v;
    }
    std::copy(&v_now[0], &v_now[0] + w, v);
    if (a.iterations > 0) {
      for (int64_t i = 0; i < h; ++i) u[i] = static_cast<acc_t>(t[i]);
      for (int64_t i = 0; i < h; ++i) static_cast<T*>(a.u)[i] = static_cast<T>(u[i]);
      for (int64_t j = 0; j < w; ++j) static_cast<T*>(a.v)[j] = static_cast<T>(v[j]);
    }
    *a.sigma = sigma;
  }
};

// Calls f(first, length) for pieces of n elements, as parallel tasks from the last to the first.
template <typename F>
void for_pieces(int64_t n, const F& f) {
  parallel_for_reversed((n + kElements - 1) / kElements, n,
                        [&](int64_t i) { f(i * kElements, std::min(kElements, n - i * kElements)); });
}

template <typename T>
struct Backward {
  using acc_t = acc_type<T>;
  using P = Pack<T>;
  const SpectralNormBackward& a;
  const T *weight = static_cast<const T*>(a.weight), *dy = static_cast<const T*>(a.dy);
  const acc_t *u = static_cast<const acc_t*>(a.u), *v = static_cast<const acc_t*>(a.v);
  T* dweight = static_cast<T*>(a.dweight);

  double sum_of_products() const {
    const int64_t numel = a.shape.numel();
    const Chunks chunks(Runs{0, 1, 0, numel});
    const ScratchArray<double> partial(chunks.size());
    parallel_for(chunks.size(), numel, [&](int64_t i) { partial[i] = chunk_dot(dy, weight, chunks[i]); });
    double total = 0;
    for (int64_t i = 0; i < chunks.size(); ++i) total += partial[i];
    return total;
  }

  // Scalar math: dweight[i, j] = dy[i, j] / sigma - rows[i] * (k / sigma) * columns[j]
  FASTNORM_LOOP void outer(int64_t begin, int64_t rows, int64_t length, const acc_t* row_value,
                           const ColumnArray<T>& column, int64_t first_column, double scale, double k) const {
    const P reciprocal(static_cast<acc_t>(scale));
    for (int64_t i = 0; i < rows; ++i) {
      const P factor(static_cast<acc_t>(-k * scale * row_value[i]));
      const int64_t start = begin + i * length;
      for_packs<T, 2>(length, [&](int64_t j, auto count, int) {
        const P product = P::load_acc(&column[first_column + j]) * factor;
        fmadd(P::load(dy + start + j, count), reciprocal, product).store(dweight + start + j, count);
      });
    }
  }

  void run() const {
    const auto [N, C, S, layout] = a.shape;
    const double scale = 1 / *a.sigma, k = sum_of_products() * scale;
    const int64_t numel = a.shape.numel();
    const bool is_transposed = S == 1 && N > 1;  // [w, h]
    const ColumnArray<T> column(is_transposed ? C : N * S);
    std::copy_n(is_transposed ? u : v, is_transposed ? C : N * S, &column[0]);
    if (is_transposed)
      return parallel_for_reversed(N, numel, [&, C = C](int64_t n) { outer(n * C, 1, C, v + n, column, 0, scale, k); });

    const int64_t rows = std::max<int64_t>(1, kElements / S), blocks = (C + rows - 1) / rows;
    parallel_for_reversed(N * blocks, numel, [&, C = C, S = S](int64_t i) {
      const int64_t n = i / blocks, c = i % blocks * rows;
      outer((n * C + c) * S, std::min(rows, C - c), S, u + c, column, n * S, scale, k);
    });
  }
};

}  // namespace

void spectral_norm_forward(const SpectralNormForward& a) {
  visit(a.dtype, [&](auto type) {
    using T = decltype(type);
    PowerMethod<T>{a}.run();
    const Pack<T> scale(static_cast<acc_type<T>>(1 / *a.sigma));
    for_pieces(a.h * a.w, [&](int64_t begin, int64_t length) FASTNORM_LOOP {
      const T* x = static_cast<const T*>(a.weight) + begin;
      T* y = static_cast<T*>(a.y) + begin;
      for_packs<T, 2>(length,
                      [&](int64_t i, auto count, int) { (Pack<T>::load(x + i, count) * scale).store(y + i, count); });
    });
  });
}

void spectral_norm_backward(const SpectralNormBackward& a) {
  visit(a.dtype, [&](auto type) { Backward<decltype(type)>{a}.run(); });
}

}  // namespace fastnorm::cpu::CPU_CAPABILITY
