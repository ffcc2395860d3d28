// The contract between spectral_norm.cpp (checks, allocation) and the kernels (cpu, cuda).
//
//   y = W / sigma,   sigma = u^T W v
//
// (Miyato et al. 2018, arXiv:1802.05957), W seen as a matrix [h, w]. u and v approximate its first singular vectors;
// an iteration of the power method is
//
//   t = W v,  u = t / max(|t|, eps),   s = W^T u,  v = s / max(|s|, eps)
//
// and leaves sigma = s . v without another product. Backward takes u and v for constants:
//
//   dW = (dy - k * u v^T) / sigma,   k = (sum dy * W) / sigma
#pragma once

#include "backend.h"
#include "dtype.h"
#include "layout.h"

namespace fastnorm {

struct SpectralNormForward {
  int64_t h, w;
  Dtype dtype;
  int64_t iterations;  // of the power method; 0 leaves u and v alone
  double eps;
  const void* matrix;     // [h, w] of dtype
  const void* weight;     // the same numbers in the order that y has; may be matrix
  void* y;                // [h * w] of dtype
  void *u, *v;            // [h], [w] of dtype: where the power method starts, and its result
  void *kept_u, *kept_v;  // [h], [w]: the result in the arithmetic's type (float64 for float64, else float32)
  double* sigma;          // one number
};

struct SpectralNormBackward {
  Shape shape;  // the weight as [N, C, S] in the order it lies in; h = C and w = N * S, v by (n, s)
  Dtype dtype;
  const void *weight, *dy;  // [N, C, S] of dtype
  const void *u, *v;        // [C], [N * S], as forward kept them
  const double* sigma;
  void* dweight;  // [N, C, S] of dtype
};

}  // namespace fastnorm

FASTNORM_DECLARE_KERNEL(spectral_norm_forward, SpectralNormForward)
FASTNORM_DECLARE_KERNEL(spectral_norm_backward, SpectralNormBackward)
