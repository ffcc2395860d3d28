// What the kernels need of the process they run in: threads, memory, the processor's caches and instruction set.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <unistd.h>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <new>
#include <string>

#include "cpu/parallel.h"
#include "isa.h"

namespace fastnorm {

Isa isa() {
  static const Isa chosen = [] {
#if defined(__x86_64__) && !defined(FASTNORM_PLAIN)
    const std::string capability = at::get_cpu_capability();
    // torch does not ask for BMI2, which every processor with AVX512 has, if no virtual machine hides it.
    if (capability == "AVX512") return __builtin_cpu_supports("bmi2") ? Isa::kAvx512 : Isa::kAvx2;
    if (capability == "AVX2") return Isa::kAvx2;
#endif
    return Isa::kDefault;
  }();
  return chosen;
}

bool small_calls_take_avx2() {
#if defined(__x86_64__) && !defined(FASTNORM_PLAIN)
  static const bool chosen = __builtin_cpu_is("intel") && std::getenv("ATEN_CPU_CAPABILITY") == nullptr;
  return chosen;
#else
  return false;
#endif
}

namespace cpu {

int num_threads() { return at::get_num_threads(); }

// Bytes of the last-level cache that a processor shares with its neighbours, 0 if unknown. Linux knows; sysconf tells
// all of a socket's on AMD's processors in glibc 2.36, say.
int64_t last_level_cache() {
  std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index3/size");  // "32768K"
  int64_t kibibytes = 0;
  if (file >> kibibytes && kibibytes > 0) return kibibytes << 10;
#if defined(_SC_LEVEL3_CACHE_SIZE)
  return std::max<int64_t>(0, sysconf(_SC_LEVEL3_CACHE_SIZE));
#else
  return 0;
#endif
}

namespace {

// Bytes of it that the thresholds count on. One of more than 96 MiB is a whole socket's, spread over the chip and shared with
// whoever else computes there. Of the 480 MiB that one system tells, about 64 were to be had; and it is writing what is read
// again at once that decides. Outputs of 6.1 MiB, and gradients of 4.6 MiB beside two inputs as large, took less time past
// the caches, gradients of 4 MiB as much, and up to 1.3 times as much together with an op that read them.
int64_t cache_at_hand() {
  constexpr int64_t kLargestOfNeighbours = 96 << 20, kOfSocket = 49 << 18;
  const int64_t known = last_level_cache(), cache = known > 0 ? known : int64_t{32} << 20;
  return cache > kLargestOfNeighbours ? kOfSocket : cache;
}

struct Thresholds {
  int64_t stream, memory;

  Thresholds() {
    if (const char* named = std::getenv("FASTNORM_STREAM_THRESHOLD")) {
      stream = std::atoll(named);
      memory = stream / 2;
      return;
    }
    const int64_t cache = cache_at_hand();
    stream = isa() == Isa::kAvx512 ? cache / 2 : cache / 8 * 3;
    memory = cache / 4;
  }
};

const Thresholds& thresholds() {
  static const Thresholds values;
  return values;
}

// After stores past the caches, before another thread may read what they wrote. Where there were none it costs nothing.
void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace

int64_t stream_threshold() { return thresholds().stream; }
int64_t memory_threshold() { return thresholds().memory; }

void parallel_ranges(int64_t tasks, bool serial, RangeBody body, const void* context) {
  if (tasks <= 0) return;
  const auto run = [&](int64_t begin, int64_t end) {
    body(context, begin, end);
    stream_fence();
  };
  if (serial || tasks == 1) return run(0, tasks);
  at::parallel_for(0, tasks, 1, run);
}

// A thread's stack of scratch memory: an aligned allocation takes some hundred cycles, which a kernel would pay several
// times a task. What does not fit is allocated.
class ScratchStack {
 public:
  ~ScratchStack() { deallocate(base_); }

  void* push(size_t bytes) {
    bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    // Never full to the last byte: an array of none would begin past the end, where pop() would take it for another's.
    if (!kUsed || bytes >= kBytes - used_) return allocate(bytes);
    if (base_ == nullptr) base_ = static_cast<char*>(allocate(kBytes));
    used_ += bytes;
    return base_ + used_ - bytes;
  }
  // What was pushed last of what is still there.
  void pop(void* data) {
    const uintptr_t offset = reinterpret_cast<uintptr_t>(data) - reinterpret_cast<uintptr_t>(base_);
    if (base_ == nullptr || offset >= kBytes) return deallocate(data);
    used_ = offset;
  }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr bool kUsed = false;  // it would not see where one array ends
#else
  static constexpr bool kUsed = true;
#endif
  static constexpr size_t kBytes = 512 << 10, kAlignment = 64;

  static void* allocate(size_t bytes) { return ::operator new(bytes, std::align_val_t{kAlignment}); }
  static void deallocate(void* data) { ::operator delete(data, std::align_val_t{kAlignment}); }

  char* base_ = nullptr;
  size_t used_ = 0;
};

thread_local ScratchStack scratch_stack;

Scratch::Scratch(size_t bytes) : data_(scratch_stack.push(bytes)) {}
Scratch::~Scratch() { scratch_stack.pop(data_); }

}  // namespace cpu
}  // namespace fastnorm
