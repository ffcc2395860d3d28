// What batch_norm.cu and group_norm.cu ask slice_norm.cu for, which has the kernels of both.
#pragma once

#include "../activation.h"
#include "../backend.h"
#include "pack.cuh"
#include "plan.h"
#include "running.cuh"

namespace fastnorm::cuda {

// What the kernels take forward.
struct SliceForward {
  SlicePlan plan;
  Dtype dtype, param_dtype, stats_dtype;
  Activation activation;
  double eps;
  const void *x, *residual, *weight, *bias;
  void* y;
  uint8_t* mask;
  double *mean, *rstd, *variance;  // by group; variance or null
  int64_t D;                       // channels that share statistics
  RunningUpdate update;            // of batch_norm's running statistics; or all zero
  bool use_running;                // the running statistics are those to normalise by
  // Batch renormalisation: r and d by channel, from the running statistics.
  const void *running_mean, *running_var;
  double r_max, d_max;
  double *r, *d;
  void* partial;  // Moments[slices][entries][parts], if split
};

// Backward's sums of a channel, or of g = dz * weight over a slice.
struct Sums {
  double dz, dz_xhat;
};

// What the kernels take backward.
struct SliceBackward {
  SlicePlan plan;
  Dtype dtype, param_dtype;
  Activation activation;
  bool constant_statistics;  // that do not depend on x: dx = dz * scale
  bool reads_x;              // in the sweep that makes dx, or any
  const void *x, *dy, *residual, *weight, *bias;
  const double *mean, *rstd;  // by group
  const double *r, *d;        // by channel, or null
  const uint8_t* mask;
  void *dx, *dresidual;
  int64_t D;
  double count;              // elements of a group
  const double* given_sums;  // [2, C] as BatchNormBackward has them, or null
  Sums* partial;             // [slices][entries][parts], if split
  Sums* group_sums;          // by group, of dz * weight; if split
  Sums* channel_sums;        // [samples][C] of dz, or null: there is one sample
  void *dweight, *dbias;     // each or null
  double* sums;              // [2, C] as BatchNormBackward has them, or null; never beside channel_sums
};

// Statistics, then y. own: of the batch, else those in a (use_running, or a.mean and a.rstd as they are).
void run_forward(const char* op, const SliceForward& a, bool own, cudaStream_t stream);

// sums: those of the channels, for dweight, dbias and a.sums, and in training for dx. dx and dresidual if wanted.
void run_backward(const char* op, const SliceBackward& a, bool sums, cudaStream_t stream);

namespace {

// Pieces of the workspace, each aligned to 16 bytes.
class Workspace {
 public:
  explicit Workspace(void* start) : start_(static_cast<unsigned char*>(start)) {}

  template <typename V>
  V* take(int64_t n) {
    unsigned char* here = start_ ? start_ + bytes_ : nullptr;
    bytes_ += ceil_divide(n * static_cast<int64_t>(sizeof(V)), 16) * 16;
    return reinterpret_cast<V*>(here);
  }
  int64_t bytes() const { return bytes_; }

 private:
  unsigned char* start_;
  int64_t bytes_ = 0;
};

// What both ops' contracts have; everything else is zero.
template <typename Args>
SliceForward common_forward(const Args& a) {
  SliceForward s{};
  s.dtype = a.dtype;
  s.param_dtype = a.param_dtype;
  s.activation = a.activation;
  s.eps = a.eps;
  s.x = a.x;
  s.residual = a.residual;
  s.weight = a.weight;
  s.bias = a.bias;
  s.y = a.y;
  s.mask = a.mask;
  s.mean = a.mean;
  s.rstd = a.rstd;
  s.variance = a.variance;
  return s;
}

template <typename Args>
SliceBackward common_backward(const Args& a) {
  SliceBackward s{};
  s.dtype = a.dtype;
  s.param_dtype = a.param_dtype;
  s.activation = a.activation;
  s.reads_x = true;
  s.x = a.x;
  s.dy = a.dy;
  s.residual = a.residual;
  s.weight = a.weight;
  s.bias = a.bias;
  s.mean = a.mean;
  s.rstd = a.rstd;
  s.mask = a.mask;
  s.dx = a.dx;
  s.dresidual = a.dresidual;
  s.dweight = a.dweight;
  s.dbias = a.dbias;
  return s;
}

// Of an op's arguments(a, workspace).
template <typename Args>
int64_t workspace_bytes(const Args& a) {
  Workspace workspace(nullptr);
  if (a.shape.numel() > 0) arguments(a, workspace);
  return workspace.bytes();
}

inline SlicePlan plan_for_device(PlanInput in, Dtype dtype) {
  const Device& d = device();
  in.element = size_of(dtype);
  in.multiprocessors = d.multiprocessors;
  in.shared = d.dynamic_shared();
  in.largest_cluster = d.has_clusters() ? kMaxCluster : 1;
  return plan_slices(in);
}

}  // namespace
}  // namespace fastnorm::cuda
