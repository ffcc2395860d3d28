// Mean and sum of squared deviations, exactly enough: within a chunk of at most kChunk elements two sweeps in the
// arithmetic's type (the mean, then deviations from it, with the first-order correction), across chunks Chan's merge in
// float64.
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

constexpr int kMostSlices = 8;  // that chunk_moments takes together

// Not cloned for one slice: it would gain nothing and be compiled twice.
template <int kUnroll, typename T>
FASTNORM_LOOP __attribute__((noclone)) void chunk_moments_by(const T* x, const Runs& chunk, int slices, int64_t apart,
                                                             int64_t ahead, Moments* result) {
  using acc_t = acc_type<T>;
  using P = Pack<T>;
  constexpr int kUnroll2 = std::max(1, kUnroll / 2);
  const double n = static_cast<double>(chunk.numel());
  const auto for_runs = [&](const auto& f) {
    for (int64_t run = 0; run < chunk.count; ++run)
      for (int s = 0; s < slices; ++s) f(s, x + s * apart + chunk.offset + run * chunk.stride);
  };

  P sums[kMostSlices][kUnroll];
  for (int s = 0; s < slices; ++s) std::fill(sums[s], sums[s] + kUnroll, P(0));
  for_runs([&](int s, const T* row) {
    P sum[kUnroll];
    std::copy(sums[s], sums[s] + kUnroll, sum);
    for_packs<T, kUnroll>(chunk.length, [&](int64_t i, auto count, int u) {
      if (ahead) prefetch(row + i + ahead);
      sum[u] = sum[u] + P::load(row + i, count);
    });
    std::copy(sum, sum + kUnroll, sums[s]);
  });
  acc_t m[kMostSlices];
  for (int s = 0; s < slices; ++s) m[s] = static_cast<acc_t>(lane_sum(sums[s]) / n);

  P first[kMostSlices][kUnroll2], second[kMostSlices][kUnroll2];
  for (int s = 0; s < slices; ++s) {
    std::fill(first[s], first[s] + kUnroll2, P(0));
    std::fill(second[s], second[s] + kUnroll2, P(0));
  }
  for_runs([&](int s, const T* row) {
    const P shift(m[s]);
    P s1[kUnroll2], s2[kUnroll2];
    std::copy(first[s], first[s] + kUnroll2, s1);
    std::copy(second[s], second[s] + kUnroll2, s2);
    for_packs<T, kUnroll2>(chunk.length, [&](int64_t i, auto count, int u) {
      const P d = (P::load(row + i, count) - shift).keep(count);
      s1[u] = s1[u] + d;
      s2[u] = fmadd(d, d, s2[u]);
    });
    std::copy(s1, s1 + kUnroll2, first[s]);
    std::copy(s2, s2 + kUnroll2, second[s]);
  });
  for (int s = 0; s < slices; ++s) {
    const double deviations = lane_sum(first[s]), squares = lane_sum(second[s]);
    result[s] = !std::is_same_v<acc_t, double> && out_of_range(m[s], deviations, squares)
                    ? chunk_moments_float64(x + s * apart, chunk)
                    : shifted_moments(n, m[s], deviations, squares);
  }
}

// The moments of a chunk of each of at most kMostSlices slices that begin `apart` elements from each other, whose runs
// are taken by turns: what lies near each other is read together.
// Scalar math: m = sum(x) / n;  s1 = sum(x - m);  s2 = sum((x - m)^2). Prefetches what lies `ahead` of the chunk, if not
// 0.
template <typename T>
void chunk_moments(const T* x, const Runs& chunk, int slices, int64_t apart, int64_t ahead, Moments* result) {
  constexpr int kUnroll = 2 * kSumPacks<T>;
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

// Scalar math: sum(x * y) over a chunk
template <typename T>
FASTNORM_LOOP double chunk_dot(const T* x, const T* y, const Runs& chunk) {
  using P = Pack<T>;
  constexpr int kUnroll = kSumPacks<T>;
  P sum[kUnroll];
  for (auto& s : sum) s = P(0);
  for (int64_t run = 0; run < chunk.count; ++run) {
    const int64_t start = chunk.offset + run * chunk.stride;
    for_packs<T, kUnroll>(chunk.length, [&](int64_t i, auto count, int u) {
      sum[u] = fmadd(P::load(x + start + i, count), P::load(y + start + i, count), sum[u]);
    });
  }
  return lane_sum(sum);
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
