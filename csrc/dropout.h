// The contract between dropout.cpp and the kernels (cpu, cuda).
//
//   y[i] = keep[i] ? x[i] * scale + shift_kept : x[i] * 0 + shift_dropped
//   keep[i] = bits(seed, offset, index(i)) >= threshold                                             (philox.h)
//
// Dropout has no shifts; it is forward and backward, for the map is linear and its own adjoint. A dropped NaN or inf
// stays NaN, as in torch.
//
// Alpha dropout (Klambauer et al. 2017, arXiv:1706.02515) sets what it drops to alpha', the value SELU saturates at,
// and maps the result so that an input of mean 0 and variance 1 keeps both:
//
//   y[i] = a * (keep[i] ? x[i] : alpha') + b,   q = P(dropped)
//   a = ((1 - q) * (1 + q * alpha'^2))^(-1/2),   b = -a * q * alpha'
//
// and its backward is dropout with scale = a.
#pragma once

#include "backend.h"
#include "dtype.h"
#include "layout.h"
#include "philox.h"

namespace fastnorm {

constexpr double kAlphaPrime = -1.7580993408473766;  // -scale * alpha of SELU

namespace {  // internal linkage: see isa.h

// a and b for the probability that is drawn. p = 1 gives zeros, as in torch.
inline DropoutLevel alpha_dropout_level(double p) {
  const DropoutLevel level = dropout_level(p);
  if (level.scale == 0) return level;
  const double q = level.threshold / 65536.0;
  const double a = 1 / std::sqrt((1 - q) * (1 + q * kAlphaPrime * kAlphaPrime)), b = -a * q * kAlphaPrime;
  return {level.threshold, a, b, a * kAlphaPrime + b};
}

}  // namespace

struct Dropout {
  Shape shape;      // (N, C, S); a tensor without channels is (1, 1, numel), one draw a sample is (1, N, numel / N)
  bool by_channel;  // one draw a channel: index(n, c, s) = n * C + c; otherwise one an element: (n * C + c) * S + s
  Dtype dtype;
  uint64_t seed, offset;
  const int64_t* state;  // on a CUDA device, unless null: where seed and offset lie instead, for the kernel to read
                         // them, so that a captured graph draws another mask at each replay
  DropoutLevel level;
  const void* x;
  void* y;  // may be x

  // For isa_for().
  bool is_small() const { return shape.numel() <= 8 << 10; }
};

// While a graph is captured, torch's generator says where its seed and offset will lie at each replay:
//   state[0] = dropout_seed(*seed, *offset + added),   state[1] = 0                       all of it in device memory
struct DropoutState {
  const int64_t *seed, *offset;
  uint64_t added;
  int64_t* state;
};

}  // namespace fastnorm

FASTNORM_DECLARE_KERNEL(dropout, Dropout)
FASTNORM_DECLARE_CUDA_KERNEL(dropout_state, DropoutState)
