// Spectral normalisation on a CUDA device. An iteration of the power method is five kernels, none of which waits for
// the host:
//
//   multiply         t = W v: a block a row
//   normalize_rows   u = t / |t|: one block
//   multiply_turned  partial sums of W^T u: a thread a column, kPartRows rows a part
//   merge_columns    s = W^T u from them, and each block's part of |s|^2
//   normalize_columns  v = s / |s|, sigma; every block adds up |s|^2 for itself, all in the same order
//
// and y = W / sigma an elementwise one: W is read three times. Backward is a sum of products, in two kernels, the second
// of which maps. Products are of the arithmetic's type, sums float64 beyond 16 bytes a thread.
#include "../spectral_norm.h"

#include <algorithm>

#include "launch.cuh"
#include "pack.cuh"
#include "reduce.cuh"

namespace fastnorm::cuda {
namespace {

constexpr const char* kOp = "spectral_norm";
constexpr int kThreads = 256;
constexpr int kPartRows = 64;
constexpr int kMaxParts = 512;  // of a sum over the whole weight

Grid grid_for(int64_t threads, int64_t y = 1) {
  return {dim3(static_cast<unsigned>(ceil_divide(threads, kThreads)), static_cast<unsigned>(y)), kThreads};
}

// ---- the power method

// u and v as they are given, in the arithmetic's type.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    start(const T* u, const T* v, acc_type<T>* kept_u, acc_type<T>* kept_v, int64_t h, int64_t w) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < h) kept_u[i] = to_acc(u[i]);
  if (i < w) kept_v[i] = to_acc(v[i]);
}

template <typename T, int kPack>
__global__ void __launch_bounds__(kThreads) multiply(const T* matrix, const acc_type<T>* v, double* t, int64_t w) {
  using acc_t = acc_type<T>;
  SMEM_ARRAY(double, scratch, kMaxWarps);
  const T* const row = matrix + blockIdx.x * w;
  double sum[1] = {0}, total[1];
  for (int64_t j = static_cast<int64_t>(threadIdx.x) * kPack; j < w; j += int64_t{kThreads} * kPack) {
    acc_t x[kPack], by[kPack], product = 0;
    Pack<T, kPack>::load(row + j).unpack(x);
    load_numbers(v + j, by);
#pragma unroll
    for (int e = 0; e < kPack; ++e) product = multiply_add(x[e], by[e], product);
    sum[0] += product;
  }
  block_sum(sum, total, scratch);
  if (threadIdx.x == 0) t[blockIdx.x] = total[0];
}

// One block. Scalar math: u = t / max(|t|, eps)
template <typename T>
__global__ void __launch_bounds__(kThreads)
    normalize_rows(const double* t, T* u, acc_type<T>* kept_u, int64_t h, double eps) {
  SMEM_ARRAY(double, scratch, kMaxWarps);
  double sum[1] = {0}, total[1];
  for (int64_t i = threadIdx.x; i < h; i += kThreads) sum[0] += t[i] * t[i];
  block_sum(sum, total, scratch);
  const double divisor = fmax(eps, sqrt(total[0]));
  for (int64_t i = threadIdx.x; i < h; i += kThreads) {
    kept_u[i] = static_cast<acc_type<T>>(t[i] / divisor);
    u[i] = from_acc<T>(kept_u[i]);
  }
}

// One block, where there are no iterations. Scalar math: sigma = u . t
template <typename acc_t>
__global__ void __launch_bounds__(kThreads) dot_rows(const double* t, const acc_t* u, double* sigma, int64_t h) {
  SMEM_ARRAY(double, scratch, kMaxWarps);
  double sum[1] = {0}, total[1];
  for (int64_t i = threadIdx.x; i < h; i += kThreads) sum[0] += t[i] * static_cast<double>(u[i]);
  block_sum(sum, total, scratch);
  if (threadIdx.x == 0) *sigma = total[0];
}

// Scalar math: partial[part][j] = sum over the rows of the part of W[i][j] * u[i]
template <typename T, int kPack>
__global__ void __launch_bounds__(kThreads)
    multiply_turned(const T* matrix, const acc_type<T>* u, acc_type<T>* partial, int64_t h, int64_t w) {
  using acc_t = acc_type<T>;
  const int64_t j = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kPack;
  if (j >= w) return;
  for (int64_t part = blockIdx.y; part * kPartRows < h; part += gridDim.y) {
    const int64_t begin = part * kPartRows, end = min(h, begin + kPartRows);
    acc_t sum[kPack] = {};
    for (int64_t i = begin; i < end; ++i) {
      acc_t x[kPack];
      Pack<T, kPack>::load(matrix + i * w + j).unpack(x);
      const acc_t by = u[i];
#pragma unroll
      for (int e = 0; e < kPack; ++e) sum[e] = multiply_add(x[e], by, sum[e]);
    }
    store_numbers(partial + part * w + j, sum);
  }
}

template <typename acc_t>
__global__ void __launch_bounds__(kThreads)
    merge_columns(const acc_t* partial, double* s, double* squares, int64_t parts, int64_t w) {
  SMEM_ARRAY(double, scratch, kMaxWarps);
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  double value = 0;
  if (j < w) {
    for (int64_t part = 0; part < parts; ++part) value += static_cast<double>(partial[part * w + j]);
    s[j] = value;
  }
  const double sum[1] = {value * value};
  double total[1];
  block_sum(sum, total, scratch);
  if (threadIdx.x == 0) squares[blockIdx.x] = total[0];
}

// The sum of n numbers, by all threads of a block.
__device__ inline double sum_of(const double* p, int64_t n, double* scratch) {
  double sum[1] = {0}, total[1];
  for (int64_t i = threadIdx.x; i < n; i += kThreads) sum[0] += p[i];
  block_sum(sum, total, scratch);
  return total[0];
}

// Scalar math: v = s / max(|s|, eps),   sigma = s . v
template <typename T>
__global__ void __launch_bounds__(kThreads)
    normalize_columns(const double* s, const double* squares, T* v, acc_type<T>* kept_v, double* sigma, int64_t w,
                      double eps) {
  SMEM_ARRAY(double, scratch, kMaxWarps);
  const double square = sum_of(squares, gridDim.x, scratch), divisor = fmax(eps, sqrt(square));
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (j < w) {
    kept_v[j] = static_cast<acc_type<T>>(s[j] / divisor);
    v[j] = from_acc<T>(kept_v[j]);
  }
  if (j == 0) *sigma = square / divisor;
}

template <typename T, int kPack>
__global__ void __launch_bounds__(kThreads) divide(const T* weight, T* y, const double* sigma, int64_t numel) {
  using acc_t = acc_type<T>;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kPack;
  if (i >= numel) return;
  const int n = static_cast<int>(min(numel - i, int64_t{kPack}));
  const acc_t scale = static_cast<acc_t>(1 / *sigma);
  acc_t x[kPack];
  load_part<kPack>(weight + i, 0, n, n == kPack).unpack(x);
#pragma unroll
  for (int j = 0; j < kPack; ++j) x[j] *= scale;
  store_part(Pack<T, kPack>::pack(x), y + i, 0, n);
}

// ---- backward

template <typename T>
struct Backward {
  const T *weight, *dy;
  const acc_type<T>*u, *v;
  const double* sigma;
  T* dweight;
  int64_t N, C, S;
  int64_t parts;
  double* partial;

  __device__ int64_t numel() const { return N * C * S; }
};

template <typename T, int kPack>
__global__ void __launch_bounds__(kThreads) sum_products(Backward<T> a) {
  using acc_t = acc_type<T>;
  SMEM_ARRAY(double, scratch, kMaxWarps);
  double sum[1] = {0}, total[1];
  const int64_t numel = a.numel(), step = static_cast<int64_t>(gridDim.x) * kThreads * kPack;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kPack; i < numel; i += step) {
    const int n = static_cast<int>(min(numel - i, int64_t{kPack}));
    acc_t x[kPack], y[kPack], product = 0;
    load_part<kPack>(a.weight + i, 0, n, n == kPack).unpack(x);
    load_part<kPack>(a.dy + i, 0, n, n == kPack).unpack(y);
#pragma unroll
    for (int j = 0; j < kPack; ++j) product = multiply_add(x[j], y[j], product);
    sum[0] += product;
  }
  block_sum(sum, total, scratch);
  if (threadIdx.x == 0) a.partial[blockIdx.x] = total[0];
}

// Scalar math: dW[i, j] = dy[i, j] / sigma - u[i] * (k / sigma) * v[j],   k = (sum dy * W) / sigma
template <typename T, int kPack>
__global__ void __launch_bounds__(kThreads) differentiate(Backward<T> a) {
  using acc_t = acc_type<T>;
  SMEM_ARRAY(double, scratch, kMaxWarps);
  const double scale = 1 / *a.sigma, k = sum_of(a.partial, a.parts, scratch) * scale;
  const acc_t reciprocal = static_cast<acc_t>(scale);
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kPack, numel = a.numel();
  if (i >= numel) return;
  const int n = static_cast<int>(min(numel - i, int64_t{kPack}));
  acc_t dy[kPack];
  load_part<kPack>(a.dy + i, 0, n, n == kPack).unpack(dy);
  int64_t s = i % a.S, c = i / a.S % a.C, first = i / a.S / a.C * a.S;  // v[first + s], u[c]
  acc_t row = static_cast<acc_t>(-k * scale * static_cast<double>(a.u[c]));
#pragma unroll
  for (int j = 0; j < kPack; ++j) {
    if (j >= n) break;
    dy[j] = multiply_add(dy[j], reciprocal, row * a.v[first + s]);
    if (++s < a.S || j + 1 >= n) continue;
    s = 0;
    if (++c == a.C) {
      c = 0;
      first += a.S;
    }
    row = static_cast<acc_t>(-k * scale * static_cast<double>(a.u[c]));
  }
  store_part(Pack<T, kPack>::pack(dy), a.dweight + i, 0, n);
}

// ---- launches

// Of the workspace, in bytes from its start, each a multiple of 16.
struct Places {
  int64_t t, s, squares, partial, end;
};
Places places(const SpectralNormForward& a) {
  const auto doubles = [](int64_t n) { return ceil_divide(n, 2) * 16; };
  Places p{};
  p.s = p.t + doubles(a.h);
  p.squares = p.s + doubles(a.w);
  p.partial = p.squares + doubles(ceil_divide(a.w, kThreads));
  p.end = p.partial + (a.iterations > 0 ? ceil_divide(a.h, kPartRows) * a.w * (a.dtype == Dtype::kFloat64 ? 8 : 4) : 0);
  return p;
}

template <typename T, int kPack>
void power_method(const SpectralNormForward& a, const Queue& queue) {
  using acc_t = acc_type<T>;
  const auto stream = static_cast<cudaStream_t>(queue.stream);
  const int64_t h = a.h, w = a.w, parts = ceil_divide(h, kPartRows);
  const Places at = places(a);
  char* const workspace = static_cast<char*>(queue.workspace);
  const auto numbers = [&](int64_t place) { return reinterpret_cast<double*>(workspace + place); };
  double *const t = numbers(at.t), *const s = numbers(at.s), *const squares = numbers(at.squares);
  acc_t* const partial = reinterpret_cast<acc_t*>(workspace + at.partial);
  const T* const matrix = static_cast<const T*>(a.matrix);
  T *const u = static_cast<T*>(a.u), *const v = static_cast<T*>(a.v);
  acc_t *const kept_u = static_cast<acc_t*>(a.kept_u), *const kept_v = static_cast<acc_t*>(a.kept_v);
  const Grid rows{dim3(static_cast<unsigned>(h)), kThreads}, one{dim3(1), kThreads};
  // Enough blocks to fill the device; one a part would be more than CUDA starts along y for millions of rows.
  const Grid columns = grid_for(w / kPack, std::min<int64_t>(parts, 8 * device().multiprocessors));

  launch(kOp, start<T>, grid_for(std::max(h, w)), stream, u, v, kept_u, kept_v, h, w);
  for (int64_t i = 0; i < a.iterations; ++i) {
    launch(kOp, multiply<T, kPack>, rows, stream, matrix, kept_v, t, w);
    launch(kOp, normalize_rows<T>, one, stream, t, u, kept_u, h, a.eps);
    launch(kOp, multiply_turned<T, kPack>, columns, stream, matrix, kept_u, partial, h, w);
    launch(kOp, merge_columns<acc_t>, grid_for(w), stream, partial, s, squares, parts, w);
    launch(kOp, normalize_columns<T>, grid_for(w), stream, s, squares, v, kept_v, a.sigma, w, a.eps);
  }
  if (a.iterations > 0) return;
  launch(kOp, multiply<T, kPack>, rows, stream, matrix, kept_v, t, w);
  launch(kOp, dot_rows<acc_t>, one, stream, t, kept_u, a.sigma, h);
}

int64_t parts_of(const SpectralNormBackward& a) {
  constexpr int64_t kLeast = 1 << 13;  // elements of a block
  return std::clamp<int64_t>(a.shape.numel() / kLeast, 1, std::min(kMaxParts, 4 * device().multiprocessors));
}

}  // namespace

int64_t spectral_norm_forward_workspace(const SpectralNormForward& a) { return places(a).end; }

void spectral_norm_forward(const SpectralNormForward& a, const Queue& queue) {
  visit(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto stream = static_cast<cudaStream_t>(queue.stream);
    if (a.w % kWindow<T> == 0 && is_aligned(a.matrix, a.kept_v)) {
      power_method<T, kWindow<T>>(a, queue);
    } else {
      power_method<T, 1>(a, queue);
    }
    const int64_t numel = a.h * a.w;
    const T* const weight = static_cast<const T*>(a.weight);
    T* const y = static_cast<T*>(a.y);
    if (!is_aligned(weight, y)) return launch(kOp, divide<T, 1>, grid_for(numel), stream, weight, y, a.sigma, numel);
    launch(kOp, divide<T, kWindow<T>>, grid_for(ceil_divide(numel, kWindow<T>)), stream, weight, y, a.sigma, numel);
  });
}

int64_t spectral_norm_backward_workspace(const SpectralNormBackward& a) {
  return parts_of(a) * static_cast<int64_t>(sizeof(double));
}

void spectral_norm_backward(const SpectralNormBackward& a, const Queue& queue) {
  visit(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using acc_t = acc_type<T>;
    const auto [N, C, S, layout] = a.shape;
    const Backward<T> call{static_cast<const T*>(a.weight),
                           static_cast<const T*>(a.dy),
                           static_cast<const acc_t*>(a.u),
                           static_cast<const acc_t*>(a.v),
                           a.sigma,
                           static_cast<T*>(a.dweight),
                           N,
                           C,
                           S,
                           parts_of(a),
                           static_cast<double*>(queue.workspace)};
    const auto run = [&](auto pack) {
      constexpr int kPack = decltype(pack)::value;
      const auto stream = static_cast<cudaStream_t>(queue.stream);
      launch(kOp, sum_products<T, kPack>, {dim3(static_cast<unsigned>(call.parts)), kThreads}, stream, call);
      launch(kOp, differentiate<T, kPack>, grid_for(ceil_divide(N * C * S, kPack)), stream, call);
    };
    if (is_aligned(a.weight, a.dy, a.dweight)) return run(std::integral_constant<int, kWindow<T>>{});
    run(std::integral_constant<int, 1>{});
  });
}

}  // namespace fastnorm::cuda
