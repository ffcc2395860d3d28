// Dropout on the CPU: the mask is drawn 64 elements at a time, from the element's logical index, and never stored.
//
// elements, contiguous:     memory order is logical order; a task owns kTaskElements.
// elements, channels_last:  a task owns some positions s of one sample, or all. A draw holds consecutive s
//                           of one channel, so 64 of each of 64 channels are a square of bits; transposed, it masks rows
//                           of channels.
// channels, contiguous:     a thread owns a stretch of memory, wherever in a channel that begins and ends: a few large
//                           samples occupy all threads as many small channels do.
// channels, channels_last:  a thread owns a stretch of rows; the bits of a sample's channels are drawn once and mask
//                           each of its rows.
#include "../dropout.h"

#include "parallel.h"
#include "philox_vec.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

constexpr int64_t kTaskElements = 1 << 14;
constexpr int64_t kDraws = 16;  // of 64 bits each, before they are used: two short loops run faster than a long one
constexpr int64_t kUnalignedBits = 56;  // whole bytes of the 57 that are left of 64

// Squares of 2 * kWidth bits: their upper right and lower left quarters change places.
template <int kWidth>
void exchange_quarters(uint64_t* rows, uint64_t right) {
  for (int square = 0; square < 64; square += 2 * kWidth) {
    for (int k = square; k < square + kWidth; ++k) {
      const uint64_t difference = (rows[k] >> kWidth ^ rows[k + kWidth]) & right;
      rows[k] ^= difference << kWidth;
      rows[k + kWidth] ^= difference;
    }
  }
}

// Bit j of row i becomes bit i of row j (Hacker's Delight, 7-3).
void transpose_64x64(uint64_t* rows) {
  exchange_quarters<32>(rows, 0x00000000FFFFFFFFull);
  exchange_quarters<16>(rows, 0x0000FFFF0000FFFFull);
  exchange_quarters<8>(rows, 0x00FF00FF00FF00FFull);
  exchange_quarters<4>(rows, 0x0F0F0F0F0F0F0F0Full);
  exchange_quarters<2>(rows, 0x3333333333333333ull);
  exchange_quarters<1>(rows, 0x5555555555555555ull);
}

// kShifted: alpha dropout's forward. Dropout, and the backward of both, only multiply.
template <typename T, bool kShifted>
struct DropoutKernel {
  using P = Pack<T>;
  using acc_t = acc_type<T>;
  const Dropout& a;
  const T* x = static_cast<const T*>(a.x);
  T* y = static_cast<T*>(a.y);
  const int64_t N = a.shape.N, C = a.shape.C, S = a.shape.S;
  const KeepBits keep{a.seed, a.offset, a.level.threshold};
  const P scale{static_cast<acc_t>(a.level.scale)};
  const P shift_kept{static_cast<acc_t>(a.level.shift_kept)}, shift_dropped{static_cast<acc_t>(a.level.shift_dropped)};
  const bool stream = a.shape.numel() * size_of(a.dtype) >= stream_threshold();

  // Scalar math: y[i] = x[i] * (bit i ? scale : 0) + (bit i ? shift_kept : shift_dropped)
  FASTNORM_LOOP void apply(int64_t at, int64_t n, const uint8_t* bits) const {
    const P kept = scale, dropped(acc_t(0)), to_kept = shift_kept, to_dropped = shift_dropped;
    map_run(at, n, [&](const P& value, int64_t i, auto count) {
      const uint32_t here = load_bits<T>(bits + i / 8, count);
      const P factor = choose(here, kept, dropped);
      if constexpr (!kShifted) return value * factor;
      return fmadd(value, factor, choose(here, to_kept, to_dropped));
    });
  }

  // The same for a run that is kept or dropped as a whole.
  FASTNORM_LOOP void apply_uniform(int64_t at, int64_t n, bool keeps) const {
    const P factor = keeps ? scale : P(acc_t(0)), shift = keeps ? shift_kept : shift_dropped;
    map_run(at, n, [&](const P& value, int64_t, auto) {
      if constexpr (!kShifted) return value * factor;
      return fmadd(value, factor, shift);
    });
  }

  template <typename F>
  void map_run(int64_t at, int64_t n, const F& f) const {
    const T* from = x + at;
    T* to = y + at;
    const bool past_caches = stream && fills_lines(to, n);
    for_packs<T>(
        n, [&](int64_t i, auto count, int) { put(f(P::load(from + i, count), i, count), to + i, count, past_caches); });
  }

  void contiguous() const {
    const int64_t numel = a.shape.numel();
    parallel_for((numel + kTaskElements - 1) / kTaskElements, numel, [&](int64_t task) {
      const int64_t end = std::min(numel, (task + 1) * kTaskElements);
      for (int64_t i = task * kTaskElements; i < end; i += 64 * kDraws) {
        uint64_t bits[kDraws];
        const int64_t n = std::min<int64_t>(64 * kDraws, end - i);
        keep.of_groups(static_cast<uint64_t>(i / kElementsPerPhilox), (n + 63) / 64, bits);
        apply(i, n, reinterpret_cast<const uint8_t*>(bits));
      }
      if (stream) stream_fence();
    });
  }

  // Where each channel begins a Philox block it has draws of its own. Else these would begin and end within one, so a
  // small sample is drawn in one go, through the end of one channel to the next, and a larger one in long pieces.
  void channels_last() const {
    const int64_t words = (C + 63) / 64;  // of bits, a row
    const bool aligned = S % kElementsPerPhilox == 0;
    const int64_t task_rows = aligned ? 64 : S <= kMostRows ? S : kMostRows - kElementsPerPhilox;
    const int64_t chunks = (S + task_rows - 1) / task_rows;
    parallel_for(N * chunks, a.shape.numel(), [&](int64_t task) {
      const int64_t n = task / chunks, s0 = task % chunks * task_rows, rows = std::min(task_rows, S - s0);
      const ScratchArray<uint64_t> bits(rows * words);
      for (int64_t word = 0; word < words; ++word) {
        const int64_t channels = std::min<int64_t>(64, C - word * 64);
        const auto put_square = [&](uint64_t* square, int64_t s) {
          transpose_64x64(square);
          for (int64_t r = s; r < std::min(rows, s + 64); ++r) bits[r * words + word] = square[r - s];
        };
        uint64_t square[64] = {};
        if (aligned) {
          draw_square(n, word * 64, channels, s0, rows, square);
          put_square(square, 0);
        } else {
          DrawnRows drawn;
          draw_rows(n, word * 64, channels, s0, rows, drawn);
          for (int64_t s = 0; s < rows; s += 64) {
            for (int64_t c = 0; c < channels; ++c) square[c] = drawn.bits_from(c, s);
            put_square(square, s);
          }
        }
      }
      for (int64_t r = 0; r < rows; ++r)
        apply((n * S + s0 + r) * C, C, reinterpret_cast<const uint8_t*>(&bits[r * words]));
      if (stream) stream_fence();
    });
  }

  // While bits are drawn memory has nothing to do, so the elements that they are for may come already: a row with each
  // draw.
  static void prefetch_row(const T* row, int64_t channels) {
    for (int64_t i = 0; i < channels; i += 64 / static_cast<int64_t>(sizeof(T))) prefetch(row + i);
  }

  // bits[c]: `rows` positions from s0 on of channel first + c; each begins a Philox block.
  FASTNORM_LOOP void draw_square(int64_t n, int64_t first, int64_t channels, int64_t s0, int64_t rows,
                                 uint64_t* bits) const {
    const KeepBits local = keep;
    const T* row = x + (n * S + s0) * C + first;
    for (int64_t c = 0; c < channels; ++c, row += C) {
      if (c < rows) prefetch_row(row, channels);
      bits[c] = local.of_group(static_cast<uint64_t>(((n * C + first + c) * S + s0) / kElementsPerPhilox));
    }
  }

  static constexpr int64_t kMostRows = 256;

  // The bits of at most kMostRows positions of 64 channels.
  struct DrawnRows {
    uint64_t words[64 * kMostRows / 64 + 2];
    int64_t begin[64];  // bit of a channel's first position

    // 64 of channel c from its position s on.
    uint64_t bits_from(int64_t c, int64_t s) const {
      const int64_t bit = begin[c] + s, word = bit / 64, within = bit % 64;
      return words[word] >> within | words[word + 1] << 1 << (63 - within);
    }
  };

  // `rows` positions from s0 on of the channels from `first` on.
  FASTNORM_LOOP void draw_rows(int64_t n, int64_t first, int64_t channels, int64_t s0, int64_t rows,
                               DrawnRows& drawn) const {
    const KeepBits local = keep;
    const T* const row = x + (n * S + s0) * C + first;
    const int64_t index = (n * C + first) * S + s0;
    int64_t draws = 0;
    const auto draw = [&](int64_t from, int64_t count) {
      const int64_t end = from + count;
      for (from -= from % kElementsPerPhilox; from < end; from += 64, ++draws) {
        if (draws < rows) prefetch_row(row + draws * C, channels);
        drawn.words[draws] = local.of_group(static_cast<uint64_t>(from / kElementsPerPhilox));
      }
    };
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t of_channel = index + c * S;
      drawn.begin[c] = rows == S ? of_channel - index / kElementsPerPhilox * kElementsPerPhilox
                                 : draws * 64 + of_channel % kElementsPerPhilox;
      if (rows < S) draw(of_channel, rows);
    }
    if (rows == S) draw(index, channels * S);
    drawn.words[draws] = 0;  // read, not used
  }

  // The bits of the elements from `index` on: kUnalignedBits of them at least.
  static uint64_t draw(const KeepBits& keep, int64_t index) {
    return keep.of_group(static_cast<uint64_t>(index / kElementsPerPhilox)) >> (index % kElementsPerPhilox);
  }

  void whole_channels() const {
    const int64_t numel = a.shape.numel();
    parallel_for_ranges((numel + 63) / 64, numel, [&](int64_t begin, int64_t end) {
      end = std::min(numel, end * 64);
      int64_t i = begin * 64, channel = i / S, next = (channel + 1) * S;
      uint64_t bits = keep.of_group(static_cast<uint64_t>(channel / 64 * 64 / kElementsPerPhilox));
      while (i < end) {
        apply_uniform(i, std::min(next, end) - i, bits >> (channel % 64) & 1);
        i = next;
        next += S;
        if (++channel % 64 == 0) bits = keep.of_group(static_cast<uint64_t>(channel / kElementsPerPhilox));
      }
      if (stream) stream_fence();
    });
  }

  void whole_channels_last() const {
    parallel_for_ranges(N * S, a.shape.numel(), [&](int64_t begin, int64_t end) {
      const ScratchArray<uint8_t> bits((C + 7) / 8);
      for (int64_t row = begin; row < end;) {
        const int64_t n = row / S, next = std::min(end, (n + 1) * S);
        sample_bits(n, bits.data());
        for (; row < next; ++row) apply(row * C, C, bits.data());
      }
      if (stream) stream_fence();
    });
  }

  // One bit for each channel of sample n.
  void sample_bits(int64_t n, uint8_t* out) const {
    constexpr int64_t kBytes = kUnalignedBits / 8;
    const int64_t bytes = (C + 7) / 8;
    for (int64_t b = 0; b < bytes; b += kBytes) {
      const uint64_t bits = draw(keep, n * C + b * 8);
      std::memcpy(out + b, &bits, static_cast<size_t>(std::min(kBytes, bytes - b)));
    }
  }

  void run() const {
    const bool last = a.shape.layout == Layout::kChannelsLast;
    if (a.by_channel) return last ? whole_channels_last() : whole_channels();
    return last ? channels_last() : contiguous();
  }
};

}  // namespace

void dropout(const Dropout& a) {
  const bool shifted = a.level.shift_kept != 0 || a.level.shift_dropped != 0;
  visit(a.dtype, [&](auto type) {
    if (shifted) {
      DropoutKernel<decltype(type), true>{a}.run();
    } else {
      DropoutKernel<decltype(type), false>{a}.run();
    }
  });
}

}  // namespace fastnorm::cpu::CPU_CAPABILITY
