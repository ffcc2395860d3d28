// The coefficients of a slice (a channel, a group, a row), computed in float64 and rounded once.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "moments.h"  // FASTNORM_HOST_DEVICE

namespace fastnorm {
namespace {  // internal linkage: see isa.h

// z = (x - mean) * scale + shift. The mean is split in a value of the arithmetic's type and a remainder that goes into
// the shift, so x - mean keeps its digits at |mean| >> std and a constant channel gives bias exactly; x * scale + shift
// would do neither.
template <typename acc_t>
struct SliceAffine {
  acc_t mean, scale, shift;

  FASTNORM_HOST_DEVICE SliceAffine(double mean_, double rstd, double weight, double bias)
      : mean(static_cast<acc_t>(mean_)),
        scale(static_cast<acc_t>(rstd * weight)),
        shift(static_cast<acc_t>(mean_ == static_cast<double>(mean) ? bias : bias - (mean_ - mean) * rstd * weight)) {}
};

// xhat = (x - mean) * rstd + rest, the rest being what the mean lost above.
template <typename acc_t>
struct SliceStandardize {
  acc_t mean, rstd, rest;

  FASTNORM_HOST_DEVICE SliceStandardize(double mean_, double rstd_)
      : mean(static_cast<acc_t>(mean_)),
        rstd(static_cast<acc_t>(rstd_)),
        rest(static_cast<acc_t>(lost(mean_) * rstd_)) {}

 private:
  FASTNORM_HOST_DEVICE static double lost(double mean) { return static_cast<double>(static_cast<acc_t>(mean)) - mean; }
};

// v over the power of two at or below it, 1 <= mantissa < 2; 1 for zero and the infinities, NaN stays where v is divided.
FASTNORM_HOST_DEVICE inline double mantissa_of(double v) {
  uint64_t bits;
  std::memcpy(&bits, &v, sizeof v);
  bits = (bits & 0x000fffffffffffff) | 0x3ff0000000000000;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

// sum(g * xhat), for which (x - mean) * power is summed in place of xhat: a product with a power of two has no rounding of
// its own in every term. What is missing, the rest above and `unit`, the sum gets in the end, in float64.
template <typename acc_t>
struct SliceSummand {
  acc_t mean, power;

  FASTNORM_HOST_DEVICE SliceSummand(double mean_, double rstd)
      : mean(static_cast<acc_t>(mean_)),
        power(static_cast<acc_t>(rstd / mantissa_of(rstd))),
        unit_(mantissa_of(rstd)),
        rest_((static_cast<double>(mean) - mean_) * (rstd / unit_)) {}

  // From the sums of g and of g * (x - mean) * power.
  FASTNORM_HOST_DEVICE double sum_g_xhat(double sum_g, double sum) const {
    return (std::isfinite(sum_g) ? sum + rest_ * sum_g : sum) * unit_;
  }

 private:
  double unit_, rest_;
};

// dx = (g - m1 - xhat * m2) * factor, where m1 and m2 are the means over the slice of g and g * xhat, written in x -
// mean:
//   dx = (g - (x - mean) * slope - offset) * factor
template <typename acc_t>
struct SliceGradient {
  acc_t slope, offset;

  FASTNORM_HOST_DEVICE SliceGradient(double count, double mean, double rstd, double sum_g, double sum_g_xhat)
      : slope(static_cast<acc_t>(rstd * sum_g_xhat / count)),
        offset(static_cast<acc_t>(sum_g / count + (static_cast<double>(static_cast<acc_t>(mean)) - mean) * rstd *
                                                      sum_g_xhat / count)) {}
};

}  // namespace
}  // namespace fastnorm
