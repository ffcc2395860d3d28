// What batch, group and instance normalisation share on the device. A slice is what is reduced and normalised together;
// plan.h says how it lies in memory, is cut and is given to blocks.
//
// Resident: a cluster owns a slice at a time. Its blocks keep their pieces in shared memory, where bulk copies bring
// those of long planes, the next slice's while this one is written if there is room, and the first sweep all others;
// the statistics, merged through distributed shared memory, and the outputs come from there. Forward moves 2 tensors
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
  short begin, end;

  __device__ bool any() const { return begin < end; }
  template <int kN>
  __device__ bool is_full() const {
    return begin == 0 && end == kN;
  }
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
    channels = static_cast<int>(min(static_cast<int64_t>(p.entries), p.C - channel));
    length_ = p.strips ? channels : p.run_length;
    row_ = sample * p.mask_row_sample + index * p.mask_row_slice;
    lane = static_cast<int>(threadIdx.x) % p.team;
    team = static_cast<int>(threadIdx.x) / p.team;
    teams = static_cast<int>(blockDim.x) / p.team;
    const int each = p.pieces_per_block();
    first = min(p.pieces, block * each);
    last = min(p.pieces, first + each);
  }

  // The run of the thread's window u in the pieces k .. k + teams - 1, p.runs or more if there is none. A team takes a
  // piece of a long run, or every so many of their short ones, so that runs that are neighbours in memory go to
  // neighbouring teams.
  __device__ int64_t run(int k, int u) const {
    if (p.per_run > 0) return k + team < last ? (k + team) / p.per_run : p.runs;
    const int64_t run = static_cast<int64_t>(k) * kBatch + u * teams + team;
    return run < static_cast<int64_t>(last) * kBatch ? run : p.runs;
  }

  // Of a long run: where that begins, and the team's first window in it, -1 if the team has no piece. Found once for all
  // windows of the piece, for it takes a division.
  struct Piece {
    int64_t from;
    int window;
  };
  __device__ Piece piece(int k) const {
    const int piece = k + team;
    if (p.per_run == 0 || piece >= last) return {0, -1};
    const int run = piece / p.per_run;
    return {start_ + run * p.run_stride, (piece - run * p.per_run) * p.span};
  }

  // Window u of the pieces k .. k + teams - 1; `of_long` is piece(k).
  __device__ Place place(int k, int u, const Piece& of_long) const {
    int64_t from = of_long.from;
    int inside = lane, window = of_long.window;  // of the piece's windows of this run, of all
    if (p.per_run > 0) {
      inside += u * p.team;
    } else {
      const int64_t short_run = run(k, u);
      from = start_ + short_run * p.run_stride;
      window = short_run < p.runs ? 0 : -1;
    }
    if (window < 0 || inside >= p.span) return {0, 0, 0};
    window += inside;
    // Windows of planes are the tensor's, so that they are aligned wherever the plane begins: `head` elements of the
    // first ones, of which there are eight at most, come before it.
    const int head = p.strips ? 0 : static_cast<int>(from & 7);
    const int64_t i = from - head + static_cast<int64_t>(window) * kN, left = from + length_ - i;
    return {i, static_cast<short>(max(0, min(kN, head - min(window, 8) * kN))),
            static_cast<short>(left < kN ? max(0, static_cast<int>(max(left, int64_t{-1}))) : kN)};
  }

  // The elements of a piece of a long run, in whole windows that are all in the tensor: begin .. end - 1.
  __device__ void piece_range(int piece, int64_t* begin, int64_t* end) const {
    const int64_t from = start_ + piece / p.per_run * p.run_stride, first = from & ~int64_t{7};
    *begin = first + static_cast<int64_t>(piece % p.per_run) * p.span * kN;
    const int64_t last = first + (from + length_ - first + kN - 1) / kN * kN;
    *end = max(*begin, min(min(last, p.numel / kN * kN), *begin + p.span * kN));
  }

  // Which of the block's stretches of `span` windows it is in: short runs, or pieces of long ones.
  __device__ int stretch(int k, int u) const {
    return p.per_run > 0 ? k - first + team : (k - first) * kBatch + u * teams + team;
  }

  // Where the window is in the block's buffer, in elements.
  __device__ int slot(int k, int u) const {
    return (stretch(k, u) * p.span + lane + (p.per_run > 0 ? u * p.team : 0)) * kN;
  }

  // The row of the table that the run's coefficients are in: with strips, the row of the window's first element.
  __device__ int entry(int64_t run) const {
    if (p.strips) return lane * kN;
    return p.entries > 1 ? static_cast<int>(run) : 0;
  }

  // The byte of the mask that the window's bits belong to, and the first of them.
  __device__ int64_t mask_byte(const Place& at, int64_t run) const {
    const int64_t row = row_ + run * p.mask_row_run;
    if (p.strips) return row * ((p.C + 7) / 8) + (channel + lane * kN) / 8;
    return at.i / 8 + row;
  }
  __device__ int mask_bit(const Place& at) const {
    return static_cast<int>((p.strips ? channel + lane * kN : at.i) % 8);
  }

  const SlicePlan& p;
  int64_t sample, channel;  // the slice's first
  int channels;             // that there are: the last strip may lack some
  int first, last;          // the block's pieces
  int lane, team, teams;

  // Where the statistics of channel c are, which D channels share.
  __device__ int64_t statistic(int64_t c, int64_t D) const { return sample * (p.C / D) + c / D; }

 private:
  int64_t start_, length_, row_;
};

// The block's shared memory (plan.h). Places are found anew each time: kept, they would take a third of the registers.
template <typename T>
class Shared {
 public:
  using acc_t = acc_type<T>;

  __device__ explicit Shared(const SlicePlan& plan) : p(plan) {}
  __device__ acc_t* table() const { return at<acc_t>(p.shared.table); }
  __device__ acc_t* partial() const { return at<acc_t>(p.shared.partial); }
  __device__ double* totals() const { return at<double>(p.shared.totals); }
  __device__ acc_t* shift() const { return at<acc_t>(p.shared.shift); }
  template <typename V>
  __device__ V* exchange() const {
    return at<V>(p.shared.exchange);
  }
  __device__ Statistics* statistics() const { return at<Statistics>(p.shared.groups); }
  __device__ Sums* group_sums() const { return at<Sums>(p.shared.groups); }
  __device__ Sums* sums() const { return at<Sums>(p.shared.sums); }
  __device__ acc_t* runs() const { return at<acc_t>(p.shared.runs); }
  __device__ T* buffer(int i) const { return at<T>(p.shared.buffers + i * p.shared.buffer); }

 private:
  template <typename V>
  __device__ static V* at(int64_t byte) {
    return reinterpret_cast<V*>(dynamic_shared<unsigned char>() + byte);
  }

  const SlicePlan& p;
};

// f(j) for each element j of a window that has any, kC columns. The columns of a strip that are no channels of it are
// left out when they are summed.
template <int kN, int kC, typename F>
__device__ inline void for_elements(const Place& at, const F& f) {
  if (kC > 1 || kN == 1 || at.is_full<kN>()) {  // nearly always: without tests an element
#pragma unroll
    for (int j = 0; j < kN; ++j) f(j);
  } else {
#pragma unroll
    for (int j = 0; j < kN; ++j)
      if (j >= at.begin && j < at.end) f(j);
  }
}

template <int kN, typename T>
__device__ inline Pack<T, kN> load_window(const T* x, const Place& at, int64_t numel) {
  if (!at.any()) return load_part<kN>(x, 0, 0, false);
  return load_part<kN>(x + at.i, at.begin, at.end, at.i + kN <= numel);
}

// Starts the bulk copies of the block's pieces of n tensors to its buffers, `apart` elements from one to the next. By
// all threads, after what read the buffers before and a __syncthreads(); `full` tells when they have landed.
template <int n, int kN, typename T>
__device__ inline void start_copies(const Walk<kN>& walk, const T* const (&tensors)[n], T* buffers, int64_t apart,
                                    Barrier& full) {
  if (threadIdx.x >= kWarp) return;
  const int lane = static_cast<int>(threadIdx.x);
  int64_t begin, end;
  unsigned bytes[1] = {0};
  for (int piece = walk.first + lane; piece < walk.last; piece += kWarp) {
    walk.piece_range(piece, &begin, &end);
    bytes[0] += static_cast<unsigned>(end - begin) * static_cast<unsigned>(n * sizeof(T));
  }
  warp_sum(bytes);
  if (lane == 0) full.expect(bytes[0]);
  __syncwarp();
  for (int piece = walk.first + lane; piece < walk.last; piece += kWarp) {
    walk.piece_range(piece, &begin, &end);
    if (begin == end) continue;
#pragma unroll
    for (int i = 0; i < n; ++i)
      bulk_copy(buffers + i * apart + (piece - walk.first) * walk.p.span * kN, tensors[i] + begin,
                static_cast<uint32_t>((end - begin) * sizeof(T)), full);
  }
}

// n sums of a thread. A thread that takes an element at a time has some hundred terms where others have some tens: in
// float32 it keeps what each addition rounds off, too.
template <typename acc_t, int n, int kN>
class ThreadSums {
 public:
  __device__ void add(int k, acc_t v) {
    if constexpr (kKeepsRest) {
      const acc_t total = sum_[k] + v, added = total - sum_[k];  // Knuth's two-sum
      rest_[k] += (sum_[k] - (total - added)) + (v - added);
      sum_[k] = total;
    } else {
      sum_[k] += v;
    }
  }

  __device__ void add_product(int k, acc_t a, acc_t b) {
    if constexpr (kKeepsRest) {
      add(k, a * b);
    } else {
      sum_[k] = multiply_add(a, b, sum_[k]);
    }
  }

  __device__ acc_t operator[](int k) const {
    if constexpr (kKeepsRest) return isfinite(rest_[k]) ? sum_[k] + rest_[k] : sum_[k];  // infinity leaves NaN
    return sum_[k];
  }

 private:
  static constexpr bool kKeepsRest = kN == 1 && sizeof(acc_t) == 4;
  acc_t sum_[n] = {}, rest_[n] = {};
};

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

// Stores the window's bits, shifted to their place: windows of an octet that lie in several lanes meet in its first.
// What belongs to no element of the run is never read. By all threads of the warp.
template <int kN>
__device__ inline void store_mask(uint8_t* mask, const Walk<kN>& walk, const Place& at, int64_t run, unsigned bits) {
  constexpr unsigned kAny = 1u << 8;
  bits = bits << walk.mask_bit(at) | (at.any() ? kAny : 0u);
  const int lanes = min(8 / kN, walk.p.team);
  for (int distance = 1; distance < lanes; distance *= 2) bits |= __shfl_xor_sync(kAllLanes, bits, distance);
  if ((bits & kAny) && walk.lane % lanes == 0) mask[walk.mask_byte(at, run)] = static_cast<uint8_t>(bits);
}

// Calls use(place, what load(place, k, u) gave, k, u) for the thread's windows up to piece `last`, kFlight of them
// loaded before the first is used. By all threads: use may exchange values in a warp.
template <int kFlight, int kN, typename Load, typename Use>
__device__ inline void for_windows(const Walk<kN>& walk, int last, const Load& load, const Use& use) {
  for (int k = walk.first; k < last; k += walk.teams) {
    const auto piece = walk.piece(k);
#pragma unroll 1
    for (int u = 0; u < kBatch; u += kFlight) {
      Place at[kFlight];
      decltype(load(at[0], k, u)) loaded[kFlight];
#pragma unroll
      for (int v = 0; v < kFlight; ++v) {
        at[v] = walk.place(k, u + v, piece);
        loaded[v] = load(at[v], k, u + v);
      }
#pragma unroll
      for (int v = 0; v < kFlight; ++v) use(at[v], loaded[v], k, u + v);
    }
  }
}

// Calls work(walk, rank in the cluster, parity) for each slice of the cluster, its bulk copies landed, if there are any,
// and those of the next under way, if there is a second buffer. The parity changes from slice to slice.
template <typename Kernel, typename Work>
__device__ inline void for_slices(Kernel& kernel, const SlicePlan& p, const Work& work) {
  using ThisWalk = Walk<Kernel::kElements>;
  SMEM_ARRAY(Barrier, full, 2);
  const unsigned rank = cluster_rank();
  const auto copy = [&](int64_t slice, int stage) {
    if (slice < p.slices) kernel.start_copies(ThisWalk(p, slice, static_cast<int>(rank)), stage, full[stage]);
  };
  int64_t slice = blockIdx.x / p.cluster;
  if (p.bulk) {
    if (threadIdx.x == 0) {
      full[0].init();
      full[1].init();
    }
    __syncthreads();
    copy(slice, 0);
  }
  for (int turn = 0; slice < p.slices; slice += p.clusters, ++turn) {
    const int stage = turn % p.stages;
    kernel.use_stage(stage);
    if (p.bulk) {
      if (p.stages == 2) copy(slice + p.clusters, 1 - stage);
      full[stage].wait(turn / p.stages % 2);
    }
    work(ThisWalk(p, slice, static_cast<int>(rank)), rank, turn % 2);
    fence_before_bulk_copy();
    __syncthreads();  // the readers of shared memory are done
    if (p.bulk && p.stages == 1) copy(slice + p.clusters, 0);
  }
  cluster_sync();  // no block leaves while another reads its shared memory
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

// A channel's mean, rstd or the like for each of a window's elements, or one for all of them (kC = 1).
template <typename acc_t, int kC>
struct Affine {
  acc_t mean[kC], scale[kC], shift[kC];

  __device__ acc_t operator()(acc_t x, int j) const {
    return multiply_add(x - mean[j % kC], scale[j % kC], shift[j % kC]);
  }
};

template <typename T, int kN, int kC>
class Forward {
 public:
  using acc_t = acc_type<T>;
  using Window = Pack<T, kN>;
  static constexpr int kElements = kN;

  __device__ explicit Forward(const SliceForward& args) : a(args), p(args.plan), shared(args.plan) {}

  // Which of the buffers the slice is in, or will be.
  __device__ void use_stage(int stage) { stage_ = stage; }

  __device__ void start_copies(const Walk<kN>& walk, int stage, Barrier& full) const {
    const T* const tensors[1] = {x()};
    cuda::start_copies(walk, tensors, shared.buffer(stage), 0, full);
  }

  // Moments of each group of the slice's elements in this block: store(group, moments) by one thread each, and again if
  // the first were not exact. Resident: the block's elements go to the buffer on the way.
  template <typename Store>
  __device__ void moments(const Walk<kN>& walk, const Store& store) {
    SMEM_ARRAY(unsigned, inexact, 1);
    if (threadIdx.x == 0) *inexact = 0;
    const int members = p.strips ? p.group : 1, groups = p.strips ? p.groups() : 1;
    find_shift(walk, groups, members);

    constexpr int n = 2 * kC + 1;
    ThreadSums<acc_t, 2 * kC, kN> sums;
    acc_t count = 0, shift[kC];
#pragma unroll
    for (int j = 0; j < kC; ++j) shift[j] = shared.shift()[p.strips ? min(walk.lane * kN + j, p.entries - 1) : 0];
    for_windows<kFlight>(
        walk, walk.last, [&](const Place& at, int k, int u) { return window(walk, at, k, u, kept(walk)); },
        [&](const Place& at, const Window& loaded, int, int) {
          if (!at.any()) return;
          acc_t v[kN];
          loaded.unpack(v);
          for_elements<kN, kC>(at, [&](int j) {
            const acc_t d = v[j] - shift[j % kC];
            sums.add(j % kC, d);
            sums.add_product(kC + j % kC, d, d);
          });
          count += static_cast<acc_t>(kC > 1 ? 1 : at.end - at.begin);
        });
    acc_t sum[n];
#pragma unroll
    for (int k = 0; k < n; ++k) sum[k] = k < 2 * kC ? sums[k] : count;
    column_sums(p, sum, shared.partial(), shared.totals());
    for_groups(groups, members, [&](int g, int lane, int lanes) {
      double v[3] = {0, 0, 0};
      for (int c = g * members + lane; g >= 0 && c < (g + 1) * members; c += lanes) {
        v[0] += shared.totals()[c / kC * n + c % kC];
        v[1] += shared.totals()[c / kC * n + kC + c % kC];
        v[2] += shared.totals()[c / kC * n + 2 * kC];
      }
      warp_sum(v, 1, lanes);
      if (g < 0 || lane != 0) return;
      const double from = static_cast<double>(shared.shift()[g * members]);
      if (!std::is_same_v<acc_t, double> && v[2] > 0 && out_of_range(from, v[0], v[1])) atomicOr(inexact, 1u);
      store(g, v[2] > 0 ? shifted_moments(v[2], from, v[0], v[1]) : Moments{});
    });
    __syncthreads();
    if (*inexact) exact_moments(walk, groups, members, store);
  }

  // Statistics of the slice's groups, merged over the cluster, to shared.statistics() and to a.mean and a.rstd.
  __device__ void statistics(const Walk<kN>& walk, unsigned rank, int parity) {
    Moments* mine = shared.template exchange<Moments>() + parity * p.groups();
    moments(walk, [&](int g, const Moments& m) { mine[g] = m; });
    cluster_sync();
    for (int g = static_cast<int>(threadIdx.x); g < p.groups(); g += static_cast<int>(blockDim.x)) {
      if (g * p.group >= walk.channels) continue;
      const Moments m = merge_moments(p.cluster, [&](int k) { return *map_shared_rank(mine + g, k); });
      const int64_t i = walk.statistic(walk.channel, a.D) + g;
      const Statistics s = keep_statistics(a, i, m.mean, m.biased_variance(), rank == 0);
      shared.statistics()[g] = s;
    }
    __syncthreads();
  }

  // The coefficients of each channel of the slice. Block 0 of those that share the slice keeps what backward needs.
  __device__ void table(const Walk<kN>& walk, bool keep) {
    for (int e = static_cast<int>(threadIdx.x); e < walk.channels; e += static_cast<int>(blockDim.x)) {
      const int64_t c = walk.channel + e, i = walk.statistic(c, a.D);
      Statistics s;
      if (a.use_running) {
        s = keep_statistics(a, c, read(a.running_mean, a.stats_dtype, c, 0.0),
                            read(a.running_var, a.stats_dtype, c, 1.0), keep);
      } else {
        s = p.resident ? shared.statistics()[e / p.group] : Statistics{a.mean[i], a.rstd[i]};
      }
      double weight = read(a.weight, a.param_dtype, c, 1.0), bias = read(a.bias, a.param_dtype, c, 0.0);
      if (a.r) {
        const Correction by = correction(a, c, s);
        bias += weight * by.d;
        weight *= by.r;
        if (keep) {
          a.r[c] = by.r;
          a.d[c] = by.d;
        }
      }
      const SliceAffine<acc_t> affine(s.mean, s.rstd, weight, bias);
      shared.table()[e] = affine.mean;
      shared.table()[p.entries + e] = affine.scale;
      shared.table()[2 * p.entries + e] = affine.shift;
    }
    __syncthreads();
  }

  // y = activation((x - mean) * scale + shift + residual)
  __device__ void normalize(const Walk<kN>& walk) {
    struct Loaded {
      Window x, residual;
    };
    Affine<acc_t, kC> affine;
    load_coefficients(walk, 0, affine);
    for_windows<kFlight>(
        walk, walk.last,
        [&](const Place& at, int k, int u) {
          Loaded w;
          w.x = window(walk, at, k, u, p.resident ? walk.last : 0);
          if (a.residual) w.residual = load_window<kN>(residual(), at, p.numel);
          return w;
        },
        [&](const Place& at, const Loaded& w, int k, int u) {
          if (p.by_run() && at.any()) load_coefficients(walk, walk.run(k, u), affine);
          acc_t z[kN];
          w.x.unpack(z);
#pragma unroll
          for (int j = 0; j < kN; ++j) z[j] = affine(z[j], j);
          if (a.residual) {
            acc_t r[kN];
            w.residual.unpack(r);
#pragma unroll
            for (int j = 0; j < kN; ++j) z[j] += r[j];
          }
          if (a.mask) store_mask(a.mask, walk, at, walk.run(k, u), positive_bits(z));
          activate(a.activation, z);
          if (at.any()) store_part(Window::pack(z), static_cast<T*>(a.y) + at.i, at.begin, at.end);
        });
  }

 private:
  static constexpr int kFlight = kN > 4 ? 2 : kBatch;

  __device__ const T* x() const { return static_cast<const T*>(a.x); }
  __device__ const T* residual() const { return static_cast<const T*>(a.residual); }

  // The end of the pieces that are in the buffer after find_shift(): all of the block's, or each team's first.
  __device__ int kept(const Walk<kN>& walk) const {
    return p.resident ? walk.last : min(walk.last, walk.first + walk.teams);
  }

  // From the buffer if piece k is one of those before `kept`.
  __device__ Window window(const Walk<kN>& walk, const Place& at, int k, int u, int kept) const {
    if (k >= kept || (p.bulk && at.i + kN > p.numel)) return load_window<kN>(x(), at, p.numel);
    return at.any() ? Window::load(shared.buffer(stage_) + walk.slot(k, u)) : load_part<kN>(x(), 0, 0, false);
  }

  // The shift of each group: a number near its mean.
  __device__ void find_shift(const Walk<kN>& walk, int groups, int members) {
    constexpr int n = kC + 1;
    acc_t sum[n] = {};
    for_windows<kFlight>(
        walk, kept(walk), [&](const Place& at, int k, int u) { return window(walk, at, k, u, p.bulk ? walk.last : 0); },
        [&](const Place& at, const Window& loaded, int k, int u) {
          if (!at.any()) return;
          if (!p.bulk) loaded.store(shared.buffer(stage_) + walk.slot(k, u));
          acc_t v[kN];
          loaded.unpack(v);
          for_elements<kN, kC>(at, [&](int j) { sum[j % kC] += v[j]; });
          sum[kC] += static_cast<acc_t>(kC > 1 ? 1 : at.end - at.begin);
        });
    column_sums(p, sum, shared.partial(), shared.totals());
    for_groups(groups, members, [&](int g, int lane, int lanes) {
      double v[2] = {0, 0};
      for (int c = g * members + lane; g >= 0 && c < (g + 1) * members; c += lanes) {
        v[0] += shared.totals()[c / kC * n + c % kC];
        v[1] += shared.totals()[c / kC * n + kC];
      }
      warp_sum(v, 1, lanes);
      for (int c = g * members + lane; g >= 0 && c < (g + 1) * members; c += lanes)
        shared.shift()[c] = static_cast<acc_t>(v[0] / v[1]);
    });
    __syncthreads();
  }

  // moments() in double, a group at a time: for numbers whose squares float32 does not hold.
  template <typename Store>
  __device__ void exact_moments(const Walk<kN>& walk, int groups, int members, const Store& store) {
    SMEM_ARRAY(double, scratch, 2 * kMaxWarps);
    for (int g = 0; g < groups; ++g) {
      double total[2], count = 0, mean = 0;
      for (int sweep = 0; sweep < 2; ++sweep) {
        double sum[2] = {0, 0};
        for_windows<1>(
            walk, walk.last, [&](const Place& at, int k, int u) { return window(walk, at, k, u, kept(walk)); },
            [&](const Place& at, const Window& loaded, int, int) {
              acc_t v[kN];
              loaded.unpack(v);
#pragma unroll
              for (int j = 0; j < kN; ++j) {
                const bool of_group = !p.strips || (walk.lane * kN + j) / members == g;
                if (j < at.begin || j >= at.end || !of_group) continue;
                const double d = static_cast<double>(v[j]) - mean;
                sum[0] += sweep == 0 ? 1 : d * d;
                sum[1] += d;
              }
            });
        block_sum(sum, total, scratch);
        if (sweep == 0) {
          count = total[0];
          mean = total[1] / count;
        }
      }
      if (threadIdx.x == 0 && count > 0) store(g, shifted_moments(count, mean, total[1], total[0]));
    }
  }

  __device__ void load_coefficients(const Walk<kN>& walk, int64_t run, Affine<acc_t, kC>& affine) const {
    const int entry = walk.entry(run);
#pragma unroll
    for (int j = 0; j < kC; ++j) {
      const bool is_there = entry + j < walk.channels;
      affine.mean[j] = is_there ? shared.table()[entry + j] : acc_t(0);
      affine.scale[j] = is_there ? shared.table()[p.entries + entry + j] : acc_t(0);
      affine.shift[j] = is_there ? shared.table()[2 * p.entries + entry + j] : acc_t(0);
    }
  }

  const SliceForward& a;
  const SlicePlan& p;
  const Shared<T> shared;
  int stage_ = 0;
};

// Which sweeps a launch makes. Resident: both.
enum class Sweep { kBoth, kReduce, kNormalize };

// Resident: a cluster a slice at a time. Else a block a part of a slice, the last ones first where it normalises.
template <typename T, int kN, int kC>
__global__ void __launch_bounds__(max_threads(kC, false), kBlocks)
    slice_forward(const __grid_constant__ SliceForward a, const __grid_constant__ Sweep sweep) {
  const SlicePlan& p = a.plan;
  Forward<T, kN, kC> kernel(a);
  if (sweep == Sweep::kBoth) {
    for_slices(kernel, p, [&](const Walk<kN>& walk, unsigned rank, int parity) {
      kernel.statistics(walk, rank, parity);
      kernel.table(walk, rank == 0);
      kernel.normalize(walk);
    });
  } else {
    const unsigned block = sweep == Sweep::kReduce ? blockIdx.x : gridDim.x - 1 - blockIdx.x, part = block % p.parts;
    const Walk<kN> walk(p, block / p.parts, static_cast<int>(part));
    if (sweep == Sweep::kReduce) {
      Moments* partial = a.partial + block * static_cast<int64_t>(p.entries);
      kernel.moments(walk, [&](int g, const Moments& m) { partial[g] = m; });
    } else {
      kernel.table(walk, part == 0);
      kernel.normalize(walk);
    }
  }
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
  bool reads_x;              // in the sweep that makes dx, or any
  const void *x, *dy, *residual, *weight, *bias;
  const double *mean, *rstd;  // by group
  const double *r, *d;        // by channel, or null
  const uint8_t* mask;
  void *dx, *dresidual;
  int64_t D;
  double count;              // elements of a group
  const double* given_sums;  // [2, C] as BatchNormBackward has them, or null
  Sums* partial;             // [slices][parts][entries], if split
  Sums* channel_sums;        // [samples][C] of dz
  Sums* group_sums;          // by group, of dz * weight; if split
};

template <typename T, int kN, int kC>
class Backward {
 public:
  using acc_t = acc_type<T>;
  using Window = Pack<T, kN>;
  static constexpr int kElements = kN;

  __device__ explicit Backward(const SliceBackward& args) : a(args), p(args.plan), shared(args.plan) {}

  // Which of the buffers the slice is in, or will be.
  __device__ void use_stage(int stage) { stage_ = stage; }

  __device__ void start_copies(const Walk<kN>& walk, int stage, Barrier& full) const {
    const T* const tensors[2] = {x(), dy()};
    const int64_t apart = p.shared.buffer / static_cast<int64_t>(sizeof(T));
    cuda::start_copies(walk, tensors, shared.buffer(2 * stage), apart, full);
  }

  // The coefficients that are known before the sums.
  __device__ void table(const Walk<kN>& walk) {
    for (int e = static_cast<int>(threadIdx.x); e < walk.channels; e += static_cast<int>(blockDim.x)) {
      const int64_t c = walk.channel + e;
      const Statistics s = statistics(walk, c);
      double bias = read(a.bias, a.param_dtype, c, 0.0);
      if (a.r) bias += read(a.weight, a.param_dtype, c, 1.0) * a.d[c];
      const SliceAffine<acc_t> affine(s.mean, s.rstd, weight(c), bias);
      const SliceStandardize<acc_t> standardize(s.mean, s.rstd);
      acc_t* row = shared.table() + e;
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
    for (int e = static_cast<int>(threadIdx.x); e < walk.channels; e += static_cast<int>(blockDim.x)) {
      const int64_t c = walk.channel + e;
      const Statistics s = statistics(walk, c);
      const Sums g = a.constant_statistics ? Sums{0, 0} : sums(e, c);
      const GroupGradient<acc_t> gradient(a.count, s.mean, s.rstd, g.dz, g.dz_xhat);
      shared.table()[kSlope * p.entries + e] = gradient.slope;
      shared.table()[kOffset * p.entries + e] = gradient.offset;
    }
    __syncthreads();
  }

  // The sums of each channel of the slice over the block's elements: store(entry, sums) by one thread each. Resident:
  // the block's elements go to the buffers on the way.
  template <typename Store>
  __device__ void sums(const Walk<kN>& walk, const Store& store) {
    constexpr int n = 2 * kC;
    ThreadSums<acc_t, n, kN> sums;
    Coefficients c;
    load_affine(walk, 0, c);
    load_standardize(walk, 0, c);
    for_windows<kFlight>(
        walk, walk.last,
        [&](const Place& at, int k, int u) { return p.bulk ? load_resident(walk, at, k, u) : load(at); },
        [&](const Place& at, const Loaded& w, int k, int u) {
          if (at.any()) {
            if (p.resident && !p.bulk) {
              w.x.store(shared.buffer(2 * stage_) + walk.slot(k, u));
              w.dy.store(shared.buffer(2 * stage_ + 1) + walk.slot(k, u));
            }
            if (p.by_run()) {
              load_affine(walk, walk.run(k, u), c);
              load_standardize(walk, walk.run(k, u), c);
            }
            acc_t v[kN], dz[kN];
            w.x.unpack(v);
            w.dy.unpack(dz);
            activation_gradient(walk, at, walk.run(k, u), v, dz, c.affine);
            for_elements<kN, kC>(at, [&](int j) {
              const acc_t xhat = multiply_add(v[j] - c.affine.mean[j % kC], c.rstd[j % kC], c.rest[j % kC]);
              sums.add(j % kC, dz[j]);
              sums.add_product(kC + j % kC, dz[j], xhat);
            });
          }
          if (p.by_run() && (p.per_run == 0 || u == kBatch - 1)) {
            keep_run(walk, k, u, sums[0], sums[kC]);
            sums = {};
          }
        });
    if (p.by_run()) {
      __syncthreads();
    } else {
      acc_t sum[n];
#pragma unroll
      for (int k = 0; k < n; ++k) sum[k] = sums[k];
      column_sums(p, sum, shared.partial(), shared.totals());
    }
    for (int e = static_cast<int>(threadIdx.x); e < walk.channels; e += static_cast<int>(blockDim.x)) {
      const double* totals = shared.totals() + e / kC * n + e % kC;
      store(e, p.by_run() ? sum_of_run(walk, e) : Sums{totals[0], totals[kC]});
    }
  }

  // Merges the sums over the cluster and adds up those of each group, for table_of_sums().
  __device__ void merge(const Walk<kN>& walk, unsigned rank, int parity) {
    Sums* mine = shared.template exchange<Sums>() + parity * p.entries;
    sums(walk, [&](int e, const Sums& s) { mine[e] = s; });
    cluster_sync();
    for (int e = static_cast<int>(threadIdx.x); e < walk.channels; e += static_cast<int>(blockDim.x)) {
      const int64_t c = walk.channel + e;
      Sums all{0, 0};
      for (int k = 0; k < p.cluster; ++k) {
        const Sums part = *map_shared_rank(mine + e, k);
        all.dz += part.dz;
        all.dz_xhat += part.dz_xhat;
      }
      shared.sums()[e] = {weight(c) * all.dz, weight(c) * all.dz_xhat};
      if (rank == 0) a.channel_sums[walk.sample * p.C + c] = all;
    }
    __syncthreads();
    const int members = p.entries / p.groups();
    for_groups(p.groups(), members, [&](int g, int lane, int lanes) {
      double v[2] = {0, 0};
      for (int e = g * members + lane; g >= 0 && e < min((g + 1) * members, walk.channels); e += lanes) {
        v[0] += shared.sums()[e].dz;
        v[1] += shared.sums()[e].dz_xhat;
      }
      warp_sum(v, 1, lanes);
      if (g >= 0 && lane == 0) shared.group_sums()[g] = {v[0], v[1]};
    });
    __syncthreads();
    table_of_sums(walk, [&](int e, int64_t) { return shared.group_sums()[e / members]; });
  }

  // Of channel c, which is a group of its own.
  __device__ Sums given_sums(int64_t c) const {
    return {weight(c) * a.given_sums[c], weight(c) * a.given_sums[p.C + c]};
  }

  // dresidual = dz;  dx = dz * scale - ((x - mean) * slope + offset)
  __device__ void elements(const Walk<kN>& walk) {
    Coefficients c;
    load_affine(walk, 0, c);
    load_gradient(walk, 0, c);
    for_windows<kFlight>(
        walk, walk.last,
        [&](const Place& at, int k, int u) { return p.resident ? load_resident(walk, at, k, u) : load(at); },
        [&](const Place& at, const Loaded& w, int k, int u) {
          if (!at.any()) return;
          if (p.by_run()) {
            load_affine(walk, walk.run(k, u), c);
            load_gradient(walk, walk.run(k, u), c);
          }
          acc_t v[kN], dz[kN];
          w.x.unpack(v);
          w.dy.unpack(dz);
          activation_gradient(walk, at, walk.run(k, u), v, dz, c.affine);
          if (a.dresidual) store_part(Window::pack(dz), static_cast<T*>(a.dresidual) + at.i, at.begin, at.end);
          if (a.dx == nullptr) return;
#pragma unroll
          for (int j = 0; j < kN; ++j) {
            dz[j] *= c.affine.scale[j % kC];
            if (!a.constant_statistics)
              dz[j] -= multiply_add(v[j] - c.affine.mean[j % kC], c.slope[j % kC], c.offset[j % kC]);
          }
          store_part(Window::pack(dz), static_cast<T*>(a.dx) + at.i, at.begin, at.end);
        });
  }

 private:
  static constexpr int kFlight = 2;
  // Columns of the table.
  enum { kMean, kScale, kShift, kRstd, kRest, kSlope, kOffset, kColumns };
  static_assert(kColumns == kBackwardColumns);

  __device__ const T* x() const { return static_cast<const T*>(a.x); }
  __device__ const T* dy() const { return static_cast<const T*>(a.dy); }

  struct Loaded {
    Window x, dy;
  };
  struct Coefficients {
    Affine<acc_t, kC> affine;
    acc_t rstd[kC], rest[kC];     // xhat = (x - mean) * rstd + rest
    acc_t slope[kC], offset[kC];  // see elements()
  };

  __device__ Loaded load(const Place& at) const {
    Loaded w;
    if (a.reads_x) w.x = load_window<kN>(x(), at, p.numel);
    w.dy = load_window<kN>(dy(), at, p.numel);
    return w;
  }

  __device__ Loaded load_resident(const Walk<kN>& walk, const Place& at, int k, int u) const {
    if (!at.any() || (p.bulk && at.i + kN > p.numel)) return load(at);
    return {Window::load(shared.buffer(2 * stage_) + walk.slot(k, u)),
            Window::load(shared.buffer(2 * stage_ + 1) + walk.slot(k, u))};
  }

  __device__ Statistics statistics(const Walk<kN>& walk, int64_t c) const {
    const int64_t i = walk.statistic(c, a.D);
    return {a.mean[i], a.rstd[i]};
  }

  // What xhat is multiplied by.
  __device__ double weight(int64_t c) const { return read(a.weight, a.param_dtype, c, 1.0) * (a.r ? a.r[c] : 1.0); }

  __device__ void load_column(const Walk<kN>& walk, int64_t run, int column, acc_t (&to)[kC]) const {
    const int entry = walk.entry(run);
#pragma unroll
    for (int j = 0; j < kC; ++j)
      to[j] = entry + j < walk.channels ? shared.table()[column * p.entries + entry + j] : acc_t(0);
  }
  __device__ void load_affine(const Walk<kN>& walk, int64_t run, Coefficients& c) const {
    load_column(walk, run, kMean, c.affine.mean);
    load_column(walk, run, kScale, c.affine.scale);
    load_column(walk, run, kShift, c.affine.shift);
  }
  __device__ void load_standardize(const Walk<kN>& walk, int64_t run, Coefficients& c) const {
    load_column(walk, run, kRstd, c.rstd);
    load_column(walk, run, kRest, c.rest);
  }
  __device__ void load_gradient(const Walk<kN>& walk, int64_t run, Coefficients& c) const {
    load_column(walk, run, kSlope, c.slope);
    load_column(walk, run, kOffset, c.offset);
  }

  // dz becomes dy * activation'(z), z as forward had it or its sign from the mask.
  __device__ void activation_gradient(const Walk<kN>& walk, const Place& at, int64_t run, const acc_t (&v)[kN],
                                      acc_t (&dz)[kN], const Affine<acc_t, kC>& affine) const {
    if (a.activation == Activation::kNone) return;
    if (a.mask) return activate_backward(a.activation, dz, a.mask[walk.mask_byte(at, run)] >> walk.mask_bit(at));
    acc_t z[kN];
#pragma unroll
    for (int j = 0; j < kN; ++j) z[j] = affine(v[j], j);
    if (a.residual) {
      acc_t r[kN];
      load_window<kN>(static_cast<const T*>(a.residual), at, p.numel).unpack(r);
#pragma unroll
      for (int j = 0; j < kN; ++j) z[j] += r[j];
    }
    activate_backward(a.activation, dz, z);
  }

  // A team's sums of a run, or of its piece of a long one.
  __device__ void keep_run(const Walk<kN>& walk, int k, int u, acc_t dz, acc_t dz_xhat) const {
    acc_t v[2] = {dz, dz_xhat};
    warp_sum(v, 1, p.team);
    if (walk.lane != 0 || walk.run(k, u) >= p.runs) return;
    acc_t* to = shared.runs() + 2 * walk.stretch(k, u);
    to[0] = v[0];
    to[1] = v[1];
  }

  __device__ Sums sum_of_run(const Walk<kN>& walk, int run) const {
    const int here = p.per_run > 0 ? 1 : kBatch, stretches = max(1, p.per_run);
    const int begin = max(run * stretches, walk.first * here), end = min((run + 1) * stretches, walk.last * here);
    Sums all{0, 0};
    for (int i = begin; i < end; ++i) {
      const acc_t* from = shared.runs() + 2 * (i - walk.first * here);
      all.dz += static_cast<double>(from[0]);
      all.dz_xhat += static_cast<double>(from[1]);
    }
    return all;
  }

  const SliceBackward& a;
  const SlicePlan& p;
  const Shared<T> shared;
  int stage_ = 0;
};

// As slice_forward().
template <typename T, int kN, int kC>
__global__ void __launch_bounds__(max_threads(kC, true), kBlocks)
    slice_backward(const __grid_constant__ SliceBackward a, const __grid_constant__ Sweep sweep) {
  const SlicePlan& p = a.plan;
  Backward<T, kN, kC> kernel(a);
  if (sweep == Sweep::kBoth) {
    for_slices(kernel, p, [&](const Walk<kN>& walk, unsigned rank, int parity) {
      kernel.table(walk);
      kernel.merge(walk, rank, parity);
      if (a.dx || a.dresidual) kernel.elements(walk);
    });
  } else {
    const unsigned block = sweep == Sweep::kReduce ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
    const Walk<kN> walk(p, block / p.parts, static_cast<int>(block % p.parts));
    kernel.table(walk);
    if (sweep == Sweep::kReduce) {
      Sums* partial = a.partial + block * static_cast<int64_t>(p.entries);
      kernel.sums(walk, [&](int e, const Sums& s) { partial[e] = s; });
    } else {
      kernel.table_of_sums(walk, [&](int, int64_t c) {
        return a.given_sums ? kernel.given_sums(c) : a.group_sums[walk.statistic(c, a.D)];
      });
      kernel.elements(walk);
    }
  }
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
  return {dim3(static_cast<unsigned>(ceil_divide(groups, kMergeThreads / kWarp))), kMergeThreads};
}

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
  return s;
}

// Of an op's arguments(a, workspace).
template <typename Args>
int64_t workspace_bytes(const Args& a) {
  Workspace workspace(nullptr);
  if (a.shape.numel() > 0) arguments(a, workspace);
  return workspace.bytes();
}

// The plan, for clusters as large and as many as the device holds of this kernel.
template <typename Kernel>
SlicePlan plan_for_device(PlanInput in, Dtype dtype, const Kernel& kernel) {
  const Device& d = device();
  in.element = size_of(dtype);
  in.multiprocessors = d.multiprocessors;
  in.shared = d.dynamic_shared();
  in.largest_cluster = d.has_clusters() ? kMaxCluster : 1;
  in.bulk_copies = d.has_clusters();
  SlicePlan p = plan_slices(in);
  while (p.resident && p.cluster > 1) {
    int64_t at_once = 0;
    visit_kernel(dtype, p, [&](auto type, auto window, auto columns) {
      at_once = clusters_at_once(kernel(type, window, columns), p.cluster, p.threads, p.shared.all);
    });
    if (at_once >= p.clusters) break;
    if (at_once > 0) {
      in.most_clusters = at_once;
    } else {
      in.largest_cluster = p.cluster / 2;
    }
    p = plan_slices(in);
  }
  return p;
}

inline SlicePlan plan_forward(const PlanInput& in, Dtype dtype) {
  return plan_for_device(in, dtype, [](auto type, auto window, auto columns) {
    return slice_forward<typename decltype(type)::type, decltype(window)::value, decltype(columns)::value>;
  });
}

inline SlicePlan plan_backward(const PlanInput& in, Dtype dtype) {
  return plan_for_device(in, dtype, [](auto type, auto window, auto columns) {
    return slice_backward<typename decltype(type)::type, decltype(window)::value, decltype(columns)::value>;
  });
}

// Statistics, then y. `own`: of the batch, else those in a (use_running, or a.mean and a.rstd as they are).
inline void run_forward(const char* op, Dtype dtype, const SliceForward& a, bool own, int64_t groups,
                        cudaStream_t stream) {
  const SlicePlan& p = a.plan;
  visit_kernel(dtype, p, [&](auto type, auto window, auto columns) {
    using T = typename decltype(type)::type;
    constexpr int kN = decltype(window)::value, kC = decltype(columns)::value;
    const auto kernel = slice_forward<T, kN, kC>;
    if (p.resident) return launch(op, kernel, resident_grid(p), stream, a, Sweep::kBoth);
    if (own) {
      launch(op, kernel, split_grid(p), stream, a, Sweep::kReduce);
      launch(op, merge_statistics, merge_grid(groups), stream, a, groups);
    }
    if (a.y == nullptr) return;
    launch(op, kernel, split_grid(p), stream, a, Sweep::kNormalize);
  });
}

// dweight and dbias of `dtype`, each or null, from the channel sums of `samples` samples.
inline void run_parameter_gradients(const char* op, const SliceBackward& a, int64_t samples, void* dweight, void* dbias,
                                    Dtype dtype, cudaStream_t stream) {
  if (!dweight && !dbias) return;
  const Grid grid{dim3(static_cast<unsigned>(ceil_divide(a.plan.C, kWarp))), kMergeThreads};
  launch(op, parameter_gradients, grid, stream, a.channel_sums, samples, a.plan.C, a.r, a.d, dweight, dbias, dtype);
}

// Channel sums if `sums`, dx and dresidual if wanted.
inline void run_backward(const char* op, Dtype dtype, const SliceBackward& a, bool sums, int64_t groups,
                         cudaStream_t stream) {
  const SlicePlan& p = a.plan;
  visit_kernel(dtype, p, [&](auto type, auto window, auto columns) {
    using T = typename decltype(type)::type;
    constexpr int kN = decltype(window)::value, kC = decltype(columns)::value;
    const auto kernel = slice_backward<T, kN, kC>;
    if (p.resident) return launch(op, kernel, resident_grid(p), stream, a, Sweep::kBoth);
    if (sums) {
      launch(op, kernel, split_grid(p), stream, a, Sweep::kReduce);
      launch(op, merge_sums, merge_grid(groups), stream, a, groups);
    }
    if (!a.dx && !a.dresidual) return;
    SliceBackward elements = a;
    elements.reads_x = !a.constant_statistics || (a.activation != Activation::kNone && a.mask == nullptr);
    launch(op, kernel, split_grid(p), stream, elements, Sweep::kNormalize);
  });
}

}  // namespace
}  // namespace fastnorm::cuda
