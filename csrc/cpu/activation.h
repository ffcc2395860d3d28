// The activations of ../activation.h on packs, forward and backward: the one piece of code every norm fuses.
#pragma once

#include "../activation.h"
#include "vec.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

// exp(x), to 1 ulp or so; of NaN it may be anything. For float32 in line, by vectors.h's or the coefficients of Cephes'
// expf (Moshier, 1989): a call of at::vec's would spill every vector register that the loop around it keeps its
// coefficients in.
// Scalar math: n = round(x / ln 2);  r = x - n ln 2;  exp = 2^n * (1 + r + r^2 (c0 + c1 r + ... + c5 r^5))
template <typename Vec>
Vec exponential(const Vec& x) {
#if defined(__x86_64__) && !defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<typename Vec::value_type, float>) {
    const Vec in_range = vec::clamp(x, Vec(-87.33f), Vec(89));  // 0, for what is not a normal number, and infinity
    const Vec ones(0x1.8p23f);                                  // a number added to it is rounded to a whole one
    const Vec rounded = vec::fmadd(in_range, Vec(static_cast<float>(M_LOG2E)), ones), n = rounded - ones;
    const Vec r = vec::fmadd(n, Vec(2.12194440e-4f), vec::fmadd(n, Vec(-0.693359375f), in_range));
    Vec q = vec::fmadd(Vec(1.9875691500e-4f), r, Vec(1.3981999507e-3f));
    q = vec::fmadd(q, r, Vec(8.3334519073e-3f));
    q = vec::fmadd(q, r, Vec(4.1665795894e-2f));
    q = vec::fmadd(q, r, Vec(1.6666665459e-1f));
    q = vec::fmadd(q, r, Vec(5.0000001201e-1f));
    const Vec half_power = power_of_2_below(rounded),
              half = vec::fmadd(half_power, vec::fmadd(r * r, q, r), half_power);
    return half + half;
  }
#endif
  return x.exp();
}

// The standard normal distribution's Phi(z), with exp(-z^2 / 2) from which phi(z) comes, too.
// Scalar math: t = 1 / (1 + 0.3275911 |z| / sqrt(2));  tail = (a1 t + ... + a5 t^5) / 2 * exp(-z^2 / 2);
//              Phi = z < 0 ? tail : 1 - tail
// For float32 by Abramowitz & Stegun 7.1.26 (1964), whose error is below 7.5e-8, as at::vec's erf on these processors;
// exp is most of the work.
template <typename Vec>
struct Normal {
  Vec exp, cdf;  // anything where z is NaN

  explicit Normal(const Vec& z) : exp(exponential(z * z * Vec(-0.5))), cdf(cdf_of(z)) {}

 private:
  Vec cdf_of(const Vec& z) const {
#if defined(__x86_64__)
    if constexpr (std::is_same_v<typename Vec::value_type, float>) {
      const Vec t = Vec(1) / vec::fmadd(z.abs(), Vec(0.3275911 * M_SQRT1_2), Vec(1));
      Vec r = vec::fmadd(Vec(0.5 * 1.061405429), t, Vec(0.5 * -1.453152027));
      r = vec::fmadd(r, t, Vec(0.5 * 1.421413741));
      r = vec::fmadd(r, t, Vec(0.5 * -0.284496736));
      r = vec::fmadd(r, t, Vec(0.5 * 0.254829592));
      const Vec tail = r * t * exp;
      return Vec::blendv(Vec(1) - tail, tail, z < Vec(0));
    }
#endif
    return Vec(0.5) * (z * Vec(-M_SQRT1_2)).erfc();  // 1 + erf would cancel on the left
  }
};

// An activation that the compiler knows, which compiles a loop for it alone.
template <Activation kAct>
struct Known {};

// One of the four that is chosen in the loop: what float64 and float16 have, whose speed on a CPU counts less than what
// five loops take to compile, and is a few hundredths less.
struct Chosen {
  Activation activation;
};

// Whether it needs an exponential: then its derivative is worth keeping.
constexpr bool is_smooth(Activation activation) {
  return activation == Activation::kSilu || activation == Activation::kGelu;
}

// The same of an activation's type, where Chosen may be all but none.
template <typename Act>
constexpr bool kIsNone = std::is_same_v<Act, Known<Activation::kNone>>;
template <typename Act>
constexpr bool kMayBeSmooth = true;
template <Activation kAct>
constexpr bool kMayBeSmooth<Known<kAct>> = is_smooth(kAct);
template <typename Act>
constexpr bool kMayBePiecewiseLinear = true;
template <Activation kAct>
constexpr bool kMayBePiecewiseLinear<Known<kAct>> = kAct == Activation::kRelu || kAct == Activation::kLeakyRelu;

// Calls f with the activation as the loops over elements of T have it.
template <typename F>
auto visit_known(Activation activation, const F& f) {
  switch (activation) {
    case Activation::kRelu: return f(Known<Activation::kRelu>{});
    case Activation::kLeakyRelu: return f(Known<Activation::kLeakyRelu>{});
    case Activation::kSilu: return f(Known<Activation::kSilu>{});
    case Activation::kGelu: return f(Known<Activation::kGelu>{});
    case Activation::kNone: break;
  }
  return f(Known<Activation::kNone>{});
}
template <typename T, typename F>
void visit(Activation activation, const F& f) {
  if constexpr (std::is_same_v<T, double> || std::is_same_v<T, c10::Half>) {
    return activation == Activation::kNone ? f(Known<Activation::kNone>{}) : f(Chosen{activation});
  } else {
    return visit_known(activation, f);
  }
}

// Scalar math: y = z | max(z, 0) | z > 0 ? z : slope * z | z / (1 + exp(-z)) | z * (1 + erf(z / sqrt(2))) / 2
template <Activation kAct, typename T>
Pack<T> activate(Known<kAct>, const Pack<T>& z) {
  using Vec = typename Pack<T>::Vec;
  return map<T>(
      [](Vec v) {
        if constexpr (kAct == Activation::kNone) {
          return v;
        } else if constexpr (kAct == Activation::kRelu) {
          return vec::clamp_min(v, Vec(0));
        } else if constexpr (kAct == Activation::kLeakyRelu) {
          return Vec::blendv(v, v * Vec(kLeakySlope), v <= Vec(0));
        } else if constexpr (kAct == Activation::kSilu) {
          return v / (Vec(1) + exponential(v.neg()));
        } else {
          return v * Normal<Vec>(v).cdf;
        }
      },
      z);
}

// dz = dy * activation'(z).
// Scalar math: dy | z > 0 ? dy : 0 | z > 0 ? dy : slope * dy | dy * s * (1 + z * (1 - s)), s = sigmoid(z) |
//              dy * (Phi(z) + z * phi(z))
template <Activation kAct, typename T>
Pack<T> activate_backward(Known<kAct>, const Pack<T>& dy, const Pack<T>& z) {
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
          const Vec s = Vec(1) / (Vec(1) + exponential(v.neg()));
          return d * s * (Vec(1) + v * (Vec(1) - s));
        } else {
          constexpr double kInvSqrt2Pi = M_2_SQRTPI * M_SQRT1_2 * 0.5;
          const Normal<Vec> normal(v);
          return d * vec::fmadd(v, Vec(kInvSqrt2Pi) * normal.exp, normal.cdf);
        }
      },
      dy, z);
}

// The same from the bit !(z <= 0), for the piecewise linear ones.
template <Activation kAct, typename T, typename Count>
Pack<T> activate_backward(Known<kAct>, const Pack<T>& dy, uint32_t positive, Count count) {
  const Pack<T> slope(static_cast<acc_type<T>>(kAct == Activation::kRelu ? 0.0 : kLeakySlope));
  return choose(positive, dy, kAct == Activation::kRelu ? slope : dy * slope, count);
}

template <typename T>
Pack<T> activate(Chosen act, const Pack<T>& z) {
  return visit_known(act.activation, [&](auto known) { return activate(known, z); });
}
template <typename T, typename... ZOrBits>
Pack<T> activate_backward(Chosen act, const Pack<T>& dy, const ZOrBits&... z) {
  return visit_known(act.activation, [&](auto known) { return activate_backward(known, dy, z...); });
}

// How often to unroll a loop around activate_backward: an exponential leaves no latency to hide.
template <typename Act>
constexpr int unroll_of(int unroll) {
  return kMayBeSmooth<Act> ? 1 : unroll;
}

}  // namespace
}  // namespace fastnorm::cpu::CPU_CAPABILITY
