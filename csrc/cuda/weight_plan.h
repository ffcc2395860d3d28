// How weight normalisation's slices are given to blocks; weight_norm.cu says what a block does. Plain C++, as plan.h.
#pragma once

#include <algorithm>

#include "../layout.h"
#include "sizes.h"

namespace fastnorm::cuda {

// What the choice depends on.
struct WeightPlanInput {
  Shape shape;      // [N, C, S], a slice all of one c
  int64_t element;  // bytes
  bool aligned;     // all tensors start at a multiple of 16 bytes
  bool backward;
  int multiprocessors;
  int64_t shared;  // dynamic, bytes a block may have
};

constexpr int kWeightThreads = 256;  // of a block

struct WeightPlan {
  bool by_columns;
  int pack;        // elements an access
  int64_t blocks;  // that share out the slices
  int64_t parts;   // of a slice
  bool resident;   // a slice stays in shared memory
  int64_t shared;  // bytes a block
};

namespace {  // internal linkage: see isa.h

inline WeightPlan plan_weights(const WeightPlanInput& in) {
  constexpr int kShortRun = 16;
  constexpr int64_t kLeast = 1 << 13;  // elements of a part, of which there are two blocks a multiprocessor
  const auto [N, C, S, layout] = in.shape;
  const int window = static_cast<int>(16 / in.element);
  WeightPlan p{};
  p.by_columns = N > 1 && S < kShortRun;
  p.pack = !p.by_columns && in.aligned && S % window == 0 ? window : 1;
  p.blocks = p.by_columns ? ceil_divide(C, kWarp / S) : C;
  const int64_t rows = p.by_columns ? N : INT64_MAX;  // a part has one at least
  const int64_t wanted = ceil_divide(2 * in.multiprocessors, p.blocks);
  p.parts = std::clamp<int64_t>(std::min({wanted, N * C * S / p.blocks / kLeast, rows}), 1, 1 << 10);
  const int64_t bytes = N * S * in.element * (in.backward ? 2 : 1);
  p.resident = p.parts == 1 && !p.by_columns && bytes <= in.shared / 2;
  p.shared = p.resident ? bytes : 0;
  return p;
}

}  // namespace
}  // namespace fastnorm::cuda
