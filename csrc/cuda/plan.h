// How slices (what is reduced and normalised together) are cut for the device: the one place that decides. Plain C++,
// so that the host can explain a choice and tests can force one.
//
//   resident  a cluster of 1 to 16 blocks keeps a slice on chip between its statistics and its normalisation: each
//             element is read once
//   split     the slice is too long, or the device has no clusters: its parts are reduced by many blocks, merged, and
//             read again
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

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
  int arrays;       // tensors to keep on chip: x, or x and dy
  bool backward;
  bool split_only;   // statistics are given
  bool one_sweep;    // statistics are all that is wanted
  bool bulk_copies;  // the device has them
  int multiprocessors;
  int64_t shared;  // dynamic, bytes a block may have
  int largest_cluster;
  int64_t most_clusters = 0;  // that run at once, 0 if unknown
};

// What tests change; -1 and 0 leave the choice as it is.
struct PlanOverride {
  int resident = -1;  // 0: split; 1: resident wherever it fits
  int cluster = 0;    // blocks
  int scalar = 0;     // 1: an access an element
  int stages = 0;     // buffers
};
inline PlanOverride& plan_override() {
  static PlanOverride given;
  return given;
}

constexpr int kBatch = 4;  // windows of a thread in a piece
constexpr int kMaxCluster = 16;

// The most threads a block, for a kernel with so many columns of coefficients and sums a thread. Registers decide: two
// blocks must fit a multiprocessor, so that one computes while the other waits for memory.
constexpr int kBlocks = 2;
constexpr int max_threads(int columns, bool backward) {
  if (backward) return columns > 4 ? 128 : 160;
  return columns > 1 ? 192 : 256;
}

// Slices lie in memory as runs of contiguous elements:
//
//   planes  (contiguous)     a run is a plane of a channel; every run has its own coefficients, or all of them have the
//                            same
//   strips  (channels_last)  a run is `entries` neighbouring channels of a position
//
// A run is cut in windows of `window` elements, 16 bytes; a team of threads takes them, a thread a window. The unit of
// work is a piece: kBatch windows a thread, of one long run or of kBatch short ones.
struct SlicePlan {
  bool resident;
  int window;  // elements an access
  int threads, cluster;
  bool bulk;         // resident planes of long runs: copied by bulk copies, which need no threads
  int stages;        // buffers: 2 where the next slice is copied while this one is normalised
  int parts;         // blocks that reduce a slice, if split
  int64_t clusters;  // that are started, each for a slice at a time, if resident

  // Slice s of sample n = s / inner begins at element n * sample_stride + s % inner * slice_stride.
  int64_t slices, inner, sample_stride, slice_stride;
  int64_t runs, run_stride, run_length;
  int64_t C, S, numel;
  bool strips;
  int entries;  // channels of a slice
  int group;    // of its channels share statistics in the kernel; resident: D

  int team;     // threads; planes: at most 32, strips: a power of two
  int span;     // windows of a run's part in one piece
  int per_run;  // pieces of a long run; 0: a piece is kBatch runs
  int pieces;   // of a slice
  int64_t mask_row_sample, mask_row_slice, mask_row_run;

  // Shared memory of a block, in bytes from its start.
  struct {
    int64_t table;     // [columns of coefficients][entries] of arithmetic's type
    int64_t partial;   // [warps][lanes][numbers]: block-wide sums under way
    int64_t totals;    // [columns][numbers] double: done
    int64_t shift;     // [entries] of arithmetic's type
    int64_t exchange;  // [2] moments of the groups or sums of the entries: what the cluster's other blocks read
    int64_t groups;    // [groups] pairs of double
    int64_t sums;      // [entries] pairs of double
    int64_t runs;      // [runs of a block's pieces] pairs of arithmetic's type
    int64_t buffers;   // [stages][arrays][buffer]
    int64_t buffer;    // bytes
    int64_t all;
  } shared;

  FASTNORM_HOST_DEVICE int piece_windows() const { return per_run > 0 ? span : span * kBatch; }
  FASTNORM_HOST_DEVICE int pieces_per_block() const {
    const int blocks = resident ? cluster : parts;
    return (pieces + blocks - 1) / blocks;
  }
  FASTNORM_HOST_DEVICE int groups() const { return entries / group > 1 ? entries / group : 1; }
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

constexpr int kForwardColumns = 3, kBackwardColumns = 7;  // of the table of coefficients

// The geometry of slices; strips of `width` channels.
inline void set_slices(SlicePlan& p, const PlanInput& in, int64_t width) {
  const int64_t N = in.shape.N, C = in.shape.C, S = in.shape.S, D = in.D;
  p.C = C;
  p.S = S;
  p.numel = in.shape.numel();
  p.sample_stride = in.per_sample ? C * S : 0;
  if (p.strips) {
    p.entries = static_cast<int>(width);
    p.inner = ceil_divide(C, width);
    p.slices = in.per_sample ? N * p.inner : p.inner;
    p.slice_stride = p.run_length = width;
    p.runs = in.per_sample ? S : N * S;
    p.run_stride = C;
    p.mask_row_sample = in.per_sample ? S : 0;
    p.mask_row_slice = 0;
    p.mask_row_run = 1;
  } else {
    // In two sweeps every plane is a slice: merging planes to groups is then the same as merging parts.
    const int64_t channels = in.per_sample && p.resident ? D : 1;
    p.entries = static_cast<int>(channels);
    p.inner = C / channels;
    p.slices = in.per_sample ? N * p.inner : p.inner;
    p.slice_stride = channels * S;
    p.run_length = S;
    p.runs = in.per_sample ? channels : N;
    p.run_stride = in.per_sample ? S : C * S;
    p.mask_row_sample = in.per_sample ? C : 0;
    p.mask_row_slice = channels;
    p.mask_row_run = in.per_sample ? 1 : C;
  }
  p.group = p.resident ? static_cast<int>(D) : 1;
}

inline void set_pieces(SlicePlan& p) {
  const int per_octet = 8 / p.window;  // windows
  p.per_run = 0;
  if (p.strips) {
    p.span = static_cast<int>(ceil_divide(p.entries, p.window));
    p.team = power_of_two_from(p.span);
  } else {
    // A plane may begin anywhere in its first eight elements.
    const int64_t octets = p.S % 8 == 0 ? p.S / 8 : (p.S + 14) / 8;
    p.team = 32;
    if (octets * per_octet > p.team) {
      p.per_run = static_cast<int>(ceil_divide(octets * per_octet, p.team * kBatch));
      p.span = static_cast<int>(ceil_divide(octets, p.per_run)) * per_octet;
    } else {
      p.span = static_cast<int>(octets) * per_octet;
      p.team = power_of_two_from(p.span);
    }
  }
  p.pieces = static_cast<int>(p.per_run > 0 ? p.runs * p.per_run : ceil_divide(p.runs, kBatch));
}

// As many as have a piece to work on, in whole warps and teams.
inline void set_threads(SlicePlan& p, int most) {
  const int64_t busy = int64_t{p.pieces_per_block()} * p.team;
  const int unit = std::max(32, p.team);
  p.threads =
      std::max(1, static_cast<int>(std::min<int64_t>(most, power_of_two_from(std::min<int64_t>(most, busy))) / unit)) *
      unit;
}

inline void set_shared(SlicePlan& p, const PlanInput& in) {
  const int64_t acc = in.element == 8 ? 8 : 4, warps = p.threads / 32;
  const int64_t numbers = in.backward || p.window > 1 ? 2 * (p.strips ? p.window : 1) + 1 : 3;
  int64_t at = 0;
  const auto take = [&at](int64_t bytes) {
    const int64_t here = at;
    at += ceil_divide(bytes, 16) * 16;
    return here;
  };
  p.shared.table = take((in.backward ? kBackwardColumns : kForwardColumns) * p.entries * acc);
  p.shared.partial = take(warps * std::min(p.columns(), 32) * numbers * acc);
  p.shared.totals = take(p.columns() * numbers * 8);
  p.shared.shift = take(p.entries * acc);
  p.shared.exchange = take(2 * (in.backward ? p.entries * 16 : p.groups() * 24));
  p.shared.groups = take(p.groups() * 16);
  p.shared.sums = take(in.backward ? p.entries * 16 : 0);
  p.shared.runs = take(in.backward && p.by_run() ? p.pieces_per_block() * (p.per_run ? 1 : kBatch) * 2 * acc : 0);
  // Split: forward's first pieces, which are needed twice.
  const int64_t kept = p.resident ? p.pieces_per_block() : in.backward || in.split_only ? 0 : p.threads / p.team;
  p.shared.buffer = kept * p.piece_windows() * p.window * in.element;
  p.shared.buffer = ceil_divide(p.shared.buffer, 16) * 16;
  p.shared.buffers = take(p.stages * in.arrays * p.shared.buffer);
  p.shared.all = at;
}

// Channels a strip: whole groups and windows and bytes of the mask, `bytes` or more unless there are fewer channels.
inline int64_t strip_width(const SlicePlan& p, const PlanInput& in, int64_t bytes) {
  const int64_t unit = std::lcm(std::lcm(p.resident ? in.D : 1, p.window), 8);
  return std::min(in.shape.C, ceil_divide(bytes / in.element, unit) * unit);
}

// Whether a cluster of that size holds a slice. Fills in all but the number of clusters.
inline bool try_resident(SlicePlan& p, const PlanInput& in, int64_t strip_bytes, int cluster) {
  p.resident = true;
  p.cluster = cluster;
  p.stages = 1;
  p.parts = 1;
  set_slices(p, in, p.strips ? strip_width(p, in, strip_bytes) : 0);
  set_pieces(p);
  const int most = max_threads(p.strips ? p.window : 1, in.backward);
  if (p.team > most || (cluster > 1 && p.pieces < cluster)) return false;
  set_threads(p, most);
  set_shared(p, in);
  return p.shared.all <= in.shared;
}

// The smallest cluster that holds a slice in half of its multiprocessors' shared memory and gives each of the device's
// two blocks; of at most eight blocks if there is a choice, for larger ones fit few places.
inline bool plan_resident(SlicePlan& p, const PlanInput& in) {
  const PlanOverride& forced = plan_override();
  const auto allowed = [&](int cluster) {
    return cluster <= in.largest_cluster && (forced.cluster == 0 || forced.cluster == cluster);
  };
  constexpr int64_t kBeside = kStaticShared + (1 << 10);  // of a block: CUDA takes 1 KiB for itself
  // What every multiprocessor of a generation holds at least: 24 blocks where there are clusters, else 16.
  const int64_t most_blocks = in.largest_cluster > 1 ? 24 : 16;
  // Blocks that a multiprocessor holds: the compiler leaves registers for kBlocks of the most threads.
  const auto each = [&] {
    const int64_t threads = kBlocks * max_threads(p.strips ? p.window : 1, in.backward);
    return std::min({most_blocks, threads / p.threads, (in.shared + kBeside) / (p.shared.all + kBeside)});
  };
  for (const int64_t strip_bytes : {128, 64, 32}) {
    SlicePlan best = p;
    bool found = false;
    for (int cluster = 1; cluster <= kMaxCluster; cluster *= 2) {
      if (!allowed(cluster) || (cluster > 8 && found) || !try_resident(p, in, strip_bytes, cluster)) continue;
      best = p;
      found = true;
      if (each() >= kBlocks && p.slices * cluster >= kBlocks * in.multiprocessors) break;
    }
    p = best;
    if (found) {
      p.clusters = std::max<int64_t>(1, each() * in.multiprocessors / p.cluster);
      if (in.most_clusters > 0) p.clusters = std::min(p.clusters, in.most_clusters);
      p.clusters = std::min(p.clusters, p.slices);
      p.bulk = in.bulk_copies && p.per_run > 0 && p.window > 1;
      if (p.bulk && (p.slices > p.clusters || forced.stages == 2) && forced.stages != 1) {
        const int64_t before = each();
        p.stages = 2;
        set_shared(p, in);
        if (p.shared.all > in.shared || each() < before) p.stages = 1;
        set_shared(p, in);
      }
      return true;
    }
    if (!p.strips) break;
  }
  return false;
}

// Enough blocks to fill the device several times over, none with less than two pieces a team or more elements than a
// float32 counts exactly.
inline void plan_split(SlicePlan& p, const PlanInput& in) {
  constexpr int kWaves = 8;
  constexpr int64_t kMostElements = 1 << 22;
  p.resident = false;
  p.cluster = p.stages = 1;
  p.clusters = 0;
  p.parts = 1;
  set_slices(p, in, p.strips ? strip_width(p, in, 128) : 0);
  set_pieces(p);
  const int threads = max_threads(p.strips ? p.window : 1, in.backward);
  const int64_t teams = std::max(1, threads / p.team);
  const int64_t wanted = ceil_divide(int64_t{kWaves} * in.multiprocessors, p.slices),
                most = ceil_divide(p.pieces, 2 * teams);
  const int64_t fewest = ceil_divide(p.runs * p.run_length, kMostElements);
  p.parts = static_cast<int>(std::min<int64_t>(p.pieces, std::max({fewest, std::min(wanted, most), int64_t{1}})));
  p.parts = static_cast<int>(ceil_divide(p.pieces, p.pieces_per_block()));  // none empty
  set_threads(p, threads);
  set_shared(p, in);
}

}  // namespace

inline SlicePlan plan_slices(const PlanInput& in) {
  const PlanOverride& forced = plan_override();
  SlicePlan p{};
  // A plane of one element is a channel of a position.
  p.strips = in.shape.layout == Layout::kChannelsLast || in.shape.S == 1;
  const bool in_windows = !p.strips || in.shape.C * in.element % 16 == 0;
  p.window = in.aligned && in_windows && in.element < 8 && !forced.scalar ? static_cast<int>(16 / in.element) : 1;
  const bool may_stay = !in.split_only && !in.one_sweep && forced.resident != 0;
  if (!may_stay || !plan_resident(p, in)) plan_split(p, in);
  return p;
}

}  // namespace fastnorm::cuda
