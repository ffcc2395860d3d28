// The contract between dropout.cpp and the kernels (cpu/dropout.cpp).
//
//   y[i] = x[i] * (keep[i] ? scale : 0),   keep[i] = bits(seed, offset, index(i)) >= threshold      (philox.h)
//
// The same kernel is forward and backward, for the map is linear and its own adjoint. A dropped NaN or inf stays NaN,
// as in torch.
#pragma once

#include "dtype.h"
#include "isa.h"
#include "layout.h"
#include "philox.h"

namespace fastnorm {

struct Dropout {
  Shape shape;      // (N, C, S); a tensor without channels is (1, 1, numel)
  bool by_channel;  // one draw a channel: index(n, c, s) = n * C + c; otherwise one an element: (n * C + c) * S + s
  Dtype dtype;
  uint64_t seed, offset;
  DropoutLevel level;
  const void* x;
  void* y;  // may be x
};

}  // namespace fastnorm

FASTNORM_DECLARE_CPU_KERNEL(dropout, Dropout)
