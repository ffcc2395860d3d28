// Dropout on the CPU: the mask is drawn 64 elements at a time, from the element's logical index, and never stored.
//
// elements, contiguous:     memory order is logical order; a thread owns a stretch of it.
// elements, channels_last:  a task owns kTaskRows positions s of one sample. Each Philox block holds eight consecutive
//                           s of one channel, so eight channels' blocks are an 8 x 8 bit matrix; transposed, it masks
//                           rows of channels.
// channels, contiguous:     a thread owns a stretch of memory, wherever in a channel that begins and ends: a few large
//                           samples occupy all threads as many small channels do.
// channels, channels_last:  a thread owns a stretch of rows; the bits of a sample's channels are drawn once and mask
//                           each of its rows.
#include "../dropout.h"

#include "parallel.h"
#include "philox_vec.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

constexpr int64_t kTaskRows = 64;

// bit 8 * i + j of the result is bit 8 * j + i of x (Hacker's Delight, 7-3)
uint64_t transpose_8x8(uint64_t x) {
  uint64_t t = (x ^ x >> 7) & 0x00AA00AA00AA00AAull;
  x ^= t ^ t << 7;
  t = (x ^ x >> 14) & 0x0000CCCC0000CCCCull;
  x ^= t ^ t << 14;
  t = (x ^ x >> 28) & 0x00000000F0F0F0F0ull;
  return x ^ t ^ t << 28;
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
    parallel_for_ranges((numel + 63) / 64, numel, [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group) {
        const uint64_t bits = keep.of_group(static_cast<uint64_t>(group * 64 / kElementsPerPhilox));
        apply(group * 64, std::min<int64_t>(64, numel - group * 64), reinterpret_cast<const uint8_t*>(&bits));
      }
      if (stream) stream_fence();
    });
  }

  void channels_last() const {
    const int64_t row_bytes = (C + 7) / 8, chunks = (S + kTaskRows - 1) / kTaskRows;
    parallel_for(N * chunks, a.shape.numel(), [&](int64_t task) {
      const int64_t n = task / chunks, s0 = task % chunks * kTaskRows, rows = std::min(kTaskRows, S - s0);
      const ScratchArray<uint8_t> bits(kTaskRows * row_bytes);
      for (int64_t c = 0; c < C; c += 8) channel_bits(n, c, s0, rows, &bits[c / 8], row_bytes);
      for (int64_t r = 0; r < rows; ++r) apply((n * S + s0 + r) * C, C, &bits[r * row_bytes]);
      if (stream) stream_fence();
    });
  }

  // The bits of channels c .. c + 7 at positions s0 .. s0 + rows - 1: a byte for each position, `row_bytes` apart.
  void channel_bits(int64_t n, int64_t c, int64_t s0, int64_t rows, uint8_t* out, int64_t row_bytes) const {
    uint64_t first[8];
    int phase[8];  // where in its block a channel's position s0 is
    bool aligned = true;
    for (int j = 0; j < 8; ++j) {
      const int64_t index = (n * C + c + j) * S + s0;
      first[j] = static_cast<uint64_t>(index / kElementsPerPhilox);
      phase[j] = static_cast<int>(index % kElementsPerPhilox);
      aligned = aligned && phase[j] == 0;
    }
    EightBlocks block = EightBlocks::load(first);
    uint64_t here = keep.of_blocks(block);
    for (int64_t r = 0; r < rows; r += 8) {
      block.advance();
      uint64_t next = 0, bits = here;
      if (r + 8 < rows || !aligned) next = keep.of_blocks(block);
      if (!aligned) {
        bits = 0;
        for (int j = 0; j < 8; ++j) {
          const uint64_t two = (here >> (8 * j) & 0xFF) | (next >> (8 * j) & 0xFF) << 8;
          bits |= (two >> phase[j] & 0xFF) << (8 * j);
        }
      }
      here = next;
      bits = transpose_8x8(bits);
      const int64_t end = std::min<int64_t>(8, rows - r);
      for (int64_t i = 0; i < end; ++i) out[(r + i) * row_bytes] = static_cast<uint8_t>(bits >> (8 * i));
    }
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

  // One bit for each channel of sample n. A draw of 64 bits from a whole block on holds 57 channels or more.
  void sample_bits(int64_t n, uint8_t* out) const {
    constexpr int64_t kBytes = 7;
    const int64_t bytes = (C + 7) / 8;
    for (int64_t b = 0; b < bytes; b += kBytes) {
      const uint64_t index = static_cast<uint64_t>(n * C + b * 8);
      const uint64_t bits = keep.of_group(index / kElementsPerPhilox) >> (index % kElementsPerPhilox);
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
