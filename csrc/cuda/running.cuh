// Running statistics, as batch and instance normalisation update them.
#pragma once

#include "pack.cuh"

namespace fastnorm::cuda {

// running = (1 - momentum) * running + momentum * new, the variance unbiased
struct RunningUpdate {
  void *mean, *var;  // of dtype; or both null
  Dtype dtype;
  int64_t* batches;  // counted up; or null
  double momentum;
  double unbiased;  // an unbiased variance by a biased one

  // Of channel c, by one thread.
  __device__ void average(int64_t c, double new_mean, double new_variance) const {
    if (mean == nullptr) return;
    // Both are on their way before either is written.
    const double old_mean = read(mean, dtype, c, 0.0), old_var = read(var, dtype, c, 0.0);
    write(mean, dtype, c, (1 - momentum) * old_mean + momentum * new_mean);
    write(var, dtype, c, (1 - momentum) * old_var + momentum * (new_variance * unbiased));
  }

  // And the number of batches, which channel 0's thread counts.
  __device__ void average_and_count(int64_t c, double new_mean, double new_variance) const {
    average(c, new_mean, new_variance);
    if (c == 0 && batches) ++*batches;
  }
};

}  // namespace fastnorm::cuda
