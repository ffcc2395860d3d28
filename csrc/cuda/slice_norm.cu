// What batch, group and instance normalisation share on the device. A slice is what is reduced and normalised together;
// plan.h says how it lies in memory, is cut and is given to blocks.
//
// Resident: a block owns a slice, or a cluster of blocks does, whose warps' sums meet in distributed shared memory. The
// threads hold the first windows in registers and read the others again, from the second-level cache. Forward moves 2
// tensors through device memory, backward 3, and one more for each residual or its gradient.
//
// Split: one launch reduces, a block a part of a slice; a small one merges the parts; a third normalises, the last
// blocks' elements first, for they may still be in the L2 cache. Forward moves 3 tensors, backward 5.
//
// What is of a channel alone is written by the launch that ends its sums: dweight and dbias of batch_norm, and its
// running statistics unless they wait (batch_norm.cu).
//
// Every access is whole: plan.h chooses its width so that it divides every run. Sums are of arithmetic's type, of a
// window, of a batch of them, of a thread; from the block on they are double. The shift from which deviations are taken
// is the mean of the elements that the warp holds, or split the block.
#include "slice_norm.cuh"

#include "../affine.h"
#include "../group_norm.h"
#include "activation.cuh"
#include "reduce.cuh"

namespace fastnorm::cuda {
namespace {

struct Statistics {
  double mean, rstd;
};

// ---- what both directions share

// Which elements of slice `slice` the threads take in block `block` of those that share it.
template <int kN>
class Walk {
 public:
  // Numbers of slices are blocks', and so less than 2^31.
  __device__ Walk(const SlicePlan& plan, unsigned slice, int block) : p(plan) {
    const unsigned inner = static_cast<unsigned>(p.inner), index = slice % inner;
    sample = static_cast<int>(slice / inner);
    channel = static_cast<int>(index) * p.entries;
    channels = min(p.entries, static_cast<int>(p.C) - channel);
    lane = static_cast<int>(threadIdx.x) % p.team;
    team = static_cast<int>(threadIdx.x) / p.team;
    teams = static_cast<int>(blockDim.x) / p.team;
    start_ = sample * p.sample_stride + index * p.slice_stride + lane * kN;
    span_ = p.strips ? channels / kN : p.span;
    const int64_t each = p.chunks_per_block();
    first_ = min(p.chunks, block * each);
    chunks = static_cast<int>(min(p.chunks, first_ + each) - first_);
  }

  // A thread's window, of the block's chunk `chunk`.
  struct Place {
    int64_t i;  // its first element
    int chunk;
    bool inside;  // there is one
  };
  __device__ Place place(int chunk) const {
    const Part part = part_of(chunk);
    return {start_ + part.run * p.run_stride + part.window * kN, chunk, chunk < chunks && part.window + lane < span_};
  }

  // The run of the slice that a window is of.
  __device__ int64_t run(const Place& at) const { return part_of(at.chunk).run; }

  // The row of the table that the run's coefficients are in: with strips, the row of the window's first element.
  __device__ int entry(int64_t run) const {
    if (p.strips) return lane * kN;
    return p.entries > 1 ? static_cast<int>(run) : 0;
  }

  // The byte of the mask that the window's bits belong to, and the first of them.
  struct Bits {
    int64_t byte;
    int first;
  };
  __device__ Bits bits(const Place& at) const {
    const Part part = part_of(at.chunk);
    const int64_t row = sample * p.mask_row_sample + channel / p.entries * p.mask_row_slice + part.run * p.mask_row_run;
    const int of_row = (p.strips ? channel : 0) + (part.window + lane) * kN;
    return {row * p.mask_row_bytes + of_row / 8, of_row % 8};
  }

  // The block's chunks of a run: begin .. end - 1.
  __device__ void chunks_of_run(int64_t run, int* begin, int* end) const {
    *begin = static_cast<int>(max(int64_t{0}, min(int64_t{chunks}, run * p.per_run - first_)));
    *end = static_cast<int>(max(int64_t{0}, min(int64_t{chunks}, (run + 1) * p.per_run - first_)));
  }

  // Where the statistics of channel c are, which D channels share.
  __device__ int64_t statistic(int64_t c, int64_t D) const { return sample * (p.C / D) + c / D; }

  const SlicePlan& p;
  int sample, channel;  // the slice's first
  int channels;         // that there are: the last strip may lack some
  int chunks;           // of the block
  int lane, team, teams;

 private:
  // Where a chunk is: its run, and its first window in that.
  struct Part {
    int64_t run;
    int window;
  };
  __device__ Part part_of(int chunk) const {
    if (p.per_run == 1) return {first_ + chunk, 0};
    const uint32_t of_slice = static_cast<uint32_t>(first_) + static_cast<uint32_t>(chunk),
                   run = p.by_per_run(of_slice);
    return {run, static_cast<int>(of_slice - run * static_cast<uint32_t>(p.per_run)) * p.team};
  }

  int64_t start_, first_;
  int span_;
};

// The block's shared memory (plan.h).
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
  __device__ Sums* sums() const { return at<Sums>(p.shared.sums); }
  __device__ acc_t* runs() const { return at<acc_t>(p.shared.runs); }

 private:
  template <typename V>
  __device__ static V* at(int64_t byte) {
    return reinterpret_cast<V*>(dynamic_shared<unsigned char>() + byte);
  }

  const SlicePlan& p;
};

// Column `column` of the block's table of coefficients, at kC rows from `entry` on. Rows beyond the last strip's
// channels are not read.
template <int kC, typename acc_t>
__device__ inline void load_column(const acc_t* table, const SlicePlan& p, int column, int entry, int channels,
                                   acc_t (&to)[kC]) {
#pragma unroll
  for (int j = 0; j < kC; ++j) to[j] = entry + j < channels ? table[column * p.entries + entry + j] : acc_t(0);
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

// Stores the window's bits, shifted to their place: windows of an octet that lie in several lanes meet in its first.
// What belongs to no element of the run is never read. By all threads of the warp.
template <int kN>
__device__ inline void store_mask(uint8_t* mask, const Walk<kN>& walk, const typename Walk<kN>::Place& at,
                                  unsigned bits) {
  const auto where = walk.bits(at);
  bits = at.inside ? bits << where.first : 0u;
  const int lanes = min(8 / kN, walk.p.team);
  for (int distance = 1; distance < lanes; distance *= 2) bits |= __shfl_xor_sync(kAllLanes, bits, distance);
  if (at.inside && walk.lane % lanes == 0) mask[where.byte] = static_cast<uint8_t>(bits);
}

// The windows that a thread holds in registers: of the block's first kHeld * teams chunks. Loaded at once, so that all
// of them are on their way before the first is used.
template <typename T, int kN, int kHeld>
class Held {
 public:
  using Window = Pack<T, kN>;

  // kOnce: nothing reads them again.
  template <bool kOnce>
  __device__ void load(const Walk<kN>& walk, const T* x) {
#pragma unroll
    for (int v = 0; v < kHeld; ++v) {
      const auto at = walk.place(v * walk.teams + walk.team);
      if (at.inside) windows_[v] = kOnce ? Window::load_streaming(x + at.i) : Window::load(x + at.i);
    }
  }
  __device__ const Window& operator[](int v) const { return windows_[v]; }

 private:
  Window windows_[kHeld];
};

// Calls use(place, v, what load(place) gave) for the windows held, kFlight of them loaded before the first is used, and
// then done(). By all threads: use may exchange values in a warp.
template <int kHeld, int kFlight, int kN, typename Load, typename Use, typename Done>
__device__ inline void for_held(const Walk<kN>& walk, const Load& load, const Use& use, const Done& done) {
  static_assert(kHeld % kFlight == 0);
#pragma unroll
  for (int first = 0; first < kHeld; first += kFlight) {
    typename Walk<kN>::Place at[kFlight];
    decltype(load(at[0])) loaded[kFlight];
#pragma unroll
    for (int v = 0; v < kFlight; ++v) {
      at[v] = walk.place((first + v) * walk.teams + walk.team);
      loaded[v] = load(at[v]);
    }
#pragma unroll
    for (int v = 0; v < kFlight; ++v) use(at[v], first + v, loaded[v]);
    done();
  }
}

// The same for the windows of the chunks from kFrom * teams on, whose use has no number.
template <int kFlight, int kFrom, int kN, typename Load, typename Use, typename Done>
__device__ inline void for_windows(const Walk<kN>& walk, const Load& load, const Use& use, const Done& done) {
#pragma unroll 1
  for (int chunk = kFrom * walk.teams; chunk < walk.chunks; chunk += kFlight * walk.teams) {
    typename Walk<kN>::Place at[kFlight];
    decltype(load(at[0])) loaded[kFlight];
#pragma unroll
    for (int v = 0; v < kFlight; ++v) {
      at[v] = walk.place(chunk + v * walk.teams + walk.team);
      loaded[v] = load(at[v]);
    }
#pragma unroll
    for (int v = 0; v < kFlight; ++v) use(at[v], loaded[v]);
    done();
  }
}

struct Nothing {};

// n kinds of sums of a thread, each for kC columns. With one column a window's elements are added first, then a batch of
// windows, then all, so that no chain of additions is long.
template <typename acc_t, int n, int kC>
class ThreadSums {
 public:
  // term(j), of each element of a window, to sum k.
  template <int kN, typename Term>
  __device__ void add(int k, const Term& term) {
    if constexpr (kC > 1) {
#pragma unroll
      for (int j = 0; j < kN; ++j) all_[k * kC + j] += term(j);
    } else {
      acc_t sum = term(0);
#pragma unroll
      for (int j = 1; j < kN; ++j) sum += term(j);
      batch_[k] += sum;
    }
  }
  __device__ void end_batch() {
    if constexpr (kC == 1) {
#pragma unroll
      for (int k = 0; k < n; ++k) {
        all_[k] += batch_[k];
        batch_[k] = 0;
      }
    }
  }
  // By kinds, then by columns.
  __device__ acc_t operator[](int i) const { return all_[i]; }

 private:
  acc_t all_[n * kC] = {}, batch_[kC > 1 ? 1 : n] = {};
};

// ---- forward

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

template <typename T, int kN, int kC, int kFlight>
class Forward {
 public:
  using acc_t = acc_type<T>;
  using Window = Pack<T, kN>;

  __device__ explicit Forward(const SliceForward& args) : a(args), p(args.plan), shared(args.plan) {}

  __device__ const T* x() const { return static_cast<const T*>(a.x); }

  // What a thread adds up: deviations from `shift` and their squares, of the windows held and of the others.
  template <int kHeld, typename Adder>
  __device__ void add_deviations(const Walk<kN>& walk, const Held<T, kN, kHeld>& held, const acc_t (&shift)[kC],
                                 Adder& sums, acc_t& count) const {
    const auto add = [&](const auto& at, const Window& loaded) {
      if (!at.inside) return;
      acc_t v[kN];
      loaded.unpack(v);
#pragma unroll
      for (int j = 0; j < kN; ++j) v[j] -= shift[j % kC];
      sums.template add<kN>(0, [&](int j) { return v[j]; });
      sums.template add<kN>(1, [&](int j) { return v[j] * v[j]; });
      count += static_cast<acc_t>(kN / kC);
    };
    const auto end = [&] { sums.end_batch(); };
    for_held<kHeld, kFlight>(
        walk, [](const auto&) { return Nothing{}; }, [&](const auto& at, int v, Nothing) { add(at, held[v]); }, end);
    for_windows<kFlight, kHeld>(walk, [&](const auto& at) { return load(at); }, add, end);
  }

  // Moments of the elements of each warp, to of_warps; then all threads of the block may read them. Whole planes.
  template <int kHeld>
  __device__ void moments_of_warps(const Walk<kN>& walk, const Held<T, kN, kHeld>& held, Moments* of_warps) const {
    SMEM_ARRAY(unsigned, inexact, 1);
    if (threadIdx.x == 0) *inexact = 0;
    __syncthreads();
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    acc_t first[2] = {};
    add_held(walk, held, first);
    warp_sum(first);
    const acc_t shift[1] = {first[1] > 0 ? first[0] / first[1] : acc_t(0)};
    ThreadSums<acc_t, 2, 1> sums;
    acc_t count = 0;
    add_deviations(walk, held, shift, sums, count);
    acc_t sum[3] = {sums[0], sums[1], count};
    warp_sum(sum);
    if (threadIdx.x % kWarp == 0) {
      const double from = static_cast<double>(shift[0]), d = static_cast<double>(sum[0]);
      const double d2 = static_cast<double>(sum[1]);
      if (!std::is_same_v<acc_t, double> && out_of_range(from, d, d2)) atomicOr(inexact, 1u);
      of_warps[warp] = sum[2] > 0 ? shifted_moments(static_cast<double>(sum[2]), from, d, d2) : Moments{};
    }
    __syncthreads();
    if (!*inexact) return;
    __syncthreads();  // all have seen that
    if (threadIdx.x % kWarp == 0) of_warps[warp] = Moments{};
    __syncthreads();
    exact_moments(walk, 1, [&](int, const Moments& m) { of_warps[0] = m; });
  }

  // Moments of the slice's elements in this block, or with strips of each channel's: store(which, moments) by one thread
  // each, and again if the first were not exact.
  template <int kHeld, typename Store>
  __device__ void moments(const Walk<kN>& walk, const Held<T, kN, kHeld>& held, const Store& store) const {
    SMEM_ARRAY(unsigned, inexact, 1);
    if (threadIdx.x == 0) *inexact = 0;
    const int groups = p.strips ? walk.channels : 1;
    find_shift(walk, held, groups);

    constexpr int n = 2 * kC + 1;
    ThreadSums<acc_t, 2, kC> sums;
    acc_t count = 0, shift[kC];
    load_column<kC>(shared.shift(), p, 0, p.strips ? walk.lane * kN : 0, groups, shift);
    add_deviations(walk, held, shift, sums, count);
    acc_t sum[n];
#pragma unroll
    for (int k = 0; k < n; ++k) sum[k] = k < 2 * kC ? sums[k] : count;
    column_sums(p, sum, shared.partial(), shared.totals());
    for (int g = static_cast<int>(threadIdx.x); g < groups; g += static_cast<int>(blockDim.x)) {
      const double* of_column = shared.totals() + g / kC * n;
      const double from = static_cast<double>(shared.shift()[g]), elements = of_column[2 * kC];
      const double first = of_column[g % kC], second = of_column[kC + g % kC];
      if (!std::is_same_v<acc_t, double> && elements > 0 && out_of_range(from, first, second)) atomicOr(inexact, 1u);
      store(g, elements > 0 ? shifted_moments(elements, from, first, second) : Moments{});
    }
    __syncthreads();
    if (*inexact) exact_moments(walk, groups, store);
  }

  // Of the slice's channel e.
  struct Parameters {
    double weight, bias;
  };
  __device__ Parameters parameters(const Walk<kN>& walk, int e) const {
    const int64_t c = walk.channel + e;
    return {read(a.weight, a.param_dtype, c, 1.0), read(a.bias, a.param_dtype, c, 0.0)};
  }

  // Its coefficients, and what backward needs of batch renormalisation if `keep`.
  __device__ SliceAffine<acc_t> affine(const Walk<kN>& walk, int e, Parameters of_channel, const Statistics& s,
                                       bool keep) const {
    if (a.r) {
      const int64_t c = walk.channel + e;
      const Correction by = correction(a, c, s);
      of_channel.bias += of_channel.weight * by.d;
      of_channel.weight *= by.r;
      if (keep) {
        a.r[c] = by.r;
        a.d[c] = by.d;
      }
    }
    return {s.mean, s.rstd, of_channel.weight, of_channel.bias};
  }

  // The table of the coefficients of all channels of the slice, of the statistics of each. One block of those that share
  // the slice keeps what backward needs. own: the parameters of channel threadIdx.x.
  template <typename OfChannel>
  __device__ void table(const Walk<kN>& walk, bool keep, const Parameters& own, const OfChannel& statistics) const {
    const int first = static_cast<int>(threadIdx.x);
    for (int e = first; e < walk.channels; e += static_cast<int>(blockDim.x)) {
      const int64_t c = walk.channel + e;
      const auto row = affine(walk, e, e == first ? own : parameters(walk, e), statistics(c), keep);
      shared.table()[e] = row.mean;
      shared.table()[p.entries + e] = row.scale;
      shared.table()[2 * p.entries + e] = row.shift;
    }
    __syncthreads();
  }

  // Of a window's columns.
  struct Coefficients {
    acc_t mean[kC], scale[kC], shift[kC];
  };
  __device__ Coefficients coefficients(const Walk<kN>& walk) const {
    Coefficients c;
    load_column<kC>(shared.table(), p, 0, walk.entry(0), walk.channels, c.mean);
    load_column<kC>(shared.table(), p, 1, walk.entry(0), walk.channels, c.scale);
    load_column<kC>(shared.table(), p, 2, walk.entry(0), walk.channels, c.shift);
    return c;
  }

  // y = activation((x - mean) * scale + shift + residual)
  template <int kHeld>
  __device__ void normalize(const Walk<kN>& walk, const Held<T, kN, kHeld>& held, Coefficients c) const {
    const auto use = [&](const auto& at, const Window& loaded, const Window& residual) {
      acc_t z[kN];
      if (at.inside) {
        if (p.by_run()) {
          const int entry = walk.entry(walk.run(at));
          load_column<kC>(shared.table(), p, 1, entry, walk.channels, c.scale);
          load_column<kC>(shared.table(), p, 2, entry, walk.channels, c.shift);
        }
        loaded.unpack(z);
#pragma unroll
        for (int j = 0; j < kN; ++j) z[j] = multiply_add(z[j] - c.mean[j % kC], c.scale[j % kC], c.shift[j % kC]);
        if (a.residual) {
          acc_t r[kN];
          residual.unpack(r);
#pragma unroll
          for (int j = 0; j < kN; ++j) z[j] += r[j];
        }
      }
      if (a.mask) store_mask(a.mask, walk, at, at.inside ? positive_bits(z) : 0u);
      if (!at.inside) return;
      activate(a.activation, z);
      Window::pack(z).store_streaming(static_cast<T*>(a.y) + at.i);
    };
    const auto nothing = [] {};
    for_held<kHeld, kFlight>(
        walk, [&](const auto& at) { return load_residual(at); },
        [&](const auto& at, int v, const Window& residual) { use(at, held[v], residual); }, nothing);
    struct Loaded {
      Window x, residual;
    };
    for_windows<kFlight, kHeld>(
        walk, [&](const auto& at) { return Loaded{load_last(at), load_residual(at)}; },
        [&](const auto& at, const Loaded& w) { use(at, w.x, w.residual); }, nothing);
  }

 private:
  __device__ Window load(const typename Walk<kN>::Place& at) const {
    Window w;
    if (at.inside) w = Window::load(x() + at.i);
    return w;
  }
  __device__ Window load_last(const typename Walk<kN>::Place& at) const {
    Window w;
    if (at.inside) w = Window::load_streaming(x() + at.i);
    return w;
  }
  __device__ Window load_residual(const typename Walk<kN>::Place& at) const {
    Window w;
    if (a.residual && at.inside) w = Window::load_streaming(static_cast<const T*>(a.residual) + at.i);
    return w;
  }

  // Sums and numbers of a thread's elements among the windows held, by columns.
  template <int kHeld>
  __device__ void add_held(const Walk<kN>& walk, const Held<T, kN, kHeld>& held, acc_t (&sum)[kC + 1]) const {
    ThreadSums<acc_t, 1, kC> sums;
    for_held<kHeld, kFlight>(
        walk, [](const auto&) { return Nothing{}; },
        [&](const auto& at, int w, Nothing) {
          if (!at.inside) return;
          acc_t v[kN];
          held[w].unpack(v);
          sums.template add<kN>(0, [&](int j) { return v[j]; });
          sum[kC] += static_cast<acc_t>(kN / kC);
        },
        [&] { sums.end_batch(); });
#pragma unroll
    for (int k = 0; k < kC; ++k) sum[k] = sums[k];
  }

  // The shift of each group: a number near its mean.
  template <int kHeld>
  __device__ void find_shift(const Walk<kN>& walk, const Held<T, kN, kHeld>& held, int groups) const {
    constexpr int n = kC + 1;
    acc_t sum[n] = {};
    add_held(walk, held, sum);
    column_sums(p, sum, shared.partial(), shared.totals());
    for (int g = static_cast<int>(threadIdx.x); g < groups; g += static_cast<int>(blockDim.x)) {
      const double* of_column = shared.totals() + g / kC * n;
      shared.shift()[g] = static_cast<acc_t>(of_column[g % kC] / of_column[kC]);
    }
    __syncthreads();
  }

  // moments() in double, a group at a time: for numbers whose squares float32 does not hold.
  template <typename Store>
  __device__ void exact_moments(const Walk<kN>& walk, int groups, const Store& store) const {
    SMEM_ARRAY(double, scratch, 2 * kMaxWarps);
    for (int g = 0; g < groups; ++g) {
      double total[2], count = 0, mean = 0;
      for (int sweep = 0; sweep < 2; ++sweep) {
        double sum[2] = {0, 0};
        for_windows<1, 0>(
            walk, [&](const auto& at) { return load(at); },
            [&](const auto& at, const Window& loaded) {
              if (!at.inside) return;
              acc_t v[kN];
              loaded.unpack(v);
#pragma unroll
              for (int j = 0; j < kN; ++j) {
                if (p.strips && walk.lane * kN + j != g) continue;
                const double d = static_cast<double>(v[j]) - mean;
                sum[0] += sweep == 0 ? 1 : d * d;
                sum[1] += d;
              }
            },
            [] {});
        block_sum(sum, total, scratch);
        if (sweep == 0) {
          count = total[0];
          mean = total[1] / count;
        }
      }
      if (threadIdx.x == 0 && count > 0) store(g, shifted_moments(count, mean, total[1], total[0]));
    }
    __syncthreads();
  }

  const SliceForward& a;
  const SlicePlan& p;
  const Shared<T> shared;
};

// Where block `block` of a split grid leaves what it knows of its slice's channel e.
__device__ inline int64_t partial_index(const SlicePlan& p, unsigned block, int e) {
  const int64_t slice = block / static_cast<unsigned>(p.parts), part = block % static_cast<unsigned>(p.parts);
  return (slice * p.entries + e) * p.parts + part;
}

// Windows that split kernels load before they know their coefficients.
constexpr int kAhead = 4;

// What the warps of all blocks of a cluster left at `mine` in their shared memory: number k of them.
template <typename V>
__device__ inline V of_cluster(V* mine, int64_t k) {
  const int warps = static_cast<int>(blockDim.x) / kWarp, rank = static_cast<int>(k) / warps;
  return *map_shared_rank(mine + (static_cast<int>(k) - rank * warps), static_cast<unsigned>(rank));
}

// A cluster a slice.
template <typename T, int kN>
__global__ void __launch_bounds__(kSliceThreads, 2) forward_resident(const __grid_constant__ SliceForward a) {
  const SlicePlan& p = a.plan;
  const Forward<T, kN, 1, 2> kernel(a);
  const unsigned rank = cluster_rank();
  const Walk<kN> walk(p, blockIdx.x / static_cast<unsigned>(p.cluster), static_cast<int>(rank));
  Held<T, kN, windows_held(false)> held;
  held.template load<false>(walk, kernel.x());
  const auto own = kernel.parameters(walk, p.by_run() ? min(static_cast<int>(threadIdx.x), walk.channels - 1) : 0);
  Moments* const mine = Shared<T>(p).template exchange<Moments>();
  kernel.moments_of_warps(walk, held, mine);
  if (p.cluster > 1) cluster_sync();
  const Moments m = merge_moments(
      static_cast<int>(threadIdx.x) % kWarp, kWarp, p.cluster * static_cast<int64_t>(blockDim.x) / kWarp,
      [&](int64_t k) { return of_cluster(mine, k); }, [](auto& v) { warp_sum(v); });
  const bool keep = rank == 0 && threadIdx.x == 0;
  const Statistics s = keep_statistics(a, walk.statistic(walk.channel, a.D), m.mean, m.biased_variance(), keep);
  if (p.by_run()) {
    kernel.table(walk, rank == 0, own, [&](int64_t) { return s; });
    kernel.normalize(walk, held, kernel.coefficients(walk));
  } else {
    const auto affine = kernel.affine(walk, 0, own, s, keep);
    kernel.normalize(walk, held, {{affine.mean}, {affine.scale}, {affine.shift}});
  }
  if (keep) a.update.average_and_count(walk.channel, m.mean, m.biased_variance());  // for which y does not wait
  if (p.cluster > 1) cluster_sync();  // no block leaves while another reads its shared memory
}

// A block a part of a slice, here and below.
template <typename T, int kN, int kC>
__global__ void __launch_bounds__(kSliceThreads, 2) forward_reduce(const __grid_constant__ SliceForward a) {
  const SlicePlan& p = a.plan;
  const Forward<T, kN, kC, kAhead> kernel(a);
  const unsigned parts = static_cast<unsigned>(p.parts);
  const Walk<kN> walk(p, blockIdx.x / parts, static_cast<int>(blockIdx.x % parts));
  Held<T, kN, kAhead> held;
  held.template load<false>(walk, kernel.x());
  kernel.moments(walk, held, [&](int g, const Moments& m) {
    static_cast<Moments*>(a.partial)[partial_index(p, blockIdx.x, g)] = m;
  });
}

template <typename T, int kN, int kC>
__global__ void __launch_bounds__(kSliceThreads, 2) forward_elements(const __grid_constant__ SliceForward a) {
  const SlicePlan& p = a.plan;
  const Forward<T, kN, kC, kAhead> kernel(a);
  const unsigned parts = static_cast<unsigned>(p.parts), block = gridDim.x - 1 - blockIdx.x, part = block % parts;
  const Walk<kN> walk(p, block / parts, static_cast<int>(part));
  Held<T, kN, kAhead> held;
  held.template load<true>(walk, kernel.x());
  kernel.table(walk, part == 0, kernel.parameters(walk, min(static_cast<int>(threadIdx.x), walk.channels - 1)),
               [&](int64_t c) {
                 if (a.use_running)
                   return keep_statistics(a, c, read(a.running_mean, a.stats_dtype, c, 0.0),
                                          read(a.running_var, a.stats_dtype, c, 1.0), part == 0);
                 const int64_t i = walk.statistic(c, a.D);
                 return Statistics{a.mean[i], a.rstd[i]};
               });
  kernel.normalize(walk, held, kernel.coefficients(walk));
}

// Where the parts of channel c of sample n are, one after the other.
__device__ inline int64_t first_partial(const SlicePlan& p, unsigned n, unsigned c) {
  const unsigned entries = static_cast<unsigned>(p.entries);
  return ((n * p.inner + c / entries) * entries + c % entries) * p.parts;
}

constexpr int kMergeThreads = 256, kMergeWarps = kMergeThreads / kWarp;

// The merges' threads: teams of `warps` of them, a power of two, a team a group. Groups, and the parts of one, are fewer
// than 2^31.
class MergeTeam {
 public:
  __device__ MergeTeam(int64_t groups, int warps)
      : group(blockIdx.x * (kMergeWarps / warps) + threadIdx.x / (warps * kWarp)),
        is_there(group < groups),
        thread(static_cast<int>(threadIdx.x) % (warps * kWarp)),
        threads(warps * kWarp) {}

  // Over the team of what a warp's lanes have alike; every thread gets it.
  template <int n>
  __device__ void sum_of_warps(double (&v)[n]) const {
    SMEM_ARRAY(double, scratch, 2 * kMaxWarps);
    static_assert(n <= 2);
    if (threads > kWarp) cuda::sum_of_warps(v, threads / kWarp, scratch);
  }

  const unsigned group;
  const bool is_there;  // of the last block's teams some have no group, but take part in its barriers
  const int thread, threads;
};

// Merges the parts of a group's channels.
__global__ void __launch_bounds__(kMergeThreads)
    merge_statistics(const __grid_constant__ SliceForward a, int64_t groups, int warps) {
  const SlicePlan& p = a.plan;
  const MergeTeam team(groups, warps);
  const unsigned D = static_cast<unsigned>(a.D), per_sample = static_cast<unsigned>(p.C) / D;
  const unsigned n = team.group / per_sample, c = team.group % per_sample * D, parts = static_cast<unsigned>(p.parts);
  const Moments m = merge_moments(
      team.thread, team.threads, team.is_there ? static_cast<int64_t>(D) * parts : 0,
      [&](int64_t k) {
        const unsigned part = static_cast<unsigned>(k);
        return static_cast<const Moments*>(a.partial)[first_partial(p, n, c + part / parts) + part % parts];
      },
      [&](auto& v) {
        warp_sum(v);
        team.sum_of_warps(v);
      });
  if (!team.is_there || team.thread != 0) return;
  keep_statistics(a, team.group, m.mean, m.biased_variance(), true);
  a.update.average_and_count(team.group, m.mean, m.biased_variance());
}

// ---- backward

// Those of channel c in sample n, by one thread: for parameter_gradients(), or of one sample all that is wanted.
//   dweight = r * sum of dz * xhat + d * sum of dz,  dbias = sum of dz
__device__ inline void keep_sums(const SliceBackward& a, int64_t n, int64_t c, const Sums& s) {
  const int64_t C = a.plan.C;
  if (a.channel_sums) {
    a.channel_sums[n * C + c] = s;
    return;
  }
  if (a.dweight) write(a.dweight, a.param_dtype, c, a.r ? a.r[c] * s.dz_xhat + a.d[c] * s.dz : s.dz_xhat);
  if (a.dbias) write(a.dbias, a.param_dtype, c, s.dz);
  if (a.sums) {
    a.sums[c] = s.dz;
    a.sums[C + c] = s.dz_xhat;
  }
}

template <typename T, int kN, int kC, int kFlight>
class Backward {
 public:
  using acc_t = acc_type<T>;
  using Window = Pack<T, kN>;
  using Place = typename Walk<kN>::Place;

  __device__ explicit Backward(const SliceBackward& args) : a(args), p(args.plan), shared(args.plan) {}

  __device__ const T* x() const { return static_cast<const T*>(a.x); }
  __device__ const T* dy() const { return static_cast<const T*>(a.dy); }

  // What xhat is multiplied by.
  __device__ double weight(int64_t c) const { return read(a.weight, a.param_dtype, c, 1.0) * (a.r ? a.r[c] : 1.0); }

  // The coefficients that are known before the sums.
  __device__ void table(const Walk<kN>& walk) const {
    for (int e = static_cast<int>(threadIdx.x); e < walk.channels; e += static_cast<int>(blockDim.x)) {
      const int64_t c = walk.channel + e;
      const Statistics s = statistics(walk, c);
      double bias = read(a.bias, a.param_dtype, c, 0.0);
      if (a.r) bias += read(a.weight, a.param_dtype, c, 1.0) * a.d[c];
      const SliceAffine<acc_t> affine(s.mean, s.rstd, weight(c), bias);
      acc_t* const row = shared.table() + e;
      row[kMean * p.entries] = affine.mean;
      row[kScale * p.entries] = affine.scale;
      row[kShift * p.entries] = affine.shift;
      row[kPower * p.entries] = SliceSummand<acc_t>(s.mean, s.rstd).power;
    }
    __syncthreads();
  }

  // Those that come from the sums of g = dz * weight over the slice.
  template <typename GroupSums>
  __device__ void table_of_sums(const Walk<kN>& walk, const GroupSums& sums) const {
    for (int e = static_cast<int>(threadIdx.x); e < walk.channels; e += static_cast<int>(blockDim.x)) {
      const int64_t c = walk.channel + e;
      const Statistics s = statistics(walk, c);
      const Sums g = a.constant_statistics ? Sums{0, 0} : sums(c);
      const GroupGradient<acc_t> gradient(a.count, s.mean, s.rstd, g.dz, g.dz_xhat);
      shared.table()[kSlope * p.entries + e] = gradient.slope;
      shared.table()[kOffset * p.entries + e] = gradient.offset;
    }
    __syncthreads();
  }

  // Adds sums of dz and of dz * (xhat - rest) to those of the thread, in the windows held and in the others; done(chunk)
  // after each window.
  template <int kHeld, typename Adder, typename Done>
  __device__ void add_gradients(const Walk<kN>& walk, const Held<T, kN, kHeld>& held_x,
                                const Held<T, kN, kHeld>& held_dy, Adder& sums, const Done& done) const {
    visit_activated(
        [&](auto activated) { add_gradients_of<decltype(activated)::value>(walk, held_x, held_dy, sums, done); });
  }
  template <bool kActivated, int kHeld, typename Adder, typename Done>
  __device__ void add_gradients_of(const Walk<kN>& walk, const Held<T, kN, kHeld>& held_x,
                                   const Held<T, kN, kHeld>& held_dy, Adder& sums, const Done& done) const {
    acc_t mean[kC], power[kC];
    load_column<kC>(shared.table(), p, kMean, walk.entry(0), walk.channels, mean);
    load_column<kC>(shared.table(), p, kPower, walk.entry(0), walk.channels, power);
    const auto add = [&](const Place& at, const Window& loaded_x, const Window& loaded_dy, const Beside& beside) {
      if (at.inside) {
        acc_t v[kN], dz[kN];
        loaded_x.unpack(v);
        loaded_dy.unpack(dz);
        if constexpr (kActivated) activation_gradient(walk, at, beside, v, dz);
        sums.template add<kN>(0, [&](int j) { return dz[j]; });
        sums.template add<kN>(1, [&](int j) { return dz[j] * ((v[j] - mean[j % kC]) * power[j % kC]); });
      }
      done(at.chunk);
    };
    const auto end = [&] { sums.end_batch(); };
    for_held<kHeld, kFlight>(
        walk, [&](const Place& at) { return load_beside<kActivated>(walk, at); },
        [&](const Place& at, int v, const Beside& beside) { add(at, held_x[v], held_dy[v], beside); }, end);
    for_windows<kFlight, kHeld>(
        walk, [&](const Place& at) { return load<false, kActivated>(walk, at); },
        [&](const Place& at, const Loaded& w) { add(at, w.x, w.dy, w.beside); }, end);
  }

  // The sums of dz and dz * xhat from those that the loop above has made.
  __device__ static Sums with_rest(const Sums& s, const Statistics& of_slice) {
    return {s.dz, SliceSummand<acc_t>(of_slice.mean, of_slice.rstd).sum_g_xhat(s.dz, s.dz_xhat)};
  }

  // The sums of each channel of the slice over the block's elements: store(entry, sums) by one thread each.
  template <int kHeld, typename Store>
  __device__ void sums(const Walk<kN>& walk, const Held<T, kN, kHeld>& held_x, const Held<T, kN, kHeld>& held_dy,
                       const Store& store) const {
    constexpr int n = 2 * kC;
    ThreadSums<acc_t, 2, kC> sums;
    add_gradients(walk, held_x, held_dy, sums, [](int) {});
    acc_t sum[n];
#pragma unroll
    for (int k = 0; k < n; ++k) sum[k] = sums[k];
    column_sums(p, sum, shared.partial(), shared.totals());
    for (int e = static_cast<int>(threadIdx.x); e < walk.channels; e += static_cast<int>(blockDim.x)) {
      const double* const of_column = shared.totals() + e / kC * n + e % kC;
      store(e, with_rest({of_column[0], of_column[kC]}, statistics(walk, walk.channel + e)));
    }
  }

  // The sums of each warp over its elements, without the rest, to of_warps.
  template <int kHeld>
  __device__ void sums_of_warps(const Walk<kN>& walk, const Held<T, kN, kHeld>& held_x,
                                const Held<T, kN, kHeld>& held_dy, Sums* of_warps) const {
    ThreadSums<acc_t, 2, kC> sums;
    add_gradients(walk, held_x, held_dy, sums, [](int) {});
    double sum[2] = {static_cast<double>(sums[0]), static_cast<double>(sums[kC])};
    warp_sum(sum);
    if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = {sum[0], sum[1]};
  }

  // The sums of each channel, a run, over the block's elements, without the rest, to of_runs.
  template <int kHeld>
  __device__ void sums_of_runs(const Walk<kN>& walk, const Held<T, kN, kHeld>& held_x,
                               const Held<T, kN, kHeld>& held_dy, Sums* of_runs) const {
    ThreadSums<acc_t, 2, kC> sums;
    add_gradients(walk, held_x, held_dy, sums, [&](int chunk) {  // which is of one run
      sums.end_batch();
      acc_t sum[2] = {sums[0], sums[kC]};
      warp_sum(sum, 1, p.team);
      sums = {};
      if (walk.lane != 0 || chunk >= walk.chunks) return;
      shared.runs()[2 * chunk] = sum[0];
      shared.runs()[2 * chunk + 1] = sum[1];
    });
    __syncthreads();
    for (int e = static_cast<int>(threadIdx.x); e < walk.channels; e += static_cast<int>(blockDim.x))
      of_runs[e] = sum_of_run(walk, e);
  }

  // Of a window's columns.
  struct Coefficients {
    acc_t mean[kC], scale[kC], slope[kC], offset[kC];
  };
  __device__ Coefficients coefficients(const Walk<kN>& walk) const {
    Coefficients c;
    load_column<kC>(shared.table(), p, kMean, walk.entry(0), walk.channels, c.mean);
    load_column<kC>(shared.table(), p, kScale, walk.entry(0), walk.channels, c.scale);
    load_column<kC>(shared.table(), p, kSlope, walk.entry(0), walk.channels, c.slope);
    load_column<kC>(shared.table(), p, kOffset, walk.entry(0), walk.channels, c.offset);
    return c;
  }
  // Of planes, whose slice has these sums of g = dz * weight.
  __device__ Coefficients coefficients(const Walk<kN>& walk, const Statistics& s, const Sums& g) const {
    GroupGradient<acc_t> gradient(a.count, s.mean, s.rstd, g.dz, g.dz_xhat);
    return {
        {shared.table()[kMean * p.entries]}, {shared.table()[kScale * p.entries]}, {gradient.slope}, {gradient.offset}};
  }

  // dresidual = dz;  dx = dz * scale - ((x - mean) * slope + offset)
  template <int kHeld>
  __device__ void elements(const Walk<kN>& walk, const Held<T, kN, kHeld>& held_x, const Held<T, kN, kHeld>& held_dy,
                           const Coefficients& c) const {
    visit_activated([&](auto activated) { elements_of<decltype(activated)::value>(walk, held_x, held_dy, c); });
  }
  template <bool kActivated, int kHeld>
  __device__ void elements_of(const Walk<kN>& walk, const Held<T, kN, kHeld>& held_x, const Held<T, kN, kHeld>& held_dy,
                              Coefficients c) const {
    const auto use = [&](const Place& at, const Window& loaded_x, const Window& loaded_dy, const Beside& beside) {
      if (!at.inside) return;
      acc_t v[kN], dz[kN];
      loaded_x.unpack(v);
      loaded_dy.unpack(dz);
      if constexpr (kActivated) activation_gradient(walk, at, beside, v, dz);
      if (a.dresidual) Window::pack(dz).store_streaming(static_cast<T*>(a.dresidual) + at.i);
      if (a.dx == nullptr) return;
      if (p.by_run()) load_column<kC>(shared.table(), p, kScale, walk.entry(walk.run(at)), walk.channels, c.scale);
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        dz[j] *= c.scale[j % kC];
        if (!a.constant_statistics) dz[j] -= multiply_add(v[j] - c.mean[j % kC], c.slope[j % kC], c.offset[j % kC]);
      }
      Window::pack(dz).store_streaming(static_cast<T*>(a.dx) + at.i);
    };
    const auto nothing = [] {};
    for_held<kHeld, kFlight>(
        walk, [&](const Place& at) { return load_beside<kActivated>(walk, at); },
        [&](const Place& at, int v, const Beside& beside) { use(at, held_x[v], held_dy[v], beside); }, nothing);
    for_windows<kFlight, kHeld>(
        walk, [&](const Place& at) { return load<true, kActivated>(walk, at); },
        [&](const Place& at, const Loaded& w) { use(at, w.x, w.dy, w.beside); }, nothing);
  }

  __device__ Statistics statistics(const Walk<kN>& walk, int64_t c) const {
    const int64_t i = walk.statistic(c, a.D);
    return {a.mean[i], a.rstd[i]};
  }

 private:
  // Columns of the table.
  enum { kMean, kScale, kShift, kPower, kSlope, kOffset, kColumns };
  static_assert(kColumns == kBackwardColumns);

  // f(whether there is an activation), apart: the activations' code would take registers of a loop that has none.
  template <typename F>
  __device__ void visit_activated(const F& f) const {
    if (a.activation == Activation::kNone) {
      f(std::false_type{});
    } else {
      f(std::true_type{});
    }
  }

  // What the activation's gradient needs.
  struct Beside {
    Window residual;
    unsigned positive;
  };
  struct Loaded {
    Window x, dy;
    Beside beside;
  };

  template <bool kActivated>
  __device__ Beside load_beside(const Walk<kN>& walk, const Place& at) const {
    Beside b;
    if (!kActivated || !at.inside) return b;
    if (a.mask) {
      const auto where = walk.bits(at);
      b.positive = static_cast<unsigned>(a.mask[where.byte]) >> where.first;
    } else if (a.residual) {
      b.residual = Window::load(static_cast<const T*>(a.residual) + at.i);
    }
    return b;
  }

  // kLast: nothing reads x and dy again.
  template <bool kLast, bool kActivated>
  __device__ Loaded load(const Walk<kN>& walk, const Place& at) const {
    Loaded w;
    if (at.inside) {
      if (a.reads_x) w.x = kLast ? Window::load_streaming(x() + at.i) : Window::load(x() + at.i);
      w.dy = kLast ? Window::load_streaming(dy() + at.i) : Window::load(dy() + at.i);
    }
    w.beside = load_beside<kActivated>(walk, at);
    return w;
  }

  // dz becomes dy * activation'(z), z as forward had it or its sign from the mask.
  __device__ void activation_gradient(const Walk<kN>& walk, const Place& at, const Beside& beside, const acc_t (&v)[kN],
                                      acc_t (&dz)[kN]) const {
    if (a.mask) return activate_backward(a.activation, dz, beside.positive);
    acc_t mean[kC], scale[kC], shift[kC], z[kN];
    const int entry = walk.entry(p.by_run() ? walk.run(at) : 0);
    load_column<kC>(shared.table(), p, kMean, entry, walk.channels, mean);
    load_column<kC>(shared.table(), p, kScale, entry, walk.channels, scale);
    load_column<kC>(shared.table(), p, kShift, entry, walk.channels, shift);
#pragma unroll
    for (int j = 0; j < kN; ++j) z[j] = multiply_add(v[j] - mean[j % kC], scale[j % kC], shift[j % kC]);
    if (a.residual) {
      acc_t r[kN];
      beside.residual.unpack(r);
#pragma unroll
      for (int j = 0; j < kN; ++j) z[j] += r[j];
    }
    activate_backward(a.activation, dz, z);
  }

  __device__ Sums sum_of_run(const Walk<kN>& walk, int run) const {
    int begin, end;
    walk.chunks_of_run(run, &begin, &end);
    Sums all{0, 0};
    for (int chunk = begin; chunk < end; ++chunk) {
      all.dz += static_cast<double>(shared.runs()[2 * chunk]);
      all.dz_xhat += static_cast<double>(shared.runs()[2 * chunk + 1]);
    }
    return all;
  }

  const SliceBackward& a;
  const SlicePlan& p;
  const Shared<T> shared;
};

// As forward_resident().
template <typename T, int kN>
__global__ void __launch_bounds__(kSliceThreads, 2) backward_resident(const __grid_constant__ SliceBackward a) {
  const SlicePlan& p = a.plan;
  const Backward<T, kN, 1, 2> kernel(a);
  const Shared<T> shared(p);
  const unsigned rank = cluster_rank();
  const Walk<kN> walk(p, blockIdx.x / static_cast<unsigned>(p.cluster), static_cast<int>(rank));
  Held<T, kN, windows_held(true)> x, dy;
  x.template load<false>(walk, kernel.x());
  dy.template load<false>(walk, kernel.dy());
  kernel.table(walk);
  Sums* const mine = shared.template exchange<Sums>();
  double g[2] = {0, 0};  // of dz * weight over the slice, in every warp
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (p.by_run()) {
    kernel.sums_of_runs(walk, x, dy, mine);
  } else {
    kernel.sums_of_warps(walk, x, dy, mine);
  }
  p.cluster > 1 ? cluster_sync() : __syncthreads();
  const Statistics s = kernel.statistics(walk, walk.channel);
  if (p.by_run()) {
    for (int e = static_cast<int>(threadIdx.x); e < walk.channels; e += static_cast<int>(blockDim.x)) {
      Sums all{0, 0};
      for (int k = 0; k < p.cluster; ++k) {
        const Sums part = *map_shared_rank(mine + e, k);
        all.dz += part.dz;
        all.dz_xhat += part.dz_xhat;
      }
      all = kernel.with_rest(all, s);
      const double weight = kernel.weight(walk.channel + e);
      shared.sums()[e] = {weight * all.dz, weight * all.dz_xhat};
      if (rank == 0) keep_sums(a, walk.sample, walk.channel + e, all);
    }
    __syncthreads();
    for (int e = lane; e < walk.channels; e += kWarp) {
      g[0] += shared.sums()[e].dz;
      g[1] += shared.sums()[e].dz_xhat;
    }
    warp_sum(g);
  } else {
    const double weight = kernel.weight(walk.channel);
    for (int k = lane; k < p.cluster * static_cast<int>(blockDim.x) / kWarp; k += kWarp) {
      const Sums part = of_cluster(mine, k);
      g[0] += part.dz;
      g[1] += part.dz_xhat;
    }
    warp_sum(g);
    const Sums all = kernel.with_rest({g[0], g[1]}, s);
    if (rank == 0 && threadIdx.x == 0) keep_sums(a, walk.sample, walk.channel, all);
    g[0] = weight * all.dz;
    g[1] = weight * all.dz_xhat;
  }
  if (a.dx || a.dresidual) kernel.elements(walk, x, dy, kernel.coefficients(walk, s, {g[0], g[1]}));
  if (p.cluster > 1) cluster_sync();  // no block leaves while another reads its shared memory
}

// The same of x and of dy: in the sweep for the sums fewer and, of 16 bytes of one channel, more blocks at once were
// faster, in that for dx more windows.
template <int kN>
constexpr int kReduceAhead = kN > 4 ? 2 : 4;
template <int kC>
constexpr int kElementsAhead = kC > 4 ? 2 : 4;

template <typename T, int kN, int kC>
__global__ void __launch_bounds__(kSliceThreads, kC == 1 && kN > 4 ? 3 : 2)
    backward_reduce(const __grid_constant__ SliceBackward a) {
  const SlicePlan& p = a.plan;
  const Backward<T, kN, kC, kReduceAhead<kN>> kernel(a);
  const unsigned parts = static_cast<unsigned>(p.parts);
  const Walk<kN> walk(p, blockIdx.x / parts, static_cast<int>(blockIdx.x % parts));
  Held<T, kN, kReduceAhead<kN>> x, dy;
  x.template load<false>(walk, kernel.x());
  dy.template load<false>(walk, kernel.dy());
  kernel.table(walk);
  kernel.sums(walk, x, dy, [&](int e, const Sums& s) { a.partial[partial_index(p, blockIdx.x, e)] = s; });
}

template <typename T, int kN, int kC>
__global__ void __launch_bounds__(kSliceThreads, 2) backward_elements(const __grid_constant__ SliceBackward a) {
  const SlicePlan& p = a.plan;
  const Backward<T, kN, kC, kElementsAhead<kC>> kernel(a);
  const unsigned parts = static_cast<unsigned>(p.parts), block = gridDim.x - 1 - blockIdx.x;
  const Walk<kN> walk(p, block / parts, static_cast<int>(block % parts));
  Held<T, kN, kElementsAhead<kC>> x, dy;
  if (a.reads_x) x.template load<true>(walk, kernel.x());
  dy.template load<true>(walk, kernel.dy());
  kernel.table(walk);
  kernel.table_of_sums(walk, [&](int64_t c) {
    if (a.given_sums == nullptr) return a.group_sums[walk.statistic(c, a.D)];
    return Sums{kernel.weight(c) * a.given_sums[c], kernel.weight(c) * a.given_sums[p.C + c]};  // c is a group
  });
  kernel.elements(walk, x, dy, kernel.coefficients(walk));
}

// Adds the parts of each of a group's channels, and the channels with their weights. A channel has as many lanes as parts,
// so that a warp takes several of few parts; of more than 32 it has all the team's threads.
__global__ void __launch_bounds__(kMergeThreads)
    merge_sums(const __grid_constant__ SliceBackward a, int64_t groups, int warps) {
  const SlicePlan& p = a.plan;
  const MergeTeam team(groups, warps);
  int lanes = 1;
  while (lanes < team.threads && lanes < p.parts) lanes *= 2;
  const int lane = team.thread % lanes, mine = team.thread / lanes, at_once = team.threads / lanes;
  const unsigned D = static_cast<unsigned>(a.D), per_sample = static_cast<unsigned>(p.C) / D;
  const unsigned n = team.group / per_sample, first = team.group % per_sample * D;
  double group[2] = {0, 0};
  for (unsigned start = 0; start < D; start += at_once) {
    const unsigned k = start + mine;
    const unsigned c = first + k;
    const bool is_there = team.is_there && k < D;
    double v[2] = {0, 0};
#pragma unroll 4
    for (int part = lane; part < p.parts; part += lanes) {
      if (!is_there) continue;
      const Sums s = a.partial[first_partial(p, n, c) + part];
      v[0] += s.dz;
      v[1] += s.dz_xhat;
    }
    warp_sum(v, 1, min(lanes, kWarp));
    team.sum_of_warps(v);
    if (!is_there || lane != 0) continue;
    const double weight = read(a.weight, a.param_dtype, c, 1.0) * (a.r ? a.r[c] : 1.0);
    group[0] += weight * v[0];
    group[1] += weight * v[1];
    keep_sums(a, n, c, {v[0], v[1]});
  }
  warp_sum(group);
  if (team.is_there && team.thread == 0) a.group_sums[team.group] = {group[0], group[1]};
}

// dweight = sum of dz * xhat,  dbias = sum of dz,  over the samples: a lane a channel, the warps of a block every so many
// samples.
__global__ void __launch_bounds__(kMergeThreads)
    parameter_gradients(const Sums* sums, int64_t samples, int64_t C, void* dweight, void* dbias, Dtype dtype) {
  SMEM_ARRAY(Sums, partial, kMergeThreads);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t c = blockIdx.x * static_cast<int64_t>(kWarp) + lane;
  Sums all{0, 0};
#pragma unroll 4
  for (int64_t n = warp; n < samples; n += kMergeWarps) {
    if (c >= C) continue;
    all.dz += sums[n * C + c].dz;
    all.dz_xhat += sums[n * C + c].dz_xhat;
  }
  partial[threadIdx.x] = all;
  __syncthreads();
  if (warp != 0 || c >= C) return;
  for (int w = 1; w < kMergeWarps; ++w) {
    all.dz += partial[w * kWarp + lane].dz;
    all.dz_xhat += partial[w * kWarp + lane].dz_xhat;
  }
  if (dweight) write(dweight, dtype, c, all.dz_xhat);
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
      using Whole = std::integral_constant<int, kWindow<T>>;
      if (p.window == Whole::value) return p.strips ? f(type, Whole{}, Whole{}) : f(type, Whole{}, One{});
    }
    if constexpr (sizeof(T) == 2) {
      using Half = std::integral_constant<int, kWindow<T> / 2>;
      if (p.window == Half::value) return f(type, Half{}, One{});
    }
    f(type, One{}, One{});
  });
}

inline Grid resident_grid(const SlicePlan& p) {
  return {dim3(static_cast<unsigned>(p.slices * p.cluster)), p.threads, p.cluster, static_cast<size_t>(p.shared.all)};
}

inline Grid split_grid(const SlicePlan& p) {
  return {dim3(static_cast<unsigned>(p.slices * p.parts)), p.threads, 1, static_cast<size_t>(p.shared.all)};
}

// Warps of a team that merges so many parts: at most two a thread, unless even kMergeWarps have more. More than one warp
// only where no thread is without a part.
inline int merge_warps(int64_t parts) {
  int warps = 1;
  while (warps < kMergeWarps && parts > 2 * kWarp * warps) warps *= 2;
  return warps;
}

// A team for each group, which merges so many parts at a time.
template <typename Args>
void launch_merge(const char* op, void (*kernel)(Args, int64_t, int), const Args& a, int64_t parts,
                  cudaStream_t stream) {
  const int64_t groups = a.plan.samples() * (a.plan.C / a.D);
  const int warps = merge_warps(parts);
  const Grid grid{dim3(static_cast<unsigned>(ceil_divide(groups, kMergeWarps / warps))), kMergeThreads};
  launch(op, kernel, grid, stream, a, groups, warps);
}

}  // namespace

void run_forward(const char* op, const SliceForward& a, bool own, cudaStream_t stream) {
  const SlicePlan& p = a.plan;
  visit_kernel(a.dtype, p, [&](auto type, auto window, auto columns) {
    using T = typename decltype(type)::type;
    constexpr int kN = decltype(window)::value, kC = decltype(columns)::value;
    if (p.resident) {
      if constexpr (kC == 1) launch(op, forward_resident<T, kN>, resident_grid(p), stream, a);
      return;
    }
    if (own) {
      launch(op, forward_reduce<T, kN, kC>, split_grid(p), stream, a);
      launch_merge(op, merge_statistics, a, a.D * p.parts, stream);
    }
    if (a.y) launch(op, forward_elements<T, kN, kC>, split_grid(p), stream, a);
  });
}

void run_backward(const char* op, const SliceBackward& a, bool sums, cudaStream_t stream) {
  const SlicePlan& p = a.plan;
  visit_kernel(a.dtype, p, [&](auto type, auto window, auto columns) {
    using T = typename decltype(type)::type;
    constexpr int kN = decltype(window)::value, kC = decltype(columns)::value;
    if (p.resident) {
      if constexpr (kC == 1) launch(op, backward_resident<T, kN>, resident_grid(p), stream, a);
      return;
    }
    if (sums) {
      launch(op, backward_reduce<T, kN, kC>, split_grid(p), stream, a);
      launch_merge(op, merge_sums, a, p.parts, stream);
    }
    if (!a.dx && !a.dresidual) return;
    SliceBackward elements = a;
    elements.reads_x = !a.constant_statistics || (a.activation != Activation::kNone && a.mask == nullptr);
    launch(op, backward_elements<T, kN, kC>, split_grid(p), stream, elements);
  });
  if (a.channel_sums == nullptr || (!a.dweight && !a.dbias)) return;
  const Grid grid{dim3(static_cast<unsigned>(ceil_divide(p.C, kWarp))), kMergeThreads};
  launch(op, parameter_gradients, grid, stream, static_cast<const Sums*>(a.channel_sums), p.samples(), p.C, a.dweight,
         a.dbias, a.param_dtype);
}

}  // namespace fastnorm::cuda
