// The CUDA execution model on one processor: see emulator.h. Compiled without sanitizers, whatever the kernels have.
//
// A fiber has a stack of its own and a few saved registers. It runs until it waits; then it picks the next ready fiber
// (first, last, or at random, as the test wants) and switches to it. Nothing ready with fibers alive is a deadlock.
#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>

#include "core.h"
#include "cuda_types.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

// Present only where AddressSanitizer is loaded.
extern "C" {
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
__attribute__((weak)) void __asan_poison_memory_region(const volatile void* p, size_t bytes);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void* p, size_t bytes);
}

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {

static Observer nobody;
Observer* observer = &nobody;

namespace {

constexpr size_t kStack = 256 << 10, kPage = 4 << 10;  // bytes; pages that are never touched cost nothing
constexpr int kPoison = 0xff;                          // a NaN in every floating-point type

enum class Order : int { kFirst, kLast, kRandom };

struct Settings {
  Order order = Order::kFirst;
  uint64_t seed = 0;
} settings;

// A launch as tests read it.
struct Launched {
  Grid grid;
  const void* function;
};

// Static and dynamic shared memory share a block's limits. Here only those static arrays are known that a kernel came
// to, so any kernel counts as if it had the most that launch.cuh allows.
constexpr size_t kMostStatic = 2 << 10;

struct FunctionLimits {
  int shared = (48 << 10) - static_cast<int>(kMostStatic);
  bool large_clusters = false;
};

std::map<const void*, FunctionLimits> limits;
std::vector<Launched> launches;
std::vector<Buffer> all_buffers;
std::string errors;
size_t error_count;

Group the_group;
Fiber* current = nullptr;
Fiber host;  // the thread that launches
const void* host_bottom;
size_t host_size;
std::vector<uint32_t> ready;  // indices of fibers
size_t ready_head;            // kFirst takes from here
std::vector<char*> stacks;
const std::function<void()>* the_kernel;
bool failed;

uint64_t random_state;
uint64_t next_random() {  // xorshift64*
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return random_state * 0x2545F4914F6CDD1Dull;
}

std::string at(Site site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

bool same(Site a, Site b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

std::string name_of(const Fiber& f) {
  const Block& b = the_group.blocks[f.rank];
  char text[96];
  std::snprintf(text, sizeof text, "block (%u,%u,%u) thread %u", b.index[0], b.index[1], b.index[2], f.thread);
  return text;
}

// ---- switching

#if defined(__x86_64__)
extern "C" void cuda_on_cpu_switch(void** save, void* load);
// Callee-saved registers of the System V calling convention go on the stack that is left.
asm(R"(
.text
.hidden cuda_on_cpu_switch
.globl cuda_on_cpu_switch
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_cpu_switch, .-cuda_on_cpu_switch
)");
#else
std::map<Fiber*, ucontext_t> contexts;
#endif

void enter();

void prepare(Fiber& f, size_t i) {
  if (i >= stacks.size()) {
    void* p = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
      std::perror("cuda_on_cpu: a fiber's stack");
      std::abort();
    }
    mprotect(p, kPage, PROT_NONE);  // the guard
    stacks.push_back(static_cast<char*>(p));
  }
  f.stack = stacks[i];
  f.fake_stack = nullptr;
#if defined(__x86_64__)
  // Stacks begin at different offsets in their pages, else they would fight for the same sets of the cache.
  auto* top = reinterpret_cast<void**>(f.stack + kStack - (i % 16) * 256);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&enter);  // what the switch returns to; the stack is then as after a call
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  f.stack_pointer = top;
#else
  ucontext_t& context = contexts[&f];
  getcontext(&context);
  context.uc_stack.ss_sp = f.stack + kPage;
  context.uc_stack.ss_size = kStack - kPage;
  context.uc_link = nullptr;
  makecontext(&context, enter, 0);
#endif
}

void set_index(const Fiber& f) {
  const unsigned x = blockDim.x, y = blockDim.y;
  threadIdx = {f.thread % x, f.thread / x % y, f.thread / x / y};
  const Block& b = the_group.blocks[f.rank];
  blockIdx = {b.index[0], b.index[1], b.index[2]};
}

void switch_to(Fiber& from, Fiber& to, bool from_dies = false) {
  current = &to == &host ? nullptr : &to;
  if (current) set_index(to);
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(from_dies ? nullptr : &from.fake_stack,
                                   &to == &host ? host_bottom : to.stack + kPage,
                                   &to == &host ? host_size : kStack - kPage);
  }
#if defined(__x86_64__)
  cuda_on_cpu_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&contexts[&from], &contexts[&to]);
#endif
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
}

// ---- scheduling

void make_ready(Fiber& f) {
  f.wait = Wait::kNone;
  ready.push_back(static_cast<uint32_t>(&f - the_group.fibers.data()));
}

Fiber& take_ready() {
  uint32_t i;
  if (settings.order == Order::kFirst) {
    i = ready[ready_head++];
    if (ready_head == ready.size()) {
      ready.clear();
      ready_head = 0;
    }
  } else {
    if (settings.order == Order::kRandom) std::swap(ready[next_random() % ready.size()], ready.back());
    i = ready.back();
    ready.pop_back();
  }
  return the_group.fibers[i];
}

std::string deadlock() {
  std::map<std::string, int> where;
  for (const Fiber& f : the_group.fibers) {
    static const char* const kWhat[] = {"ready", "__syncthreads", "cluster_sync", "a warp operation"};
    if (f.wait != Wait::kDone) ++where[std::string(kWhat[static_cast<int>(f.wait)]) + " at " + at(f.site)];
  }
  std::string text = "deadlock:";
  for (const auto& [what, threads] : where) text += " " + std::to_string(threads) + " threads wait for " + what + ";";
  return text;
}

// The running fiber waits or is done: another runs.
void run_next(bool dies = false) {
  Fiber& from = *current;
  if (ready.empty()) {
    const bool all_done = std::all_of(the_group.fibers.begin(), the_group.fibers.end(),
                                      [](const Fiber& f) { return f.wait == Wait::kDone; });
    if (!all_done) fail(deadlock());
    switch_to(from, host, dies);
  } else {
    Fiber& to = take_ready();
    if (&to != &from) switch_to(from, to, dies);
  }
}

void wait(Wait what, Site site) {
  current->wait = what;
  current->site = site;
  run_next();
}

void leave(Arrivals& arrivals, const char* what) {
  --arrivals.alive;
  if (arrivals.arrived > 0)
    fail(name_of(*current) + " ended while others wait for " + what + " at " + at(arrivals.site));
}

void free_shared(Block& block) {
  for (const SharedArray& a : block.shared) {
    observer->shared_freed(a);
    std::free(a.p);
  }
  block.shared.clear();
}

void enter() {
  if (__sanitizer_finish_switch_fiber) {
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);  // of the stack that was left
    if (!host_size) {
      host_bottom = bottom;
      host_size = size;
    }
  }
  (*the_kernel)();
  Fiber& f = *current;
  Block& block = the_group.blocks[f.rank];
  leave(block.arrivals, "__syncthreads");
  leave(the_group.arrivals, "cluster_sync");
  f.wait = Wait::kDone;
  // A late access by the rest of the cluster is then one to freed memory.
  if (block.arrivals.alive == 0) free_shared(block);
  run_next(true);
}

void arrive(Arrivals& arrivals, unsigned all, const char* what, Site site) {
  if (arrivals.alive != all)
    fail(name_of(*current) + " is at " + what + " at " + at(site) + " after others have ended");
  if (arrivals.arrived++ == 0) arrivals.site = site;
  if (!same(arrivals.site, site))
    fail(std::string("divergent ") + what + ": " + name_of(*current) + " is at " + at(site) + ", others at " +
         at(arrivals.site));
}

// ---- a launch

void run_group(const Grid& grid, unsigned first) {
  Group& g = the_group;
  const unsigned threads = grid.threads[0] * grid.threads[1] * grid.threads[2];
  g.threads_per_block = threads;
  g.blocks.assign(grid.cluster, Block{});
  g.fibers.assign(static_cast<size_t>(grid.cluster) * threads, Fiber{});
  g.arrivals = {grid.cluster * threads, 0, {}};
  g.all_started = false;
  for (unsigned rank = 0; rank < grid.cluster; ++rank) {
    Block& b = g.blocks[rank];
    b.linear = first + rank;
    b.index[0] = b.linear % grid.blocks[0];
    b.index[1] = b.linear / grid.blocks[0] % grid.blocks[1];
    b.index[2] = b.linear / grid.blocks[0] / grid.blocks[1];
    b.arrivals = {threads, 0, {}};
  }
  ready.clear();
  ready_head = 0;
  for (size_t i = 0; i < g.fibers.size(); ++i) {
    Fiber& f = g.fibers[i];
    f.rank = static_cast<unsigned>(i / threads);
    f.thread = static_cast<unsigned>(i % threads);
    prepare(f, i);
    make_ready(f);
  }
  observer->group_begins();
  host_size = 0;  // the first fiber is entered from the host's stack and tells
  switch_to(host, take_ready());
  if (!failed) observer->group_ends();
  for (Block& b : g.blocks) free_shared(b);
  if (failed && __asan_unpoison_memory_region)  // fibers that were left where they were
    for (const Fiber& f : g.fibers) __asan_unpoison_memory_region(f.stack + kPage, kStack - kPage);
}

size_t dynamic_bytes;

// The array behind `key`, made at the first call in each block.
void* shared_memory(const void* key, size_t bytes, size_t alignment) {
  Block& block = the_group.blocks[current->rank];
  for (const SharedArray& a : block.shared) {
    if (a.key != key) continue;
    if (a.bytes != bytes) fail("a shared array has two sizes");
    return a.p;
  }
  void* p = nullptr;
  if (posix_memalign(&p, alignment, std::max<size_t>(bytes, 1)) != 0) std::abort();
  std::memset(p, kPoison, bytes);
  block.shared.push_back({key, static_cast<char*>(p), bytes});
  observer->shared_made(block, block.shared.back());
  size_t fixed = 0;
  for (const SharedArray& a : block.shared) fixed += a.key == &settings ? 0 : a.bytes;
  const size_t most = dynamic_bytes > 0 ? kMostStatic : 48 << 10;
  if (fixed > most)
    fail("static shared arrays of " + std::to_string(fixed) + " bytes, more than " + std::to_string(most));
  return p;
}

const Buffer* buffer_of(const void* p, size_t bytes) {
  const auto* c = static_cast<const char*>(p);
  for (const Buffer& b : all_buffers)
    if (c >= b.p && c + bytes <= b.p + b.bytes) return &b;
  return nullptr;
}

}  // namespace

Group& group() { return the_group; }
Fiber* running() { return current; }
const std::vector<Buffer>& buffers() { return all_buffers; }

void report(const std::string& message) {
  ++error_count;
  if (errors.size() < 4096) errors += (errors.empty() ? "" : "\n") + message;
}

void fail(const std::string& message) {
  report(message);
  failed = true;
  switch_to(*current, host);  // for good
  std::abort();
}

Properties& properties() {
  static Properties p;
  return p;
}

const char* describe(Error error) {
  static std::string text;
  switch (error) {
    case Error::kNone: return "no error";
    case Error::kInvalidValue: return "invalid argument";
    case Error::kInvalidConfiguration: return "invalid configuration argument";
    case Error::kLaunchFailure: text = "unspecified launch failure: " + errors; return text.c_str();
  }
  return "unknown error";
}

Error set_max_shared(const void* function, int bytes) {
  if (bytes < 0 || bytes + kMostStatic > properties().shared_per_block) return Error::kInvalidValue;
  limits[function].shared = bytes;
  return Error::kNone;
}

Error allow_large_clusters(const void* function) {
  if (properties().major < 9) return Error::kInvalidValue;
  limits[function].large_clusters = true;
  return Error::kNone;
}

int64_t clusters_at_once(int blocks, int threads, size_t shared) {
  const Properties& device = properties();
  if (blocks > device.largest_cluster || threads > 1024 || shared + kMostStatic > device.shared_per_block) return 0;
  return device.most_clusters > 0 ? device.most_clusters : INT64_MAX;
}

Error memset(void* p, int value, size_t bytes) {
  if (!buffer_of(p, bytes)) {
    report("cudaMemsetAsync of memory that is not the device's");
    return Error::kInvalidValue;
  }
  std::memset(p, value, bytes);
  observer->set(p, bytes);
  return Error::kNone;
}

Error launch(const Grid& grid, const void* function, const std::function<void()>& kernel) {
  constexpr unsigned kLargestGrid[3] = {0x7fffffffu, 65535, 65535};
  constexpr unsigned kLargestBlock[3] = {1024, 1024, 64};
  for (int d = 0; d < 3; ++d) {
    if (grid.blocks[d] == 0 || grid.blocks[d] > kLargestGrid[d]) return Error::kInvalidConfiguration;
    if (grid.threads[d] == 0 || grid.threads[d] > kLargestBlock[d]) return Error::kInvalidConfiguration;
  }
  const unsigned threads = grid.threads[0] * grid.threads[1] * grid.threads[2];
  if (threads > 1024) return Error::kInvalidConfiguration;
  if (threads % kWarp != 0) {
    report("a block of " + std::to_string(threads) + " threads, no multiple of 32");
    return Error::kInvalidConfiguration;
  }
  const FunctionLimits& limit = limits[function];
  if (grid.shared > static_cast<size_t>(limit.shared)) return Error::kInvalidValue;
  const unsigned largest = limit.large_clusters ? static_cast<unsigned>(properties().largest_cluster)
                                                : std::min(8, properties().largest_cluster);
  if (grid.cluster != 1 && (properties().major < 9 || grid.cluster > largest || grid.blocks[0] % grid.cluster != 0))
    return Error::kInvalidConfiguration;

  launches.push_back({grid, function});
  failed = false;
  const size_t errors_before = error_count;
  random_state = settings.seed * 2654435769u + launches.size() * 40503u + 1;
  blockDim = dim3(grid.threads[0], grid.threads[1], grid.threads[2]);
  gridDim = dim3(grid.blocks[0], grid.blocks[1], grid.blocks[2]);
  dynamic_bytes = grid.shared;
  the_kernel = &kernel;
  const uint64_t blocks = uint64_t{grid.blocks[0]} * grid.blocks[1] * grid.blocks[2];
  std::vector<unsigned> order(blocks / grid.cluster);
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<unsigned>(i * grid.cluster);
  if (settings.order == Order::kLast) std::reverse(order.begin(), order.end());
  if (settings.order == Order::kRandom)
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[next_random() % i]);
  observer->launch_begins(static_cast<unsigned>(blocks));
  for (size_t i = 0; i < order.size() && !failed; ++i) run_group(grid, order[i]);
  observer->launch_ends();
  return failed || error_count > errors_before ? Error::kLaunchFailure : Error::kNone;
}

// ---- barriers

void block_barrier(Site site) {
  Fiber& self = *current;
  Arrivals& arrivals = the_group.blocks[self.rank].arrivals;
  arrive(arrivals, the_group.threads_per_block, "__syncthreads", site);
  if (arrivals.arrived < arrivals.alive) {
    wait(Wait::kBlockBarrier, site);
    return;
  }
  arrivals.arrived = 0;
  observer->block_barrier(self.rank);
  const size_t first = size_t{self.rank} * the_group.threads_per_block;
  for (size_t i = first; i < first + the_group.threads_per_block; ++i)
    if (the_group.fibers[i].wait == Wait::kBlockBarrier) make_ready(the_group.fibers[i]);
  make_ready(self);
  run_next();
}

void cluster_barrier(Site site) {
  Fiber& self = *current;
  Arrivals& arrivals = the_group.arrivals;
  arrive(arrivals, static_cast<unsigned>(the_group.fibers.size()), "cluster_sync", site);
  if (arrivals.arrived < arrivals.alive) {
    wait(Wait::kClusterBarrier, site);
    return;
  }
  arrivals.arrived = 0;
  the_group.all_started = true;
  observer->cluster_barrier();
  for (Fiber& f : the_group.fibers)
    if (f.wait == Wait::kClusterBarrier) make_ready(f);
  make_ready(self);
  run_next();
}

// ---- warps

unsigned lane() { return current->thread % kWarp; }

static Fiber* warp_of(Fiber& f) { return &f - f.thread % kWarp; }

unsigned active_mask() {
  unsigned mask = 0;
  for (unsigned i = 0; i < kWarp; ++i) mask |= (warp_of(*current)[i].wait != Wait::kDone ? 1u : 0u) << i;
  return mask;
}

static constexpr int kWarpBarrier = -1;

// Returns when all lanes of the mask have come with the same operation and mask from the same place.
static uint64_t meet(int operation, unsigned mask, uint64_t value, int source, Site site) {
  Fiber& self = *current;
  Fiber* lanes = warp_of(self);
  const unsigned self_lane = lane();
  if (!(mask >> self_lane & 1)) fail(name_of(self) + " is not in its own mask at " + at(site));
  self.operation = operation;
  self.mask = mask;
  self.value = value;
  self.source = source;
  self.site = site;
  if (operation == static_cast<int>(Warp::kShuffle) && !(mask >> source & 1))
    fail(name_of(self) + " takes a value of lane " + std::to_string(source) + ", which is not in the mask, at " +
         at(site));
  bool all = true;
  for (unsigned i = 0; i < kWarp; ++i) {
    if (!(mask >> i & 1) || i == self_lane) continue;
    const Fiber& other = lanes[i];
    if (other.wait == Wait::kDone)
      fail(name_of(self) + " waits at " + at(site) + " for lane " + std::to_string(i) + ", which has ended");
    if (other.wait == Wait::kBlockBarrier || other.wait == Wait::kClusterBarrier)
      fail(name_of(self) + " waits at " + at(site) + " for lane " + std::to_string(i) +
           ", which is at the barrier at " + at(other.site));
    if (other.wait != Wait::kWarp) {
      all = false;
    } else if (other.operation != operation || other.mask != mask || !same(other.site, site)) {
      char masks[64];
      std::snprintf(masks, sizeof masks, " (mask %08x) and at ", mask);
      const std::string here = at(site) + masks + at(other.site);
      std::snprintf(masks, sizeof masks, " (mask %08x)", other.mask);
      fail("lanes of one warp meet in different operations: " + name_of(self) + " at " + here + masks);
    }
  }
  if (!all) {
    wait(Wait::kWarp, site);
    return self.result;
  }
  uint32_t reduced = 0;
  bool first = true;
  for (unsigned i = 0; i < kWarp; ++i) {
    if (!(mask >> i & 1)) continue;
    const auto v = static_cast<uint32_t>(lanes[i].value);
    switch (static_cast<Warp>(operation)) {
      case Warp::kShuffle: break;
      case Warp::kBallot: reduced |= v << i; break;
      case Warp::kAdd: reduced += v; break;
      case Warp::kMin: reduced = first ? v : std::min(reduced, v); break;
      case Warp::kMax: reduced = first ? v : std::max(reduced, v); break;
      case Warp::kAnd: reduced = first ? v : reduced & v; break;
      case Warp::kOr: reduced |= v; break;
      case Warp::kXor: reduced ^= v; break;
    }
    first = false;
  }
  if (operation == kWarpBarrier) observer->warp_barrier(static_cast<unsigned>(lanes - the_group.fibers.data()), mask);
  for (unsigned i = 0; i < kWarp; ++i) {
    if (!(mask >> i & 1)) continue;
    lanes[i].result = operation == static_cast<int>(Warp::kShuffle) ? lanes[lanes[i].source].value : reduced;
    make_ready(lanes[i]);
  }
  run_next();
  return self.result;
}

void warp_barrier(unsigned mask, Site site) { meet(kWarpBarrier, mask, 0, 0, site); }
uint64_t warp(Warp operation, unsigned mask, uint64_t value, int source, Site site) {
  return meet(static_cast<int>(operation), mask, value, source, site);
}

// ---- memory

uint32_t atomic(Atomic operation, void* p, uint32_t value, uint32_t compare, bool is_signed) {
  auto* place = static_cast<uint32_t*>(p);
  observer->atomic(p, sizeof *place);
  const uint32_t before = *place;
  const auto less = [is_signed](uint32_t a, uint32_t b) {
    return is_signed ? static_cast<int32_t>(a) < static_cast<int32_t>(b) : a < b;
  };
  switch (operation) {
    case Atomic::kAdd: *place = before + value; break;
    case Atomic::kExchange: *place = value; break;
    case Atomic::kCompareExchange: *place = before == compare ? value : before; break;
    case Atomic::kMin: *place = less(value, before) ? value : before; break;
    case Atomic::kMax: *place = less(before, value) ? value : before; break;
    case Atomic::kAnd: *place = before & value; break;
    case Atomic::kOr: *place = before | value; break;
  }
  return before;
}

uint64_t atomic_add64(void* p, uint64_t value) {
  auto* place = static_cast<uint64_t*>(p);
  observer->atomic(p, sizeof *place);
  const uint64_t before = *place;
  *place = before + value;
  return before;
}

void fence(bool whole_device) { observer->fence(whole_device); }

void* shared_array(const void* key, size_t bytes) { return shared_memory(key, bytes, 16); }
void* dynamic_shared(size_t alignment) { return shared_memory(&settings, dynamic_bytes, alignment); }

unsigned cluster_size() { return static_cast<unsigned>(the_group.blocks.size()); }
unsigned cluster_rank() { return current->rank; }

void* map_shared_rank(const void* p, unsigned rank, Site site) {
  if (rank >= the_group.blocks.size())
    fail(name_of(*current) + " maps to block " + std::to_string(rank) + " of a cluster of " +
         std::to_string(the_group.blocks.size()) + " at " + at(site));
  const Block& own = the_group.blocks[current->rank];
  Block& other = the_group.blocks[rank];
  const auto* c = static_cast<const char*>(p);
  for (const SharedArray& a : own.shared) {
    if (c < a.p || c > a.p + a.bytes) continue;
    if (rank == current->rank) return const_cast<char*>(c);
    if (!the_group.all_started)
      fail(name_of(*current) + " reaches into block " + std::to_string(rank) +
           " of its cluster, which may not have started, at " + at(site));
    if (other.arrivals.alive == 0)
      fail(name_of(*current) + " reaches into block " + std::to_string(rank) + " of its cluster, which has ended, at " +
           at(site));
    for (const SharedArray& b : other.shared)
      if (b.key == a.key) return b.p + (c - a.p);
    fail("block " + std::to_string(rank) + " of the cluster has not made the array mapped at " + at(site));
  }
  fail(name_of(*current) + " maps an address that is not in its shared memory at " + at(site));
}

void trap(Site site) { fail(name_of(*current) + " traps at " + at(site)); }

}  // namespace emulator

// ---- for Python

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void emulator_set_device(int multiprocessors, int64_t shared_per_block, int64_t l2, int major, int minor,
                                int largest_cluster, int64_t most_clusters) {
  emulator::properties() = {
      multiprocessors, static_cast<size_t>(shared_per_block), static_cast<size_t>(l2), major, minor, largest_cluster,
      most_clusters};
}

EXPORT void emulator_set_order(int order, uint64_t seed) {
  emulator::settings = {static_cast<emulator::Order>(order), seed};
}

// Device memory: `guard` bytes before and after are no one's.
EXPORT void emulator_add_buffer(void* p, int64_t bytes, int64_t guard, const char* name, int writable) {
  auto* c = static_cast<char*>(p);
  emulator::all_buffers.push_back({c, static_cast<size_t>(bytes), name, writable != 0});
  if (__asan_poison_memory_region) {
    __asan_poison_memory_region(c - guard, static_cast<size_t>(guard));
    __asan_poison_memory_region(c + bytes, static_cast<size_t>(guard));
    __asan_unpoison_memory_region(c, static_cast<size_t>(bytes));  // of the granule that holds both
  }
}

EXPORT void emulator_clear_buffers(int64_t guard) {
  for (const emulator::Buffer& b : emulator::all_buffers)
    if (__asan_unpoison_memory_region)
      __asan_unpoison_memory_region(b.p - guard, b.bytes + 2 * static_cast<size_t>(guard));
  emulator::all_buffers.clear();
  emulator::errors.clear();
  emulator::launches.clear();
}

EXPORT const char* emulator_errors() { return emulator::errors.c_str(); }
EXPORT int64_t emulator_launches() { return static_cast<int64_t>(emulator::launches.size()); }
// blocks x, y, z, threads, cluster, dynamic shared memory in bytes
EXPORT void emulator_launch(int64_t i, int64_t* out) {
  const emulator::Grid& g = emulator::launches[static_cast<size_t>(i)].grid;
  const int64_t values[6] = {g.blocks[0], g.blocks[1],
                             g.blocks[2], int64_t{g.threads[0]} * g.threads[1] * g.threads[2],
                             g.cluster,   static_cast<int64_t>(g.shared)};
  std::copy(values, values + 6, out);
}
