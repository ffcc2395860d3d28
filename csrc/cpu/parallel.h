// Threads and scratch memory for the kernels, implemented in runtime.cpp, which is compiled for the plain processor.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastnorm::cpu {

// Below this many elements the work is done by the calling thread: waking the others costs some microseconds.
constexpr int64_t kSerialElements = 16384;

int num_threads();

// Outputs of at least this many bytes are written past the caches: half the last-level cache, for the input is there,
// too; three eighths on processors without AVX512, of which one was measured, in a virtual machine. A cache of more than
// 96 MiB counts as 12.25 (runtime.cpp says why).
int64_t stream_threshold();
// Inputs of at least this many bytes are taken to lie in memory, whence other work has driven them, or as far away: a
// quarter of it.
int64_t memory_threshold();

using RangeBody = void (*)(const void* context, int64_t begin, int64_t end);
void parallel_ranges(int64_t tasks, bool serial, RangeBody body, const void* context);

// 64-byte aligned, uninitialised, freed with the object: in the opposite order on the same thread, as scopes end.
class Scratch {
 public:
  explicit Scratch(size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void* data() const { return data_; }

 private:
  void* data_;
};

namespace {

// Calls task(i) for 0 <= i < tasks, consecutive ones on one thread. What a task computes may depend on i and the shape,
// never on the thread or their number, though how much a task has may: so results are the same for any number of threads.
template <typename F>
void parallel_for(int64_t tasks, int64_t elements, const F& task) {
  parallel_ranges(
      tasks, elements < kSerialElements,
      [](const void* context, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) (*static_cast<const F*>(context))(i);
      },
      &task);
}

// Calls body(begin, end) for ranges that make up 0 .. tasks, one a thread. For work in which no task feeds another
// through a sum: where a range ends depends on the number of threads.
template <typename F>
void parallel_for_ranges(int64_t tasks, int64_t elements, const F& body) {
  parallel_ranges(
      tasks, elements < kSerialElements,
      [](const void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); }, &body);
}

// The same, each thread from its last task to its first: a second sweep then begins with what the first left in the
// cache.
template <typename F>
void parallel_for_reversed(int64_t tasks, int64_t elements, const F& task) {
  parallel_ranges(
      tasks, elements < kSerialElements,
      [](const void* context, int64_t begin, int64_t end) {
        for (int64_t i = end - 1; i >= begin; --i) (*static_cast<const F*>(context))(i);
      },
      &task);
}

template <typename T>
class ScratchArray {
 public:
  explicit ScratchArray(int64_t size) : memory_(static_cast<size_t>(size) * sizeof(T)) {}
  T* data() const { return static_cast<T*>(memory_.data()); }
  T& operator[](int64_t i) const { return data()[i]; }

 private:
  Scratch memory_;
};

}  // namespace
}  // namespace fastnorm::cpu
