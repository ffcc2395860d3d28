// Batch normalisation on CUDA devices: slice_norm.cu with a channel, or a strip of channels, a slice. What is only of
// batch_norm is here: when the running statistics are updated.
#include "../batch_norm.h"

#include <cmath>

#include "../moments.h"
#include "slice_norm.cuh"

namespace fastnorm::cuda {
namespace {

bool updates_running(const BatchNormForward& a) { return a.training && (a.running_mean || a.num_batches_tracked); }

// Whether the running statistics wait for a launch of their own: for all channels' statistics, for the number of batches,
// or because batch renormalisation reads them as they were.
bool updates_last(const BatchNormForward& a) {
  return updates_running(a) && (a.skip_nonfinite_stats || std::isnan(a.momentum) || a.r);
}

RunningUpdate running_update(const BatchNormForward& a) {
  const double count = static_cast<double>(a.shape.N * a.shape.S);
  return {a.running_mean, a.running_var, a.stats_dtype, a.num_batches_tracked, a.momentum, count / (count - 1)};
}

constexpr int kThreads = 256;

// One block: the running statistics and the number of batches, after this batch of mean a.mean and variance
// `variance`.
__global__ void __launch_bounds__(kThreads) update_running_statistics(const __grid_constant__ BatchNormForward a,
                                                                      RunningUpdate update, const double* variance) {
  SMEM_ARRAY(unsigned, nonfinite, 1);
  const int64_t C = a.shape.C;
  const int first = static_cast<int>(threadIdx.x);
  if (first == 0) *nonfinite = 0;
  __syncthreads();
  if (a.skip_nonfinite_stats) {
    for (int64_t c = first; c < C; c += kThreads)
      if (!is_finite_as(update.dtype, a.mean[c]) || !is_finite_as(update.dtype, variance[c] * update.unbiased))
        atomicOr(nonfinite, 1u);
  }
  const int64_t batches = update.batches ? *update.batches + 1 : 0;
  __syncthreads();
  if (*nonfinite) return;
  if (first == 0 && update.batches) *update.batches = batches;
  if (isnan(update.momentum) && update.batches) update.momentum = 1.0 / static_cast<double>(batches);
  for (int64_t c = first; c < C; c += kThreads) update.average(c, a.mean[c], variance[c]);
}

SlicePlan plan(const BatchNormForward& a) {
  PlanInput in{};
  in.shape = a.shape;
  in.D = 1;
  in.aligned = is_aligned(a.x, a.residual, a.y);
  in.split_only = !a.training;
  in.one_sweep = a.y == nullptr;
  return plan_for_device(in, a.dtype);
}

// With given statistics or sums dx needs none of this batch.
bool wants_sums(const BatchNormBackward& a) {
  return a.dweight || a.dbias || a.sums || (a.training && a.dx && a.given_sums == nullptr);
}

SlicePlan plan(const BatchNormBackward& a) {
  PlanInput in{};
  in.shape = a.shape;
  in.D = 1;
  in.aligned = is_aligned(a.x, a.dy, a.residual, a.dx, a.dresidual);
  in.backward = true;
  in.split_only = !wants_sums(a);
  return plan_for_device(in, a.dtype);
}

// What the kernels take, its buffers in the workspace.
SliceForward arguments(const BatchNormForward& a, Workspace& workspace) {
  SliceForward s = common_forward(a);
  s.plan = plan(a);
  s.stats_dtype = a.stats_dtype;
  // Given ones are only read.
  if (a.given_mean) s.mean = const_cast<double*>(a.given_mean);
  if (a.given_rstd) s.rstd = const_cast<double*>(a.given_rstd);
  s.D = 1;
  s.use_running = !a.training && a.given_mean == nullptr;
  s.running_mean = a.running_mean;
  s.running_var = a.running_var;
  s.r_max = a.r_max;
  s.d_max = a.d_max;
  s.r = a.r;
  s.d = a.d;
  if (updates_last(a) && s.variance == nullptr) s.variance = workspace.take<double>(a.shape.C);
  if (updates_running(a) && !updates_last(a)) s.update = running_update(a);
  if (a.training && !s.plan.resident) s.partial = workspace.take<Moments>(s.plan.partials());
  return s;
}

SliceBackward arguments(const BatchNormBackward& a, Workspace& workspace) {
  SliceBackward s = common_backward(a);
  s.plan = plan(a);
  s.constant_statistics = !a.training;
  s.r = a.r;
  s.d = a.d;
  s.D = 1;
  s.count = a.given_sums ? a.count : static_cast<double>(a.shape.N * a.shape.S);
  s.given_sums = a.given_sums;
  s.sums = a.sums;
  s.group_sums = workspace.take<Sums>(a.shape.C);
  if (!s.plan.resident) s.partial = workspace.take<Sums>(s.plan.partials());
  return s;
}

}  // namespace

int64_t batch_norm_forward_workspace(const BatchNormForward& a) { return workspace_bytes(a); }
int64_t batch_norm_backward_workspace(const BatchNormBackward& a) { return workspace_bytes(a); }

void batch_norm_forward(const BatchNormForward& a, const Queue& queue) {
  if (a.shape.numel() == 0) return;
  const auto stream = static_cast<cudaStream_t>(queue.stream);
  Workspace workspace(queue.workspace);
  const SliceForward s = arguments(a, workspace);
  run_forward("batch_norm", s, a.training, stream);
  if (updates_last(a))
    launch("batch_norm", update_running_statistics, Grid{dim3(1), kThreads}, stream, a, running_update(a),
           static_cast<const double*>(s.variance));
}

void batch_norm_backward(const BatchNormBackward& a, const Queue& queue) {
  if (a.shape.numel() == 0) return;
  Workspace workspace(queue.workspace);
  run_backward("batch_norm", arguments(a, workspace), wants_sums(a), static_cast<cudaStream_t>(queue.stream));
}

}  // namespace fastnorm::cuda
