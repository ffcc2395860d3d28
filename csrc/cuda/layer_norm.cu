// Layer and RMS normalisation on a CUDA device. A row belongs to a team: a warp (short rows, several teams a block), a
// block, or a cluster of blocks that add up their sums through distributed shared memory (long rows).
//
// forward    2 passes over memory: a row is read once into registers, kPacks accesses of 16 bytes a thread, from which
//            come the mean, then the deviations from it, then y. Rows beyond that (kPacks = 0) are read again for each
//            of the three, from the second-level cache.
// backward   3 passes: x and dy are read once into registers, dx is written. Teams take rows a stride apart; a thread
//            has the same columns in each, and keeps their dweight and dbias. What the blocks kept, [parts, N], a small
//            second kernel adds up in float64 and in order. The next row's dy is on its way while this one is reduced.
//            Rows too long for that: dx by one kernel that reads them twice, dweight and dbias by another that owns
//            columns and walks down a part of the rows.
//
// Sums are of the arithmetic's type within a warp and float64 beyond. A row's result depends on nothing but the row.
#include "../layer_norm.h"

#include "../affine.h"
#include "activation.cuh"
#include "launch.cuh"
#include "pack.cuh"
#include "reduce.cuh"
#include "row_plan.h"

namespace fastnorm::cuda {
namespace {

// ---- teams

constexpr int kMostSums = 2;  // at once

// The threads of this block that share a row, and the blocks of its cluster that do. By all threads of the block.
class Team {
 public:
  // scratch: 2 * kMostSums * (kMaxWarps + 1) doubles of shared memory.
  __device__ Team(int threads, double* scratch)
      : thread(static_cast<int>(threadIdx.x) % threads),
        threads(threads),
        index(static_cast<int>(threadIdx.x) / threads),
        of_warps_(scratch),
        of_blocks_(scratch + 2 * kMostSums * kMaxWarps) {}

  const int thread, threads, index;  // index: which of the block's teams

  // The sums over the team; every thread gets them. Of two calls in a row one has an even `turn` and one an odd: a
  // thread may be ahead of another by one call, and must not write what the other has still to read.
  template <int n, typename acc_t>
  __device__ void sum(const acc_t (&v)[n], double (&total)[n], int turn) const {
    acc_t own[n];
#pragma unroll
    for (int k = 0; k < n; ++k) own[k] = v[k];
    warp_sum(own);
#pragma unroll
    for (int k = 0; k < n; ++k) total[k] = static_cast<double>(own[k]);
    const int lane = static_cast<int>(threadIdx.x) % kWarp, slot = turn % 2 * kMostSums, warps = threads / kWarp;
    if (warps > 1) {
      double* const of_warps = of_warps_ + slot * kMaxWarps + index * warps;
      if (lane == 0) {
#pragma unroll
        for (int k = 0; k < n; ++k) of_warps[k * kMaxWarps + thread / kWarp] = total[k];
      }
      __syncthreads();
#pragma unroll
      for (int k = 0; k < n; ++k) total[k] = lane < warps ? of_warps[k * kMaxWarps + lane] : 0.0;
      warp_sum(total);
    }
    const int blocks = static_cast<int>(cluster_size());
    if (blocks > 1) {
      if (threadIdx.x == 0) {
#pragma unroll
        for (int k = 0; k < n; ++k) of_blocks_[slot + k] = total[k];
      }
      cluster_sync();
#pragma unroll
      for (int k = 0; k < n; ++k) {
        const unsigned rank = static_cast<unsigned>(lane);
        total[k] = lane < blocks ? *map_shared_rank(of_blocks_ + slot + k, rank) : 0.0;
      }
      warp_sum(total);
    }
  }

  // Before the end of the kernel: others may still read this block's shared memory.
  __device__ static void leave() {
    if (cluster_size() > 1) cluster_sync();
  }

 private:
  double *const of_warps_, *const of_blocks_;
};

// ---- parameters and masks

// kPack numbers of an array of T or, beside 16-bit T, of float; `otherwise` if there is none.
template <typename T, int kPack>
__device__ void load_parameters(const void* p, bool is_float, int64_t i, acc_type<T> otherwise,
                                acc_type<T> (&values)[kPack]) {
  if (p == nullptr) {
#pragma unroll
    for (int j = 0; j < kPack; ++j) values[j] = otherwise;
    return;
  }
  if constexpr (sizeof(T) == 2) {
    if (is_float) return load_numbers(static_cast<const float*>(p) + i, values);
  }
  Pack<T, kPack>::load(static_cast<const T*>(p) + i).unpack(values);
}

// Bytes of the mask are made by as many neighbouring lanes as have a pack of one byte's elements. By whole warps; lanes
// without elements pass no bits.
template <int kPack>
__device__ void store_mask(uint8_t* row, int64_t column, int64_t N, unsigned bits) {
  constexpr int kLanes = 8 / kPack;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  bits <<= lane * kPack;
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) bits |= __shfl_xor_sync(kAllLanes, bits, distance);
  if (lane == 0 && column < N) row[column / 8] = static_cast<uint8_t>(bits);
}

template <int kPack>
__device__ unsigned load_mask(const uint8_t* row, int64_t column) {
  return static_cast<unsigned>(row[column / 8]) >> column % 8;
}

// x becomes xhat = (x - mean) * rstd + rest
template <int n, typename acc_t>
__device__ void standardize(const SliceStandardize<acc_t>& s, acc_t (&x)[n]) {
#pragma unroll
  for (int j = 0; j < n; ++j) x[j] = multiply_add(x[j] - s.mean, s.rstd, s.rest);
}

// ---- forward

template <typename T>
struct Forward {
  const T *x, *residual;
  const void *weight, *bias;
  T* y;
  acc_type<T>*mean, *rstd, *rest;
  uint8_t* mask;
  int64_t M, N, mask_bytes;  // of a row
  Activation activation;
  bool subtract_mean, float_parameters;
  double eps, reciprocal;  // 1 / N
  int team;                // threads of a block that share a row
};

// Squares that left the range of float: the row is then done again in float64. A row of zeros is not such a one.
__device__ inline bool out_of_range(double m, double sum, double squares) {
  return !isfinite(squares) || (squares < 1e-30 && (sum != 0 || m != 0));
}

template <typename T, int kPack, int kPacks>
__global__ void __launch_bounds__(kForwardThreads, 1) forward_rows(const __grid_constant__ Forward<T> a) {
  using acc_t = acc_type<T>;
  using P = Pack<T, kPack>;
  SMEM_ARRAY(double, scratch, 2 * kMostSums * (kMaxWarps + 1));
  const Team team(a.team, scratch);
  const int64_t block = static_cast<int64_t>(blockIdx.x / cluster_size());
  const bool is_alone = kPacks > kForwardPacks;  // the team, in its block
  const int64_t row = is_alone ? block : block * static_cast<int>(blockDim.x / team.threads) + team.index;
  if (row >= a.M) return;  // where a block has several teams these are warps, and meet no barrier
  const T* const x = a.x + row * a.N;
  const int first = (static_cast<int>(cluster_rank()) * team.threads + team.thread) * kPack;
  const int step = static_cast<int>(cluster_size()) * team.threads * kPack;

  P kept[kPacks > 0 ? kPacks : 1];
  if constexpr (kPacks > 0) {
#pragma unroll
    for (int k = 0; k < kPacks; ++k)
      if (first + k * step < a.N) kept[k] = P::load_streaming(x + first + k * step);
  }
  // f(column, values of it and those that follow), for the thread's columns; all lanes of a warp together, those beyond
  // the row with is_inside = false.
  const auto for_packs = [&](const auto& f) {
    acc_t v[kPack];
    if constexpr (kPacks > 0) {
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        kept[k].unpack(v);
        f(first + k * step, first + k * step < a.N, v);
      }
    } else {
      for (int64_t begin = 0; begin < a.N; begin += step) {
        const bool is_inside = begin + first < a.N;
        if (is_inside) P::load(x + begin + first).unpack(v);
        f(begin + first, is_inside, v);
      }
    }
  };
  // Over the row, of terms(value, sums of a pack). `turn` is Team::sum()'s.
  const auto row_sums = [&](int turn, auto& total, const auto& add) {
    constexpr int n = std::extent_v<std::remove_reference_t<decltype(total)>>;
    // a thread that reads its part of a long row adds more numbers than float has digits for
    using sum_t = std::conditional_t<(kPacks > 0), acc_t, double>;
    sum_t sums[n] = {};
    for_packs([&](int64_t, bool is_inside, const acc_t(&v)[kPack]) {
      if (!is_inside) return;
      acc_t of_pack[n] = {};
#pragma unroll
      for (int j = 0; j < kPack; ++j) add(v[j], of_pack);
#pragma unroll
      for (int k = 0; k < n; ++k) sums[k] += of_pack[k];
    });
    team.sum(sums, total, turn);
  };
  // Sums of x - m and of their squares in float64: again from memory, element by element, which is for few rows and must
  // not take registers of all.
  const auto exact_sums = [&](int turn, double m, double(&total)[2]) {
    double sums[2] = {};
#pragma unroll 1
    for (int64_t i = first / kPack; i < a.N; i += step / kPack) {
      const double d = static_cast<double>(to_acc(x[i])) - m;
      sums[0] += d;
      sums[1] = multiply_add(d, d, sums[1]);
    }
    team.sum(sums, total, turn);
  };

  // Scalar math: m = sum x / N;  s1 = sum (x - m);  s2 = sum (x - m)^2;  mean = m + s1 / N;  var = (s2 - s1^2 / N) / N
  double sum[1] = {}, deviations[2];
  if (a.subtract_mean) row_sums(0, sum, [](acc_t v, auto& s) { s[0] += v; });
  const acc_t rounded = static_cast<acc_t>(sum[0] * a.reciprocal);
  row_sums(1, deviations, [rounded](acc_t v, auto& s) {
    const acc_t d = v - rounded;
    s[0] += d;
    s[1] = multiply_add(d, d, s[1]);
  });
  double m = static_cast<double>(rounded);
  if (sizeof(acc_t) < sizeof(double) && out_of_range(m, deviations[0], deviations[1])) {
    m = 0;
    exact_sums(2, m, deviations);
    if (a.subtract_mean) {
      m = deviations[0] * a.reciprocal;
      exact_sums(3, m, deviations);
    }
  }
  double mean = 0, m2 = deviations[1];
  if (a.subtract_mean) {
    const double shift = deviations[0] * a.reciprocal;
    mean = m + shift;
    m2 -= deviations[0] * shift;
  }
  const double variance = m2 < 0 ? 0 : m2 * a.reciprocal;  // a NaN stays one
  const SliceStandardize<acc_t> s(mean, rsqrt(variance + a.eps));
  if (team.thread == 0 && cluster_rank() == 0) {
    if (a.mean) a.mean[row] = s.mean;
    if (a.rstd) a.rstd[row] = s.rstd;
    if (a.rest) a.rest[row] = s.rest;
  }

  // Scalar math: y = activation(((x - mean) * rstd + rest) * weight + bias + residual)
  for_packs([&](int64_t column, bool is_inside, acc_t(&v)[kPack]) {
    unsigned positive = 0;
    if (is_inside) {
      acc_t weight[kPack], bias[kPack];
      load_parameters<T>(a.weight, a.float_parameters, column, acc_t(1), weight);
      load_parameters<T>(a.bias, a.float_parameters, column, acc_t(0), bias);
      standardize(s, v);
#pragma unroll
      for (int j = 0; j < kPack; ++j) v[j] = multiply_add(v[j], weight[j], bias[j]);
      if (a.residual) {
        acc_t residual[kPack];
        P::load_streaming(a.residual + row * a.N + column).unpack(residual);
#pragma unroll
        for (int j = 0; j < kPack; ++j) v[j] += residual[j];
      }
      positive = positive_bits(v);
      activate(a.activation, v);
      P::pack(v).store_streaming(a.y + row * a.N + column);
    }
    if (a.mask) store_mask<kPack>(a.mask + row * a.mask_bytes, column, a.N, positive);
  });
  Team::leave();
}

// ---- backward

template <typename T>
struct Backward {
  const T *x, *dy, *residual;
  const void *weight, *bias;
  const acc_type<T>*mean, *rstd, *rest;
  const uint8_t* mask;
  T *dx, *dresidual;
  acc_type<T>*dweight, *dbias;  // [parts, N], or null
  int64_t M, N, mask_bytes, parts;
  Activation activation;
  bool subtract_mean, float_parameters;
  double reciprocal;
  int team;

  __device__ SliceStandardize<acc_type<T>> statistics(int64_t row) const {
    SliceStandardize<acc_type<T>> s(0, 0);
    s.rstd = rstd[row];
    if (mean) s.mean = mean[row];
    if (rest) s.rest = rest[row];
    return s;
  }

  // x becomes xhat, and dy dz = dy * activation'(z), z as forward computed it or its sign from the mask.
  template <int kPack>
  __device__ void differentiate(int64_t row, int64_t column, const SliceStandardize<acc_type<T>>& s,
                                const acc_type<T> (&weight)[kPack], acc_type<T> (&x)[kPack],
                                acc_type<T> (&dy)[kPack]) const {
    using acc_t = acc_type<T>;
    standardize(s, x);
    if (activation == Activation::kNone) return;
    if (mask) return activate_backward(activation, dy, load_mask<kPack>(mask + row * mask_bytes, column));
    acc_t z[kPack];
    load_parameters<T>(bias, float_parameters, column, acc_t(0), z);
#pragma unroll
    for (int j = 0; j < kPack; ++j) z[j] = multiply_add(x[j], weight[j], z[j]);
    if (residual) {
      acc_t r[kPack];
      Pack<T, kPack>::load_streaming(residual + row * N + column).unpack(r);
#pragma unroll
      for (int j = 0; j < kPack; ++j) z[j] += r[j];
    }
    activate_backward(activation, dy, z);
  }

  // Scalar math: dx = (g - (xhat * mean(g * xhat) + mean(g))) * rstd
  template <int kPack>
  __device__ void store_dx(int64_t i, acc_type<T> (&g)[kPack], const acc_type<T> (&xhat)[kPack], acc_type<T> mean_g,
                           acc_type<T> mean_g_xhat, acc_type<T> rstd) const {
#pragma unroll
    for (int j = 0; j < kPack; ++j) g[j] = (g[j] - multiply_add(xhat[j], mean_g_xhat, mean_g)) * rstd;
    Pack<T, kPack>::pack(g).store_streaming(dx + i);
  }
};

template <typename T, int kPack, int kPacks>
__global__ void __launch_bounds__(backward_threads(std::is_same_v<T, double>), 1)
    backward_rows(const __grid_constant__ Backward<T> a) {
  using acc_t = acc_type<T>;
  using P = Pack<T, kPack>;
  SMEM_ARRAY(double, scratch, 2 * kMostSums * (kMaxWarps + 1));
  const Team team(a.team, scratch);
  const int teams = static_cast<int>(blockDim.x) / team.threads;
  const int64_t part = blockIdx.x / cluster_size();
  const int N = static_cast<int>(a.N);
  const int first = (static_cast<int>(cluster_rank()) * team.threads + team.thread) * kPack;
  const int step = static_cast<int>(cluster_size()) * team.threads * kPack;
  const auto is_inside = [&](int k) { return first + k * step < N; };

  acc_t dweight[kPacks][kPack] = {}, dbias[kPacks][kPack] = {};
  P x[kPacks], dy[kPacks];
  const auto load_row = [&](const T* from, int64_t row, P(&to)[kPacks]) {
#pragma unroll
    for (int k = 0; k < kPacks; ++k)
      if (is_inside(k) && row < a.M) to[k] = P::load_streaming(from + row * N + first + k * step);
  };
  load_row(a.x, part * teams + team.index, x);
  load_row(a.dy, part * teams + team.index, dy);

  int turn = 0;
  // all teams of the block as long as the first has a row: they meet at barriers
  for (int64_t row = part * teams + team.index; a.M > row - team.index; row += a.parts * teams) {
    const bool is_row = row < a.M;
    SliceStandardize<acc_t> s(0, 0);
    if (is_row) s = a.statistics(row);
    acc_t g[kPacks][kPack], sums[2] = {0, 0};
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (!is_row || !is_inside(k)) continue;
      const int column = first + k * step;
      acc_t weight[kPack], xhat[kPack];
      load_parameters<T>(a.weight, a.float_parameters, column, acc_t(1), weight);
      x[k].unpack(xhat);
      dy[k].unpack(g[k]);
      a.differentiate(row, column, s, weight, xhat, g[k]);
      if (a.dresidual) P::pack(g[k]).store_streaming(a.dresidual + row * N + column);
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        dbias[k][j] += g[k][j];
        dweight[k][j] = multiply_add(g[k][j], xhat[j], dweight[k][j]);
        g[k][j] *= weight[j];
        sums[0] += g[k][j];
        sums[1] = multiply_add(g[k][j], xhat[j], sums[1]);
      }
    }
    load_row(a.dy, row + a.parts * teams, dy);
    if (a.dx) {
      double total[2];
      team.sum(sums, total, turn++);
      const acc_t mean_g = a.subtract_mean ? static_cast<acc_t>(total[0] * a.reciprocal) : acc_t(0);
      const acc_t mean_g_xhat = static_cast<acc_t>(total[1] * a.reciprocal);
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        if (!is_row || !is_inside(k)) continue;
        acc_t xhat[kPack];
        x[k].unpack(xhat);
        standardize(s, xhat);
        a.store_dx(row * N + first + k * step, g[k], xhat, mean_g, mean_g_xhat, s.rstd);
      }
    }
    load_row(a.x, row + a.parts * teams, x);
  }

  // The block's teams are added up in shared memory, dweight, then dbias.
  const auto store = [&](acc_t* to, const acc_t(&sums)[kPacks][kPack]) {
    if (to == nullptr) return;
    to += part * a.N;
    if (teams == 1) {
#pragma unroll
      for (int k = 0; k < kPacks; ++k)
        if (is_inside(k)) store_numbers(to + first + k * step, sums[k]);
      return;
    }
    acc_t* const shared = dynamic_shared<acc_t>();
    const int columns = team.threads * kPack * kPacks;  // of a team; one block a cluster
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kPacks; ++k)
      if (is_inside(k)) store_numbers(shared + team.index * columns + first + k * step, sums[k]);
    __syncthreads();
    for (int64_t column = threadIdx.x; column < a.N; column += blockDim.x) {
      acc_t sum = 0;
      for (int t = 0; t < teams; ++t) sum += shared[t * columns + column];
      to[column] = sum;
    }
  };
  store(a.dweight, dweight);
  store(a.dbias, dbias);
  Team::leave();
}

// A block a row, read twice: dx and dresidual.
template <typename T, int kPack>
__global__ void __launch_bounds__(kLongRowThreads, std::is_same_v<T, double> ? 1 : 2)
    backward_long_rows(const __grid_constant__ Backward<T> a) {
  using acc_t = acc_type<T>;
  using P = Pack<T, kPack>;
  SMEM_ARRAY(double, scratch, 2 * kMostSums * (kMaxWarps + 1));
  const Team team(static_cast<int>(blockDim.x), scratch);
  const int64_t row = blockIdx.x;
  const SliceStandardize<acc_t> s = a.statistics(row);
  // f(place of the element, xhat, dz, weight) of the thread's columns
  const auto for_packs = [&](const auto& f) {
    for (int64_t column = int64_t{threadIdx.x} * kPack; column < a.N; column += int64_t{blockDim.x} * kPack) {
      acc_t xhat[kPack], dz[kPack], weight[kPack];
      load_parameters<T>(a.weight, a.float_parameters, column, acc_t(1), weight);
      P::load(a.x + row * a.N + column).unpack(xhat);
      P::load(a.dy + row * a.N + column).unpack(dz);
      a.differentiate(row, column, s, weight, xhat, dz);
      f(row * a.N + column, xhat, dz, weight);
    }
  };
  double sums[2] = {0, 0}, total[2];
  for_packs([&](int64_t i, acc_t(&xhat)[kPack], acc_t(&dz)[kPack], acc_t(&weight)[kPack]) {
    if (a.dresidual) P::pack(dz).store_streaming(a.dresidual + i);
    acc_t of_pack[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      of_pack[0] += dz[j] * weight[j];
      of_pack[1] = multiply_add(dz[j] * weight[j], xhat[j], of_pack[1]);
    }
    sums[0] += of_pack[0];
    sums[1] += of_pack[1];
  });
  if (a.dx == nullptr) return;
  team.sum(sums, total, 0);
  const acc_t mean_g = a.subtract_mean ? static_cast<acc_t>(total[0] * a.reciprocal) : acc_t(0);
  const acc_t mean_g_xhat = static_cast<acc_t>(total[1] * a.reciprocal);
  for_packs([&](int64_t i, acc_t(&xhat)[kPack], acc_t(&dz)[kPack], acc_t(&weight)[kPack]) {
#pragma unroll
    for (int j = 0; j < kPack; ++j) dz[j] *= weight[j];
    a.store_dx(i, dz, xhat, mean_g, mean_g_xhat, s.rstd);
  });
}

// dweight and dbias of long rows: a thread owns kPack columns, a block (x) as many as it has threads, and walks down the
// rows of a part (y).
template <typename T, int kPack>
__global__ void __launch_bounds__(kLongRowThreads, 2) backward_columns(const __grid_constant__ Backward<T> a) {
  using acc_t = acc_type<T>;
  using P = Pack<T, kPack>;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kPack;
  if (column >= a.N) return;
  acc_t weight[kPack], dweight[kPack] = {}, dbias[kPack] = {};
  load_parameters<T>(a.weight, a.float_parameters, column, acc_t(1), weight);
  for (int64_t row = blockIdx.y; row < a.M; row += a.parts) {
    acc_t xhat[kPack], dz[kPack];
    P::load_streaming(a.x + row * a.N + column).unpack(xhat);
    P::load_streaming(a.dy + row * a.N + column).unpack(dz);
    a.differentiate(row, column, a.statistics(row), weight, xhat, dz);
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      dbias[j] += dz[j];
      dweight[j] = multiply_add(dz[j], xhat[j], dweight[j]);
    }
  }
  if (a.dweight) store_numbers(a.dweight + blockIdx.y * a.N + column, dweight);
  if (a.dbias) store_numbers(a.dbias + blockIdx.y * a.N + column, dbias);
}

// The sums of the parts: a block owns 32 columns, a warp every kMergeWarps-th part of them.
constexpr int kMergeWarps = 16;

template <typename acc_t>
__global__ void __launch_bounds__(kMergeWarps* kWarp)
    merge_parts(const acc_t* dweight_parts, const acc_t* dbias_parts, void* dweight, void* dbias, Dtype dtype,
                int64_t parts, int64_t N) {
  SMEM_ARRAY(double, sums, kMergeWarps* kWarp);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  const bool is_bias = blockIdx.y == 1 || dweight == nullptr;
  const acc_t* const from = is_bias ? dbias_parts : dweight_parts;
  double sum = 0;
  if (column < N)
    for (int64_t part = warp; part < parts; part += kMergeWarps) sum += static_cast<double>(from[part * N + column]);
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp != 0 || column >= N) return;
  for (int w = 1; w < kMergeWarps; ++w) sum += sums[w * kWarp + lane];
  write(is_bias ? dbias : dweight, dtype, column, sum);
}

// ---- launches

template <typename Args>
RowPlanInput plan_input(const Args& a, int pack) {
  const Device& d = device();
  return {a.M, a.N, pack, a.dtype == Dtype::kFloat64, a.dtype == Dtype::kBFloat16, d.has_clusters(), d.multiprocessors};
}

template <typename Args>
bool is_float(const Args& a) {
  return a.param_dtype == Dtype::kFloat32;
}

// f(T, elements of a pack)
template <typename Args, typename F, typename... P>
void with_pack(const Args& a, const F& f, const P*... pointers) {
  visit(a.dtype, [&](auto type) {
    constexpr int kPack = kWindow<typename decltype(type)::type>;
    if (a.N % kPack == 0 && is_aligned(a.x, a.residual, a.weight, a.bias, pointers...))
      return f(type, std::integral_constant<int, kPack>{});
    f(type, std::integral_constant<int, 1>{});
  });
}

template <typename F>
void visit_packs(int packs, const F& f) {
  switch (packs) {
    case 1: return f(std::integral_constant<int, 1>{});
    case 2: return f(std::integral_constant<int, 2>{});
    case 4: return f(std::integral_constant<int, 4>{});
    case 8: return f(std::integral_constant<int, 8>{});
    case 16: return f(std::integral_constant<int, 16>{});
  }
}

constexpr const char* kOp = "layer_norm";

// The plan, for no more clusters than run at once: each has its share of the rows, and one that had to wait for another's
// end would double the time.
template <typename T, int kPack>
RowPlan plan_backward(const LayerNormBackward& a) {
  RowPlan p = plan_rows_backward(plan_input(a, kPack));
  if (p.cluster == 1) return p;
  visit_packs(p.packs, [&](auto packs) {
    constexpr int kPacks = decltype(packs)::value;
    if constexpr (kPacks <= kBackwardPacks) {
      const int64_t at_once = clusters_at_once(backward_rows<T, kPack, kPacks>, p.cluster, p.threads(), 0);
      p.parts = std::clamp<int64_t>(at_once, 1, p.parts);
    }
  });
  return p;
}

// Of the parts' sums of dweight, or of dbias.
int64_t parts_bytes(const LayerNormBackward& a, const RowPlan& p) {
  const int64_t bytes = p.parts * a.N * (a.dtype == Dtype::kFloat64 ? 8 : 4);
  return ceil_divide(bytes, kAccess) * kAccess;
}

}  // namespace

int64_t layer_norm_forward_workspace(const LayerNormForward&) { return 0; }

void layer_norm_forward(const LayerNormForward& a, const Queue& queue) {
  with_pack(
      a,
      [&](auto type, auto pack) {
        using T = typename decltype(type)::type;
        using acc_t = acc_type<T>;
        constexpr int kPack = decltype(pack)::value;
        const RowPlan p = plan_rows_forward(plan_input(a, kPack));
        const Forward<T> call{static_cast<const T*>(a.x),
                              static_cast<const T*>(a.residual),
                              a.weight,
                              a.bias,
                              static_cast<T*>(a.y),
                              static_cast<acc_t*>(a.mean),
                              static_cast<acc_t*>(a.rstd),
                              static_cast<acc_t*>(a.rest),
                              a.mask,
                              a.M,
                              a.N,
                              a.mask_rows().bytes_per_row(),
                              a.activation,
                              a.subtract_mean,
                              is_float(a),
                              a.eps,
                              1.0 / static_cast<double>(a.N),
                              p.team};
        const Grid grid{dim3(static_cast<unsigned>(ceil_divide(a.M, p.teams) * p.cluster)), p.threads(), p.cluster};
        const auto stream = static_cast<cudaStream_t>(queue.stream);
        if (p.packs == 0) return launch(kOp, forward_rows<T, kPack, 0>, grid, stream, call);
        visit_packs(p.packs, [&](auto packs) {
          constexpr int kPacks = decltype(packs)::value;
          if constexpr (kPacks <= most_forward_packs(std::is_same_v<T, __nv_bfloat16>))
            launch(kOp, forward_rows<T, kPack, kPacks>, grid, stream, call);
        });
      },
      a.y);
}

int64_t layer_norm_backward_workspace(const LayerNormBackward& a) {
  int64_t bytes = 0;
  with_pack(
      a,
      [&](auto type, auto pack) {
        bytes = ((a.dweight != nullptr) + (a.dbias != nullptr)) *
                parts_bytes(a, plan_backward<typename decltype(type)::type, decltype(pack)::value>(a));
      },
      a.dy, a.dx, a.dresidual);
  return bytes;
}

void layer_norm_backward(const LayerNormBackward& a, const Queue& queue) {
  with_pack(
      a,
      [&](auto type, auto pack) {
        using T = typename decltype(type)::type;
        using acc_t = acc_type<T>;
        constexpr int kPack = decltype(pack)::value;
        const RowPlan p = plan_backward<T, kPack>(a);
        const auto stream = static_cast<cudaStream_t>(queue.stream);
        char* const workspace = static_cast<char*>(queue.workspace);
        Backward<T> call{static_cast<const T*>(a.x),
                         static_cast<const T*>(a.dy),
                         static_cast<const T*>(a.residual),
                         a.weight,
                         a.bias,
                         static_cast<const acc_t*>(a.mean),
                         static_cast<const acc_t*>(a.rstd),
                         static_cast<const acc_t*>(a.rest),
                         a.mask,
                         static_cast<T*>(a.dx),
                         static_cast<T*>(a.dresidual),
                         nullptr,
                         nullptr,
                         a.M,
                         a.N,
                         a.mask_rows().bytes_per_row(),
                         p.parts,
                         a.activation,
                         a.subtract_mean,
                         is_float(a),
                         1.0 / static_cast<double>(a.N),
                         p.team};
        if (a.dweight) call.dweight = reinterpret_cast<acc_t*>(workspace);
        if (a.dbias) call.dbias = reinterpret_cast<acc_t*>(workspace + (a.dweight ? parts_bytes(a, p) : 0));
        const bool wants_columns = a.dweight || a.dbias;
        if (p.packs > 0) {
          visit_packs(p.packs, [&](auto packs) {
            constexpr int kPacks = decltype(packs)::value;
            if constexpr (kPacks <= kBackwardPacks) {
              const size_t shared = p.teams > 1 ? static_cast<size_t>(p.threads()) * kPack * kPacks * sizeof(acc_t) : 0;
              const Grid grid{dim3(static_cast<unsigned>(p.parts * p.cluster)), p.threads(), p.cluster, shared};
              launch(kOp, backward_rows<T, kPack, kPacks>, grid, stream, call);
            }
          });
        } else {
          if (a.dx || a.dresidual)
            launch(kOp, backward_long_rows<T, kPack>, {dim3(static_cast<unsigned>(a.M)), p.threads()}, stream, call);
          const dim3 blocks(static_cast<unsigned>(ceil_divide(a.N, int64_t{kPack} * p.threads())),
                            static_cast<unsigned>(p.parts));
          if (wants_columns) launch(kOp, backward_columns<T, kPack>, {blocks, p.threads()}, stream, call);
        }
        if (!wants_columns) return;
        const dim3 blocks(static_cast<unsigned>(ceil_divide(a.N, kWarp)), a.dweight && a.dbias ? 2 : 1);
        launch(kOp, merge_parts<acc_t>, {blocks, kMergeWarps * kWarp}, stream, call.dweight, call.dbias, a.dweight,
               a.dbias, a.param_dtype, p.parts, a.N);
      },
      a.dy, a.dx, a.dresidual);
}

}  // namespace fastnorm::cuda
