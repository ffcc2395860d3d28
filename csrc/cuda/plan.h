// How slices (what is reduced and normalised together) are cut for the device: the one place that decides. Plain C++,
// so that the host can explain a choice and tests can force one.
//
//   resident  a block, or a cluster of them, takes a slice alone: it keeps what its registers hold of it between its
//             statistics and its normalisation, and finds the rest in the second-level cache, for it has read it just
//             before
//   split     the slice is too long for that, or its channels are neighbours in memory: its parts are reduced by many
//             blocks, merged, and read again
#pragma once

#include <algorithm>
#include <cstdint>

#include "../layout.h"
#include "../moments.h"  // FASTNORM_HOST_DEVICE
#include "sizes.h"

namespace fastnorm::cuda {

// What the choice depends on beside the shape.
struct PlanInput {
  Shape shape;
  int64_t D;        // channels that share statistics
  bool per_sample;  // statistics of each sample (group_norm), or over all of them (batch_norm)
  int64_t element;  // bytes
  bool aligned;     // all tensors start at a multiple of 16 bytes
  bool backward;
  bool split_only;  // statistics are given
  bool one_sweep;   // statistics are all that is wanted
  int multiprocessors;
  int64_t shared;  // dynamic, bytes a block may have
  int largest_cluster;
};

// What tests change; -1 and 0 leave the choice as it is.
struct PlanOverride {
  int resident = -1;  // 0: split; 1: resident wherever it fits
  int cluster = 0;    // blocks
  int scalar = 0;     // 1: an access an element
};
inline PlanOverride& plan_override() {
  static PlanOverride given;
  return given;
}

constexpr int kMaxCluster = 8;  // that every device with clusters has

constexpr int kSliceThreads = 256;  // the most of a block
// Windows that a thread of a resident kernel holds of x, and backward of dy as well.
constexpr int windows_held(bool backward) { return backward ? 4 : 8; }

// Slices lie in memory as runs of contiguous elements:
//
//   planes  (contiguous)     a run is a plane of a channel; every run has its own coefficients, or all of them have the
//                            same
//   strips  (channels_last)  a run is `entries` neighbouring channels of a position
//
// A run is `span` windows, accesses of `window` elements that divide every run: of 16 bytes, of 8 (planes of 16-bit
// elements, of which many are 14 x 14) or of one element. A team of threads takes `team` of them at once, a chunk.
struct SlicePlan {
  bool resident;
  int window;  // elements an access
  int threads, cluster;
  int parts;  // blocks that reduce a slice, if split

  // Slice s of sample n = s / inner begins at element n * sample_stride + s % inner * slice_stride.
  int64_t slices, inner, sample_stride, slice_stride;
  int64_t runs, run_stride;
  int64_t C;
  bool strips;
  int entries;  // channels of a slice

  int team;         // threads, a power of two: at most 32
  int span;         // windows of a run: less than 2^31, and so is what a slice has of chunks
  int64_t per_run;  // chunks of a run
  FastDivide by_per_run;
  int64_t chunks;  // of a slice
  int64_t mask_row_sample, mask_row_slice, mask_row_run, mask_row_bytes;

  // Shared memory of a block, in bytes from its start.
  struct {
    int64_t table;     // [columns of coefficients][entries] of arithmetic's type
    int64_t partial;   // [warps][lanes][numbers]: block-wide sums under way
    int64_t totals;    // [columns][numbers] double: done
    int64_t shift;     // [entries] of arithmetic's type
    int64_t exchange;  // moments or sums of the warps, or sums of the entries: what the cluster's other blocks read
    int64_t sums;      // [entries] pairs of double
    int64_t runs;      // [chunks of a block] pairs of arithmetic's type
    int64_t all;
  } shared;

  FASTNORM_HOST_DEVICE int64_t chunks_per_block() const {
    const int blocks = resident ? cluster : parts;
    return (chunks + blocks - 1) / blocks;
  }
  // Statistics are of each of these, or of the whole batch, which is one.
  int64_t samples() const { return slices / inner; }
  // What the blocks leave for the merge, if split.
  int64_t partials() const { return slices * parts * entries; }
  // Planes of several channels: backward's sums are of runs.
  FASTNORM_HOST_DEVICE bool by_run() const { return !strips && entries > 1; }
  // Columns of sums: of what a thread's place in its team stands for.
  FASTNORM_HOST_DEVICE int columns() const { return strips ? team : 1; }
};

namespace {  // internal linkage: see isa.h

inline int power_of_two_from(int64_t n) {
  int p = 1;
  while (p < n) p *= 2;
  return p;
}

constexpr int kForwardColumns = 3, kBackwardColumns = 6;  // of the table of coefficients

// Elements an access.
inline int window_of(int64_t length, int64_t element, bool aligned, bool strips) {
  const int whole = static_cast<int>(16 / element);
  if (!aligned || element == 8) return 1;
  if (length % whole == 0) return whole;
  return element == 2 && !strips && length % (whole / 2) == 0 ? whole / 2 : 1;
}

// The geometry of slices; strips of at most `width` channels.
inline void set_slices(SlicePlan& p, const PlanInput& in, int64_t width) {
  const int64_t N = in.shape.N, C = in.shape.C, S = in.shape.S, D = in.D;
  p.C = C;
  p.sample_stride = in.per_sample ? C * S : 0;
  if (p.strips) {
    p.entries = static_cast<int>(width);
    p.inner = ceil_divide(C, width);
    p.slices = in.per_sample ? N * p.inner : p.inner;
    p.slice_stride = width;
    p.runs = in.per_sample ? S : N * S;
    p.run_stride = C;
    p.mask_row_sample = in.per_sample ? S : 0;
    p.mask_row_slice = 0;
    p.mask_row_run = 1;
    p.mask_row_bytes = ceil_divide(C, 8);
  } else {
    // In two sweeps every plane is a slice: merging planes to groups is then the same as merging parts.
    const int64_t channels = in.per_sample && p.resident ? D : 1;
    p.entries = static_cast<int>(channels);
    p.inner = C / channels;
    p.slices = in.per_sample ? N * p.inner : p.inner;
    p.slice_stride = channels * S;
    p.runs = in.per_sample ? channels : N;
    p.run_stride = in.per_sample ? S : C * S;
    p.mask_row_sample = in.per_sample ? C : 0;
    p.mask_row_slice = channels;
    p.mask_row_run = in.per_sample ? 1 : C;
    p.mask_row_bytes = ceil_divide(S, 8);
  }
  p.span = static_cast<int>((p.strips ? p.entries : S) / p.window);
  // Planes: few, so that few lanes of the last chunk are idle, but as many as share a byte of the mask and a line of the
  // cache; the chunks of a slice must be less than 2^31.
  const int widest = p.runs * p.span < int64_t{1} << 33 ? 8 : kWarp;
  p.team = std::min(p.strips ? kWarp : widest, power_of_two_from(p.span));
  p.per_run = ceil_divide(p.span, p.team);
  p.by_per_run = FastDivide::by(static_cast<uint32_t>(p.per_run));
  p.chunks = p.runs * p.per_run;
}

inline void set_shared(SlicePlan& p, const PlanInput& in) {
  const int64_t acc = in.element == 8 ? 8 : 4, warps = p.threads / kWarp;
  const int64_t numbers = 2 * (p.strips ? p.window : 1) + (in.backward ? 0 : 1);
  int64_t at = 0;
  const auto take = [&at](int64_t bytes) {
    const int64_t here = at;
    at += ceil_divide(bytes, 16) * 16;
    return here;
  };
  p.shared.table = take((in.backward ? kBackwardColumns : kForwardColumns) * p.entries * acc);
  // Resident: the warps' sums meet in `exchange`.
  p.shared.partial = take(p.resident ? 0 : warps * std::min(p.columns(), kWarp) * numbers * acc);
  p.shared.totals = take(p.resident ? 0 : p.columns() * numbers * 8);
  p.shared.shift = take(p.resident || in.backward ? 0 : p.entries * acc);
  p.shared.exchange = take(!p.resident ? 0 : in.backward ? std::max<int64_t>(p.entries, warps) * 16 : warps * 24);
  p.shared.sums = take(in.backward && p.resident ? p.entries * 16 : 0);
  p.shared.runs = take(in.backward && p.by_run() ? p.chunks_per_block() * 2 * acc : 0);
  p.shared.all = at;
}

// Channels a strip: whole windows and bytes of the mask, up to 256 bytes. A team is a warp at most.
inline int64_t strip_width(const SlicePlan& p, const PlanInput& in) {
  const int64_t C = in.shape.C, unit = std::max(8, p.window);
  const int64_t most = std::max(unit, std::min<int64_t>(256 / in.element, int64_t{kWarp} * p.window));
  // Strips that end with a line of the cache, if there are such; else all about as wide.
  for (const int64_t width : {most, most / 2})
    if (width % unit == 0 && C % width == 0) return width;
  return std::min(C, ceil_divide(ceil_divide(C, ceil_divide(C, most)), unit) * unit);
}

// Gives a slice to a cluster of that size. Whether its blocks have a part each, and the shared memory.
inline bool try_resident(SlicePlan& p, const PlanInput& in, int cluster) {
  p.resident = true;
  p.cluster = cluster;
  p.parts = 1;
  set_slices(p, in, 0);
  if (p.chunks < cluster) return false;
  const int64_t held = ceil_divide(p.chunks_per_block() * p.team, windows_held(in.backward));
  p.threads = static_cast<int>(std::min<int64_t>(kSliceThreads, ceil_divide(held, kWarp) * kWarp));
  set_shared(p, in);
  return p.shared.all <= in.shared;
}

// One block, unless its part would be larger than what the second-level cache keeps for all blocks that run at once: then
// the smallest cluster whose parts are not. And a larger one while there are fewer blocks than multiprocessors and these
// have several warps.
inline bool plan_resident(SlicePlan& p, const PlanInput& in) {
  constexpr int64_t kBlockBytes = 200 << 10;  // of x, and backward of dy
  const PlanOverride& forced = plan_override();
  const int64_t planes = in.per_sample ? in.D : in.shape.N;  // of a slice
  const int64_t bytes = planes * in.shape.S * in.element * (in.backward ? 2 : 1);
  // Planes of a batch lie apart, and forward is soon faster split.
  const int64_t of_batch = kBlockBytes / (in.backward ? 1 : 4);
  if (!in.per_sample && bytes > of_batch && forced.resident != 1) return false;
  SlicePlan best = p;
  bool found = false;
  for (int cluster = 1; cluster <= std::min(in.largest_cluster, kMaxCluster); cluster *= 2) {
    if (forced.cluster > 0 ? forced.cluster != cluster : bytes > kBlockBytes * cluster && forced.resident != 1)
      continue;
    if (!try_resident(p, in, cluster) || (found && p.threads < kSliceThreads / 2)) break;
    best = p;
    found = true;
    if (p.slices * cluster >= in.multiprocessors) break;
  }
  p = best;
  return found;
}

// Parts of each of so many slices: for one wave of the two blocks that a multiprocessor holds, or for as few more as
// leave less than a tenth of the last one empty.
inline int64_t parts_for_waves(int64_t slices, int64_t multiprocessors) {
  constexpr int64_t kMostWaves = 4;
  const int64_t at_once = 2 * multiprocessors;
  int64_t best = 1;
  double best_use = 0;
  for (int64_t waves = 1; waves <= kMostWaves; ++waves) {
    const int64_t parts = std::max<int64_t>(1, waves * at_once / slices);
    const double use =
        static_cast<double>(parts * slices) / static_cast<double>(ceil_divide(parts * slices, at_once) * at_once);
    if (use > best_use + 0.01) best = parts, best_use = use;
    if (use > 0.9) break;
  }
  return best;
}

// None with less than two accesses a thread or more elements than a float32 counts exactly.
inline void plan_split(SlicePlan& p, const PlanInput& in) {
  constexpr int64_t kMostElements = 1 << 22;
  p.resident = false;
  p.cluster = 1;
  p.parts = 1;
  set_slices(p, in, p.strips ? strip_width(p, in) : 0);
  const int64_t teams = kSliceThreads / p.team, most = ceil_divide(p.chunks, 2 * teams);
  const int64_t fewest = ceil_divide(p.chunks * p.team * p.window, kMostElements);
  const int64_t wanted = parts_for_waves(p.slices, in.multiprocessors);
  p.parts = static_cast<int>(std::min<int64_t>(p.chunks, std::max({fewest, std::min(wanted, most), int64_t{1}})));
  p.parts = static_cast<int>(ceil_divide(p.chunks, p.chunks_per_block()));  // none empty
  const int64_t busy = ceil_divide(p.chunks_per_block() * p.team, kWarp) * kWarp;
  p.threads = static_cast<int>(std::min<int64_t>(kSliceThreads, busy));
  set_shared(p, in);
}

}  // namespace

inline SlicePlan plan_slices(const PlanInput& in) {
  const PlanOverride& forced = plan_override();
  SlicePlan p{};
  // A plane of one element is a channel of a position.
  p.strips = in.shape.layout == Layout::kChannelsLast || in.shape.S == 1;
  p.window = window_of(p.strips ? in.shape.C : in.shape.S, in.element, in.aligned && !forced.scalar, p.strips);
  const bool may_stay = !p.strips && !in.split_only && !in.one_sweep && forced.resident != 0;
  if (!may_stay || !plan_resident(p, in)) plan_split(p, in);
  return p;
}

}  // namespace fastnorm::cuda
