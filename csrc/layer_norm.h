// The contract between layer_norm.cpp (checks, allocation) and the kernels (cpu, cuda), for layer_norm and rms_norm:
// the second is the first without the mean.
//
// LayerNorm (Ba, Kiros & Hinton 2016), of each row, with its biased variance:
//   xhat = (x - mean) * rstd,   rstd = 1 / sqrt(var + eps)
// RMSNorm (Zhang & Sennrich 2019):
//   xhat = x * rstd,   rstd = 1 / sqrt(mean(x^2) + eps)
// Both:
//   z = xhat * weight + bias (+ residual),   y = activation(z)
//
//   dz = dy * activation'(z),   dbias = sum over rows of dz,   dweight = sum over rows of dz * xhat,   dresidual = dz
//   dx = rstd * (g - mean(g) - xhat * mean(g * xhat)),   g = dz * weight;   RMSNorm's has no mean(g)
#pragma once

#include "activation.h"
#include "backend.h"
#include "dtype.h"
#include "mask.h"

namespace fastnorm {

// x, y, residual and their gradients: [M, N] of dtype, contiguous. weight, bias: [N] of param_dtype, or null.
//
// mean, rstd, rest: [M] of float32, float64 for float64 input: xhat = (x - mean) * rstd + rest as forward computed it
// (affine.h). rest holds what the mean lost when it was rounded, so backward keeps its digits where |mean| >> std. mean
// and rest are null for rms_norm.
//
// mask: see mask.h, a row of bits a row; kept only for relu and leaky_relu with a residual, else null.

struct LayerNormForward {
  int64_t M, N;  // rows; elements normalised in each
  Dtype dtype, param_dtype;
  Activation activation;
  bool subtract_mean;  // layer_norm, or rms_norm
  double eps;

  const void *x, *residual;  // residual or null
  const void *weight, *bias;

  void* y;
  void *mean, *rstd, *rest;  // each or null: not kept
  uint8_t* mask;

  MaskRows mask_rows() const { return {M, N}; }
};

struct LayerNormBackward {
  int64_t M, N;
  Dtype dtype, param_dtype;
  Activation activation;
  bool subtract_mean;

  const void *x, *dy, *residual;  // residual for silu and gelu, else null
  const void *weight, *bias;
  const void *mean, *rstd, *rest;
  const uint8_t* mask;

  void *dx, *dresidual;   // each or null: not wanted; on the CPU dx may be dy
  void *dweight, *dbias;  // of param_dtype, each or null

  MaskRows mask_rows() const { return {M, N}; }
};

}  // namespace fastnorm

FASTNORM_DECLARE_KERNEL(layer_norm_forward, LayerNormForward)
FASTNORM_DECLARE_KERNEL(layer_norm_backward, LayerNormBackward)
