// How a tensor (N, C, *spatial) lies in memory: the two dense layouts that every norm reads and writes without a copy.
#pragma once

#include <cstdint>

namespace fastnorm {

enum class Layout : int32_t {
  kContiguous,    // element (n, c, s) at (n * C + c) * S + s
  kChannelsLast,  // element (n, c, s) at (n * S + s) * C + c
};

struct Shape {
  int64_t N, C, S;  // samples; channels; product of the spatial sizes (1 if there are none)
  Layout layout;

  int64_t numel() const { return N * C * S; }
};

}  // namespace fastnorm
