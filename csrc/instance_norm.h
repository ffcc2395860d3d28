// The contract between instance_norm.cpp (checks, allocation) and the kernel (in cpu/group_norm.cpp) for what instance
// normalisation has beside group normalisation: running statistics, the average of the samples'.
//
//   running_mean = (1 - momentum) * running_mean + momentum * mean_n(mean[n, c])
//   running_var  = (1 - momentum) * running_var  + momentum * mean_n(variance[n, c]) * S / (S - 1)
#pragma once

#include "backend.h"
#include "dtype.h"
#include "layout.h"

namespace fastnorm {

struct InstanceNormRunning {
  Shape shape;
  Dtype stats_dtype;
  double momentum;                   // weight of the new value
  const double *mean, *variance;     // [N, C], the biased variance
  void *running_mean, *running_var;  // [C] of stats_dtype
};

}  // namespace fastnorm

FASTNORM_DECLARE_KERNEL(instance_norm_running, InstanceNormRunning)
