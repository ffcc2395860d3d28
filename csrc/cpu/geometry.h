// A slice that is reduced together (a channel, a group, a row) as chunks that fit the first-level cache.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

// Elements a chunk: 16 KiB of float32, so that what sweeps one twice finds it in the first-level cache; float32 partial
// sums of no more terms than this are merged in float64.
constexpr int64_t kChunk = 4096;

// `count` runs of `length` contiguous elements, `stride` elements from start to start, the first at `offset`.
struct Runs {
  int64_t offset, count, stride, length;

  int64_t numel() const { return count * length; }
  // At most `most` of them, from the first on.
  Runs part(int64_t first, int64_t most) const {
    return {offset + first * stride, std::min(most, count - first), stride, length};
  }
  // The same from the last to the first.
  Runs reversed() const { return {offset + (count - 1) * stride, count, -stride, length}; }
};

// The chunks of a slice: a piece of one run if the runs are long, else several whole runs.
class Chunks {
 public:
  explicit Chunks(const Runs& slice)
      : slice_(slice),
        pieces_(std::max<int64_t>(1, (slice.length + kChunk - 1) / kChunk)),
        runs_(std::max<int64_t>(1, kChunk / std::max<int64_t>(1, slice.length))) {}

  int64_t size() const { return pieces_ > 1 ? slice_.count * pieces_ : (slice_.count + runs_ - 1) / runs_; }

  Runs operator[](int64_t i) const {
    if (pieces_ > 1) {
      const int64_t run = i / pieces_, start = i % pieces_ * kChunk;
      return {slice_.offset + run * slice_.stride + start, 1, 0, std::min(kChunk, slice_.length - start)};
    }
    const int64_t run = i * runs_;
    return {slice_.offset + run * slice_.stride, std::min(runs_, slice_.count - run), slice_.stride, slice_.length};
  }

  // Calls f(offset, length) for every run of chunk i.
  template <typename F>
  void for_runs(int64_t i, const F& f) const {
    const Runs chunk = (*this)[i];
    for (int64_t run = 0; run < chunk.count; ++run) f(chunk.offset + run * chunk.stride, chunk.length);
  }

 private:
  Runs slice_;
  int64_t pieces_, runs_;
};

}  // namespace
}  // namespace fastnorm::cpu::CPU_CAPABILITY
