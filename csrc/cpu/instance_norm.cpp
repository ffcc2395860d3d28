// Running statistics of instance normalisation on the CPU; the normalisation itself is group_norm.cpp's, with G = C.
#include "../instance_norm.h"

#include "vec.h"

namespace fastnorm::cpu::CPU_CAPABILITY {

void instance_norm_running(const InstanceNormRunning& a) {
  const int64_t N = a.shape.N, C = a.shape.C;
  const double count = static_cast<double>(a.shape.S), unbiased = count / (count - 1);
  const auto average = [&](void* running, int64_t c, const double* values, double factor) {
    double sum = 0;
    for (int64_t n = 0; n < N; ++n) sum += values[n * C + c];
    const double value = sum / static_cast<double>(N) * factor;
    write(running, a.stats_dtype, c, (1 - a.momentum) * read(running, a.stats_dtype, c, 0) + a.momentum * value);
  };
  for (int64_t c = 0; c < C; ++c) {
    average(a.running_mean, c, a.mean, 1.0);
    average(a.running_var, c, a.variance, unbiased);
  }
}

}  // namespace fastnorm::cpu::CPU_CAPABILITY
