// The activations of ../activation.h on packs, forward and backward: the one piece of code every norm fuses.
#pragma once

#include "../activation.h"
#include "vec.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

// Scalar math: y = z | max(z, 0) | z > 0 ? z : slope * z | z / (1 + exp(-z)) | z * (1 + erf(z / sqrt(2))) / 2
template <Activation kAct, typename T>
Pack<T> activate(const Pack<T>& z) {
  using Vec = typename Pack<T>::Vec;
  return map<T>(
      [](Vec v) {
        if constexpr (kAct == Activation::kNone) {
          return v;
        } else if constexpr (kAct == Activation::kRelu) {
          return at::vec::clamp_min(v, Vec(0));
        } else if constexpr (kAct == Activation::kLeakyRelu) {
          return Vec::blendv(v, v * Vec(kLeakySlope), v <= Vec(0));
        } else if constexpr (kAct == Activation::kSilu) {
          return v / (Vec(1) + v.neg().exp());
        } else {
          return v * Vec(0.5) * (Vec(1) + (v * Vec(M_SQRT1_2)).erf());
        }
      },
      z);
}

// dz = dy * activation'(z).
// Scalar math: dy | z > 0 ? dy : 0 | z > 0 ? dy : slope * dy | dy * s * (1 + z * (1 - s)), s = sigmoid(z) |
//              dy * (Phi(z) + z * phi(z))
template <Activation kAct, typename T>
Pack<T> activate_backward(const Pack<T>& dy, const Pack<T>& z) {
  using Vec = typename Pack<T>::Vec;
  return map<T>(
      [](Vec d, Vec v) {
        if constexpr (kAct == Activation::kNone) {
          return d;
        } else if constexpr (kAct == Activation::kRelu) {
          return Vec::blendv(d, Vec(0), v <= Vec(0));
        } else if constexpr (kAct == Activation::kLeakyRelu) {
          return Vec::blendv(d, d * Vec(kLeakySlope), v <= Vec(0));
        } else if constexpr (kAct == Activation::kSilu) {
          const Vec s = Vec(1) / (Vec(1) + v.neg().exp());
          return d * s * (Vec(1) + v * (Vec(1) - s));
        } else {
          constexpr double kInvSqrt2Pi = M_2_SQRTPI * M_SQRT1_2 * 0.5;
          const Vec cdf = Vec(0.5) * (Vec(1) + (v * Vec(M_SQRT1_2)).erf());
          const Vec pdf = Vec(kInvSqrt2Pi) * (v * v * Vec(-0.5)).exp();
          return d * at::vec::fmadd(v, pdf, cdf);
        }
      },
      dy, z);
}

// The same from the bit !(z <= 0), for the piecewise linear ones.
template <Activation kAct, typename T>
Pack<T> activate_backward(const Pack<T>& dy, uint32_t positive) {
  static_assert(kAct == Activation::kRelu || kAct == Activation::kLeakyRelu);
  const Pack<T> slope(static_cast<acc_type<T>>(kAct == Activation::kRelu ? 0.0 : kLeakySlope));
  return choose(positive, dy, kAct == Activation::kRelu ? slope : dy * slope);
}

// Calls f with activation as a compile-time constant.
template <typename F>
void visit(Activation activation, const F& f) {
  switch (activation) {
    case Activation::kNone: return f(std::integral_constant<Activation, Activation::kNone>{});
    case Activation::kRelu: return f(std::integral_constant<Activation, Activation::kRelu>{});
    case Activation::kLeakyRelu: return f(std::integral_constant<Activation, Activation::kLeakyRelu>{});
    case Activation::kSilu: return f(std::integral_constant<Activation, Activation::kSilu>{});
    case Activation::kGelu: return f(std::integral_constant<Activation, Activation::kGelu>{});
  }
}

}  // namespace
}  // namespace fastnorm::cpu::CPU_CAPABILITY
