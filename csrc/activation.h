// Activations that a norm applies in the same kernel: y = act(norm(x) + residual).
#pragma once

#include <cstdint>

namespace fastnorm {

enum class Activation : int32_t {
  kNone,
  kRelu,       // max(z, 0), NaN kept
  kLeakyRelu,  // z if z > 0 else kLeakySlope * z
  kSilu,       // z * sigmoid(z)
  kGelu,       // z * Phi(z), Phi the normal distribution function (the erf form)
};

constexpr double kLeakySlope = 0.01;  // torch.nn.LeakyReLU's default

// Piecewise linear in z: all that backward needs to know of z is whether !(z <= 0), one bit.
inline bool is_piecewise_linear(Activation a) { return a == Activation::kRelu || a == Activation::kLeakyRelu; }

}  // namespace fastnorm
