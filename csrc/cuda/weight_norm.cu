// Weight normalisation on a CUDA device: a sum of products over each slice, then an elementwise map with two
// coefficients of the slice. Forward (v times itself) and backward (v times dw) are the same.
//
// planes   (runs of 16 elements or more, or one run a slice): a block owns a slice, keeps it in shared memory between
//          sum and map if it fits, and so reads it once.
// columns  (slices of many short runs): the matrix [N, C * S]; a block owns the columns of as many slices as a warp has
//          lanes for, its warps every so many rows, which are read again for the map.
//
// Too few slices for the multiprocessors: each is cut in parts, whose sums one kernel writes and a second adds up, all
// of its blocks in the same order, before it maps.
#include "../weight_norm.h"

#include "launch.cuh"
#include "pack.cuh"
#include "reduce.cuh"
#include "weight_plan.h"

namespace fastnorm::cuda {
namespace {

constexpr int kThreads = kWeightThreads, kWarps = kThreads / kWarp;

enum class Phase { kAll, kSum, kMap };

struct Coefficients {
  double factor, slope;
};

template <typename T>
struct Call {
  const T *v, *dw;  // dw: backward only
  T* out;           // w or dv, or null
  const void* g;
  void* dg;      // or null
  double* norm;  // forward writes it, backward reads it
  Dtype param_dtype;
  int64_t N, C, S;
  int64_t parts;
  double* partial;  // [C, parts] sums of products
  bool resident;    // planes: the slice is kept in shared memory

  // Scalar math: forward   norm = sqrt(sum), factor = g / norm
  //              backward  dg = sum / norm, factor = g / norm, slope = dg / norm
  __device__ Coefficients finish(int64_t c, double sum, bool writes) const {
    const double given = read<double>(g, param_dtype, c, 1.0);
    if (dw == nullptr) {
      const double length = sqrt(sum);
      if (writes) norm[c] = length;
      return {given / length, 0};
    }
    const double length = norm[c], gradient = sum / length;
    if (writes && dg) write(dg, param_dtype, c, gradient);
    return {given / length, gradient / length};
  }

  __device__ double sum_of_parts(int64_t c) const {
    double sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += partial[c * parts + part];
    return sum;
  }
};

// Products that left the range of float: the sum is made again in float64. Zeros are such, too.
template <typename T>
__device__ bool is_exact(double sum) {
  return sizeof(T) == sizeof(double) || (isfinite(sum) && fabs(sum) >= 1e-30);
}

// Scalar math: w = v * factor,   dv = (dw - v * slope) * factor
template <int n, typename acc_t>
__device__ void map(const Coefficients& c, const acc_t (&v)[n], acc_t (&x)[n]) {
  const acc_t factor = static_cast<acc_t>(c.factor), slope = static_cast<acc_t>(c.slope);
#pragma unroll
  for (int j = 0; j < n; ++j) x[j] = multiply_add(-v[j], slope, x[j]) * factor;
}

template <typename T, int kPack>
__global__ void __launch_bounds__(kThreads, 4) planes(Call<T> a, Phase phase) {
  using acc_t = acc_type<T>;
  using P = Pack<T, kPack>;
  SMEM_ARRAY(double, scratch, kMaxWarps);
  const int64_t c = blockIdx.x, part = blockIdx.y, packs = a.N * a.S / kPack;
  const int64_t begin = part * packs / a.parts, end = (part + 1) * packs / a.parts;
  T *const kept_v = dynamic_shared<T>(), *const kept_dw = kept_v + (end - begin) * kPack;
  const auto place = [&](int64_t i) {
    return a.N == 1 ? c * a.S + i * kPack : (i * kPack / a.S * a.C + c) * a.S + i * kPack % a.S;
  };
  const auto for_packs = [&](const auto& f) {
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) f(i);
  };

  double sum[1] = {0}, total[1];
  if (phase != Phase::kMap) {
    const auto add = [&](auto zero, bool keeps) {
      using sum_t = decltype(zero);
      sum[0] = 0;
      for_packs([&](int64_t i) {
        const P v = P::load(a.v + place(i)), dw = a.dw ? P::load(a.dw + place(i)) : v;
        if (keeps) {
          v.store(kept_v + (i - begin) * kPack);
          if (a.dw) dw.store(kept_dw + (i - begin) * kPack);
        }
        acc_t x[kPack], y[kPack];
        v.unpack(x);
        dw.unpack(y);
        sum_t of_pack = 0;
#pragma unroll
        for (int j = 0; j < kPack; ++j)
          of_pack = multiply_add(static_cast<sum_t>(x[j]), static_cast<sum_t>(y[j]), of_pack);
        sum[0] += of_pack;
      });
      block_sum(sum, total, scratch);
    };
    add(acc_t(0), a.resident);
    if (!is_exact<T>(total[0])) add(0.0, false);
    if (phase == Phase::kSum) {
      if (threadIdx.x == 0) a.partial[c * a.parts + part] = total[0];
      return;
    }
  }
  const double all = phase == Phase::kMap ? a.sum_of_parts(c) : total[0];
  const Coefficients coefficients = a.finish(c, all, part == 0 && threadIdx.x == 0);
  if (a.out == nullptr) return;
  for_packs([&](int64_t i) {
    acc_t v[kPack], x[kPack];
    (a.resident ? P::load(kept_v + (i - begin) * kPack) : P::load(a.v + place(i))).unpack(v);
    if (a.dw) {
      (a.resident ? P::load(kept_dw + (i - begin) * kPack) : P::load(a.dw + place(i))).unpack(x);
    } else {
#pragma unroll
      for (int j = 0; j < kPack; ++j) x[j] = v[j];
    }
    map(coefficients, v, x);
    P::pack(x).store_streaming(a.out + place(i));
  });
}

template <typename T>
__global__ void __launch_bounds__(kThreads) columns(Call<T> a, Phase phase) {
  using acc_t = acc_type<T>;
  SMEM_ARRAY(double, of_warps, kThreads);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int S = static_cast<int>(a.S), most = kWarp / S;  // slices of a block
  const int64_t first = static_cast<int64_t>(blockIdx.x) * most, width = a.C * a.S;
  const int slices = static_cast<int>(min(a.C - first, static_cast<int64_t>(most)));
  const bool is_column = lane < slices * S;
  const int64_t part = blockIdx.y, begin = part * a.N / a.parts, end = (part + 1) * a.N / a.parts;
  const int64_t column = first * S + lane, c = first + lane / S;
  const T *const v = a.v + column, *const dw = a.dw ? a.dw + column : v;

  double all = 0;  // of the lane's slice
  if (phase != Phase::kMap) {
    const auto add = [&](auto zero) {
      using sum_t = decltype(zero);
      constexpr int kRows = 16;  // added up in the arithmetic's type
      double sum = 0;
      for (int64_t row = begin + warp; is_column && row < end; row += kRows * kWarps) {
        sum_t of_rows = 0;
        for (int64_t r = row; r < min(end, row + kRows * kWarps); r += kWarps)
          of_rows = multiply_add(static_cast<sum_t>(to_acc(v[r * width])), static_cast<sum_t>(to_acc(dw[r * width])),
                                 of_rows);
        sum += of_rows;
      }
      __syncthreads();  // the last call's readers are done
      of_warps[threadIdx.x] = sum;
      __syncthreads();
      double of_column = 0;
      for (int w = 0; w < kWarps; ++w) of_column += of_warps[w * kWarp + lane];
      all = 0;
      for (int k = 0; k < S; ++k) all += __shfl_sync(kAllLanes, of_column, min(lane / S * S + k, kWarp - 1));
    };
    add(acc_t(0));
    // the same in every warp, for all have the same sums
    if (__any_sync(kAllLanes, is_column && !is_exact<T>(all))) add(0.0);
    if (phase == Phase::kSum) {
      if (warp == 0 && is_column && lane % S == 0) a.partial[c * a.parts + part] = all;
      return;
    }
  }
  if (!is_column) return;
  if (phase == Phase::kMap) all = a.sum_of_parts(c);
  const Coefficients coefficients = a.finish(c, all, part == 0 && warp == 0 && lane % S == 0);
  if (a.out == nullptr) return;
  for (int64_t row = begin + warp; row < end; row += kWarps) {
    const acc_t value[1] = {to_acc(v[row * width])};
    acc_t x[1] = {to_acc(dw[row * width])};
    map(coefficients, value, x);
    a.out[row * width + column] = from_acc<T>(x[0]);
  }
}

// ---- launches

WeightPlan plan(const Shape& shape, Dtype dtype, bool backward, bool aligned = true) {
  const Device& d = device();
  return plan_weights({
      .shape = shape,
      .element = size_of(dtype),
      .aligned = aligned,
      .backward = backward,
      .multiprocessors = d.multiprocessors,
      .shared = d.dynamic_shared(),
  });
}

int64_t workspace(const Shape& shape, const WeightPlan& p) {
  return p.parts > 1 ? shape.C * p.parts * static_cast<int64_t>(sizeof(double)) : 0;
}

template <typename Args>
void run(const Args& a, const void* dw, void* out, double* norm, void* dg, const Queue& queue) {
  visit(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr const char* kOp = "weight_norm";
    const auto stream = static_cast<cudaStream_t>(queue.stream);
    const auto [N, C, S, layout] = a.shape;
    const WeightPlan p = plan(a.shape, a.dtype, dw != nullptr, is_aligned(a.v, dw, out));
    const Call<T> call{static_cast<const T*>(a.v),
                       static_cast<const T*>(dw),
                       static_cast<T*>(out),
                       a.g,
                       dg,
                       norm,
                       a.param_dtype,
                       N,
                       C,
                       S,
                       p.parts,
                       static_cast<double*>(queue.workspace),
                       p.resident};
    const Grid grid{dim3(static_cast<unsigned>(p.blocks), static_cast<unsigned>(p.parts)), kThreads, 1,
                    static_cast<size_t>(p.shared)};
    const auto kernel = p.by_columns ? columns<T> : p.pack > 1 ? planes<T, kWindow<T>> : planes<T, 1>;
    if (p.parts == 1) return launch(kOp, kernel, grid, stream, call, Phase::kAll);
    launch(kOp, kernel, grid, stream, call, Phase::kSum);
    launch(kOp, kernel, grid, stream, call, Phase::kMap);
  });
}

}  // namespace

int64_t weight_norm_forward_workspace(const WeightNormForward& a) {
  return workspace(a.shape, plan(a.shape, a.dtype, false));
}
void weight_norm_forward(const WeightNormForward& a, const Queue& queue) {
  run(a, nullptr, a.w, a.norm, nullptr, queue);
}

int64_t weight_norm_backward_workspace(const WeightNormBackward& a) {
  return workspace(a.shape, plan(a.shape, a.dtype, true));
}
void weight_norm_backward(const WeightNormBackward& a, const Queue& queue) {
  run(a, a.dw, a.dv, const_cast<double*>(a.norm), a.dg, queue);
}

}  // namespace fastnorm::cuda
