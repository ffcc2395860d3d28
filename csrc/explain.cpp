#include "explain.h"

#include "cuda/dropout_plan.h"
#include "cuda/plan.h"
#include "cuda/row_plan.h"
#include "cuda/weight_plan.h"
#include "cuda/window_plan.h"

namespace fastnorm {

static constexpr int kMajorWithClusters = 9;

static Layout layout_of(bool channels_last) { return channels_last ? Layout::kChannelsLast : Layout::kContiguous; }

Decision plan_slices(int64_t N, int64_t C, int64_t S, bool channels_last, int64_t D, bool per_sample, int64_t element,
                     bool backward, int multiprocessors, int64_t shared, int major) {
  const bool has_clusters = major >= kMajorWithClusters;
  cuda::PlanInput in{};
  in.shape = {N, C, S, layout_of(channels_last)};
  in.D = D;
  in.per_sample = per_sample;
  in.element = element;
  in.aligned = true;
  in.backward = backward;
  in.multiprocessors = multiprocessors;
  in.shared = cuda::most_dynamic_shared(shared);
  in.largest_cluster = has_clusters ? cuda::kMaxCluster : 1;
  const cuda::SlicePlan p = cuda::plan_slices(in);
  return {
      {"resident", p.resident}, {"blocks", p.slices * (p.resident ? p.cluster : p.parts)},
      {"threads", p.threads},   {"cluster", p.cluster},
      {"parts", p.parts},       {"window", p.window},
      {"shared", p.shared.all}, {"slices", p.slices},
  };
}

Decision plan_dropout(int64_t N, int64_t C, int64_t S, bool channels_last, bool by_channel, int64_t element) {
  const cuda::DropoutPlan p =
      cuda::plan_dropout({N, C, S, layout_of(channels_last)}, by_channel, element, /*aligned=*/true);
  return {{"window", p.pack}, {"blocks", p.blocks()}, {"threads", cuda::kDropoutThreads}};
}

Decision plan_windows(int64_t N, int64_t C, int64_t H, int64_t W, bool channels_last, bool intra, int64_t before,
                      int64_t after, int64_t element, bool backward, int multiprocessors, int64_t shared) {
  const cuda::WindowPlan p = cuda::plan_windows({
      .shape = {N, C, H * W, layout_of(channels_last)},
      .H = H,
      .W = W,
      .region = intra ? Region::kIntra : Region::kInter,
      .before = before,
      .after = after,
      .element = element,
      .aligned = true,
      .backward = backward,
      .multiprocessors = multiprocessors,
      .shared = cuda::most_dynamic_shared(shared),
  });
  const auto parts = [](const cuda::Axis& axis) { return axis.has_window() ? axis.tiles() : 1; };
  return {
      {"in_registers", p.path != cuda::WindowPath::kTiles},
      {"in_workspace", p.in_workspace},
      {"window", p.pack},
      {"blocks", p.blocks},
      {"threads", p.threads},
      {"shared", p.shared()},
      {"parts", parts(p.row) * parts(p.column)},
  };
}

Decision plan_weights(int64_t N, int64_t C, int64_t S, int64_t element, bool backward, int multiprocessors,
                      int64_t shared) {
  const cuda::WeightPlan p = cuda::plan_weights({
      .shape = {N, C, S, Layout::kContiguous},
      .element = element,
      .aligned = true,
      .backward = backward,
      .multiprocessors = multiprocessors,
      .shared = cuda::most_dynamic_shared(shared),
  });
  return {
      {"resident", p.resident},          {"window", p.pack},   {"blocks", p.blocks * p.parts},
      {"threads", cuda::kWeightThreads}, {"shared", p.shared}, {"parts", p.parts},
  };
}

Decision plan_rows(int64_t M, int64_t N, int64_t element, bool is_bfloat16, bool backward, int multiprocessors,
                   int major) {
  constexpr int64_t kAccess = 16;  // bytes
  const int pack = N % (kAccess / element) == 0 ? static_cast<int>(kAccess / element) : 1;
  const cuda::RowPlanInput in{M, N, pack, element == 8, is_bfloat16, major >= kMajorWithClusters, multiprocessors};
  const cuda::RowPlan p = backward ? cuda::plan_rows_backward(in) : cuda::plan_rows_forward(in);
  // Rows too long for registers: backward has a block a row for dx, the parts share them out for dweight and dbias.
  const int64_t of_rows = p.packs == 0 ? M : backward ? p.parts : cuda::ceil_divide(M, p.teams);
  return {
      {"packs", p.packs},       {"window", pack},       {"blocks", of_rows * p.cluster},
      {"threads", p.threads()}, {"cluster", p.cluster}, {"parts", p.parts},
      {"teams", p.teams},
  };
}

}  // namespace fastnorm
