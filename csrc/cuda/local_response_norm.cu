// Local response normalisation on a CUDA device: forward reads x and writes y, backward reads x and dy and writes dx.
// What lies between is in shared memory.
//
// All four cases are a tensor [slices, rows, columns, lanes], contiguous, with a window along rows, columns or both:
//
//   inter, contiguous      [N, C, 1, H * W]      window along the rows
//   inter, channels_last   [1, N * H * W, C, 1]  window along the columns
//   intra, contiguous      [N * C, H, W, 1]      windows along both
//   intra, channels_last   [N, H, W, C]          windows along both
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
#include "window_plan.h"

namespace fastnorm::cuda {
namespace {

// ---- scale^-beta

enum class Power { kHalf, kThreeQuarters, kOne, kAny };

Power power_of(double beta) {
  return beta == 0.5 ? Power::kHalf : beta == 0.75 ? Power::kThreeQuarters : beta == 1 ? Power::kOne : Power::kAny;
}

__device__ inline float reciprocal_root(float s) { return rsqrtf(s); }
__device__ inline double reciprocal_root(double s) { return rsqrt(s); }
__device__ inline float root(float s) { return sqrtf(s); }
__device__ inline double root(double s) { return sqrt(s); }
__device__ inline float raise(float s, float exponent) { return powf(s, exponent); }
__device__ inline double raise(double s, double exponent) { return pow(s, exponent); }

// power = s^-beta, inverse = 1 / s
template <int n, typename acc_t>
__device__ void powers(Power kind, acc_t beta, const acc_t (&s)[n], acc_t (&power)[n], acc_t (&inverse)[n]) {
#pragma unroll
  for (int j = 0; j < n; ++j) {
    if (kind == Power::kHalf || kind == Power::kThreeQuarters) {
      const acc_t r = reciprocal_root(s[j]);
      power[j] = kind == Power::kHalf ? r : r * root(r);
      inverse[j] = r * r;
    } else {
      inverse[j] = 1 / s[j];
      power[j] = kind == Power::kOne ? inverse[j] : raise(s[j], -beta);
    }
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

template <typename T>
struct Call {
  const T *x, *dy;
  T* out;  // y, or dx
  Power power;
  acc_type<T> a, beta, k;
  unsigned char* workspace;  // where the buffers are if not in shared memory
  WindowPlan plan;
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
__global__ void __launch_bounds__(kMaxWindowThreads, resident_blocks<T, kPack, kBackward>())
    normalize(const __grid_constant__ Call<T> call) {
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
      powers(call.power, call.beta, scale, power, inverse);
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

template <bool kBackward, typename Args>
void run(const Args& a, const void* dy, void* out, bool aligned, const Queue& queue) {
  const WindowPlan p = plan<kBackward>(a, aligned);
  const Grid grid{dim3(static_cast<unsigned>(p.blocks)), p.threads, 1, static_cast<size_t>(p.shared())};
  visit(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using acc_t = acc_type<T>;
    const LocalResponseNormSetting& s = a.setting;
    const Call<T> call{static_cast<const T*>(a.x),
                       static_cast<const T*>(dy),
                       static_cast<T*>(out),
                       power_of(s.beta),
                       static_cast<acc_t>(s.a),
                       static_cast<acc_t>(s.beta),
                       static_cast<acc_t>(s.k),
                       static_cast<unsigned char*>(queue.workspace),
                       p};
    const auto kernel = p.pack == 1 ? normalize<T, 1, kBackward> : normalize<T, lane_pack(sizeof(T)), kBackward>;
    launch("local_response_norm", kernel, grid, static_cast<cudaStream_t>(queue.stream), call);
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
