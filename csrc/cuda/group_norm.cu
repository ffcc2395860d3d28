// Group and instance normalisation on CUDA devices: slice_norm.cu with a group of a sample, or a strip of a sample's
// groups, a slice.
#include "../group_norm.h"

#include "../moments.h"
#include "slice_norm.cuh"

namespace fastnorm::cuda {
namespace {

template <typename Args>
PlanInput plan_input(const Args& a) {
  PlanInput in{};
  in.shape = a.shape;
  in.D = a.shape.C / a.G;
  in.per_sample = true;
  return in;
}

bool wants_sums(const GroupNormBackward& a) { return a.dweight || a.dbias || a.dx; }

SlicePlan plan(const GroupNormForward& a) {
  PlanInput in = plan_input(a);
  in.aligned = is_aligned(a.x, a.residual, a.y);
  return plan_for_device(in, a.dtype);
}

SlicePlan plan(const GroupNormBackward& a) {
  PlanInput in = plan_input(a);
  in.aligned = is_aligned(a.x, a.dy, a.residual, a.dx, a.dresidual);
  in.backward = true;
  in.split_only = !wants_sums(a);
  return plan_for_device(in, a.dtype);
}

// What the kernels take, its buffers in the workspace.
SliceForward arguments(const GroupNormForward& a, Workspace& workspace) {
  SliceForward s = common_forward(a);
  s.plan = plan(a);
  s.D = a.shape.C / a.G;
  if (!s.plan.resident) s.partial = workspace.take<Moments>(s.plan.partials());
  return s;
}

SliceBackward arguments(const GroupNormBackward& a, Workspace& workspace) {
  SliceBackward s = common_backward(a);
  s.plan = plan(a);
  s.D = a.shape.C / a.G;
  s.count = static_cast<double>(s.D * a.shape.S);
  s.channel_sums = workspace.take<Sums>(a.shape.N * a.shape.C);
  s.group_sums = workspace.take<Sums>(a.shape.N * a.G);
  if (!s.plan.resident) s.partial = workspace.take<Sums>(s.plan.partials());
  return s;
}

}  // namespace

int64_t group_norm_forward_workspace(const GroupNormForward& a) { return workspace_bytes(a); }
int64_t group_norm_backward_workspace(const GroupNormBackward& a) { return workspace_bytes(a); }

void group_norm_forward(const GroupNormForward& a, const Queue& queue) {
  if (a.shape.numel() == 0) return;
  Workspace workspace(queue.workspace);
  run_forward("group_norm", arguments(a, workspace), true, static_cast<cudaStream_t>(queue.stream));
}

void group_norm_backward(const GroupNormBackward& a, const Queue& queue) {
  if (a.shape.numel() == 0) return;
  Workspace workspace(queue.workspace);
  run_backward("group_norm", arguments(a, workspace), wants_sums(a), static_cast<cudaStream_t>(queue.stream));
}

}  // namespace fastnorm::cuda
