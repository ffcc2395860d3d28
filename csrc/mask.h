// The one bit an element that a norm keeps for backward where it fuses a residual with relu or leaky_relu: !(z <= 0).
// The residual itself is not kept then; without one, backward recomputes the sign of z from x.
#pragma once

#include <cstdint>

#include "layout.h"

namespace fastnorm {

// Bits go by rows of elements that are contiguous in memory, lowest bit first, no two rows in one byte, so that no two
// tasks write one. What a row is, the contract of each op says for the CPU.
struct MaskRows {
  int64_t rows, length;

  int64_t bytes_per_row() const { return (length + 7) / 8; }
  int64_t bytes() const { return rows * bytes_per_row(); }
};

namespace {  // internal linkage: see isa.h

// The rows on a CUDA device, of every op that has channels: planes, or the channels of a position.
inline MaskRows cuda_mask_rows(const Shape& shape) {
  if (shape.layout == Layout::kContiguous && shape.S > 1) return {shape.N * shape.C, shape.S};
  return {shape.N * shape.S, shape.C};
}

}  // namespace

}  // namespace fastnorm
