// A norm's mask (mask.h) as numbers.
#pragma once

#include "mask.h"
#include "tensors.h"

namespace fastnorm {

struct MaskBit {
  int64_t row, column;
};

// -> the derivative of a piecewise linear activation at every element, in input's type, layout and place; place(i) is
// where the bit of the i-th element in memory lies. Plain loops on the CPU: only a double backward comes here.
template <typename Place>
Tensor mask_slopes(const Tensor& input, const Tensor& mask, Activation activation, const MaskRows& rows, Place place) {
  const double below = activation == Activation::kRelu ? 0.0 : kLeakySlope;
  const auto on_cpu = at::TensorOptions().device(at::kCPU).dtype(at::kDouble);
  const Tensor slopes = empty_in_layout(input.to(on_cpu), shape_of(input).layout), bits = mask.to(at::kCPU);
  double* out = slopes.mutable_data_ptr<double>();
  const uint8_t* bytes = bits.const_data_ptr<uint8_t>();
  for (int64_t i = 0; i < input.numel(); ++i) {
    const MaskBit bit = place(i);
    const int64_t at = bit.row * rows.bits_per_row() + bit.column;
    out[i] = bytes[at / 8] >> (at % 8) & 1 ? 1.0 : below;
  }
  return slopes.to(input.options());
}

}  // namespace fastnorm
