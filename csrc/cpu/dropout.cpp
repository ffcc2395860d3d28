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

#include "bit_square.h"
#include "parallel.h"
#include "philox_vec.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

constexpr int64_t kDraws = 12;  // of 64 bits each, before they are used: two short loops run faster than a long one
constexpr int64_t kTaskElements = 22 * 64 * kDraws;
constexpr int64_t kUnalignedBits = 56;  // whole bytes of the 57 that are left of 64

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
  const int64_t bytes = a.shape.numel() * size_of(a.dtype);
  const bool stream = bytes >= stream_threshold();
  // Whether x and y come from memory: what lies ahead is asked for then. Where bits are drawn for every element, memory
  // has more time.
  const bool far = (a.by_channel ? 2 : 1) * bytes >= memory_threshold();

  // Scalar math: y[i] = x[i] * (bit i ? scale : 0) + (bit i ? shift_kept : shift_dropped). Bits can be read three bytes
  // past the last.
  void apply(int64_t at, int64_t n, const uint8_t* bits) const {
    far ? apply_bits<true>(at, n, bits) : apply_bits<false>(at, n, bits);
  }

  template <bool kFar>
  FASTNORM_LOOP void apply_bits(int64_t at, int64_t n, const uint8_t* bits) const {
    const P kept = scale, dropped(acc_t(0)), to_kept = shift_kept, to_dropped = shift_dropped;
    map_run<kFar, AnyOrder>(at, n, [&](const P& value, int64_t i, auto count) {
      const uint32_t here = load_bits_and_more(bits + i / 8);
      const P factor = choose(here, kept, dropped, count);
      if constexpr (!kShifted) return value * factor;
      return fmadd(value, factor, choose(here, to_kept, to_dropped, count));
    });
  }

  // Calls f(pack, its first element, Whole | Partial), which gives what is stored.
  template <bool kFar, typename Whole, typename F>
  void map_run(int64_t at, int64_t n, const F& f) const {
    const T* from = x + at;
    T* to = y + at;
    const bool past_caches = stream && to != from && fills_lines(to, n);
    for_packs<T, 1, Whole>(n, [&](int64_t i, auto count, int) {
      if constexpr (kFar) {
        prefetch(from + i + kAhead<T>);
        if (!past_caches) prefetch_to_write(to + i + kAhead<T>);
      }
      put(f(P::load(from + i, count), i, count), to + i, count, past_caches);
    });
  }

  void contiguous() const {
    const int64_t numel = a.shape.numel();
    parallel_for((numel + kTaskElements - 1) / kTaskElements, numel, [&](int64_t task) {
      const int64_t end = std::min(numel, (task + 1) * kTaskElements);
      for (int64_t i = task * kTaskElements; i < end; i += 64 * kDraws) {
        uint64_t bits[kDraws + 1];
        const int64_t n = std::min<int64_t>(64 * kDraws, end - i);
        uint64_t block = static_cast<uint64_t>(i / kElementsPerPhilox) - kGroupBlocks;
        keep.of_groups((n + 63) / 64, bits, [&] { return block += kGroupBlocks; });
        apply(i, n, reinterpret_cast<const uint8_t*>(bits));
      }
    });
  }

  // A task is some rows of a sample: all, or as many as fill whole draws of each channel's, wherever it begins in a
  // Philox block.
  static constexpr int64_t kMostRows = 256;

  void channels_last() const {
    const int64_t words = (C + 63) / 64;  // of bits, a row
    const int64_t whole_draws = S % kElementsPerPhilox == 0 ? kMostRows : kMostRows - kElementsPerPhilox;
    const int64_t task_rows = S <= kMostRows ? S : whole_draws, chunks = (S + task_rows - 1) / task_rows;
    parallel_for(N * chunks, a.shape.numel(), [&](int64_t task) {
      const int64_t n = task / chunks, s0 = task % chunks * task_rows, rows = std::min(task_rows, S - s0);
      const ScratchArray<uint64_t> bits(rows * words + 1);
      for (int64_t word = 0; word < words; ++word) bits_of_channels(n, s0, rows, word, &bits[word], words);
      for (int64_t r = 0; r < rows; ++r)
        apply((n * S + s0 + r) * C, C, reinterpret_cast<const uint8_t*>(&bits[r * words]));
    });
  }

  // Bit c of bits[r * pitch]: channel 64 * word + c of sample n at position s0 + r.
  FASTNORM_LOOP void bits_of_channels(int64_t n, int64_t s0, int64_t rows, int64_t word, uint64_t* bits,
                                      int64_t pitch) const {
    const int64_t first = 64 * word, channels = std::min<int64_t>(64, C - first), index = (n * C + first) * S + s0;
    const bool one_stretch = rows == S, aligned = S % kElementsPerPhilox == 0;
    // Whole samples are one stretch of indices, of others each channel has one.
    const int64_t stretches = one_stretch ? 1 : channels;
    const int64_t bits_before = one_stretch ? index % kElementsPerPhilox : aligned ? 0 : kElementsPerPhilox - 1;
    const int64_t draws = (bits_before + (one_stretch ? channels * S : rows) + 63) / 64;  // a stretch
    uint64_t drawn[64 * kMostRows / 64 + 1];
    draw_stretches(index, stretches, draws, x + (n * S + s0) * C + first, rows, drawn);
    drawn[stretches * draws] = 0;  // read, not used

    int64_t begin[64];  // bit of a channel's first position
    for (int64_t c = 0; c < channels; ++c)
      begin[c] = one_stretch ? bits_before + c * S : c * draws * 64 + (index + c * S) % kElementsPerPhilox;
    uint64_t columns[64] = {};
    const int64_t square_rows = aligned ? 64 : kUnalignedBits;
    for (int64_t r = 0; r < rows; r += square_rows) {
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t bit = begin[c] + r;
        std::memcpy(&columns[c], reinterpret_cast<const uint8_t*>(drawn) + bit / 8, sizeof(uint64_t));
        columns[c] >>= bit % 8;
      }
      transpose_bits(columns, std::min(square_rows, rows - r), bits + r * pitch, pitch);
    }
  }

  // `draws` of 64 bits for each stretch, of which the next begins S elements on. While bits are drawn memory has nothing
  // to do, so the elements that they are for may come already: a row with each draw.
  void draw_stretches(int64_t index, int64_t stretches, int64_t draws, const T* row, int64_t rows,
                      uint64_t* drawn) const {
    int64_t next_row = 0, next_draw = 0;
    keep.of_groups(stretches * draws, drawn, [&] {
      if (next_row < rows) prefetch_elements(row + next_row++ * C);
      const int64_t block = index / kElementsPerPhilox + next_draw * kGroupBlocks;
      if (++next_draw == draws) next_draw = 0, index += S;
      return static_cast<uint64_t>(block);
    });
  }

  // 64 of them, which may lie past the end.
  static void prefetch_elements(const T* p) {
#pragma GCC unroll 8
    for (size_t i = 0; i < 64; i += 64 / sizeof(T)) prefetch(p + i);
  }

  // The bits of the elements from `index` on: kUnalignedBits of them at least.
  uint64_t draw(int64_t index) const {
    return keep.of_group(static_cast<uint64_t>(index / kElementsPerPhilox)) >> (index % kElementsPerPhilox);
  }

  void whole_channels() const {
    const int64_t numel = a.shape.numel();
    parallel_for_ranges((numel + 63) / 64, numel, [&](int64_t begin, int64_t end) {
      const int64_t last = std::min(numel, end * 64);
      far ? scale_planes<true>(begin * 64, last) : scale_planes<false>(begin * 64, last);
    });
  }

  // Scalar math: y[i] = x[i] * (channel kept ? scale : 0) + (channel kept ? shift_kept : shift_dropped)
  template <bool kFar>
  FASTNORM_LOOP void scale_planes(int64_t i, int64_t end) const {
    const P kept = scale, dropped(acc_t(0)), to_kept = shift_kept, to_dropped = shift_dropped;
    const int64_t plane = S;
    int64_t channel = i / plane, next = (channel + 1) * plane;
    const auto draw_group = [&] {
      return keep.of_group(static_cast<uint64_t>(channel / 64 * 64 / kElementsPerPhilox));
    };
    for (uint64_t bits = draw_group(); i < end; i = next, next += plane) {
      const bool keeps = bits >> (channel % 64) & 1;
      const P factor = keeps ? kept : dropped, shift = keeps ? to_kept : to_dropped;
      map_run<kFar, AnyOrder>(i, std::min(next, end) - i, [&](const P& value, int64_t, auto) {
        if constexpr (!kShifted) return value * factor;
        return fmadd(value, factor, shift);
      });
      if (++channel % 64 == 0) bits = draw_group();
    }
  }

  // A sample's channels have their factors, and their shifts, in arrays, short rows several as one.
  void whole_channels_last() const {
    const int64_t fold = C < 64 ? 256 / C : 1, width = fold * C;
    parallel_for_ranges(N * S, a.shape.numel(), [&](int64_t begin, int64_t end) {
      const ScratchArray<uint8_t> bits(C / 8 + P::kSize);
      const ScratchArray<acc_t> factor(width + P::kSize), shift(width + P::kSize);
      for (int64_t row = begin; row < end;) {
        const int64_t n = row / S, next = std::min(end, (n + 1) * S);
        sample_bits(n, bits.data());
        for_packs<T>(C, [&](int64_t c, auto, int) {
          const uint32_t here = load_bits<T>(&bits[c / 8]);
          choose(here, scale, P(acc_t(0))).store_acc(&factor[c]);
          choose(here, shift_kept, shift_dropped).store_acc(&shift[c]);
        });
        for (int64_t c = C; c < width; c += C) {
          std::copy(&factor[0], &factor[C], &factor[c]);
          std::copy(&shift[0], &shift[C], &shift[c]);
        }
        far ? scale_rows<true>(row * C, next * C, width, factor.data(), shift.data())
            : scale_rows<false>(row * C, next * C, width, factor.data(), shift.data());
        row = next;
      }
    });
  }

  // Scalar math: y[i] = x[i] * factor[i % width] + shift[i % width]
  template <bool kFar>
  FASTNORM_LOOP void scale_rows(int64_t begin, int64_t end, int64_t width, const acc_t* factor,
                                const acc_t* shift) const {
    for (int64_t row = begin; row < end; row += width) {
      map_run<kFar, Full>(row, std::min(width, end - row), [&](const P& value, int64_t i, auto) {
        if constexpr (!kShifted) return value * P::load_acc(factor + i);
        return fmadd(value, P::load_acc(factor + i), P::load_acc(shift + i));
      });
    }
  }

  // One bit for each channel of sample n.
  void sample_bits(int64_t n, uint8_t* out) const {
    constexpr int64_t kBytes = kUnalignedBits / 8;
    const int64_t bytes = (C + 7) / 8;
    for (int64_t b = 0; b < bytes; b += kBytes) {
      const uint64_t bits = draw(n * C + b * 8);
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
