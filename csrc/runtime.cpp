// What the kernels need of the process they run in: threads, memory, the processor's caches and instruction set.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <unistd.h>

#include <algorithm>
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
    if (capability == "AVX512") return Isa::kAvx512;
    if (capability == "AVX2") return Isa::kAvx2;
#endif
    return Isa::kDefault;
  }();
  return chosen;
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

int64_t stream_threshold() {
  static const int64_t bytes = [] {
    if (const char* named = std::getenv("FASTNORM_STREAM_THRESHOLD")) return static_cast<int64_t>(std::atoll(named));
    const int64_t cache = last_level_cache();
    return cache > 0 ? cache / 2 : int64_t{16} << 20;
  }();
  return bytes;
}

void parallel_ranges(int64_t tasks, bool serial, RangeBody body, const void* context) {
  if (tasks <= 0) return;
  if (serial || tasks == 1) return body(context, 0, tasks);
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

constexpr std::align_val_t kScratchAlignment{64};

Scratch::Scratch(size_t bytes) : data_(::operator new(bytes, kScratchAlignment)) {}
Scratch::~Scratch() { ::operator delete(data_, kScratchAlignment); }

}  // namespace cpu
}  // namespace fastnorm
