// The contract between group_norm.cpp and instance_norm.cpp (checks, allocation) and the kernels (cpu,
// cuda), for both ops: instance normalisation is group normalisation with a channel a group.
//
//   xhat = (x - mean) * rstd,  rstd = 1 / sqrt(var + eps),  var biased
//   z    = xhat * weight + bias (+ residual),   y = activation(z)
//
// with mean and var of each slice, the D * S elements of the D = C / G channels of one group in one sample (Wu & He
// 2018, Ulyanov, Vedaldi & Lempitsky 2016).
//
//   dz = dy * activation'(z),   dresidual = dz
//   dbias = sum dz,   dweight = sum dz * xhat,   over (N, S) of each channel
//   dx = rstd * (g - mean(g) - xhat * mean(g * xhat)),   g = dz * weight,   the means over the slice
#pragma once

#include "activation.h"
#include "affine.h"
#include "backend.h"
#include "dtype.h"
#include "layout.h"
#include "mask.h"

namespace fastnorm {

// x, y, residual and their gradients: [N, C, S] of dtype in shape.layout, dense. weight, bias: [C] of param_dtype, or
// null. mean, rstd, variance: [N, G] float64 whatever dtype is, so that backward sees the mean that forward saw.
//
// mask: see mask.h, rows by group_mask_rows(); kept only for relu and leaky_relu with a residual, else null.

struct GroupNormForward {
  Shape shape;
  int64_t G;  // divides shape.C
  Dtype dtype, param_dtype;
  Activation activation;
  double eps;

  const void *x, *residual;  // residual or null
  const void *weight, *bias;

  void* y;
  double *mean, *rstd;
  double* variance;  // the biased one, or null: not wanted
  uint8_t* mask;     // or null
};

struct GroupNormBackward {
  Shape shape;
  int64_t G;
  Dtype dtype, param_dtype;
  Activation activation;

  const void *x, *dy, *residual;  // residual for silu and gelu, else null
  const void *weight, *bias;
  const double *mean, *rstd;
  const uint8_t* mask;  // or null

  void *dx, *dresidual;   // each or null: not wanted; on the CPU dx may be dy
  void *dweight, *dbias;  // of param_dtype, each or null
};

namespace {  // internal linkage: see isa.h

// Planes this small are not worth a vector loop each.
constexpr int64_t kSmallGroupPlane = 16;

// How a sample lies, as rows of `width` contiguous elements, and `rest` more that are no full row:
//   planes   contiguous: a row is a plane of S elements
//   flat     contiguous, tiny planes: one row, the sample
//   columns  channels_last: a row is a position's C channels, or several such where C is small, so that even three
//            channels fill the vectors
enum class SampleLayout { kPlanes, kFlat, kColumns };

struct SampleRows {
  SampleLayout layout;
  int64_t rows, width, rest;

  int64_t size() const { return rows + (rest > 0); }
};

inline SampleRows sample_rows(const Shape& shape) {
  if (shape.layout == Layout::kContiguous) {
    if (shape.S < kSmallGroupPlane) return {SampleLayout::kFlat, 1, shape.C * shape.S, 0};
    return {SampleLayout::kPlanes, shape.C, shape.S, 0};
  }
  int64_t fold = 1;
  while (fold * shape.C < 64 && fold < shape.S) fold *= 2;
  return {SampleLayout::kColumns, shape.S / fold, fold * shape.C, shape.S % fold * shape.C};
}

// The mask's rows: those of every sample, one after the other.
inline MaskRows group_mask_rows(const Shape& shape) {
  const SampleRows sample = sample_rows(shape);
  return {shape.N * sample.size(), sample.width};
}

// dx above, from the sums of g and g * xhat over a slice of `count` elements, written in x - mean:
//   dx = dz * scale - ((x - mean) * slope + offset),   mean and scale as SliceAffine has them
template <typename acc_t>
struct GroupGradient {
  acc_t slope, offset;

  FASTNORM_HOST_DEVICE GroupGradient(double count, double mean, double rstd, double sum_g, double sum_g_xhat) {
    const double per_rstd = rstd / count, lost = static_cast<double>(static_cast<acc_t>(mean)) - mean;
    slope = static_cast<acc_t>(per_rstd * sum_g_xhat * rstd);
    offset = static_cast<acc_t>(per_rstd * (sum_g + lost * rstd * sum_g_xhat));
  }
};

}  // namespace

}  // namespace fastnorm

FASTNORM_DECLARE_KERNEL(group_norm_forward, GroupNormForward)
FASTNORM_DECLARE_KERNEL(group_norm_backward, GroupNormBackward)
