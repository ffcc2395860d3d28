// The contract between weight_norm.cpp (checks, allocation) and the kernels (cpu, cuda).
//
//   w = v * (g / norm),   norm = sqrt(sum v^2) over each slice: all dimensions but one, or all of them
//
// (Salimans & Kingma 2016, arXiv:1602.07868). A slice of zeros gives NaN, as in torch.
//
//   dg = sum(dw * v) / norm,   dv = (dw - v * dg / norm) * (g / norm)
#pragma once

#include "backend.h"
#include "dtype.h"
#include "layout.h"

namespace fastnorm {

// v, w and their gradients: [N, C, S] of dtype, where slice c is the elements (n, c, s) in the order they lie in. g and
// dg: [C] of param_dtype. norm: [C] float64.

struct WeightNormForward {
  Shape shape;
  Dtype dtype, param_dtype;
  const void *v, *g;
  void* w;
  double* norm;

  // For isa_for().
  bool is_small() const { return shape.numel() <= 128 << 10; }
};

struct WeightNormBackward {
  Shape shape;
  Dtype dtype, param_dtype;
  const void *v, *g, *dw;
  const double* norm;
  void *dv, *dg;  // each or null: not wanted

  bool is_small() const { return shape.numel() <= 128 << 10; }
};

}  // namespace fastnorm

FASTNORM_DECLARE_KERNEL(weight_norm_forward, WeightNormForward)
FASTNORM_DECLARE_KERNEL(weight_norm_backward, WeightNormBackward)
