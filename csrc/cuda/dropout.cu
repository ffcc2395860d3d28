// Dropout on a CUDA device: one read, one write, nothing saved. The mask is drawn again wherever it is needed, from the
// seed and an element's logical index, eight elements a Philox block (philox.h).
//
// elements, contiguous:     a warp owns 256 elements, and each of its lanes draws one block. An access of 16 bytes holds
//                           8, 4 or 2 elements of 16, 32 or 64 bits, so that lanes that follow each other in memory
//                           get their bits from the lane that drew them.
// elements, channels_last:  a warp owns 32 channels of kStripRows positions. A block holds eight positions of one
//                           channel: each lane draws for its channel, and eight ballots make of it a word of 32 channels
//                           for each position, a transposed 32 x 8 bit matrix. Rows are then read and written by 16
//                           bytes a lane. Where S is no multiple of 8, blocks begin at other positions in each channel,
//                           and one more than the strip is long is drawn.
// channels, contiguous:     a thread owns kWindowsPerThread times 16 bytes, wherever in a channel they lie, and draws once
//                           for the eight channels of a block, which they seldom leave.
// channels, channels_last:  a thread draws once for the channels of 16 bytes, and applies it to kRowsPerThread rows.
#include "../dropout.h"

#include "dropout_plan.h"
#include "launch.cuh"
#include "pack.cuh"
#include "reduce.cuh"

namespace fastnorm::cuda {
namespace {

constexpr int kThreads = kDropoutThreads;
constexpr int kStripRows = kDropoutStripRows;
constexpr int kRowsPerThread = kDropoutRows;
constexpr int kWindowsPerThread = kDropoutWindows;

template <typename T>
struct Call {
  const T* x;
  T* y;
  int64_t N, C, S;
  uint64_t seed, offset;
  const int64_t* state;  // where these two lie instead, or null
  uint32_t threshold;
  acc_type<T> scale, shift_kept, shift_dropped;

  __device__ int64_t numel() const { return N * C * S; }

  // Scalar math: y = x * (keep ? scale : 0) + (keep ? shift_kept : shift_dropped)
  template <int kPack>
  __device__ Pack<T, kPack> apply(const Pack<T, kPack>& x, uint32_t keep) const {
    acc_type<T> v[kPack];
    x.unpack(v);
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      const bool kept = keep >> j & 1;
      v[j] = multiply_add(v[j], kept ? scale : acc_type<T>(0), kept ? shift_kept : shift_dropped);
    }
    return Pack<T, kPack>::pack(v);
  }

  // The pack from element i on, or what the tensor has of it.
  template <int kPack>
  __device__ Pack<T, kPack> load(int64_t i) const {
    const int64_t left = numel() - i;
    return load_part<kPack, true>(x + i, 0, static_cast<int>(min(left, int64_t{kPack})), left >= kPack);
  }
  template <int kPack>
  __device__ void store(int64_t i, const Pack<T, kPack>& pack) const {
    store_part(pack, y + i, 0, static_cast<int>(max(min(numel() - i, int64_t{kPack}), int64_t{0})));
  }
};

class Mask {
 public:
  template <typename T>
  __device__ explicit Mask(const Call<T>& call)
      : seed_(call.state ? static_cast<uint64_t>(call.state[0]) : call.seed),
        offset_(call.state ? static_cast<uint64_t>(call.state[1]) : call.offset),
        threshold_(call.threshold << 16) {}

  // Bit e: whether element 8 * block + e is kept. A half of a word is compared in the word's upper half; what lies
  // below it cannot change the result.
  __device__ uint32_t of_block(uint64_t block) const {
    const Philox4x32 random = dropout_bits(seed_, offset_, block);
    uint32_t keep = 0;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      keep |= static_cast<uint32_t>(random.word[w] << 16 >= threshold_) << (2 * w);
      keep |= static_cast<uint32_t>(random.word[w] >= threshold_) << (2 * w + 1);
    }
    return keep;
  }

  // Bit e: whether element index + e is kept, up to the end of index's block. No pack of channels goes beyond, for these
  // begin at multiples of their size.
  __device__ uint32_t from(uint64_t index) const {
    return of_block(index / kElementsPerPhilox) >> index % kElementsPerPhilox;
  }

 private:
  uint64_t seed_, offset_;
  uint32_t threshold_;
};

template <typename T, int kPack>
__global__ void __launch_bounds__(kThreads) drop_elements(Call<T> call) {
  constexpr int kPasses = kElementsPerPhilox / kPack;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  const int64_t first = warp * kWarp * kElementsPerPhilox + lane * kPack;
  Pack<T, kPack> x[kPasses];
#pragma unroll
  for (int k = 0; k < kPasses; ++k) x[k] = call.template load<kPack>(first + k * kWarp * kPack);
  const uint32_t drawn = Mask(call).of_block(static_cast<uint64_t>(warp * kWarp + lane));
#pragma unroll
  for (int k = 0; k < kPasses; ++k) {
    const int in_tile = (k * kWarp + lane) * kPack;
    const uint32_t keep = __shfl_sync(kAllLanes, drawn, in_tile / kElementsPerPhilox) >> in_tile % kElementsPerPhilox;
    call.store(first + k * kWarp * kPack, call.apply(x[k], keep));
  }
}

template <typename T, int kPack>
__global__ void __launch_bounds__(kThreads) drop_elements_channels_last(Call<T> call, int64_t strips, int64_t groups) {
  constexpr int kPasses = kElementsPerPhilox / kPack;
  constexpr int kLanesPerRow = kWarp / kPack;  // a pass is kPack rows
  const int lane = static_cast<int>(threadIdx.x) % kWarp, lane_row = lane / kLanesPerRow;
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  if (warp >= call.N * strips * groups) return;
  const int64_t n = warp / groups / strips, s0 = warp / groups % strips * kStripRows, c0 = warp % groups * kWarp;
  const int64_t rows = min(call.S - s0, static_cast<int64_t>(kStripRows));

  const Mask mask(call);
  const uint64_t index = static_cast<uint64_t>((n * call.C + min(c0 + lane, call.C - 1)) * call.S + s0);
  uint64_t block = index / kElementsPerPhilox;
  const int phase = static_cast<int>(index % kElementsPerPhilox);
  const bool is_whole = call.S % kElementsPerPhilox == 0;  // then every phase is 0
  uint32_t here = mask.of_block(block), next = 0;

  const int64_t c = c0 + lane % kLanesPerRow * kPack;
  for (int64_t r = 0; r < rows; r += kElementsPerPhilox) {
    Pack<T, kPack> x[kPasses];
    int64_t at[kPasses];  // -1: no element
#pragma unroll
    for (int k = 0; k < kPasses; ++k) {
      const int64_t row = r + k * kPack + lane_row;
      at[k] = row < rows && c < call.C ? (n * call.S + s0 + row) * call.C + c : -1;
      if (at[k] >= 0) x[k] = Pack<T, kPack>::load_streaming(call.x + at[k]);
    }
    if (!is_whole || r + kElementsPerPhilox < rows) next = mask.of_block(++block);
    const uint32_t drawn = (here | next << kElementsPerPhilox) >> phase;
    here = next;
#pragma unroll
    for (int k = 0; k < kPasses; ++k) {
      uint32_t channels = 0;
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        const uint32_t word = __ballot_sync(kAllLanes, drawn >> (k * kPack + j) & 1);
        if (j == lane_row) channels = word;
      }
      if (at[k] < 0) continue;
      call.apply(x[k], channels >> (c - c0)).store_streaming(call.y + at[k]);
    }
  }
}

template <typename T, int kPack>
__global__ void __launch_bounds__(kThreads) drop_channels(Call<T> call, bool is_narrow, FastDivide by_S) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  const int64_t first = (warp * kWarp * kWindowsPerThread + lane) * kPack;
  Pack<T, kPack> x[kWindowsPerThread];
#pragma unroll
  for (int k = 0; k < kWindowsPerThread; ++k) x[k] = call.template load<kPack>(first + k * kWarp * kPack);
  const Mask mask(call);
  uint64_t block = ~uint64_t{0};
  uint32_t of_block = 0;
#pragma unroll
  for (int k = 0; k < kWindowsPerThread; ++k) {
    const int64_t i = first + k * kWarp * kPack;
    const uint64_t channel = is_narrow ? by_S(static_cast<uint32_t>(i)) : static_cast<uint64_t>(i / call.S);
    if (channel / kElementsPerPhilox != block) {
      block = channel / kElementsPerPhilox;
      of_block = mask.of_block(block);
    }
    // A block of eight channels has a multiple of eight elements, so that no pack goes beyond it.
    const uint32_t drawn = of_block >> channel % kElementsPerPhilox;
    int64_t left = static_cast<int64_t>(channel + 1) * call.S - i;  // elements of the channel from i on
    uint32_t keep = drawn & 1 ? ~0u : 0u;
    if (left < kPack) {
      uint32_t nth = 0;  // of the channels that begin here or before
      keep = 0;
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        keep |= (drawn >> nth & 1) << j;
        if (--left > 0) continue;
        ++nth;
        left = call.S;
      }
    }
    call.store(i, call.apply(x[k], keep));
  }
}

template <typename T, int kPack>
__global__ void __launch_bounds__(kThreads) drop_channels_channels_last(Call<T> call, int64_t chunks) {
  const int64_t packs = call.C / kPack, task = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (task >= call.N * chunks * packs) return;
  const int64_t c = task % packs * kPack, chunk = task / packs % chunks, n = task / packs / chunks;
  const uint32_t keep = Mask(call).from(static_cast<uint64_t>(n * call.C + c));
  // Threads of neighbouring chunks take neighbouring rows.
  Pack<T, kPack> x[kRowsPerThread];
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) {
    const int64_t s = chunk + r * chunks;
    if (s < call.S) x[r] = Pack<T, kPack>::load_streaming(call.x + (n * call.S + s) * call.C + c);
  }
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) {
    const int64_t s = chunk + r * chunks;
    if (s < call.S) call.apply(x[r], keep).store_streaming(call.y + (n * call.S + s) * call.C + c);
  }
}

// The seed and offset of a mask, drawn anew at each replay of a captured graph. One thread: 24 bytes in, 16 out.
__global__ void draw_state(DropoutState args) {
  if (threadIdx.x != 0) return;
  const uint64_t offset = static_cast<uint64_t>(*args.offset) + args.added;
  args.state[0] = static_cast<int64_t>(dropout_seed(static_cast<uint64_t>(*args.seed), offset));
  args.state[1] = 0;
}

template <typename T, int kPack>
void run(const Dropout& a, const DropoutPlan& p, cudaStream_t stream) {
  using acc_t = acc_type<T>;
  // What is not shifted has -0 added, the one number that changes no product, not even -0.
  const auto shift = [](double s) { return static_cast<acc_t>(s == 0 ? -0.0 : s); };
  const auto [N, C, S, layout] = a.shape;
  const Call<T> call{static_cast<const T*>(a.x),
                     static_cast<T*>(a.y),
                     N,
                     C,
                     S,
                     a.seed,
                     a.offset,
                     a.state,
                     a.level.threshold,
                     static_cast<acc_t>(a.level.scale),
                     shift(a.level.shift_kept),
                     shift(a.level.shift_dropped)};
  const Grid grid{dim3(static_cast<unsigned>(p.blocks())), kThreads};
  if (layout == Layout::kContiguous) {
    if (a.by_channel) return launch("dropout", drop_channels<T, kPack>, grid, stream, call, p.is_narrow, p.by_S);
    return launch("dropout", drop_elements<T, kPack>, grid, stream, call);
  }
  if (a.by_channel) return launch("dropout", drop_channels_channels_last<T, kPack>, grid, stream, call, p.strips);
  launch("dropout", drop_elements_channels_last<T, kPack>, grid, stream, call, p.strips, p.groups);
}

}  // namespace

int64_t dropout_workspace(const Dropout&) { return 0; }
int64_t dropout_state_workspace(const DropoutState&) { return 0; }

void dropout(const Dropout& a, const Queue& queue) {
  visit(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto stream = static_cast<cudaStream_t>(queue.stream);
    const DropoutPlan p = plan_dropout(a.shape, a.by_channel, sizeof(T), is_aligned(a.x, a.y));
    if (p.pack == 1) return run<T, 1>(a, p, stream);
    run<T, kWindow<T>>(a, p, stream);
  });
}

void dropout_state(const DropoutState& args, const Queue& queue) {
  launch("dropout", draw_state, {dim3(1), kWarp}, static_cast<cudaStream_t>(queue.stream), args);
}

}  // namespace fastnorm::cuda
