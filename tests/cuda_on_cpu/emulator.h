// The emulator's core as kernels see it through cuda_on_cpu.h. A CUDA thread is a fiber; the fibers of a block, or of a
// cluster of blocks, live at once and hand the processor on where they wait: at barriers and warp operations.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace emulator {

// Where a kernel calls what makes threads wait.
struct Site {
  const char* file;
  int line;

  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// The numbers are CUDA's.
enum class Error : int {
  kNone = 0,
  kInvalidValue = 1,
  kInvalidConfiguration = 9,
  kLaunchFailure = 719,
};

struct Grid {
  unsigned blocks[3], threads[3];
  unsigned cluster = 1;
  size_t shared = 0;
};

Error launch(const Grid& grid, const void* function, const std::function<void()>& kernel);
Error set_max_shared(const void* function, int bytes);
Error allow_large_clusters(const void* function);
Error memset(void* p, int value, size_t bytes);
int64_t clusters_at_once(int blocks, int threads, size_t shared);
const char* describe(Error error);

struct Properties {
  int multiprocessors = 132;
  size_t shared_per_block = 227 << 10;
  size_t l2 = 50 << 20;
  int major = 9, minor = 0;
  int largest_cluster = 16;
  int64_t most_clusters = 0;  // that run at once, 0: any number
};
Properties& properties();

template <typename Device>
const Device& device() {
  static Device d;
  const Properties& p = properties();
  d.multiprocessors = p.multiprocessors;
  d.shared_per_block = p.shared_per_block;
  d.l2 = p.l2;
  d.major = p.major;
  d.minor = p.minor;
#ifdef __CUDA_ARCH__
  d.compiled_for = __CUDA_ARCH__ / 10;
#else
  d.compiled_for = 90;
#endif
  return d;
}

// ---- what the running thread does

void block_barrier(Site site);
void cluster_barrier(Site site);
void warp_barrier(unsigned mask, Site site);

enum class Warp { kShuffle, kBallot, kAdd, kMin, kMax, kAnd, kOr, kXor };
// The value of lane `source`, or a reduction of the values of the mask's lanes, as 32-bit numbers but for kShuffle.
uint64_t warp(Warp operation, unsigned mask, uint64_t value, int source, Site site);
unsigned active_mask();
unsigned lane();

enum class Atomic { kAdd, kExchange, kCompareExchange, kMin, kMax, kAnd, kOr };
uint32_t atomic(Atomic operation, void* p, uint32_t value, uint32_t compare = 0, bool is_signed = false);
uint64_t atomic_add64(void* p, uint64_t value);
void fence(bool whole_device);

void* shared_array(const void* key, size_t bytes);
void* dynamic_shared(size_t alignment);
unsigned cluster_size();
unsigned cluster_rank();
void* map_shared_rank(const void* p, unsigned rank, Site site);

[[noreturn]] void trap(Site site);

}  // namespace emulator
