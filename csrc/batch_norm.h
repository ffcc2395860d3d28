// The contract between batch_norm.cpp (checks, allocation) and the kernels (cpu, cuda): plain pointers and sizes.
//
//   xhat = (x - mean) * rstd,  rstd = 1 / sqrt(var + eps),  var biased
//   z    = xhat * weight + bias (+ residual),   y = activation(z)
//
// with mean and var over (N, S) of each channel in training, the running statistics otherwise (Ioffe & Szegedy 2015).
//
//   dz = dy * activation'(z),   dbias = sum dz,   dweight = sum dz * xhat,   dresidual = dz
//   dx = weight * rstd * (dz - dbias / (N * S) - xhat * dweight / (N * S))     in training
//   dx = weight * rstd * dz                                                    with running statistics
//
// Batch renormalisation (Ioffe 2017, arXiv:1702.03275) in training: xhat * r + d takes the place of xhat in z and in
// dweight, with two constants of each channel from the running statistics as they were before this batch,
//   r = clip(sigma / sigma_running, 1 / r_max, r_max),   d = clip((mean - mean_running) / sigma_running, -d_max, d_max)
//   sigma = sqrt(var + eps),   sigma_running = sqrt(running_var + eps)
//   dx = weight * r * rstd * (dz - dbias / (N * S) - xhat * (sum dz * xhat) / (N * S))
#pragma once

#include "activation.h"
#include "affine.h"
#include "backend.h"
#include "dtype.h"
#include "layout.h"
#include "mask.h"

namespace fastnorm {

// x, y, residual and their gradients: [N, C, S] of dtype in shape.layout, dense. weight, bias: [C] of param_dtype, or
// null. mean, rstd: [C] float64 whatever dtype is: 16 bytes a channel buy a backward that sees the mean the forward
// saw.
//
// mask: see mask.h, rows by mask_rows(); kept only for relu and leaky_relu with a residual, else null.

namespace {  // internal linkage: see isa.h

// For isa_for(). exp() has other last bits in another instruction set, which a sample alone must not have.
inline bool is_small_batch(const Shape& shape, Activation a) {
  return shape.numel() <= 32 << 10 && a != Activation::kSilu && a != Activation::kGelu;
}

}  // namespace

struct BatchNormForward {
  Shape shape;
  Dtype dtype, param_dtype, stats_dtype;
  Activation activation;
  bool training;              // statistics of this batch, or the running ones
  bool skip_nonfinite_stats;  // one whose statistics are inf or NaN in stats_dtype leaves the running ones alone
  double eps;
  double
      momentum;  // weight of the new value in the running statistics; NaN: cumulative average, 1 / num_batches_tracked

  const void *x, *residual;  // residual or null
  const void *weight, *bias;
  void *running_mean, *running_var;       // [C] of stats_dtype; or null, if not kept. The variance is the unbiased one
  int64_t* num_batches_tracked;           // counted up in training, or null
  const double *given_mean, *given_rstd;  // [C], both or none: to normalise by; only without training

  void* y;              // or null, in training: nothing but the statistics
  double *mean, *rstd;  // or null, where they are given
  double* variance;     // [C], biased, or null: not wanted; only in training
  uint8_t* mask;        // or null

  double r_max, d_max;
  double *r, *d;  // [C], both or none: batch renormalisation; only in training and with running statistics

  bool is_small() const { return is_small_batch(shape, activation); }
};

struct BatchNormBackward {
  Shape shape;
  Dtype dtype, param_dtype;
  Activation activation;
  bool training;

  const void *x, *dy, *residual;  // residual for silu and gelu, else null
  const void *weight, *bias;
  const double *mean, *rstd;
  const double *r, *d;  // as forward made them, or null
  const uint8_t* mask;  // or null

  void *dx, *dresidual;   // each or null: not wanted; on the CPU dx may be dy
  void *dweight, *dbias;  // of param_dtype, each or null

  // For batches of several processes, what the sums are for is apart from where they come from.
  double* sums;              // [2, C]: sum dz and sum dz * xhat, or null: not wanted
  const double* given_sums;  // the same of `count` values a channel, for dx in training, or null: those of this batch
  double count;              // with given_sums, when no other sums are wanted

  bool is_small() const { return is_small_batch(shape, activation); }
};

namespace {  // internal linkage: see isa.h

// Planes this small are not worth a vector loop each: the tensor is seen as a matrix [N, C * S], like channels_last's
// [N * S, C].
constexpr int64_t kSmallPlane = 16;

inline bool by_columns(const Shape& shape) { return shape.layout == Layout::kChannelsLast || shape.S < kSmallPlane; }

// A matrix whose rows hold `width` elements; column j belongs to channel (j / S) % C. Narrow rows are folded, several
// to a row, so that even three channels fill the vectors; the last `rest` elements are a row that is not full.
struct ColumnView {
  int64_t rows, width, rest;
  int64_t C, S;
};

inline ColumnView column_view(const Shape& shape) {
  const bool last = shape.layout == Layout::kChannelsLast;
  const int64_t S = last ? 1 : shape.S, width = shape.C * S, rows = last ? shape.N * shape.S : shape.N;
  int64_t fold = 1;
  while (fold * width < 64 && fold < rows) fold *= 2;
  return {rows / fold, fold * width, rows % fold * width, shape.C, S};
}

// The mask's rows: planes, or rows of the matrix.
inline MaskRows mask_rows(const Shape& shape) {
  if (!by_columns(shape)) return {shape.N * shape.C, shape.S};
  const ColumnView view = column_view(shape);
  return {view.rows + (view.rest > 0), view.width};
}

}  // namespace

}  // namespace fastnorm

FASTNORM_DECLARE_KERNEL(batch_norm_forward, BatchNormForward)
FASTNORM_DECLARE_KERNEL(batch_norm_backward, BatchNormBackward)
