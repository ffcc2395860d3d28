// Mean and sum of squared deviations of a set of numbers, merged exactly as Chan, Golub and LeVeque (1979) do:
//   delta = mean_b - mean_a,  n = n_a + n_b
//   mean = mean_a + delta * n_b / n,  m2 = m2_a + m2_b + delta^2 * n_a * n_b / n
// E[x^2] - mean^2 is never formed: it loses every digit where |mean| >> std.
#pragma once

#ifdef __CUDACC__
#define FASTNORM_HOST_DEVICE __host__ __device__
#else
#define FASTNORM_HOST_DEVICE
#endif

namespace fastnorm {
namespace {  // internal linkage: see isa.h

struct Moments {
  double count = 0, mean = 0, m2 = 0;

  FASTNORM_HOST_DEVICE void merge(const Moments& b) {
    if (b.count == 0) return;
    if (count == 0) {
      *this = b;
      return;
    }
    const double n = count + b.count, delta = b.mean - mean;
    mean += delta * (b.count / n);
    m2 += b.m2 + delta * delta * (count * (b.count / n));
    count = n;
  }

  FASTNORM_HOST_DEVICE double biased_variance() const { return m2 / count; }
};

}  // namespace
}  // namespace fastnorm
