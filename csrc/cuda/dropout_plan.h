// How dropout's tensors are given to threads; dropout.cu says what each of them does. Plain C++, as plan.h.
#pragma once

#include "../layout.h"
#include "../philox.h"  // kElementsPerPhilox
#include "sizes.h"

namespace fastnorm::cuda {

constexpr int kDropoutThreads = 256;   // of a block
constexpr int kDropoutStripRows = 32;  // elements, channels_last: positions of a warp
constexpr int kDropoutRows = 4;        // channels, channels_last: positions of a thread
constexpr int kDropoutWindows = 4;     // channels, contiguous: accesses of a thread

struct DropoutPlan {
  int pack;         // elements an access
  int64_t threads;  // of all blocks together
  // Channels, contiguous: element / S, if every index is less than 2^31.
  bool is_narrow;
  FastDivide by_S;
  // Into which the positions of a sample are cut, and its channels.
  int64_t strips, groups;

  int64_t blocks() const { return ceil_divide(threads, kDropoutThreads); }
};

namespace {  // internal linkage: see isa.h

// `by_channel`: one draw a channel. `aligned`: both tensors start at a multiple of 16 bytes.
inline DropoutPlan plan_dropout(const Shape& shape, bool by_channel, int64_t element, bool aligned) {
  const auto [N, C, S, layout] = shape;
  const int window = static_cast<int>(16 / element);
  DropoutPlan p{};
  p.pack = p.strips = p.groups = 1;
  if (layout == Layout::kContiguous) {
    if (aligned) p.pack = window;
    p.threads = ceil_divide(N * C * S, by_channel ? kDropoutWindows * p.pack : kElementsPerPhilox);
    p.is_narrow = S > 1 && p.blocks() * kDropoutThreads * kDropoutWindows * p.pack < int64_t{1} << 31;
    if (p.is_narrow) p.by_S = FastDivide::by(static_cast<uint32_t>(S));
    return p;
  }
  if (aligned && C % window == 0) p.pack = window;
  p.strips = ceil_divide(S, by_channel ? kDropoutRows : kDropoutStripRows);
  p.groups = by_channel ? C / p.pack : ceil_divide(C, kWarp);
  p.threads = N * p.strips * p.groups * (by_channel ? 1 : kWarp);
  return p;
}

}  // namespace
}  // namespace fastnorm::cuda
