// The activations of ../activation.h on the device. Which one is a run-time argument that all threads share: a uniform
// branch each, and a kernel is compiled once for all.
#pragma once

#include "../activation.h"
#include "pack.cuh"

namespace fastnorm::cuda {

// By the units for such functions, some units in the last place off where |v| is some tens: less than the rounding of
// what is multiplied by it.
__device__ inline float exponential(float v) { return __expf(v); }
__device__ inline double exponential(double v) { return exp(v); }
// 1 / (1 + exp(-z))
__device__ inline float sigmoid(float z) { return __fdividef(1.0f, 1.0f + exponential(-z)); }
__device__ inline double sigmoid(double z) { return 1 / (1 + exponential(-z)); }
// The normal distribution function. By erf() near zero, where its digits are.
__device__ inline float normal_cdf(float z) { return 0.5f * (1.0f + erff(z * static_cast<float>(M_SQRT1_2))); }
__device__ inline double normal_cdf(double z) { return 0.5 * (1.0 + erf(z * M_SQRT1_2)); }

// y = z | z <= 0 ? 0 : z | z <= 0 ? slope * z : z | z / (1 + exp(-z)) | z * Phi(z);  a NaN stays one
template <int n, typename acc_t>
__device__ inline void activate(Activation activation, acc_t (&z)[n]) {
  switch (activation) {
    case Activation::kNone: break;
    case Activation::kRelu:
#pragma unroll
      for (int j = 0; j < n; ++j) z[j] = z[j] <= 0 ? acc_t(0) : z[j];
      break;
    case Activation::kLeakyRelu:
#pragma unroll
      for (int j = 0; j < n; ++j) z[j] = z[j] <= 0 ? z[j] * static_cast<acc_t>(kLeakySlope) : z[j];
      break;
    case Activation::kSilu:
#pragma unroll
      for (int j = 0; j < n; ++j) z[j] *= sigmoid(z[j]);
      break;
    case Activation::kGelu:
#pragma unroll
      for (int j = 0; j < n; ++j) z[j] = z[j] * normal_cdf(z[j]);
      break;
  }
}

// Bit j: !(z[j] <= 0), all that the piecewise linear activations' backward needs to know.
template <int n, typename acc_t>
__device__ inline unsigned positive_bits(const acc_t (&z)[n]) {
  unsigned bits = 0;
#pragma unroll
  for (int j = 0; j < n; ++j) bits |= static_cast<unsigned>(!(z[j] <= 0)) << j;
  return bits;
}

// dy becomes dz where the bits are known; for relu and leaky_relu.
template <int n, typename acc_t>
__device__ inline void activate_backward(Activation activation, acc_t (&dy)[n], unsigned positive) {
  const acc_t slope = static_cast<acc_t>(kLeakySlope);
#pragma unroll
  for (int j = 0; j < n; ++j)
    if (!(positive >> j & 1)) dy[j] = activation == Activation::kRelu ? acc_t(0) : dy[j] * slope;
}

// dy becomes dz = dy * activation'(z).
// dy | z <= 0 ? 0 : dy | z <= 0 ? slope * dy : dy | dy * s * (1 + z * (1 - s)), s = sigmoid(z) | dy * (Phi + z * phi)
template <int n, typename acc_t>
__device__ inline void activate_backward(Activation activation, acc_t (&dy)[n], const acc_t (&z)[n]) {
  switch (activation) {
    case Activation::kNone: break;
    case Activation::kRelu:
    case Activation::kLeakyRelu: activate_backward(activation, dy, positive_bits(z)); break;
    case Activation::kSilu:
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const acc_t s = sigmoid(z[j]);
        dy[j] = dy[j] * s * (1 + z[j] * (1 - s));
      }
      break;
    case Activation::kGelu:
#pragma unroll
      for (int j = 0; j < n; ++j) {
        constexpr double kInvSqrt2Pi = M_2_SQRTPI * M_SQRT1_2 * 0.5;
        const acc_t pdf = static_cast<acc_t>(kInvSqrt2Pi) * exponential(z[j] * z[j] * acc_t(-0.5));
        dy[j] = dy[j] * multiply_add(z[j], pdf, normal_cdf(z[j]));
      }
      break;
  }
}

}  // namespace fastnorm::cuda
