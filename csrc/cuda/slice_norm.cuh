// What batch, group and instance normalisation share on the device. A slice is what is reduced and normalised together;
// plan.h says how it lies in memory, is cut and is given to blocks.
//
// Resident: a cluster owns a slice at a time. Its blocks copy their pieces to shared memory on the first sweep; the
// statistics, merged through distributed shared memory, and the outputs come from there. Forward moves 2 tensors
// through device memory, backward 3, and one more for each residual or its gradient.
//
// Split: one launch reduces, a block a part of a slice; a small one merges the parts; a third normalises, the last
// blocks' elements first, for they may still be in the L2 cache. Forward moves 3 tensors, backward 5.
//
// A thread accesses 16 bytes at a time, and keeps its sums in arithmetic's type; from the block on they are double. The
// shift from which deviations are taken is the mean of the block's elements if they are resident, else that of its
// first pieces.
#pragma once

#include "../affine.h"
#include "../backend.h"
#include "../group_norm.h"
#include "activation.cuh"
#include "pack.cuh"
#include "plan.h"
#include "reduce.cuh"

namespace fastnorm::cuda {
namespace {

// Backward's sums of a channel, or of g = dz * weight over a slice.
struct Sums {
  double dz, dz_xhat;
};

struct Statistics {
  double mean, rstd;
};

// ---- what both directions share

// A thread's window: elements i + begin .. i + end - 1, none if begin >= end.
struct Place {
  int64_t i;
  int begin, end;
  int64_t run;

  __device__ bool any() const { return begin < end; }
};

// Which elements of slice `slice` the thread takes in block `block` of those that share it.
template <int kN>
class Walk {
 public:
  __device__ Walk(const SlicePlan& plan, int64_t slice, int block) : p(plan) {
    sample = slice / p.inner;
    const int64_t index = slice % p.inner;
    start_ = sample * p.sample_stride + index * p.slice_stride;
    channel = index * p.entries;
    length_ = p.strips ? min(p.run_length, p.C - channel) : p.run_length;
    row_ = sample * p.mask_row_sample + index * p.mask_row_slice;
    lane = static_cast<int>(threadIdx.x) % p.team;
    team = static_cast<int>(threadIdx.x) / p.team;
    teams = static_cast<int>(blockDim.x) / p.team;
    const int each = p.pieces_per_block();
    first = min(p.pieces, block * each);
    last = min(p.pieces, first + each);
  }

  __device__ Place place(int piece, int u) const {
    int64_t run, window = 0;
    int inside = lane;  // of the piece's windows of this run
    if (p.per_run > 0) {
      run = piece / p.per_run;
      window = static_cast<int64_t>(piece % p.per_run) * p.span;
      inside += u * p.team;
    } else {
      run = static_cast<int64_t>(piece) * kBatch + u;
    }
    const int64_t from = start_ + run * p.run_stride;
    // Windows of planes are the tensor's, so that they are aligned wherever the plane begins.
    const int64_t i = (p.strips ? from : from & ~int64_t{7}) + (window + inside) * kN;
    Place at{i, 0, 0, run};
    if (piece >= last || run >= p.runs || inside >= p.span) return at;
    at.begin = static_cast<int>(max(int64_t{0}, min(int64_t{kN}, from - i)));
    at.end = static_cast<int>(max(int64_t{0}, min(int64_t{kN}, from + length_ - i)));
    return at;
  }

  // Where the window is in the block's buffer, in elements.
  __device__ int slot(int piece, int u) const {
    return ((piece - first) * p.piece_windows() + u * (p.per_run > 0 ? p.team : p.span) + lane) * kN;
  }

  // The row of the table that the run's coefficients are in: with strips, the row of the window's first element.
  __device__ int entry(int64_t run) const {
    if (p.strips) return lane * kN;
    return p.entries > 1 ? static_cast<int>(run) : 0;
  }

  // The byte of the mask that the window's bits belong to, and the first of them.
  __device__ int64_t mask_byte(const Place& at) const {
    const int64_t row = row_ + at.run * p.mask_row_run;
    if (p.strips) return row * ((p.C + 7) / 8) + (channel + lane * kN) / 8;
    return at.i / 8 + row;
  }
  __device__ int mask_bit(const Place& at) const {
    return static_cast<int>((p.strips ? channel + lane * kN : at.i) % 8);
  }

  const SlicePlan& p;
  int64_t sample, channel;  // the slice's first
  int first, last;          // the block's pieces
  int lane, team, teams;

  // Of the slice's first group in the arrays of statistics; `group` channels have the same.
  __device__ int64_t statistic(int64_t group) const { return sample * (p.C / group) + channel / group; }

 private:
  int64_t start_, length_, row_;
};

template <typename T>
struct Shared {
  using acc_t = acc_type<T>;
  acc_t *table, *partial, *shift, *runs;
  double* totals;
  unsigned char* exchange;
  Statistics* statistics;
  Sums *group_sums, *sums;
  unsigned char* buffers;

  __device__ explicit Shared(const SlicePlan& p) {
    unsigned char* at = dynamic_shared<unsigned char>();
    table = reinterpret_cast<acc_t*>(at + p.shared.table);
    partial = reinterpret_cast<acc_t*>(at + p.shared.partial);
    totals = reinterpret_cast<double*>(at + p.shared.totals);
    shift = reinterpret_cast<acc_t*>(at + p.shared.shift);
    exchange = at + p.shared.exchange;
    statistics = reinterpret_cast<Statistics*>(at + p.shared.groups);
    group_sums = reinterpret_cast<Sums*>(statistics + p.groups());
    sums = reinterpret_cast<Sums*>(at + p.shared.sums);
    runs = reinterpret_cast<acc_t*>(at + p.shared.runs);
    buffers = at + p.shared.buffers;
  }
};

template <int kN, typename T>
__device__ inline Pack<T, kN> load_window(const T* x, const Place& at, int64_t numel) {
  if (!at.any()) return load_part<kN>(x, 0, 0, false);
  return load_part<kN>(x + at.i, at.begin, at.end, at.i + kN <= numel);
}

// Sums of n numbers a thread over the block's threads of each column (plan.h): totals[column * n + k]. Then all threads
// may read them.
template <int n, typename acc_t>
__device__ inline void column_sums(const SlicePlan& p, acc_t (&v)[n], acc_t* partial, double* totals) {
  const int columns = p.columns(), lanes = min(columns, kWarp);  // lanes of a warp that differ in their column
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int threads = static_cast<int>(blockDim.x), warps = threads / kWarp;
  warp_sum(v, lanes);
  __syncthreads();  // readers of the last totals are done
  if (lane < lanes) {
#pragma unroll
    for (int k = 0; k < n; ++k) partial[(warp * lanes + lane) * n + k] = v[k];
  }
  __syncthreads();
  const int apart = columns / lanes;  // warps from one to the next with the same columns
  for (int i = static_cast<int>(threadIdx.x); i < columns * n; i += threads) {
    const int column = i / n;
    double sum = 0;
    for (int w = column / kWarp; w < warps; w += apart)
      sum += static_cast<double>(partial[(w * lanes + column % kWarp) * n + i % n]);
    totals[i] = sum;
  }
  __syncthreads();
}

// Calls f(group, first of its members that this lane takes, step, lanes) with a few lanes for each of `groups` groups
// of `members`; lanes without a group get -1. f may use warp_sum(v, 1, lanes).
template <typename F>
__device__ inline void for_groups(int groups, int members, const F& f) {
  int lanes = 1;
  while (lanes < min(members, kWarp)) lanes *= 2;
  const int at_once = static_cast<int>(blockDim.x) / lanes, mine = static_cast<int>(threadIdx.x) / lanes;
  for (int g = 0; g < groups; g += at_once)
    f(g + mine < groups ? g + mine : -1, static_cast<int>(threadIdx.x) % lanes, lanes);
}

// Stores the window's bits, shifted to their place: windows of an octet that lie in several lanes meet in its first. By
// all threads of the warp.
template <int kN>
__device__ inline void store_mask(uint8_t* mask, const Walk<kN>& walk, const Place& at, unsigned bits) {
  constexpr unsigned kAny = 1u << 8;
  unsigned inside = 0;
  if (at.any()) inside = (1u << at.end) - (1u << at.begin);
  bits = (bits & inside) << walk.mask_bit(at) | (at.any() ? kAny : 0u);
  const int lanes = min(8 / kN, walk.p.team);
  for (int distance = 1; distance < lanes; distance *= 2) bits |= __shfl_xor_sync(kAllLanes, bits, distance);
  if ((bits & kAny) && walk.lane % lanes == 0) mask[walk.mask_byte(at)] = static_cast<uint8_t>(bits);
}

// ---- forward

struct SliceForward {
  SlicePlan plan;
  Dtype param_dtype, stats_dtype;
  Activation activation;
  double eps;
  const void *x, *residual, *weight, *bias;
  void* y;
  uint8_t* mask;
  double *mean, *rstd, *variance;  // by group; variance or null
  int64_t D;                       // channels that share statistics
  bool use_running;                // the running statistics are those to normalise by
  // Batch renormalisation: r and d by channel, from the running statistics.
  const void *running_mean, *running_var;
  double r_max, d_max;
  double *r, *d;
  Moments* partial;  // [slices][parts][entries], if split
};

// Keeps what backward needs of group (or channel) i.
__device__ inline Statistics keep_statistics(const SliceForward& a, int64_t i, double mean, double variance,
                                             bool keep) {
  const Statistics s{mean, 1.0 / sqrt(variance + a.eps)};
  if (keep) {
    a.mean[i] = s.mean;
    a.rstd[i] = s.rstd;
    if (a.variance) a.variance[i] = variance;
  }
  return s;
}

__device__ inline double clip(double v, double low, double high) { return v < low ? low : v > high ? high : v; }

struct Correction {
  double r, d;
};

// Of channel c; see ../batch_norm.h.
__device__ inline Correction correction(const SliceForward& a, int64_t c, const Statistics& s) {
  const double sigma = sqrt(read(a.running_var, a.stats_dtype, c, 1.0) + a.eps);
  return {clip(1 / (s.rstd * sigma), 1 / a.r_max, a.r_max),
          clip((s.mean - read(a.running_mean, a.stats_dtype, c, 0.0)) / sigma, -a.d_max, a.d_max)};
}

__device__ inline bool out_of_range(double shift, double sum, double sum_of_squares) {
  return !isfinite(sum_of_squares) || (sum_of_squares < 1e-30 && (sum != 0 || shift != 0));
}

template <typename T, int kN, int kC>
class Forward {
 public:
  using acc_t = acc_type<T>;
  using Window = Pack<T, kN>;

  __device__ explicit Forward(const SliceForward& args)
      : a(args),
        p(args.plan),
        shared(args.plan),
        x(static_cast<const T*>(args.x)),
        residual(static_cast<const T*>(args.residual)),
        y(static_cast<T*>(args.y)),
        buffer(reinterpret_cast<T*>(shared.buffers)) {}

  __device__ Window window(const Walk<kN>& walk, const Place& at, int piece, int u) const {
    if (!p.resident) return load_window<kN>(x, at, p.numel);
    return at.any() ? Window::load(buffer + walk.slot(piece, u)) : load_part<kN>(x, 0, 0, false);
  }

  // Moments of each group of the slice's elements in this block: store(group, moments) by one thread each, and again if
  // the first were not exact.
  template <typename Store>
  __device__ void moments(const Walk<kN>& walk, const Store& store) {
    SMEM_ARRAY(unsigned, again, 1);
    if (threadIdx.x == 0) *again = 0;
    const int members = p.strips ? p.group : 1, groups = p.strips ? p.groups() : 1;
    {
      constexpr int n = kC + 1;
      acc_t sum[n] = {};
      const int last = p.resident ? walk.last : min(walk.last, walk.first + walk.teams);
      for (int k = walk.first; k < last; k += walk.teams) {
        Place at[kBatch];
        Window loaded[kBatch];
#pragma unroll
        for (int u = 0; u < kBatch; ++u) {
          at[u] = walk.place(k + walk.team, u);
          loaded[u] = load_window<kN>(x, at[u], p.numel);
        }
#pragma unroll
        for (int u = 0; u < kBatch; ++u) {
          if (!at[u].any()) continue;
          if (p.resident) loaded[u].store(buffer + walk.slot(k + walk.team, u));
          acc_t v[kN];
          loaded[u].unpack(v);
#pragma unroll
          for (int j = 0; j < kN; ++j)
            if (j >= at[u].begin && j < at[u].end) sum[j % kC] += v[j];
          sum[kC] += static_cast<acc_t>(kC > 1 ? 1 : at[u].end - at[u].begin);
        }
      }
      column_sums(p, sum, shared.partial, shared.totals);
      for_groups(groups, members, [&](int g, int lane, int lanes) {
        double v[2] = {0, 0};
        for (int c = g * members + lane; g >= 0 && c < (g + 1) * members; c += lanes) {
          v[0] += shared.totals[c / kC * n + c % kC];
          v[1] += shared.totals[c / kC * n + kC];
        }
        warp_sum(v, 1, lanes);
        for (int c = g * members + lane; g >= 0 && c < (g + 1) * members; c += lanes)
          shared.shift[c] = static_cast<acc_t>(v[0] / v[1]);
      });
      __syncthreads();
    }
    constexpr int n = 2 * kC + 1;
    acc_t sum[n] = {}, shift[kC];
#pragma unroll
    for (int j = 0; j < kC; ++j) shift[j] = column_value(walk, shared.shift, j);
    for (int k = walk.first; k < walk.last; k += walk.teams) {
      Place at[kBatch];
      Window loaded[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        at[u] = walk.place(k + walk.team, u);
        loaded[u] = window(walk, at[u], k + walk.team, u);
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        if (!at[u].any()) continue;
        acc_t v[kN];
        loaded[u].unpack(v);
#pragma unroll
        for (int j = 0; j < kN; ++j) {
          if (j < at[u].begin || j >= at[u].end) continue;
          const acc_t d = v[j] - shift[j % kC];
          sum[j % kC] += d;
          sum[kC + j % kC] = multiply_add(d, d, sum[kC + j % kC]);
        }
        sum[2 * kC] += static_cast<acc_t>(kC > 1 ? 1 : at[u].end - at[u].begin);
      }
    }
    column_sums(p, sum, shared.partial, shared.totals);
    for_groups(groups, members, [&](int g, int lane, int lanes) {
      double v[3] = {0, 0, 0};
      for (int c = g * members + lane; g >= 0 && c < (g + 1) * members; c += lanes) {
        v[0] += shared.totals[c / kC * n + c % kC];
        v[1] += shared.totals[c / kC * n + kC + c % kC];
        v[2] += shared.totals[c / kC * n + 2 * kC];
      }
      warp_sum(v, 1, lanes);
      if (g < 0 || lane != 0) return;
      const double from = static_cast<double>(shared.shift[g * members]);
      if (!std::is_same_v<acc_t, double> && v[2] > 0 && out_of_range(from, v[0], v[1])) atomicOr(again, 1u);
      store(g, v[2] > 0 ? shifted_moments(v[2], from, v[0], v[1]) : Moments{});
    });
    __syncthreads();
    if (*again) exact_moments(walk, groups, members, store);
  }

  // The same in double, a group at a time: for numbers whose squares float32 does not hold.
  template <typename Store>
  __device__ void exact_moments(const Walk<kN>& walk, int groups, int members, const Store& store) {
    SMEM_ARRAY(double, scratch, 2 * kMaxWarps);
    for (int g = 0; g < groups; ++g) {
      double total[2], count = 0, mean = 0;
      for (int sweep = 0; sweep < 2; ++sweep) {
        double sum[2] = {0, 0};
        for (int k = walk.first; k < walk.last; k += walk.teams) {
          for (int u = 0; u < kBatch; ++u) {
            const Place at = walk.place(k + walk.team, u);
            acc_t v[kN];
            window(walk, at, k + walk.team, u).unpack(v);
            for (int j = 0; j < kN; ++j) {
              if (j < at.begin || j >= at.end || (p.strips && (walk.lane * kN + j) / members != g)) continue;
              const double d = static_cast<double>(v[j]) - mean;
              sum[0] += sweep == 0 ? 1 : d * d;
              sum[1] += d;
            }
          }
        }
        block_sum(sum, total, scratch);
        if (sweep == 0) {
          count = total[0];
          mean = total[1] / count;
        }
      }
      if (threadIdx.x == 0 && count > 0) store(g, shifted_moments(count, mean, total[1], total[0]));
    }
  }

  // Statistics of the slice's groups, merged over the cluster, to shared.statistics and to a.mean and a.rstd.
  __device__ void statistics(const Walk<kN>& walk, unsigned rank, int parity) {
    Moments* mine = reinterpret_cast<Moments*>(shared.exchange) + parity * p.groups();
    moments(walk, [&](int g, const Moments& m) { mine[g] = m; });
    cluster_sync();
    for (int g = static_cast<int>(threadIdx.x); g < p.groups(); g += static_cast<int>(blockDim.x)) {
      if (walk.channel + g * p.group >= p.C) continue;
      const Moments m = merge_moments(p.cluster, [&](int k) { return *map_shared_rank(mine + g, k); });
      shared.statistics[g] = keep_statistics(a, walk.statistic(a.D) + g, m.mean, m.biased_variance(), rank == 0);
    }
    __syncthreads();
  }

  // One row of coefficients a channel of the slice.
  __device__ void table(const Walk<kN>& walk, unsigned rank) {
    for (int e = static_cast<int>(threadIdx.x); e < p.entries; e += static_cast<int>(blockDim.x)) {
      const int64_t c = walk.channel + e;
      if (c >= p.C) continue;
      const int64_t statistic = walk.sample * (p.C / a.D) + c / a.D;
      Statistics s;
      if (a.use_running) {
        s = keep_statistics(a, c, read(a.running_mean, a.stats_dtype, c, 0.0),
                            read(a.running_var, a.stats_dtype, c, 1.0), rank == 0);
      } else {
        s = p.resident ? shared.statistics[e / p.group] : Statistics{a.mean[statistic], a.rstd[statistic]};
      }
      double weight = read(a.weight, a.param_dtype, c, 1.0), bias = read(a.bias, a.param_dtype, c, 0.0);
      if (a.r) {
        const Correction by = correction(a, c, s);
        bias += weight * by.d;
        weight *= by.r;
        if (rank == 0) {
          a.r[c] = by.r;
          a.d[c] = by.d;
        }
      }
      const SliceAffine<acc_t> affine(s.mean, s.rstd, weight, bias);
      shared.table[e] = affine.mean;
      shared.table[p.entries + e] = affine.scale;
      shared.table[2 * p.entries + e] = affine.shift;
    }
    __syncthreads();
  }

  // y = activation((x - mean) * scale + shift + residual)
  __device__ void normalize(const Walk<kN>& walk) {
    acc_t mean[kC], scale[kC], shift[kC];
    load_coefficients(walk, 0, mean, scale, shift);
    for (int k = walk.first; k < walk.last; k += walk.teams) {
      Place at[kBatch];
      Window loaded[kBatch], added[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        at[u] = walk.place(k + walk.team, u);
        loaded[u] = window(walk, at[u], k + walk.team, u);
        if (residual) added[u] = load_window<kN>(residual, at[u], p.numel);
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        if (p.by_run() && at[u].any()) load_coefficients(walk, at[u].run, mean, scale, shift);
        acc_t z[kN];
        loaded[u].unpack(z);
#pragma unroll
        for (int j = 0; j < kN; ++j) z[j] = multiply_add(z[j] - mean[j % kC], scale[j % kC], shift[j % kC]);
        if (residual) {
          acc_t r[kN];
          added[u].unpack(r);
#pragma unroll
          for (int j = 0; j < kN; ++j) z[j] += r[j];
        }
        if (a.mask) store_mask(a.mask, walk, at[u], positive_bits(z));
        activate(a.activation, z);
        if (at[u].any()) store_part(Window::pack(z), y + at[u].i, at[u].begin, at[u].end);
      }
    }
  }

 private:
  // Of the column that the thread's element j is in.
  __device__ acc_t column_value(const Walk<kN>& walk, const acc_t* values, int j) const {
    if (!p.strips) return values[0];
    return walk.lane < p.span ? values[walk.lane * kN + j] : acc_t(0);
  }

  __device__ void load_coefficients(const Walk<kN>& walk, int64_t run, acc_t (&mean)[kC], acc_t (&scale)[kC],
                                    acc_t (&shift)[kC]) const {
    const int entry = walk.entry(run);
#pragma unroll
    for (int j = 0; j < kC; ++j) {
      const bool is_there = entry + j < p.entries;
      mean[j] = is_there ? shared.table[entry + j] : acc_t(0);
      scale[j] = is_there ? shared.table[p.entries + entry + j] : acc_t(0);
      shift[j] = is_there ? shared.table[2 * p.entries + entry + j] : acc_t(0);
    }
  }

  const SliceForward& a;
  const SlicePlan& p;
  const Shared<T> shared;
  const T *x, *residual;
  T *y, *buffer;
};

template <typename T, int kN, int kC>
__global__ void __launch_bounds__(kMaxThreads) resident_forward(const __grid_constant__ SliceForward a) {
  Forward<T, kN, kC> kernel(a);
  const unsigned rank = cluster_rank();
  int parity = 0;
  for (int64_t slice = blockIdx.x / a.plan.cluster; slice < a.plan.slices; slice += a.plan.clusters, parity ^= 1) {
    const Walk<kN> walk(a.plan, slice, static_cast<int>(rank));
    kernel.statistics(walk, rank, parity);
    kernel.table(walk, rank);
    kernel.normalize(walk);
  }
  cluster_sync();  // no block leaves while another reads its shared memory
}

template <typename T, int kN, int kC>
__global__ void __launch_bounds__(kMaxThreads) split_moments(const __grid_constant__ SliceForward a) {
  Forward<T, kN, kC> kernel(a);
  const Walk<kN> walk(a.plan, blockIdx.x / a.plan.parts, static_cast<int>(blockIdx.x % a.plan.parts));
  Moments* partial = a.partial + blockIdx.x * static_cast<int64_t>(a.plan.entries);
  kernel.moments(walk, [&](int g, const Moments& m) { partial[g] = m; });
}

template <typename T, int kN, int kC>
__global__ void __launch_bounds__(kMaxThreads) split_normalize(const __grid_constant__ SliceForward a) {
  Forward<T, kN, kC> kernel(a);
  const unsigned block = gridDim.x - 1 - blockIdx.x, part = block % a.plan.parts;
  const Walk<kN> walk(a.plan, block / a.plan.parts, static_cast<int>(part));
  kernel.table(walk, part);
  kernel.normalize(walk);
}

// Where block `part` of those that share channel c of sample n left what it knows of the channel.
__device__ inline int64_t partial_index(const SlicePlan& p, int64_t n, int64_t c, int64_t part) {
  return ((n * p.inner + c / p.entries) * p.parts + part) * p.entries + c % p.entries;
}

constexpr int kMergeThreads = 256;

// A warp a group: merges the parts of its channels.
__global__ void __launch_bounds__(kMergeThreads)
    merge_statistics(const __grid_constant__ SliceForward a, int64_t groups) {
  const SlicePlan& p = a.plan;
  const int64_t i = (blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x) / kWarp;
  if (i >= groups) return;
  const int64_t per_sample = p.C / a.D, n = i / per_sample, c = i % per_sample * a.D;
  const Moments m = warp_merge_moments(
      a.D * p.parts, [&](int64_t k) { return a.partial[partial_index(p, n, c + k / p.parts, k % p.parts)]; });
  keep_statistics(a, i, m.mean, m.biased_variance(), threadIdx.x % kWarp == 0);
}

// ---- backward

struct SliceBackward {
  SlicePlan plan;
  Dtype param_dtype;
  Activation activation;
  bool constant_statistics;  // that do not depend on x: dx = dz * scale
  const void *x, *dy, *residual, *weight, *bias;
  const double *mean, *rstd;  // by group
  const double *r, *d;        // by channel, or null
  const uint8_t* mask;
  void *dx, *dresidual;
  int64_t D;
  double count;        // elements of a group
  Sums* partial;       // [slices][parts][entries], if split
  Sums* channel_sums;  // [samples][C] of dz
  Sums* group_sums;    // by group, of dz * weight; if split
};

template <typename T, int kN, int kC>
class Backward {
 public:
  using acc_t = acc_type<T>;
  using Window = Pack<T, kN>;

  __device__ explicit Backward(const SliceBackward& args)
      : a(args),
        p(args.plan),
        shared(args.plan),
        x(static_cast<const T*>(args.x)),
        dy(static_cast<const T*>(args.dy)),
        residual(static_cast<const T*>(args.residual)),
        dx(static_cast<T*>(args.dx)),
        dresidual(static_cast<T*>(args.dresidual)),
        buffer_x(reinterpret_cast<T*>(shared.buffers)),
        buffer_dy(reinterpret_cast<T*>(shared.buffers + args.plan.shared.buffer)) {}

  // The coefficients that are known before the sums.
  __device__ void table(const Walk<kN>& walk) {
    for (int e = static_cast<int>(threadIdx.x); e < p.entries; e += static_cast<int>(blockDim.x)) {
      const int64_t c = walk.channel + e;
      if (c >= p.C) continue;
      const Statistics s = statistics(walk, c);
      double bias = read(a.bias, a.param_dtype, c, 0.0);
      if (a.r) bias += read(a.weight, a.param_dtype, c, 1.0) * a.d[c];
      const SliceAffine<acc_t> affine(s.mean, s.rstd, weight(c), bias);
      const SliceStandardize<acc_t> standardize(s.mean, s.rstd);
      acc_t* row = shared.table + e;
      row[kMean * p.entries] = affine.mean;
      row[kScale * p.entries] = affine.scale;
      row[kShift * p.entries] = affine.shift;
      row[kRstd * p.entries] = standardize.rstd;
      row[kRest * p.entries] = standardize.rest;
    }
    __syncthreads();
  }

  // Those that come from the sums of g = dz * weight.
  template <typename GroupSums>
  __device__ void table_of_sums(const Walk<kN>& walk, const GroupSums& sums) {
    for (int e = static_cast<int>(threadIdx.x); e < p.entries; e += static_cast<int>(blockDim.x)) {
      const int64_t c = walk.channel + e;
      if (c >= p.C) continue;
      const Statistics s = statistics(walk, c);
      const Sums g = a.constant_statistics ? Sums{0, 0} : sums(e, c);
      const GroupGradient<acc_t> gradient(a.count, s.mean, s.rstd, g.dz, g.dz_xhat);
      shared.table[kSlope * p.entries + e] = gradient.slope;
      shared.table[kOffset * p.entries + e] = gradient.offset;
    }
    __syncthreads();
  }

  // The sums of each channel of the slice over the block's elements: store(entry, sums) by one thread each.
  template <typename Store>
  __device__ void sums(const Walk<kN>& walk, const Store& store) {
    constexpr int n = 2 * kC;
    acc_t sum[n] = {}, coefficient[kSums][kC];
    load_coefficients(walk, 0, coefficient);
    for (int k = walk.first; k < walk.last; k += walk.teams) {
      const int piece = k + walk.team;
      Place at[kBatch];
      Window of_x[kBatch], of_dy[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        at[u] = walk.place(piece, u);
        of_x[u] = load_window<kN>(x, at[u], p.numel);
        of_dy[u] = load_window<kN>(dy, at[u], p.numel);
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        if (at[u].any()) {
          if (p.resident) {
            of_x[u].store(buffer_x + walk.slot(piece, u));
            of_dy[u].store(buffer_dy + walk.slot(piece, u));
          }
          if (p.by_run()) load_coefficients(walk, at[u].run, coefficient);
          acc_t v[kN], dz[kN];
          of_x[u].unpack(v);
          of_dy[u].unpack(dz);
          activation_gradient(walk, at[u], v, dz, coefficient);
#pragma unroll
          for (int j = 0; j < kN; ++j) {
            if (j < at[u].begin || j >= at[u].end) continue;
            const int c = j % kC;
            const acc_t xhat = multiply_add(v[j] - coefficient[kMean][c], coefficient[kRstd][c], coefficient[kRest][c]);
            sum[c] += dz[j];
            sum[kC + c] = multiply_add(dz[j], xhat, sum[kC + c]);
          }
        }
        if (p.by_run() && (p.per_run == 0 || u == kBatch - 1)) {
          keep_run(walk, piece, u, sum);
#pragma unroll
          for (int i = 0; i < n; ++i) sum[i] = 0;
        }
      }
    }
    if (p.by_run()) {
      __syncthreads();
      for (int e = static_cast<int>(threadIdx.x); e < p.entries; e += static_cast<int>(blockDim.x))
        store(e, sum_of_run(walk, e));
    } else {
      column_sums(p, sum, shared.partial, shared.totals);
      for (int e = static_cast<int>(threadIdx.x); e < p.entries; e += static_cast<int>(blockDim.x)) {
        const double* totals = shared.totals + e / kC * n + e % kC;
        store(e, Sums{totals[0], totals[kC]});
      }
    }
  }

  // Merges the sums over the cluster and adds up those of each group, for table_of_sums().
  __device__ void merge(const Walk<kN>& walk, unsigned rank, int parity) {
    Sums* mine = reinterpret_cast<Sums*>(shared.exchange) + parity * p.entries;
    sums(walk, [&](int e, const Sums& s) { mine[e] = s; });
    cluster_sync();
    for (int e = static_cast<int>(threadIdx.x); e < p.entries; e += static_cast<int>(blockDim.x)) {
      const int64_t c = walk.channel + e;
      Sums all{0, 0};
      for (int k = 0; k < p.cluster; ++k) {
        const Sums part = *map_shared_rank(mine + e, k);
        all.dz += part.dz;
        all.dz_xhat += part.dz_xhat;
      }
      if (c >= p.C) continue;
      shared.sums[e] = {weight(c) * all.dz, weight(c) * all.dz_xhat};
      if (rank == 0) a.channel_sums[walk.sample * p.C + c] = all;
    }
    __syncthreads();
    const int members = p.entries / p.groups();
    for_groups(p.groups(), members, [&](int g, int lane, int lanes) {
      double v[2] = {0, 0};
      for (int e = g * members + lane; g >= 0 && e < (g + 1) * members && walk.channel + e < p.C; e += lanes) {
        v[0] += shared.sums[e].dz;
        v[1] += shared.sums[e].dz_xhat;
      }
      warp_sum(v, 1, lanes);
      if (g >= 0 && lane == 0) shared.group_sums[g] = {v[0], v[1]};
    });
    __syncthreads();
    table_of_sums(walk, [&](int e, int64_t) { return shared.group_sums[e / members]; });
  }

  // dresidual = dz;  dx = dz * scale - ((x - mean) * slope + offset)
  __device__ void elements(const Walk<kN>& walk) {
    acc_t coefficient[kAll][kC];
    load_coefficients(walk, 0, coefficient);
    const bool needs_x = !a.constant_statistics || (a.activation != Activation::kNone && a.mask == nullptr);
    for (int k = walk.first; k < walk.last; k += walk.teams) {
      const int piece = k + walk.team;
      Place at[kBatch];
      Window of_x[kBatch], of_dy[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        at[u] = walk.place(piece, u);
        if (p.resident) {
          if (!at[u].any()) continue;
          of_x[u] = Window::load(buffer_x + walk.slot(piece, u));
          of_dy[u] = Window::load(buffer_dy + walk.slot(piece, u));
        } else {
          if (needs_x) of_x[u] = load_window<kN>(x, at[u], p.numel);
          of_dy[u] = load_window<kN>(dy, at[u], p.numel);
        }
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        if (!at[u].any()) continue;
        if (p.by_run()) load_coefficients(walk, at[u].run, coefficient);
        acc_t v[kN], dz[kN];
        of_x[u].unpack(v);
        of_dy[u].unpack(dz);
        activation_gradient(walk, at[u], v, dz, coefficient);
        if (dresidual) store_part(Window::pack(dz), dresidual + at[u].i, at[u].begin, at[u].end);
        if (dx == nullptr) continue;
#pragma unroll
        for (int j = 0; j < kN; ++j) {
          const int c = j % kC;
          dz[j] *= coefficient[kScale][c];
          if (!a.constant_statistics)
            dz[j] -= multiply_add(v[j] - coefficient[kMean][c], coefficient[kSlope][c], coefficient[kOffset][c]);
        }
        store_part(Window::pack(dz), dx + at[u].i, at[u].begin, at[u].end);
      }
    }
  }

 private:
  // Columns of the table; the sums need the first kSums.
  enum { kMean, kScale, kShift, kRstd, kRest, kSums, kSlope = kSums, kOffset, kAll };
  static_assert(kAll == kBackwardColumns);

  __device__ Statistics statistics(const Walk<kN>& walk, int64_t c) const {
    const int64_t i = walk.sample * (p.C / a.D) + c / a.D;
    return {a.mean[i], a.rstd[i]};
  }

  // What xhat is multiplied by.
  __device__ double weight(int64_t c) const { return read(a.weight, a.param_dtype, c, 1.0) * (a.r ? a.r[c] : 1.0); }

  template <int n>
  __device__ void load_coefficients(const Walk<kN>& walk, int64_t run, acc_t (&coefficient)[n][kC]) const {
    const int entry = walk.entry(run);
#pragma unroll
    for (int i = 0; i < n; ++i) {
#pragma unroll
      for (int j = 0; j < kC; ++j)
        coefficient[i][j] = entry + j < p.entries ? shared.table[i * p.entries + entry + j] : acc_t(0);
    }
  }

  // dz becomes dy * activation'(z), z as forward had it or its sign from the mask.
  template <int n>
  __device__ void activation_gradient(const Walk<kN>& walk, const Place& at, const acc_t (&v)[kN], acc_t (&dz)[kN],
                                      const acc_t (&coefficient)[n][kC]) const {
    if (a.activation == Activation::kNone) return;
    if (a.mask) return activate_backward(a.activation, dz, a.mask[walk.mask_byte(at)] >> walk.mask_bit(at));
    acc_t z[kN];
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      const int c = j % kC;
      z[j] = multiply_add(v[j] - coefficient[kMean][c], coefficient[kScale][c], coefficient[kShift][c]);
    }
    if (residual) {
      acc_t r[kN];
      load_window<kN>(residual, at, p.numel).unpack(r);
#pragma unroll
      for (int j = 0; j < kN; ++j) z[j] += r[j];
    }
    activate_backward(a.activation, dz, z);
  }

  // A team's sums of a run, or of its piece of a long one.
  template <int n>
  __device__ void keep_run(const Walk<kN>& walk, int piece, int u, const acc_t (&sum)[n]) const {
    acc_t v[2] = {sum[0], sum[kC]};
    warp_sum(v, 1, p.team);
    if (walk.lane != 0 || piece >= walk.last) return;
    acc_t* to = shared.runs + 2 * ((piece - walk.first) * (p.per_run > 0 ? 1 : kBatch) + (p.per_run > 0 ? 0 : u));
    to[0] = v[0];
    to[1] = v[1];
  }

  __device__ Sums sum_of_run(const Walk<kN>& walk, int run) const {
    const int here = p.per_run > 0 ? 1 : kBatch, pieces = max(1, p.per_run);
    Sums all{0, 0};
    for (int piece = run / here * pieces; piece < (run / here + 1) * pieces; ++piece) {
      if (piece < walk.first || piece >= walk.last) continue;
      const acc_t* from = shared.runs + 2 * ((piece - walk.first) * here + run % here);
      all.dz += static_cast<double>(from[0]);
      all.dz_xhat += static_cast<double>(from[1]);
    }
    return all;
  }

  const SliceBackward& a;
  const SlicePlan& p;
  const Shared<T> shared;
  const T *x, *dy, *residual;
  T *dx, *dresidual, *buffer_x, *buffer_dy;
};

template <typename T, int kN, int kC>
__global__ void __launch_bounds__(kMaxThreads) resident_backward(const __grid_constant__ SliceBackward a) {
  Backward<T, kN, kC> kernel(a);
  const unsigned rank = cluster_rank();
  int parity = 0;
  for (int64_t slice = blockIdx.x / a.plan.cluster; slice < a.plan.slices; slice += a.plan.clusters, parity ^= 1) {
    const Walk<kN> walk(a.plan, slice, static_cast<int>(rank));
    __syncthreads();  // the last slice's readers of the table are done
    kernel.table(walk);
    kernel.merge(walk, rank, parity);
    if (a.dx || a.dresidual) kernel.elements(walk);
  }
  cluster_sync();  // no block leaves while another reads its shared memory
}

template <typename T, int kN, int kC>
__global__ void __launch_bounds__(kMaxThreads) split_sums(const __grid_constant__ SliceBackward a) {
  Backward<T, kN, kC> kernel(a);
  const Walk<kN> walk(a.plan, blockIdx.x / a.plan.parts, static_cast<int>(blockIdx.x % a.plan.parts));
  kernel.table(walk);
  Sums* partial = a.partial + blockIdx.x * static_cast<int64_t>(a.plan.entries);
  kernel.sums(walk, [&](int e, const Sums& s) { partial[e] = s; });
}

template <typename T, int kN, int kC>
__global__ void __launch_bounds__(kMaxThreads) split_elements(const __grid_constant__ SliceBackward a) {
  Backward<T, kN, kC> kernel(a);
  const unsigned block = gridDim.x - 1 - blockIdx.x;
  const Walk<kN> walk(a.plan, block / a.plan.parts, static_cast<int>(block % a.plan.parts));
  kernel.table(walk);
  kernel.table_of_sums(walk, [&](int, int64_t c) { return a.group_sums[walk.sample * (a.plan.C / a.D) + c / a.D]; });
  kernel.elements(walk);
}

// A warp a group: adds the parts of each of its channels, and the channels with their weights.
__global__ void __launch_bounds__(kMergeThreads) merge_sums(const __grid_constant__ SliceBackward a, int64_t groups) {
  const SlicePlan& p = a.plan;
  const int64_t i = (blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (i >= groups) return;
  const int64_t per_sample = p.C / a.D, n = i / per_sample;
  Sums group{0, 0};
  for (int64_t c = i % per_sample * a.D; c < (i % per_sample + 1) * a.D; ++c) {
    double v[2] = {0, 0};
    for (int64_t part = lane; part < p.parts; part += kWarp) {
      const Sums s = a.partial[partial_index(p, n, c, part)];
      v[0] += s.dz;
      v[1] += s.dz_xhat;
    }
    warp_sum(v);
    const double weight = read(a.weight, a.param_dtype, c, 1.0) * (a.r ? a.r[c] : 1.0);
    group.dz += weight * v[0];
    group.dz_xhat += weight * v[1];
    if (lane == 0) a.channel_sums[n * p.C + c] = {v[0], v[1]};
  }
  if (lane == 0) a.group_sums[i] = group;
}

// dweight = r * sum of dz * xhat + d * sum of dz,  dbias = sum of dz,  over the samples: a lane a channel, the warps of
// a block every so many samples.
__global__ void __launch_bounds__(kMergeThreads)
    parameter_gradients(const Sums* sums, int64_t samples, int64_t C, const double* r, const double* d, void* dweight,
                        void* dbias, Dtype dtype) {
  SMEM_ARRAY(Sums, partial, kMergeThreads);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t c = blockIdx.x * static_cast<int64_t>(kWarp) + lane;
  Sums all{0, 0};
  for (int64_t n = warp; n < samples && c < C; n += kMergeThreads / kWarp) {
    all.dz += sums[n * C + c].dz;
    all.dz_xhat += sums[n * C + c].dz_xhat;
  }
  partial[threadIdx.x] = all;
  __syncthreads();
  if (warp != 0 || c >= C) return;
  for (int w = 1; w < kMergeThreads / kWarp; ++w) {
    all.dz += partial[w * kWarp + lane].dz;
    all.dz_xhat += partial[w * kWarp + lane].dz_xhat;
  }
  if (dweight) write(dweight, dtype, c, r ? r[c] * all.dz_xhat + d[c] * all.dz : all.dz_xhat);
  if (dbias) write(dbias, dtype, c, all.dz);
}

// ---- launches

// Calls f with the types of a kernel for these elements and accesses: f(T, elements a window, columns a window).
template <typename F>
void visit_kernel(Dtype dtype, const SlicePlan& p, const F& f) {
  using One = std::integral_constant<int, 1>;
  visit(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (sizeof(T) < 8) {
      using Many = std::integral_constant<int, kWindow<T>>;
      if (p.window > 1) return p.strips ? f(type, Many{}, Many{}) : f(type, Many{}, One{});
    }
    f(type, One{}, One{});
  });
}

inline Grid resident_grid(const SlicePlan& p) {
  return {dim3(static_cast<unsigned>(p.clusters * p.cluster)), p.threads, p.cluster, static_cast<size_t>(p.shared.all)};
}

inline Grid split_grid(const SlicePlan& p) {
  return {dim3(static_cast<unsigned>(p.slices * p.parts)), p.threads, 1, static_cast<size_t>(p.shared.all)};
}

// A warp for each of `groups`.
inline Grid merge_grid(int64_t groups) {
  return {dim3(static_cast<unsigned>(ceil_div(groups, kMergeThreads / kWarp))), kMergeThreads};
}

// Pieces of the workspace, each aligned to 16 bytes.
class Workspace {
 public:
  explicit Workspace(void* start) : start_(static_cast<unsigned char*>(start)) {}

  template <typename V>
  V* take(int64_t n) {
    unsigned char* here = start_ ? start_ + bytes_ : nullptr;
    bytes_ += ceil_div(n * static_cast<int64_t>(sizeof(V)), 16) * 16;
    return reinterpret_cast<V*>(here);
  }
  int64_t bytes() const { return bytes_; }

 private:
  unsigned char* start_;
  int64_t bytes_ = 0;
};

// The plan, for clusters as large as the device holds of this kernel.
template <typename Kernel>
SlicePlan plan_for_device(PlanInput in, Dtype dtype, const Kernel& kernel) {
  constexpr int kPortable = 8;  // every device with clusters holds these
  const Device& d = device();
  in.element = size_of(dtype);
  in.multiprocessors = d.multiprocessors;
  in.shared = static_cast<int64_t>(d.shared_per_block);
  in.largest_cluster = d.has_clusters() ? kMaxCluster : 1;
  SlicePlan p = plan_slices(in);
  if (!p.resident || p.cluster <= kPortable) return p;
  visit_kernel(dtype, p, [&](auto type, auto window, auto columns) {
    in.largest_cluster = largest_cluster(kernel(type, window, columns), p.cluster, p.threads, p.shared.all);
  });
  return in.largest_cluster < p.cluster ? plan_slices(in) : p;
}

inline SlicePlan plan_forward(const PlanInput& in, Dtype dtype) {
  return plan_for_device(in, dtype, [](auto type, auto window, auto columns) {
    return resident_forward<typename decltype(type)::type, decltype(window)::value, decltype(columns)::value>;
  });
}

inline SlicePlan plan_backward(const PlanInput& in, Dtype dtype) {
  return plan_for_device(in, dtype, [](auto type, auto window, auto columns) {
    return resident_backward<typename decltype(type)::type, decltype(window)::value, decltype(columns)::value>;
  });
}

// Statistics, then y. `own`: of the batch, else those in a (use_running, or a.mean and a.rstd as they are).
inline void run_forward(const char* op, Dtype dtype, const SliceForward& a, bool own, int64_t groups,
                        cudaStream_t stream) {
  const SlicePlan& p = a.plan;
  visit_kernel(dtype, p, [&](auto type, auto window, auto columns) {
    using T = typename decltype(type)::type;
    constexpr int kN = decltype(window)::value, kC = decltype(columns)::value;
    if (p.resident) return launch(op, resident_forward<T, kN, kC>, resident_grid(p), stream, a);
    if (own) {
      launch(op, split_moments<T, kN, kC>, split_grid(p), stream, a);
      launch(op, merge_statistics, merge_grid(groups), stream, a, groups);
    }
    launch(op, split_normalize<T, kN, kC>, split_grid(p), stream, a);
  });
}

// dweight and dbias, each or null, from the channel sums of `samples` samples.
inline void run_parameter_gradients(const char* op, const SliceBackward& a, int64_t samples, void* dweight, void* dbias,
                                    cudaStream_t stream) {
  if (!dweight && !dbias) return;
  const Grid grid{dim3(static_cast<unsigned>(ceil_div(a.plan.C, kWarp))), kMergeThreads};
  launch(op, parameter_gradients, grid, stream, a.channel_sums, samples, a.plan.C, a.r, a.d, dweight, dbias,
         a.param_dtype);
}

// Channel sums if `sums`, dx and dresidual if wanted.
inline void run_backward(const char* op, Dtype dtype, const SliceBackward& a, bool sums, int64_t groups,
                         cudaStream_t stream) {
  const SlicePlan& p = a.plan;
  visit_kernel(dtype, p, [&](auto type, auto window, auto columns) {
    using T = typename decltype(type)::type;
    constexpr int kN = decltype(window)::value, kC = decltype(columns)::value;
    if (p.resident) return launch(op, resident_backward<T, kN, kC>, resident_grid(p), stream, a);
    if (sums) {
      launch(op, split_sums<T, kN, kC>, split_grid(p), stream, a);
      launch(op, merge_sums, merge_grid(groups), stream, a, groups);
    }
    if (a.dx || a.dresidual) launch(op, split_elements<T, kN, kC>, split_grid(p), stream, a);
  });
}

}  // namespace
}  // namespace fastnorm::cuda
