// How local response normalisation's tensors are cut: local_response_norm.cu says what a block does with its part.
// Plain C++, as plan.h.
#pragma once

#include <algorithm>

#include "../local_response_norm.h"
#include "../moments.h"  // FASTNORM_HOST_DEVICE
#include "sizes.h"

namespace fastnorm::cuda {

constexpr int kWindowThreads = 256;  // the most of a block that has a tile
constexpr int kPlaneThreads = 224;   // the most that have strips of planes, whose sides often divide it
constexpr int kPlaneAccess = 8;      // bytes, where threads there take several lanes
constexpr int kNearThreads = 128;    // of a block of the kernels that exchange nothing

// What the choice depends on.
struct WindowPlanInput {
  Shape shape;
  int64_t H, W;  // of a plane; inter does not read them
  Region region;
  int64_t before, after;  // the window
  int64_t element;        // bytes
  bool aligned;           // all tensors start at a multiple of 16 bytes
  bool backward;
  int multiprocessors;
  int64_t shared;  // dynamic, bytes a block may have
};

struct Axis {
  int64_t length;
  int64_t before = 0, after = 0;  // the window, no longer than the axis
  int64_t tile = 1;

  FASTNORM_HOST_DEVICE bool has_window() const { return before + after > 0; }
  FASTNORM_HOST_DEVICE int64_t tiles() const { return (length + tile - 1) / tile; }
  // The most elements that a tile and `windows` windows around it have.
  int64_t widest(int windows) const { return std::min(length, tile + windows * (before + after)); }
};

// Which kernel: local_response_norm.cu says what they are.
enum class WindowPath { kDown, kPlane, kAlong, kTiles };

// The tensor, its tiles, and the bytes of a block's buffers.
struct WindowPlan {
  WindowPath path;
  int reach;  // but kTiles: of the kernel's windows, to either side; those of the call reach no further
  int64_t slices;
  Axis row, column;
  int64_t lanes, tile_lanes;
  int strips;  // kPlane: of a block
  int margin;  // kPlane: columns that a strip has beyond its own, to either side; kAlong: packs a warp
  int pack;    // lanes, or kAlong columns, an access
  int64_t x, sums, values, staging;  // bytes of each buffer
  int64_t widest;                    // packs of the largest buffer
  int64_t packs;                     // that the block computes
  bool in_workspace;                 // the tile is too large for shared memory
  int64_t blocks;
  int threads;  // of each

  FASTNORM_HOST_DEVICE int64_t bytes() const { return x + sums + 2 * values + staging; }
  FASTNORM_HOST_DEVICE int64_t lane_tiles() const { return (lanes + tile_lanes - 1) / tile_lanes; }
  FASTNORM_HOST_DEVICE int64_t tiles() const { return slices * row.tiles() * column.tiles() * lane_tiles(); }
  FASTNORM_HOST_DEVICE int64_t columns() const { return column.tile + 2 * margin; }  // of a strip
  int64_t shared() const { return in_workspace ? 0 : bytes(); }
  int64_t workspace() const { return in_workspace ? blocks * bytes() : 0; }
};

namespace {  // internal linkage: see isa.h

// Lanes of an access where threads take several.
constexpr int lane_pack(int64_t element) { return element == 8 ? 2 : 4; }

// The tensor, not yet cut.
inline WindowPlan view_windows(const WindowPlanInput& in) {
  const auto [N, C, S, layout] = in.shape;
  const bool last = layout == Layout::kChannelsLast || S == 1;  // one position: channels are neighbours
  const auto axis = [&](int64_t length) {
    return Axis{length, std::min(in.before, length - 1), std::min(in.after, length - 1)};
  };
  WindowPlan p{};
  if (in.region == Region::kIntra) {
    p.slices = last ? N : N * C;
    p.row = axis(in.H), p.column = axis(in.W);
    p.lanes = last ? C : 1;
  } else if (last) {
    p.slices = 1;
    p.row = {N * S}, p.column = axis(C);
    p.lanes = 1;
  } else {
    p.slices = N;
    p.row = axis(C), p.column = {1};
    p.lanes = S;
  }
  p.pack = in.aligned && p.lanes % lane_pack(in.element) == 0 ? lane_pack(in.element) : 1;
  return p;
}

// Whole slices of 128 bytes of lanes where a few of them fit a multiprocessor; else of 64; else, while windows are
// narrower than tiles, parts of a slice.
inline void cut_in_tiles(WindowPlan& p, const WindowPlanInput& in) {
  constexpr int64_t kPreferredBytes = 64 << 10;  // so that a multiprocessor holds three blocks
  const int64_t acc = in.element == 8 ? 8 : 4, preferred = std::min(kPreferredBytes, in.shared);
  const int windows = in.backward ? 2 : 1;
  const auto fits = [&](int64_t budget) {
    const auto bytes = [](int64_t elements, int64_t size) { return ceil_divide(elements * size, 16) * 16; };
    const int64_t far_rows = p.row.widest(windows), far = far_rows * p.column.widest(windows) * p.tile_lanes;
    const int64_t near_columns = p.column.widest(windows - 1);
    const int64_t near = p.row.widest(windows - 1) * near_columns * p.tile_lanes;
    p.x = bytes(far, in.element);
    p.sums = p.row.has_window() && p.column.has_window() ? bytes(far_rows * near_columns * p.tile_lanes, acc) : 0;
    p.values = in.backward ? bytes(near, acc) : 0;
    p.staging = p.pack == 1 ? bytes(near, in.element) : 0;
    p.widest = far / p.pack;
    p.packs = near / p.pack;
    return p.bytes() <= budget;
  };
  p.row.tile = p.row.has_window() ? p.row.length : ceil_divide(p.row.length, 4 * in.multiprocessors);
  p.column.tile = p.column.length;
  for (const int64_t bytes : {128, 64}) {
    p.tile_lanes = std::min(p.lanes, bytes / in.element);
    if (fits(preferred)) return;
  }
  while (!p.row.has_window() && p.row.tile > 1) {
    p.row.tile = (p.row.tile + 1) / 2;
    if (fits(preferred)) return;
  }
  while (!fits(in.shared / 2)) {
    Axis& longer = p.row.tile >= p.column.tile ? p.row : p.column;
    if (longer.tile <= longer.before + longer.after || longer.tile == 1) break;
    longer.tile = (longer.tile + 1) / 2;
  }
  if (fits(in.shared)) return;
  p.row.tile = p.row.has_window() ? p.row.length : 1;
  p.column.tile = p.column.length;
  fits(in.shared);
  p.in_workspace = true;
}

constexpr int64_t kThreadsAtOnce = 1024;  // of a multiprocessor, about

// Parts of the rows, so that all multiprocessors have work, for kernels that go down them.
inline void cut_rows(WindowPlan& p, int64_t blocks, const WindowPlanInput& in) {
  constexpr int64_t kLeast = 32;      // rows of a part, each of which reads up to 16 of its neighbours
  constexpr int64_t kMost = 1 << 15;  // parts: a launch's y is below 2^16
  const int64_t wanted = std::min(ceil_divide(in.multiprocessors * kThreadsAtOnce, blocks * p.threads), kMost);
  p.row.tile = std::min(p.row.length, std::max(ceil_divide(p.row.length, wanted), kLeast));
  p.blocks = blocks * p.row.tiles();
}

// Strips of a plane for blocks of at most kPlaneThreads.
inline void cut_in_strips(WindowPlan& p, const WindowPlanInput& in) {
  const auto up = [](int64_t a, int64_t b) { return ceil_divide(a, b) * b; };
  if (p.pack > 1) p.pack = static_cast<int>(kPlaneAccess / in.element);
  const int64_t run = std::clamp<int64_t>(32 / (p.pack * in.element), 1, 8);  // threads: 32 bytes of lanes
  p.tile_lanes = std::min(up(p.lanes, p.pack), run * p.pack);
  const int64_t threads = p.tile_lanes / p.pack, most = kPlaneThreads / threads;  // of a column; columns of a block
  p.margin = p.column.length > most ? p.reach * (in.backward ? 2 : 1) : 0;
  p.column.tile = ceil_divide(p.column.length, ceil_divide(p.column.length, most - 2 * p.margin));  // all alike
  p.strips = static_cast<int>(std::max<int64_t>(1, kPlaneThreads / (p.columns() * threads)));
  p.threads = static_cast<int>(up(p.strips * p.columns() * threads, kWarp));
  p.staging = 2 * p.strips * (p.columns() + 2 * p.reach) * threads * 8 * 4;  // two buffers of eight float32 a thread
  cut_rows(p, ceil_divide(p.slices * p.column.tiles() * p.lane_tiles(), p.strips), in);
}

// Whether windows of few elements stay in registers; if so, sets all that such a launch needs.
inline bool keep_in_registers(WindowPlan& p, const WindowPlanInput& in) {
  constexpr int64_t kMinRun = 32;  // bytes: shorter ones of lanes are no coalesced accesses
  const int64_t reach = std::max({p.row.before, p.row.after, p.column.before, p.column.after});
  const int64_t elements = p.slices * p.row.length * p.column.length * p.lanes;
  p.reach = reach <= 2 ? 2 : 4;
  if (in.element == 8 || reach > p.reach || elements >= int64_t{1} << 36 || p.row.length >= 1 << 30) return false;
  const int64_t along_pack = 16 / in.element;
  if (p.column.length == 1 && p.lanes * in.element >= kMinRun) {
    p.path = WindowPath::kDown;
    p.pack = in.aligned && in.element == 2 && p.lanes % 2 == 0 ? 2 : 1;
    p.threads = kNearThreads;
    cut_rows(p, ceil_divide(p.slices * p.lanes / p.pack, kNearThreads), in);
  } else if (p.row.has_window() && p.column.length > 1 && p.reach == 2) {
    p.path = WindowPath::kPlane;
    cut_in_strips(p, in);
  } else if (!p.row.has_window() && p.lanes == 1 && in.aligned && p.column.length % along_pack == 0 &&
             along_pack >= 2 * p.reach) {  // a lane's pack has the windows of what its neighbours want from it
    p.path = WindowPath::kAlong;
    p.pack = static_cast<int>(along_pack);
    p.threads = kNearThreads;
    p.column.tile = p.column.length;
    p.margin = kWarp % (p.column.length / along_pack) == 0 ? 0 : 1;
    const int64_t warps = ceil_divide(elements / along_pack, kWarp - 2 * p.margin);
    p.blocks = std::min(ceil_divide(warps * kWarp, kNearThreads), in.multiprocessors * kThreadsAtOnce / kNearThreads);
  } else {
    return false;
  }
  return true;
}

inline WindowPlan plan_windows(const WindowPlanInput& in) {
  constexpr int64_t kLargestWorkspace = 256 << 20;  // bytes, unless one tile is larger
  constexpr int kPacksPerThread = 4;
  WindowPlan p = view_windows(in);
  WindowPlan near = p;
  if (keep_in_registers(near, in) && near.shared() <= in.shared) return near;
  p.path = WindowPath::kTiles;
  cut_in_tiles(p, in);
  p.blocks = std::min<int64_t>(p.tiles(), INT32_MAX);
  if (p.in_workspace)
    p.blocks =
        std::clamp<int64_t>(std::min<int64_t>(2 * in.multiprocessors, kLargestWorkspace / p.bytes()), 1, p.tiles());
  const int64_t warps = ceil_divide(p.packs, kWarp * kPacksPerThread);
  p.threads = static_cast<int>(std::clamp<int64_t>(kWarp * warps, 64, kWindowThreads));
  return p;
}

}  // namespace
}  // namespace fastnorm::cuda
