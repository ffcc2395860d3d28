// What reductions share: a chunk of at most kChunk elements is summed in the arithmetic's type, chunks in float64.
#pragma once

#include <cmath>

#include "../moments.h"
#include "geometry.h"
#include "vec.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

// Moments of n numbers from the sums of (x - m) and (x - m)^2, m being any number near their mean.
inline Moments shifted_moments(double n, double m, double sum, double sum_of_squares) {
  const double d = sum / n;
  const double m2 = sum_of_squares - sum * d;
  return {n, m + d, m2 < 0 ? 0 : m2};  // a NaN stays one
}

// Squares that left the range of float32, above or below: the chunk is then done again in float64. A chunk of zeros, as
// a ReLU leaves them, is not such a one.
inline bool out_of_range(double m, double sum, double sum_of_squares) {
  return !std::isfinite(sum_of_squares) || (sum_of_squares < 1e-30 && (sum != 0 || m != 0));
}

template <typename T>
Moments chunk_moments_float64(const T* x, const Runs& chunk) {
  double sum = 0, deviations = 0, squares = 0;
  const auto each = [&](const auto& f) {
    for (int64_t run = 0; run < chunk.count; ++run)
      for (int64_t i = 0; i < chunk.length; ++i) f(static_cast<double>(x[chunk.offset + run * chunk.stride + i]));
  };
  each([&](double v) { sum += v; });
  const double mean = sum / static_cast<double>(chunk.numel());
  each([&](double v) {
    deviations += v - mean;
    squares += (v - mean) * (v - mean);
  });
  return shifted_moments(static_cast<double>(chunk.numel()), mean, deviations, squares);
}

// Scalar math: sum(x * y) over a chunk. Where products cancel each other out, what their sum is rounded by counts: it is
// float64 after kChain packs.
template <typename T>
FASTNORM_LOOP double chunk_dot(const T* x, const T* y, const Runs& chunk) {
  using P = Pack<T>;
  constexpr int kUnroll = kSumPacks<T>;
  double total = 0;
  for (int64_t run = 0; run < chunk.count; ++run) {
    const int64_t start = chunk.offset + run * chunk.stride;
    for_sum_pieces<T, 1>(chunk.length, [&](int64_t first, int64_t here) {
      const T *const from_x = x + start + first, *const from_y = y + start + first;
      P sum[kUnroll];
      for (auto& s : sum) s = P(0);
      for_packs<T, kUnroll, AnyOrder>(here, [&](int64_t i, auto count, int u) {
        sum[u] = fmadd(P::load(from_x + i, count), P::load(from_y + i, count), sum[u]);
      });
      total += lane_sum(sum);
    });
  }
  return total;
}

// The two sums that backward of every norm needs of a slice.
struct Sums {
  double dz = 0, dz_xhat = 0;

  void operator+=(const Sums& b) {
    dz += b.dz;
    dz_xhat += b.dz_xhat;
  }
};

}  // namespace
}  // namespace fastnorm::cpu::CPU_CAPABILITY
