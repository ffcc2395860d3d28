// What emulator.cpp keeps of a running launch, and what trace.cpp is told of it.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "emulator.h"

namespace emulator {

constexpr unsigned kWarp = 32;

enum class Wait : uint8_t { kNone, kBlockBarrier, kClusterBarrier, kWarp, kDone };

struct Fiber {
  void* stack_pointer;
  char* stack;
  void* fake_stack;       // AddressSanitizer's
  unsigned rank, thread;  // the block in its group, the thread in its block
  Wait wait;
  Site site;  // where it waits
  // of a warp operation
  int operation;
  unsigned mask;
  int source;
  uint64_t value, result;
};

// A barrier of a block's or a cluster's threads.
struct Arrivals {
  unsigned alive, arrived;
  Site site;  // of the first to arrive
};

struct SharedArray {
  const void* key;
  char* p;
  size_t bytes;
};

struct Block {
  unsigned index[3];
  unsigned linear;
  Arrivals arrivals;
  std::vector<SharedArray> shared;
};

struct Buffer {
  char* p;
  size_t bytes;
  std::string name;
  bool writable;
};

// The cluster, or single block, that runs.
struct Group {
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;  // threads_per_block to a block
  Arrivals arrivals;
  bool all_started;  // they have met
  unsigned threads_per_block;
};

Group& group();
Fiber* running();  // null in host code
const std::vector<Buffer>& buffers();
[[noreturn]] void fail(const std::string& message);  // ends the launch; by a running thread
void report(const std::string& message);             // notes an error; the launch goes on and fails at its end

// Told of everything that orders memory accesses. One that does nothing stands in where there is no trace.
struct Observer {
  virtual ~Observer() = default;
  virtual void launch_begins(unsigned /*blocks*/) {}
  virtual void launch_ends() {}
  virtual void group_begins() {}
  virtual void group_ends() {}
  virtual void shared_made(const Block&, const SharedArray&) {}
  virtual void shared_freed(const SharedArray&) {}
  virtual void block_barrier(unsigned /*rank*/) {}
  virtual void cluster_barrier() {}
  virtual void warp_barrier(unsigned /*first fiber*/, unsigned /*mask*/) {}
  virtual void fence(bool /*whole_device*/) {}
  virtual void atomic(void*, unsigned /*bytes*/) {}
  virtual void set(void*, size_t) {}
};
extern Observer* observer;

}  // namespace emulator
