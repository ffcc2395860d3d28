// The contract between local_response_norm.cpp (checks, allocation) and the kernels (cpu, cuda): plain pointers
// and sizes.
//
//   y[i] = x[i] * scale[i]^-beta,   scale[i] = k + a * sum x[j]^2 over the window of i   (Krizhevsky et al. 2012,
//   section 3.3)
//
// The window of i is i - before .. i + after, clipped at the edges, along the channels (inter) or along both axes of
// the plane (intra). Its size is not in the formula: `a` is alpha, divided by the size where the convention says so.
//
//   dx[i] = dy[i] * scale[i]^-beta - 2 * a * beta * x[i] * sum u[j] over the j whose window holds i,
//   u[j]  = dy[j] * x[j] * scale[j]^(-beta - 1);   those j are i - after .. i + before: the window mirrored
#pragma once

#include "backend.h"
#include "dtype.h"
#include "layout.h"

namespace fastnorm {

enum class Region : int32_t {
  kInter,  // along the channels
  kIntra,  // within a channel, in the plane of H x W
};

struct LocalResponseNormSetting {
  Region region;
  int64_t before, after;  // the window, in each axis it runs along; may reach beyond the tensor
  double a, beta, k;
};

// x, y, dy, dx: [N, C, S] of dtype in shape.layout, dense; S = H * W where the region is intra.

struct LocalResponseNormForward {
  Shape shape;
  int64_t H, W;  // of a plane; inter does not read them
  Dtype dtype;
  LocalResponseNormSetting setting;
  const void* x;
  void* y;
};

struct LocalResponseNormBackward {
  Shape shape;
  int64_t H, W;
  Dtype dtype;
  LocalResponseNormSetting setting;
  const void *x, *dy;
  void* dx;
};

}  // namespace fastnorm

FASTNORM_DECLARE_KERNEL(local_response_norm_forward, LocalResponseNormForward)
FASTNORM_DECLARE_KERNEL(local_response_norm_backward, LocalResponseNormBackward)
