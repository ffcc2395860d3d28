// How rows of layer and RMS normalisation are given to warps, blocks and clusters. Plain C++, as plan.h.
#pragma once

#include <algorithm>
#include <cstdint>

#include "sizes.h"

namespace fastnorm::cuda {

// What the choice depends on.
struct RowPlanInput {
  int64_t M, N;     // rows, elements of each
  int pack;         // elements an access
  bool is_float64;  // arithmetic
  bool is_bfloat16;
  bool has_clusters;
  int multiprocessors;
};

struct RowPlan {
  int packs;          // of a thread, in registers; 0: rows too long for that are read again for each sweep
  int team;           // threads of a block that share a row
  int teams;          // of a block
  int cluster;        // blocks that share a row
  int64_t parts = 0;  // backward: blocks, or clusters of them, that share out the rows

  int threads() const { return team * teams; }
};

// The most threads a block: a thread has 65536 registers by them.
constexpr int kForwardThreads = 512, kLongRowThreads = 256;
constexpr int backward_threads(bool is_float64) { return is_float64 ? 256 : 512; }

namespace {  // internal linkage: see isa.h

// Of a thread, 16 bytes each: as many as leave registers for other blocks; and before a row is given to several blocks.
constexpr int kForwardPacks = 4, kBackwardPacks = 2;
// Sixteen of another type than bfloat16 spill on one architecture or another.
constexpr int most_forward_packs(bool is_bfloat16) { return is_bfloat16 ? 16 : 8; }
constexpr int kForwardTeams = 4;  // warps with a row each, of a block

// Rows of `packs` packs a thread, or up to `most`, and of `widest` threads a block.
inline RowPlan plan_rows(const RowPlanInput& in, int packs, int most, int widest) {
  const int64_t n = ceil_divide(in.N, in.pack);
  RowPlan p{packs, kWarp, 1, 1};
  if (n <= kWarp * packs) {
    p.packs = 1;
    while (kWarp * p.packs < n) p.packs *= 2;
    return p;
  }
  // The fewest threads in whole warps that hold a block's share.
  const auto threads = [&] {
    return static_cast<int>(ceil_divide(ceil_divide(n, p.cluster), int64_t{kWarp} * p.packs) * kWarp);
  };
  while (p.packs < most && threads() > widest) p.packs *= 2;
  constexpr int kLargestCluster = 8;  // that every device with clusters has
  if (in.has_clusters) {
    while (p.cluster < kLargestCluster && threads() > widest) p.cluster *= 2;
    // Few rows: more multiprocessors for each, while a block keeps four warps.
    while (p.cluster < kLargestCluster && 2 * in.M * p.cluster <= in.multiprocessors && threads() >= 8 * kWarp)
      p.cluster *= 2;
  }
  p.team = threads();
  if (p.team > widest) p = {0, kLongRowThreads, 1, 1};
  return p;
}

}  // namespace

inline RowPlan plan_rows_forward(const RowPlanInput& in) {
  RowPlan p = plan_rows(in, kForwardPacks, most_forward_packs(in.is_bfloat16), kForwardThreads);
  if (p.team == kWarp && p.cluster == 1) p.teams = kForwardTeams;
  return p;
}

// Parts cost 8 bytes a column each, twice: so few blocks, each with several teams, as many as run at once.
inline RowPlan plan_rows_backward(const RowPlanInput& in) {
  constexpr int kThreads = 256, kThreadsAtOnce = 512;  // of a block; of a multiprocessor
  RowPlan p = plan_rows(in, kBackwardPacks, kBackwardPacks, backward_threads(in.is_float64));
  if (p.packs == 0) {
    p.parts =
        std::min(in.M, std::max<int64_t>(1, 2 * in.multiprocessors / ceil_divide(in.N, int64_t{in.pack} * p.team)));
    return p;
  }
  if (p.cluster == 1) p.teams = std::max(1, kThreads / p.team);
  const int64_t blocks = int64_t{in.multiprocessors} * std::max(1, kThreadsAtOnce / p.threads());
  p.parts = std::clamp<int64_t>(blocks / p.cluster, 1, ceil_divide(in.M, p.teams));
  return p;
}

}  // namespace fastnorm::cuda
