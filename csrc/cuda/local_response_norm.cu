// Local response normalisation on a CUDA device: forward reads x and writes y, backward reads x and dy and writes dx.
// What lies between is in registers, or in shared memory.
//
// All four cases are a tensor [slices, rows, columns, lanes], contiguous, with a window along rows, columns or both:
//
//   inter, contiguous      [N, C, 1, H * W]      window along the rows
//   inter, channels_last   [1, N * H * W, C, 1]  window along the columns; also where a plane has one element
//   intra, contiguous      [N * C, H, W, 1]      windows along both
//   intra, channels_last   [N, H, W, C]          windows along both
//
// Windows that reach no further than four elements (two, along both axes) stay in registers, which takes some 20
// instructions an element forward and 40 to 60 backward: normalize_down where there is a window along the rows,
// normalize_along where there is none and packs divide them. The other windows, and float64, have tiles:
//
// A block owns a tile of a slice. It loads the tile's x, and as much around it as the windows reach; sums x^2 over each
// element's window, along the columns first where there are both; and from the scale makes y. Backward needs u around
// the tile, and so the scale there, and x around that: u and g = dy * scale^-beta go to shared memory, u is summed over
// the mirrored window, and dx follows. Tiles are whole slices where these fit, so nothing is read twice; otherwise they
// share what lies between them.
//
// Every window is summed afresh: a running sum that adds what enters and subtracts what leaves would keep the rounding
// error of every large value it has seen. A window reaches no further than the tensor, and costs a multiplication an
// element.
#include "../local_response_norm.h"

#include "launch.cuh"
#include "pack.cuh"
#include "reduce.cuh"
#include "window_plan.h"

namespace fastnorm::cuda {
namespace {

// ---- scale^-beta

enum class Power { kHalf, kThreeQuarters, kOne, kAny };

Power power_of(const LocalResponseNormSetting& s) {
  constexpr double kLeast = 1e-20;  // of k, above which no scale is a denormal: rough roots take these for zero
  if (!(s.k >= kLeast)) return Power::kAny;
  return s.beta == 0.5    ? Power::kHalf
         : s.beta == 0.75 ? Power::kThreeQuarters
         : s.beta == 1    ? Power::kOne
                          : Power::kAny;
}

template <typename T>
__device__ inline acc_type<T> reciprocal_root(acc_type<T> s) {
  if constexpr (sizeof(T) == 8) {
    return rsqrt(s);
  } else {
    const float r = rough_reciprocal_root(s);
    if constexpr (sizeof(T) == 2) return r;  // nothing beside the rounding of the result
    const float rest = multiply_add(-(s * r), r, 1.0f);
    return r > 0 ? multiply_add(0.5f * r, rest, r) : r;  // 0: s is infinite
  }
}
__device__ inline float root(float s) { return rough_root(s); }
__device__ inline double root(double s) { return sqrt(s); }
// A hundred instructions, for which few call: one copy is enough.
__device__ __noinline__ float raise(float s, float exponent) { return powf(s, exponent); }
__device__ __noinline__ double raise(double s, double exponent) { return pow(s, exponent); }

// power = s^-beta, inverse = 1 / s
template <typename T, int n, typename acc_t>
__device__ void powers(Power kind, acc_t beta, const acc_t (&s)[n], acc_t (&power)[n], acc_t (&inverse)[n]) {
  if (kind == Power::kHalf || kind == Power::kThreeQuarters) {
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const acc_t r = reciprocal_root<T>(s[j]);
      power[j] = kind == Power::kHalf ? r : r * root(r);
      inverse[j] = r * r;
    }
  } else {
#pragma unroll
    for (int j = 0; j < n; ++j) {
      inverse[j] = 1 / s[j];
      power[j] = kind == Power::kOne ? inverse[j] : raise(s[j], -beta);
    }
  }
}

template <typename T>
struct Call {
  const T *x, *dy;
  T* out;  // y, or dx
  Power power;
  acc_type<T> a, beta, k;
  unsigned char* workspace;  // where a tile's buffers are if not in shared memory
  WindowPlan plan;
};

// ---- windows in registers

constexpr int kNearNumbers = 8;  // that a thread computes at a time

// A window of up to 2 * kReach + 1 numbers. It may reach beyond the tensor: there all is zero.
template <int kReach>
struct Near {
  int before, after;

  // All windows of a call are the same, but for what an axis cuts off.
  __device__ explicit Near(const WindowPlan& p)
      : before(static_cast<int>(max(p.row.before, p.column.before))),
        after(static_cast<int>(max(p.row.after, p.column.after))) {}
  // f(d) for d = -before .. after, or the mirrored window's. Constants are what makes registers of arrays, so all d are
  // gone through.
  template <bool kMirrored, typename F>
  __device__ void for_each(const F& f) const {
#pragma unroll
    for (int d = kReach; d > 0; --d)
      if (d <= (kMirrored ? after : before)) f(-d);
    f(0);
#pragma unroll
    for (int d = 1; d <= kReach; ++d)
      if (d <= (kMirrored ? before : after)) f(d);
  }
};

// Of how many threads a multiprocessor is to have room, by the registers of each: the most that spill none.
constexpr int resident_threads(int reach, bool plane, bool backward) {
  return !backward ? plane ? 672 : 1024 : reach > 2 || plane ? 512 : 640;
}

// A thread has a pack of lanes of a column, and goes down the rows, kTurns at a time, with the rows of its windows in
// registers:
//
//   x read         . . . . o o o o o o o o     rows t ..
//   scale, g, u    . . o o o o o o o o
//   dx             o o o o o o o o
//
// kPlane: there is a window along the columns, too. A block has strips of neighbouring columns, and as many more as the
// windows reach where the tensor goes on, and sums down the rows go through shared memory to be summed along them. Else
// places are the lanes of all slices, one after the other.
//
// blockIdx.y is the part of the rows.
template <typename T, int kPack, int kReach, bool kPlane, bool kBackward>
__global__ void __launch_bounds__(kPlane ? kPlaneThreads : kNearThreads,
                                  resident_threads(kReach, kPlane, kBackward) / (kPlane ? kPlaneThreads : kNearThreads))
    normalize_down(const __grid_constant__ Call<T> call) {
  using P = Pack<T, kPack>;
  constexpr int kTurns = kNearNumbers / kPack, kLag = kBackward ? 2 * kReach : kReach;
  const WindowPlan& plan = call.plan;
  const Near<kReach> window(plan);
  const int rows = static_cast<int>(plan.row.length);
  const int begin = static_cast<int>(blockIdx.y * plan.row.tile);
  const int end = static_cast<int>(min(begin + plan.row.tile, plan.row.length));
  const int64_t stride = plan.column.length * plan.lanes;  // of rows

  int64_t own;  // the place of row 0
  bool reads, writes;
  // kPlane: the thread's place among those of a buffer, where kReach columns of zeros are before and after a strip's;
  // and the places from column to column.
  bool in_strip = true;
  int in_buffer = 0, buffer_places = 0;
  const int apart = kPlane ? static_cast<int>(plan.tile_lanes) / kPack : 0;
  if constexpr (kPlane) {
    const int columns = static_cast<int>(plan.columns()), thread = static_cast<int>(threadIdx.x);
    const int c = thread / apart % columns;
    const int64_t strip = int64_t{blockIdx.x} * plan.strips + thread / apart / columns;
    const int64_t lane = strip % plan.lane_tiles() * plan.tile_lanes + thread % apart * kPack;
    const int64_t above = strip / plan.lane_tiles();
    const int64_t slice = above / plan.column.tiles(), first = above % plan.column.tiles() * plan.column.tile;
    const int64_t column = first - plan.margin + c;
    in_strip = thread / apart / columns < plan.strips;
    reads = in_strip && slice < plan.slices && lane < plan.lanes && column >= 0 && column < plan.column.length;
    writes = reads && c >= plan.margin && column < first + plan.column.tile;
    own = slice * rows * stride + column * plan.lanes + lane;
    const int wide = columns + 2 * kReach;
    buffer_places = plan.strips * wide * apart;
    in_buffer = kReach * apart;
    if (in_strip) in_buffer += (thread / apart / columns * wide + c) * apart + thread % apart;
  } else {
    const int64_t place = (int64_t{blockIdx.x} * kNearThreads + threadIdx.x) * kPack;
    reads = writes = place < plan.slices * stride;
    if (!reads) return;
    own = place + place / stride * (rows - 1) * stride;
  }

  // Of each of the numbers the sum over the columns' window, by all threads. A thread is at most one sum ahead of
  // another, so two buffers are enough.
  using V = Pack<float, kWindow<float>>;
  constexpr int kVector = kWindow<float>;
  float* buffer = kPlane ? dynamic_shared<float>() : nullptr;
  int other = buffer_places * kNearNumbers;
  if constexpr (kPlane) {
    for (int i = static_cast<int>(threadIdx.x) * kVector; i < 2 * other; i += static_cast<int>(blockDim.x) * kVector)
      V{}.store(buffer + i);
    __syncthreads();
  }
  const auto sum_along = [&]<bool kMirrored>(std::bool_constant<kMirrored>, float(&v)[kNearNumbers]) {
    float* const own_v = buffer + in_buffer * kVector;
    if (in_strip) {
#pragma unroll
      for (int i = 0; i < kNearNumbers; i += kVector) {
        V pack;
#pragma unroll
        for (int e = 0; e < kVector; ++e) pack.v[e] = v[i + e];
        pack.store(own_v + i * buffer_places);
      }
    }
    __syncthreads();
    window.template for_each<kMirrored>([&](int d) {
      if (d == 0) return;
#pragma unroll
      for (int i = 0; i < kNearNumbers; i += kVector) {
        const V pack = V::load(own_v + d * apart * kVector + i * buffer_places);
#pragma unroll
        for (int e = 0; e < kVector; ++e) v[i + e] += pack.v[e];
      }
    });
    buffer += other, other = -other;
  };

  // f(j, place of row first + j) for those of kTurns rows that are in low .. high - 1; `at` is where `first` would be.
  const auto for_rows = [&](int first, int low, int high, auto* at, const auto& f) {
    if (low <= first && first + kTurns <= high) {
#pragma unroll
      for (int j = 0; j < kTurns; ++j) f(j, at + j * stride);
    } else {
#pragma unroll
      for (int j = 0; j < kTurns; ++j)
        if (low <= first + j && first + j < high) f(j, at + j * stride);
    }
  };
  const auto fetch = [&](const T* at, int first, int reach, P(&to)[kTurns]) {
#pragma unroll
    for (int j = 0; j < kTurns; ++j) to[j] = P{};
    if (!reads) return;
    for_rows(first, max(begin - reach, 0), min(end + reach, rows), at,
             [&](int j, const T* from) { to[j] = P::load(from); });
  };
  int64_t at = own + (begin - kLag) * stride;  // of row t

  // x[2 * kReach + j] is of row t + j, g[kReach + j] and u[2 * kReach + j] of t + j - kReach
  float x[kTurns + 2 * kReach][kPack] = {}, g[kTurns + kReach][kPack] = {}, u[kTurns + 2 * kReach][kPack] = {};
  P next_x[kTurns], next_dy[kTurns];
  fetch(call.x + at, begin - kLag, kLag, next_x);
  if constexpr (kBackward) fetch(call.dy + at - kReach * stride, begin - kLag - kReach, kReach, next_dy);
#pragma unroll 1
  for (int t = begin - kLag; t - kLag < end; t += kTurns) {
    float scale[kNearNumbers], power[kNearNumbers], inverse[kNearNumbers];
#pragma unroll
    for (int j = 0; j < kTurns; ++j) next_x[j].unpack(x[2 * kReach + j]);
    if constexpr (kBackward) {
#pragma unroll
      for (int j = 0; j < kTurns; ++j) next_dy[j].unpack(g[kReach + j]);
    }
    at += kTurns * stride;
    fetch(call.x + at, t + kTurns, kLag, next_x);
    if constexpr (kBackward) {
      fetch(call.dy + at - kReach * stride, t + kTurns - kReach, kReach, next_dy);
    }

    // Scalar math: y = x * scale^-beta,   or   g = dy * scale^-beta,  u = g * x / scale
#pragma unroll
    for (int j = 0; j < kTurns; ++j) {
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        float sum = 0;
        window.template for_each<false>(
            [&](int d) { sum = multiply_add(x[kReach + j + d][e], x[kReach + j + d][e], sum); });
        scale[j * kPack + e] = sum;
      }
    }
    if constexpr (kPlane) sum_along(std::false_type{}, scale);
#pragma unroll
    for (int j = 0; j < kNearNumbers; ++j) scale[j] = multiply_add(call.a, scale[j], call.k);
    powers<T>(call.power, call.beta, scale, power, inverse);
    float out[kTurns][kPack];
    if constexpr (kBackward) {
      const float coefficient = -2 * call.a * call.beta;
      const int first = t - kReach;
      const bool whole = reads && first >= 0 && first + kTurns <= rows;
#pragma unroll
      for (int j = 0; j < kTurns; ++j) {
#pragma unroll
        for (int e = 0; e < kPack; ++e) {
          g[kReach + j][e] *= power[j * kPack + e];
          u[2 * kReach + j][e] = g[kReach + j][e] * x[kReach + j][e] * inverse[j * kPack + e];
        }
      }
      if (!whole) {  // where nothing is the scale may be zero
#pragma unroll
        for (int j = 0; j < kTurns; ++j)
          if (!reads || first + j < 0 || first + j >= rows) {
#pragma unroll
            for (int e = 0; e < kPack; ++e) u[2 * kReach + j][e] = 0;
          }
      }
      // Scalar math: dx = g - 2 * a * beta * x * sum u
      float sums[kNearNumbers];
#pragma unroll
      for (int j = 0; j < kTurns; ++j) {
#pragma unroll
        for (int e = 0; e < kPack; ++e) {
          float sum = 0;
          window.template for_each<true>([&](int d) { sum += u[kReach + j + d][e]; });
          sums[j * kPack + e] = sum;
        }
      }
      if constexpr (kPlane) sum_along(std::true_type{}, sums);
#pragma unroll
      for (int j = 0; j < kTurns; ++j)
#pragma unroll
        for (int e = 0; e < kPack; ++e) out[j][e] = multiply_add(x[j][e] * coefficient, sums[j * kPack + e], g[j][e]);
    } else {
#pragma unroll
      for (int j = 0; j < kTurns; ++j)
#pragma unroll
        for (int e = 0; e < kPack; ++e) out[j][e] = x[kReach + j][e] * power[j * kPack + e];
    }
    if (writes)
      for_rows(t - kLag, begin, end, call.out + at - (kTurns + kLag) * stride,
               [&](int j, T* to) { P::pack(out[j]).store_streaming(to); });

#pragma unroll
    for (int j = 0; j < 2 * kReach; ++j)
#pragma unroll
      for (int e = 0; e < kPack; ++e) x[j][e] = x[kTurns + j][e], u[j][e] = u[kTurns + j][e];
#pragma unroll
    for (int j = 0; j < kReach; ++j)
#pragma unroll
      for (int e = 0; e < kPack; ++e) g[j][e] = g[kTurns + j][e];
  }
}

// v[kReach ..] are a lane's own numbers; before and after them come its neighbours', zero where those are of another
// row.
template <int kReach, int kPack>
__device__ void join(float (&v)[kPack + 2 * kReach], bool is_first, bool is_last) {
#pragma unroll
  for (int j = 0; j < kReach; ++j) {
    const float left = __shfl_up_sync(kAllLanes, v[kPack + j], 1);
    const float right = __shfl_down_sync(kAllLanes, v[kReach + j], 1);
    v[j] = is_first ? 0 : left;
    v[kReach + kPack + j] = is_last ? 0 : right;
  }
}

// A lane has a pack of columns, and its neighbours have what its windows reach of others. Where warps cut rows, their
// first lane and their last are there for their neighbours alone. Warps take turns, `stride` packs apart.
template <typename T, int kReach, bool kBackward>
__global__ void __launch_bounds__(kNearThreads, kReach > 2 && kBackward ? 7 : 8)
    normalize_along(const __grid_constant__ Call<T> call) {
  constexpr int kPack = kWindow<T>;
  using P = Pack<T, kPack>;
  const WindowPlan& plan = call.plan;
  const Near<kReach> window(plan);
  const int row_packs = static_cast<int>(plan.column.length / kPack);
  const int64_t packs = plan.slices * plan.row.length * row_packs;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, own = kWarp - 2 * plan.margin;  // packs of a warp
  const int64_t warp = (int64_t{blockIdx.x} * kNearThreads + threadIdx.x) / kWarp;
  const int64_t stride = int64_t{gridDim.x} * (kNearThreads / kWarp) * own;
  const int step = static_cast<int>(stride % row_packs);

  int64_t i = warp * own + lane - plan.margin;
  int column = static_cast<int>((i + row_packs) % row_packs);  // the first pack's neighbour is -1
  P next_x{}, next_dy{};
  const auto fetch = [&](int64_t at) {
    if (at < 0 || at >= packs) return;
    next_x = P::load(call.x + at * kPack);
    if constexpr (kBackward) next_dy = P::load(call.dy + at * kPack);
  };
  fetch(i);
  for (int64_t first = warp * own; first < packs; first += stride, i += stride) {
    const bool is_first = column == 0, is_last = column == row_packs - 1;
    float x[kPack + 2 * kReach], center[kPack], out[kPack], scale[kPack], power[kPack], inverse[kPack];
    next_x.unpack(center);
    if constexpr (kBackward) next_dy.unpack(out);
    fetch(i + stride);
#pragma unroll
    for (int j = 0; j < kPack; ++j) x[kReach + j] = center[j];
    join<kReach, kPack>(x, is_first, is_last);

    // Scalar math: y = x * scale^-beta,   or   g = dy * scale^-beta,  u = g * x / scale
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      float sum = 0;
      window.template for_each<false>([&](int d) { sum = multiply_add(x[kReach + j + d], x[kReach + j + d], sum); });
      scale[j] = multiply_add(call.a, sum, call.k);
    }
    powers<T>(call.power, call.beta, scale, power, inverse);
    if constexpr (kBackward) {
      const float coefficient = -2 * call.a * call.beta;
      float u[kPack + 2 * kReach];
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        out[j] *= power[j];
        u[kReach + j] = out[j] * center[j] * inverse[j];
      }
      join<kReach, kPack>(u, is_first, is_last);
      // Scalar math: dx = g - 2 * a * beta * x * sum u
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        float sum = 0;
        window.template for_each<true>([&](int d) { sum += u[kReach + j + d]; });
        out[j] = multiply_add(center[j] * coefficient, sum, out[j]);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kPack; ++j) out[j] = center[j] * power[j];
    }
    if (lane >= plan.margin && lane < plan.margin + own && i < packs)
      P::pack(out).store_streaming(call.out + i * kPack);
    column += step;
    if (column >= row_packs) column -= row_packs;
  }
}

// ---- tiles

// Elements begin .. begin + size - 1 of an axis.
struct Span {
  int64_t begin;
  int size;
};

// Tile i of the axis.
__device__ inline Span of_tile(const Axis& axis, int64_t i) {
  return {i * axis.tile, static_cast<int>(min(axis.length - i * axis.tile, axis.tile))};
}

// The span and what lies up to `left` before it and `right` after it.
__device__ inline Span widened(const Axis& axis, const Span& span, int64_t left, int64_t right) {
  const int64_t begin = max(span.begin - left, int64_t{0}), end = min(span.begin + span.size + right, axis.length);
  return {begin, static_cast<int>(end - begin)};
}

// The windows of a span's elements, by places in that span widened by a window: what the tensor cuts off is cut off
// there, too, and places are 32 bits.
struct Windows {
  int shift, left, right, size;

  __device__ Windows(const Span& span, const Span& widened, int64_t left_, int64_t right_)
      : shift(static_cast<int>(span.begin - widened.begin)),
        left(static_cast<int>(min(left_, static_cast<int64_t>(widened.size)))),
        right(static_cast<int>(min(right_, static_cast<int64_t>(widened.size)))),
        size(widened.size) {}
  __device__ int first(int i) const { return max(i + shift - left, 0); }
  __device__ int count(int i) const { return min(i + shift + right + 1, size) - first(i); }
};

// floor(n / d), by a multiplication if n and d are below 2^16.
class Quotient {
 public:
  __device__ Quotient(int d, bool is_small) : d_(static_cast<unsigned>(d)), up_(is_small && d > 1 ? ~0u / d_ + 1 : 0) {}
  __device__ int operator()(int n) const {
    return static_cast<int>(up_ > 0 ? __umulhi(static_cast<unsigned>(n), up_) : static_cast<unsigned>(n) / d_);
  }

 private:
  unsigned d_, up_;  // up_ = 2^32 / d, rounded up
};

// store(i, load(i)) for i = first, first + step, .. below n, by several at a time: a store between two loads would keep
// the second waiting for the first, and memory takes hundreds of cycles.
template <typename Load, typename Store>
__device__ void move(int first, int n, int step, const Load& load, const Store& store) {
  using V = decltype(load(0));
  constexpr int kOnTheWay = sizeof(V) < 8 ? 8 : kAccess / sizeof(V);
  for (; first < n; first += kOnTheWay * step) {
    V held[kOnTheWay];
#pragma unroll
    for (int j = 0; j < kOnTheWay; ++j)
      if (first + j * step < n) held[j] = load(first + j * step);
#pragma unroll
    for (int j = 0; j < kOnTheWay; ++j)
      if (first + j * step < n) store(first + j * step, held[j]);
  }
}

// Part of a slice as it lies in a buffer, lanes innermost, in packs.
struct Box {
  Span row, column;
  int lanes;

  __device__ int at(int r, int c, int lane) const { return (r * column.size + c) * lanes + lane; }
  __device__ int packs() const { return row.size * column.size * lanes; }

  // A function of a pack's row, column, lane and place in the buffer as one of the place alone.
  template <typename F>
  __device__ auto by_place(bool is_small, const F& f) const {
    const int row_packs = column.size * lanes;
    return [f, row_packs, lanes = lanes, row_of = Quotient(row_packs, is_small),
            column_of = Quotient(lanes, is_small)](int i) {
      const int r = row_of(i), in_row = i - r * row_packs, c = column_of(in_row);
      return f(r, c, in_row - c * lanes, i);
    };
  }

  // f(row, column, lane, place in the buffer) for every pack, by all threads of the block.
  template <typename F>
  __device__ void for_each(bool is_small, const F& f) const {
    const auto g = by_place(is_small, f);
    for (int i = static_cast<int>(threadIdx.x); i < packs(); i += static_cast<int>(blockDim.x)) g(i);
  }
};

// sum += the `count` packs that lie `stride` elements apart, or their squares.
template <bool kSquares, int kPack, typename V>
__device__ void add_window(const V* from, int64_t stride, int count, acc_type<V> (&sum)[kPack]) {
#pragma unroll 4
  for (int i = 0; i < count; ++i) {
    acc_type<V> v[kPack];
    Pack<V, kPack>::load(from + i * stride).unpack(v);
#pragma unroll
    for (int j = 0; j < kPack; ++j) sum[j] = kSquares ? multiply_add(v[j], v[j], sum[j]) : sum[j] + v[j];
  }
}

// Sums over the windows of the elements of `out`, of values, or their squares, in the wider box `in`.
template <bool kSquares, int kPack, typename V>
struct WindowSums {
  const V* values;
  acc_type<V>* column_sums;  // of the rows of `in` and the columns of `out`
  Box in, out;
  Windows rows, columns;
  bool by_rows, by_columns, is_small;

  // Where there are windows along both axes, the sums along the columns. By all threads of the block.
  __device__ void prepare() const {
    if (!by_rows || !by_columns) return;
    Box{in.row, out.column, in.lanes}.for_each(is_small, [&](int r, int c, int lane, int i) {
      acc_type<V> sum[kPack] = {};
      add_window<kSquares>(values + in.at(r, columns.first(c), lane) * kPack, in.lanes * kPack, columns.count(c), sum);
      store_numbers(column_sums + i * kPack, sum);
    });
    __syncthreads();
  }

  __device__ void operator()(int r, int c, int lane, acc_type<V> (&sum)[kPack]) const {
#pragma unroll
    for (int j = 0; j < kPack; ++j) sum[j] = 0;
    if (!by_rows)
      return add_window<kSquares>(values + center(r, columns.first(c) - columns.shift, lane), in.lanes * kPack,
                                  columns.count(c), sum);
    if (!by_columns)
      return add_window<kSquares>(values + center(rows.first(r) - rows.shift, c, lane),
                                  in.column.size * in.lanes * kPack, rows.count(r), sum);
    const Box prepared{in.row, out.column, in.lanes};
    add_window<false>(column_sums + prepared.at(rows.first(r), c, lane) * kPack, out.column.size * in.lanes * kPack,
                      rows.count(r), sum);
  }

  // Where the pack of `out` is in `in`.
  __device__ int center(int r, int c, int lane) const { return in.at(r + rows.shift, c + columns.shift, lane) * kPack; }
};

// How many blocks a multiprocessor is to hold at once: as many as registers can be had for without spilling any.
template <typename T, int kPack, bool kBackward>
constexpr int resident_blocks() {
  if (sizeof(T) == 8) return 1;
  return (kPack == 1 ? 2 : 1) + (kBackward ? 0 : 1);
}

// kPack lanes at a time, or, if that is 1, elements one by one, staged so that memory is read and written by 16 bytes
// where the tile lies in one piece.
template <typename T, int kPack, bool kBackward>
__global__ void __launch_bounds__(kWindowThreads, resident_blocks<T, kPack, kBackward>())
    normalize_tiles(const __grid_constant__ Call<T> call) {
  using acc_t = acc_type<T>;
  using P = Pack<T, kPack>;
  constexpr bool kStaged = kPack == 1;
  const WindowPlan& plan = call.plan;
  const Axis &row = plan.row, &column = plan.column;
  const bool by_rows = row.has_window(), by_columns = column.has_window(), is_small = plan.widest < 1 << 16;
  const int64_t row_stride = column.length * plan.lanes;

  unsigned char* buffer =
      plan.in_workspace ? call.workspace + blockIdx.x * plan.bytes() : dynamic_shared<unsigned char>();
  T* const x = reinterpret_cast<T*>(buffer);
  acc_t* const column_sums = reinterpret_cast<acc_t*>(buffer += plan.x);
  acc_t* const g = reinterpret_cast<acc_t*>(buffer += plan.sums);
  acc_t* const u = reinterpret_cast<acc_t*>(buffer += plan.values);
  T* const staging = reinterpret_cast<T*>(buffer + plan.values);

  for (int64_t tile = blockIdx.x; tile < plan.tiles(); tile += gridDim.x) {
    const int64_t first_lane = tile % plan.lane_tiles() * plan.tile_lanes;
    const int64_t above = tile / plan.lane_tiles(), of_rows = above / column.tiles();
    const int64_t slice = of_rows / row.tiles();
    const int lanes = static_cast<int>(min(plan.lanes - first_lane, plan.tile_lanes)) / kPack;
    const Box own{of_tile(row, of_rows % row.tiles()), of_tile(column, above % column.tiles()), lanes};
    Box near = own;  // where the scale is needed
    if (kBackward)
      near = {widened(row, own.row, row.after, row.before), widened(column, own.column, column.after, column.before),
              lanes};
    const Box far{widened(row, near.row, row.before, row.after),
                  widened(column, near.column, column.before, column.after), lanes};  // where x is

    // Where a box begins in memory, and a pack of it.
    const auto begin_of = [&](const Box& box) {
      return (slice * row.length + box.row.begin) * row_stride + box.column.begin * plan.lanes + first_lane;
    };
    const auto place = [&](int64_t begin, int r, int c, int lane) {
      return begin + r * row_stride + c * plan.lanes + lane * kPack;
    };
    const int64_t own_begin = begin_of(own);
    // Whether a box is one piece of memory that may be read and written by 16 bytes.
    const auto is_run = [&](const Box& box, const T* p) {
      return kStaged && box.column.size == column.length && lanes == plan.lanes &&
             reinterpret_cast<uintptr_t>(p) % kAccess == 0;
    };
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    // A box of x or dy to a buffer, where packs are `spread` times as far apart as they must be.
    const auto fetch = [&](const T* from, const Box& box, T* to, int spread = 1) {
      const int64_t begin = begin_of(box);
      const int n = box.packs();
      if (is_run(box, from + begin)) {
        const auto load = [&](int i) {
          return load_part<kWindow<T>>(from + begin + i, 0, min(kWindow<T>, n - i), i + kWindow<T> <= n);
        };
        move(thread * kWindow<T>, n, threads * kWindow<T>, load,
             [&](int i, const auto& window) { window.store(to + i); });  // buffers are whole windows
      } else {
        const auto load = box.by_place(
            is_small, [&](int r, int c, int lane, int) { return P::load(from + place(begin, r, c, lane)); });
        move(thread, n, threads, load, [&](int i, const P& pack) { pack.store(to + i * kPack * spread); });
      }
    };
    const auto put = [&](const acc_t(&values)[kPack], int64_t at, int i) {
      if (kStaged) {
        P::pack(values).store(staging + i);
      } else {
        P::pack(values).store_streaming(call.out + at);
      }
    };

    fetch(call.x, far, x);
    // dy lies where g will: each pack where g's has its first elements. Elements that go one by one are staged.
    constexpr int kSpread = kStaged ? 1 : sizeof(acc_t) / sizeof(T);
    T* const dy_buffer = kStaged ? staging : reinterpret_cast<T*>(g);
    if (kBackward) fetch(call.dy, near, dy_buffer, kSpread);
    __syncthreads();

    // Scalar math: y = x * scale^-beta,   or   g = dy * scale^-beta,  u = g * x / scale
    const WindowSums<true, kPack, T> squares{x,
                                             column_sums,
                                             far,
                                             near,
                                             {near.row, far.row, row.before, row.after},
                                             {near.column, far.column, column.before, column.after},
                                             by_rows,
                                             by_columns,
                                             is_small};
    squares.prepare();
    near.for_each(is_small, [&](int r, int c, int lane, int i) {
      acc_t scale[kPack], power[kPack], inverse[kPack], values[kPack];
      squares(r, c, lane, scale);
#pragma unroll
      for (int j = 0; j < kPack; ++j) scale[j] = multiply_add(call.a, scale[j], call.k);
      powers<T>(call.power, call.beta, scale, power, inverse);
      P::load(x + squares.center(r, c, lane)).unpack(values);
      if constexpr (kBackward) {
        acc_t dy[kPack];
        P::load(dy_buffer + i * kPack * kSpread).unpack(dy);
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          dy[j] *= power[j];
          values[j] *= dy[j] * inverse[j];
        }
        store_numbers(g + i * kPack, dy);
        store_numbers(u + i * kPack, values);
      } else {
#pragma unroll
        for (int j = 0; j < kPack; ++j) values[j] *= power[j];
        put(values, place(own_begin, r, c, lane), i);  // near is own
      }
    });

    if constexpr (kBackward) {
      __syncthreads();
      // Scalar math: dx = g - 2 * a * beta * x * sum u
      const acc_t coefficient = -2 * call.a * call.beta;
      const WindowSums<false, kPack, acc_t> sums{u,
                                                 column_sums,
                                                 near,
                                                 own,
                                                 {own.row, near.row, row.after, row.before},
                                                 {own.column, near.column, column.after, column.before},
                                                 by_rows,
                                                 by_columns,
                                                 is_small};
      sums.prepare();
      own.for_each(is_small, [&](int r, int c, int lane, int i) {
        acc_t sum[kPack], center[kPack], dx[kPack];
        sums(r, c, lane, sum);
        P::load(x + squares.center(r + sums.rows.shift, c + sums.columns.shift, lane)).unpack(center);
        load_numbers(g + sums.center(r, c, lane), dx);
#pragma unroll
        for (int j = 0; j < kPack; ++j) dx[j] = multiply_add(center[j] * coefficient, sum[j], dx[j]);
        put(dx, place(own_begin, r, c, lane), i);
      });
    }

    if (kStaged) {
      __syncthreads();
      if (is_run(own, call.out + own_begin)) {
        const int n = own.packs();
        for (int i = thread * kWindow<T>; i < n; i += threads * kWindow<T>)
          store_part(Pack<T, kWindow<T>>::load(staging + i), call.out + own_begin + i, 0, min(kWindow<T>, n - i));
      } else {
        own.for_each(is_small, [&](int r, int c, int lane, int i) {
          P::load(staging + i).store_streaming(call.out + place(own_begin, r, c, lane));
        });
      }
    }
    if (tile + gridDim.x < plan.tiles()) __syncthreads();  // the buffers are filled again
  }
}

// ---- the launch

template <bool kBackward, typename Args>
WindowPlan plan(const Args& a, bool aligned) {
  const Device& d = device();
  return plan_windows({
      .shape = a.shape,
      .H = a.H,
      .W = a.W,
      .region = a.setting.region,
      .before = a.setting.before,
      .after = a.setting.after,
      .element = size_of(a.dtype),
      .aligned = aligned,
      .backward = kBackward,
      .multiprocessors = d.multiprocessors,
      .shared = d.dynamic_shared(),
  });
}

template <typename T, int kReach, bool kBackward>
auto in_registers(const WindowPlan& p) {
  if constexpr (kWindow<T> >= 2 * kReach)
    if (p.path == WindowPath::kAlong) return normalize_along<T, kReach, kBackward>;
  if constexpr (kReach == 2)
    if (p.path == WindowPath::kPlane)
      return p.pack == 1 ? normalize_down<T, 1, kReach, true, kBackward>
                         : normalize_down<T, kPlaneAccess / sizeof(T), kReach, true, kBackward>;
  if constexpr (sizeof(T) == 2)
    if (p.pack == 2) return normalize_down<T, 2, kReach, false, kBackward>;
  return normalize_down<T, 1, kReach, false, kBackward>;
}

template <typename T, bool kBackward>
auto kernel_of(const WindowPlan& p) {
  if constexpr (sizeof(T) < 8)
    if (p.path != WindowPath::kTiles)
      return p.reach == 2 ? in_registers<T, 2, kBackward>(p) : in_registers<T, 4, kBackward>(p);
  return p.pack == 1 ? normalize_tiles<T, 1, kBackward> : normalize_tiles<T, lane_pack(sizeof(T)), kBackward>;
}

template <bool kBackward, typename Args>
void run(const Args& a, const void* dy, void* out, bool aligned, const Queue& queue) {
  const WindowPlan p = plan<kBackward>(a, aligned);
  Grid grid{dim3(static_cast<unsigned>(p.blocks)), p.threads, 1, static_cast<size_t>(p.shared())};
  if (p.path == WindowPath::kDown || p.path == WindowPath::kPlane) {
    const auto parts = static_cast<unsigned>(p.row.tiles());
    grid.blocks = dim3(static_cast<unsigned>(p.blocks / parts), parts);
  }
  visit(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using acc_t = acc_type<T>;
    const LocalResponseNormSetting& s = a.setting;
    const Call<T> call{static_cast<const T*>(a.x),
                       static_cast<const T*>(dy),
                       static_cast<T*>(out),
                       power_of(s),
                       static_cast<acc_t>(s.a),
                       static_cast<acc_t>(s.beta),
                       static_cast<acc_t>(s.k),
                       static_cast<unsigned char*>(queue.workspace),
                       p};
    launch("local_response_norm", kernel_of<T, kBackward>(p), grid, static_cast<cudaStream_t>(queue.stream), call);
  });
}

bool is_aligned_call(const LocalResponseNormForward& a) { return is_aligned(a.x, a.y); }
bool is_aligned_call(const LocalResponseNormBackward& a) { return is_aligned(a.x, a.dy, a.dx); }

}  // namespace

int64_t local_response_norm_forward_workspace(const LocalResponseNormForward& a) {
  return plan<false>(a, is_aligned_call(a)).workspace();
}
void local_response_norm_forward(const LocalResponseNormForward& a, const Queue& queue) {
  run<false>(a, nullptr, a.y, is_aligned_call(a), queue);
}

int64_t local_response_norm_backward_workspace(const LocalResponseNormBackward& a) {
  return plan<true>(a, is_aligned_call(a)).workspace();
}
void local_response_norm_backward(const LocalResponseNormBackward& a, const Queue& queue) {
  run<true>(a, a.dy, a.dx, is_aligned_call(a), queue);
}

}  // namespace fastnorm::cuda
