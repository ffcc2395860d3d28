// Weight normalisation on the CPU: a sum of products over each slice, then an elementwise map with two coefficients of
// the slice. Forward and backward are the same two sweeps.
//
// planes   (runs of 16 elements or more, or one run a slice): a task owns a slice. Too few slices for the threads: the
//          same chunks, in two parallel sweeps.
// columns  (slices of many short runs): a matrix [N, C * S] whose columns are reduced by blocks of rows.
#include "../weight_norm.h"

#include "columns.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

struct Coefficients {
  double factor, slope;
};

// Scalar math: w = v * factor
template <typename T>
struct Scale {
  const T* x;  // x, y: what is multiplied and summed over a slice
  const T* y = x;
  T* out;

  template <typename C>
  FASTNORM_LOOP void operator()(int64_t i, int64_t n, const C& factor, const C&) const {
    const C by = factor;  // in registers, as in normalize.h
    const T* from = x + i;
    T* to = out + i;
    for_packs<T, 2>(n,
                    [&](int64_t j, auto count, int) { (Pack<T>::load(from + j, count) * by[j]).store(to + j, count); });
  }
};

// Scalar math: dv = (dw - v * slope) * factor
template <typename T>
struct Gradient {
  const T *x, *y;  // v and dw
  T* out;          // or null

  template <typename C>
  FASTNORM_LOOP void operator()(int64_t i, int64_t n, const C& factor, const C& slope) const {
    if (out == nullptr) return;
    const C by = factor, less = slope;
    const T *v = x + i, *dw = y + i;
    T* to = out + i;
    for_packs<T>(n, [&](int64_t j, auto count, int) {
      const Pack<T> d = Pack<T>::load(dw + j, count) - Pack<T>::load(v + j, count) * less[j];
      (d * by[j]).store(to + j, count);
    });
  }
};

// finish(c, sum) gives the coefficients of slice c from its sum of products.
template <typename T, typename Op, typename Finish>
void planes(const Shape& shape, const Op& op, const Finish& finish) {
  const int64_t C = shape.C, S = shape.S, numel = shape.numel();
  const Chunks chunks(Runs{0, shape.N, C * S, S});
  const int64_t per_slice = chunks.size();
  const auto sum = [&](int64_t c, int64_t k) { return chunk_dot(op.x + c * S, op.y + c * S, chunks[k]); };
  const auto map = [&](int64_t c, int64_t k, const Coefficients& coefficients) {
    const Uniform<T> factor(static_cast<acc_type<T>>(coefficients.factor));
    const Uniform<T> slope(static_cast<acc_type<T>>(coefficients.slope));
    chunks.for_runs(k, [&](int64_t i, int64_t length) { op(c * S + i, length, factor, slope); });
  };
  if (C < 2 * num_threads()) {
    const ScratchArray<double> partial(C * per_slice);
    const ScratchArray<Coefficients> coefficients(C);
    parallel_for(C * per_slice, numel, [&](int64_t i) { partial[i] = sum(i / per_slice, i % per_slice); });
    for (int64_t c = 0; c < C; ++c) {
      double total = 0;
      for (int64_t k = 0; k < per_slice; ++k) total += partial[c * per_slice + k];
      coefficients[c] = finish(c, total);
    }
    return parallel_for_reversed(C * per_slice, numel,
                                 [&](int64_t i) { map(i / per_slice, i % per_slice, coefficients[i / per_slice]); });
  }
  parallel_for(C, numel, [&](int64_t c) {
    double total = 0;
    for (int64_t k = 0; k < per_slice; ++k) total += sum(c, k);
    const Coefficients coefficients = finish(c, total);
    for (int64_t k = per_slice; k-- > 0;) map(c, k, coefficients);
  });
}

// Column j belongs to slice j / S.
template <typename T, typename Op, typename Finish>
void columns(const Shape& shape, const Op& op, const Finish& finish) {
  const int64_t S = shape.S, width = shape.C * S, numel = shape.numel();
  const RowParts parts(shape.N, width);
  const ScratchArray<double> partial(parts.size() * width);
  parallel_for(parts.size(), numel, [&](int64_t part) {
    double* sum = &partial[part * width];
    std::fill(sum, sum + width, 0.0);
    for (int64_t row = parts.begin(part); row < parts.end(part); row += kBlockRows) {
      const int64_t end = std::min(row + kBlockRows, parts.end(part));
      for_tiles<T>(width, [&](int64_t j, auto tile, auto count) {
        add_tile_products<decltype(tile)::value>(op.x + j, op.y + j, width, row, end, count, sum + j);
      });
    }
  });
  const ColumnArray<T> factor(width), slope(width);
  parallel_for(shape.C, parts.size() * width, [&](int64_t c) {
    double total = 0;
    for (int64_t j = c * S; j < (c + 1) * S; ++j)
      for (int64_t part = 0; part < parts.size(); ++part) total += partial[part * width + j];
    const Coefficients coefficients = finish(c, total);
    for (int64_t j = c * S; j < (c + 1) * S; ++j) {
      factor[j] = static_cast<acc_type<T>>(coefficients.factor);
      slope[j] = static_cast<acc_type<T>>(coefficients.slope);
    }
  });
  parallel_for_reversed(parts.size(), numel, [&](int64_t part) {
    for (int64_t row = parts.end(part); row-- > parts.begin(part);)
      op(row * width, width, PerColumn<T>(factor), PerColumn<T>(slope));
  });
}

template <typename T, typename Op, typename Finish>
void sum_then_map(const Shape& shape, const Op& op, const Finish& finish) {
  constexpr int64_t kShortRun = 16;
  if (shape.N > 1 && shape.S < kShortRun) return columns<T>(shape, op, finish);
  planes<T>(shape, op, finish);
}

// The squares of slice c in float64, for sums that left float32's range.
template <typename T>
double exact_sum_of_squares(const Shape& shape, const T* v, int64_t c) {
  double sum = 0;
  for (int64_t n = 0; n < shape.N; ++n) {
    for (int64_t s = 0; s < shape.S; ++s) {
      const double value = static_cast<double>(v[(n * shape.C + c) * shape.S + s]);
      sum += value * value;
    }
  }
  return sum;
}

}  // namespace

void weight_norm_forward(const WeightNormForward& a) {
  visit(a.dtype, [&](auto type) {
    using T = decltype(type);
    const T* v = static_cast<const T*>(a.v);
    sum_then_map<T>(a.shape, Scale<T>{.x = v, .out = static_cast<T*>(a.w)}, [&](int64_t c, double sum) {
      if (!std::is_same_v<T, double> && out_of_range(1, 1, sum)) sum = exact_sum_of_squares(a.shape, v, c);
      a.norm[c] = std::sqrt(sum);
      return Coefficients{read(a.g, a.param_dtype, c, 1) / a.norm[c], 0};
    });
  });
}

void weight_norm_backward(const WeightNormBackward& a) {
  visit(a.dtype, [&](auto type) {
    using T = decltype(type);
    const Gradient<T> op{static_cast<const T*>(a.v), static_cast<const T*>(a.dw), static_cast<T*>(a.dv)};
    sum_then_map<T>(a.shape, op, [&](int64_t c, double sum) {
      const double norm = a.norm[c], dg = sum / norm;
      if (a.dg) write(a.dg, a.param_dtype, c, dg);
      return Coefficients{read(a.g, a.param_dtype, c, 1) / norm, dg / norm};
    });
  });
}

}  // namespace fastnorm::cpu::CPU_CAPABILITY
