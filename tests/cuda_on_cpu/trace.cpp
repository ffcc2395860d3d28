// The trace mode: kernels compiled with -fsanitize=thread call the __tsan_* functions below, which are not
// ThreadSanitizer's, at every access to memory. They look for races and for reads of what nothing has written, and count
// what the accesses cost the memory system.
//
// Order. Time is counted in barriers: a block, a warp and the cluster have each an epoch, which a barrier of theirs ends.
// Two accesses to the same place, one of them a write, by different threads are a race unless a barrier of both lies
// between, or, between blocks of different clusters, a release and an acquire: __threadfence, an atomic and a barrier, as
// in is_last_block(). Shuffles order nothing.
//
// Cost. The k-th time that the lanes of a warp come to the same instruction is one request. Global memory moves in
// sectors of 32 bytes; shared memory has 32 banks, 4 bytes wide, and a request of different words in one bank takes as
// many turns.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <set>
#include <unordered_map>

#include <dlfcn.h>

#include "core.h"

namespace emulator {
namespace {

constexpr size_t kSector = 32, kBanks = 32, kWord = 4;  // bytes, but for the banks

struct Stamp {  // an access; launch 0: none
  uint32_t block = 0;
  uint16_t thread = 0, launch = 0;
  uint16_t block_epoch = 0, warp_epoch = 0, cluster_epoch = 0;
  uint16_t site = 0;
};

// What is known of a few bytes. Of the readers since the last write the latest is kept, and one of another warp.
struct Cell {
  Stamp write, reads[2];
  bool written = false, atomic = false;
};

struct Cost {
  int64_t bytes = 0, sectors = 0, requests = 0, ideal_sectors = 0;
};

struct Region {
  char *begin, *end;
  size_t granule;
  bool shared;
  std::string name;
  size_t guard;  // bytes around it that are no one's
  std::vector<Cell> cells;
  Cost read, write;

  Cell* at(const char* p) { return &cells[static_cast<size_t>(p - begin) / granule]; }
};

// One request, until all 32 lanes have made it.
struct Access {
  const char* p;
  uint32_t bytes;
};
struct Request {
  unsigned lanes = 0;
  Access access[kWarp];
};
struct Instruction {
  bool is_write, shared;
  uint32_t executions[kWarp] = {};
  std::vector<Request> requests;
};

using Epochs = std::vector<uint32_t>;  // of each block of the launch: what it did before that epoch is known
struct Thread {
  uint32_t fenced_in = 0;  // the block's epoch, plus 1
  bool unfenced_writes = false;
  Epochs pending, acquired;  // read by an atomic; made certain by a fence
};
struct BlockOrder {
  uint32_t epoch = 0, released = 0;
  Epochs acquired;
};

struct SharedCost {
  int64_t turns = 0, ideal_turns = 0;
};

void join(Epochs& into, const Epochs& from) {
  if (into.size() < from.size()) into.resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}

class Tracer : public Observer {
 public:
  bool counts = true, races = true;
  std::map<std::pair<const void*, bool>, Cost> by_site;
  SharedCost shared_cost;
  std::vector<Region*> buffer_regions;

  void add_buffer(char* p, size_t bytes, size_t granule, size_t guard, const std::string& name, bool holds_data) {
    auto* r = new Region{p, p + bytes, granule, false, name, guard, {}, {}, {}};
    r->cells.resize(bytes / granule + 1);
    if (holds_data)
      for (Cell& c : r->cells) c.written = true;
    regions_[p] = std::unique_ptr<Region>(r);
    buffer_regions.push_back(r);
    last_ = nullptr;
  }

  void clear() {
    regions_.clear();
    buffer_regions.clear();
    by_site.clear();
    reported_.clear();
    shared_cost = {};
    launch_ = 0;
    last_ = nullptr;
  }

  void launch_begins(unsigned blocks) override {
    blocks_ = blocks;
    ++launch_;
    released_.clear();
  }

  void group_begins() override {
    const Group& g = group();
    threads_.assign(g.fibers.size(), Thread{});
    order_.assign(g.blocks.size(), BlockOrder{});
    warp_epochs_.assign(g.fibers.size() / kWarp, 0);
    cluster_epoch_ = 0;
    instructions_.clear();
    instructions_.resize(g.fibers.size() / kWarp);
  }

  void group_ends() override {
    for (auto& warp : instructions_)
      for (auto& [pc, instruction] : warp)
        for (const Request& request : instruction.requests)
          if (request.lanes > 0) count(pc, instruction, request);
    instructions_.clear();
  }

  void shared_made(const Block&, const SharedArray& a) override {
    constexpr size_t kGranule = 2;
    auto r = std::make_unique<Region>(Region{a.p, a.p + a.bytes, kGranule, true, "shared memory", 0, {}, {}, {}});
    r->cells.resize(a.bytes / kGranule + 1);
    regions_[a.p] = std::move(r);
    last_ = nullptr;
  }

  void shared_freed(const SharedArray& a) override {
    regions_.erase(a.p);
    last_ = nullptr;
  }

  void block_barrier(unsigned rank) override {
    BlockOrder& b = order_[rank];
    ++b.epoch;
    const unsigned threads = group().threads_per_block;
    bool all_fenced = true;
    for (unsigned i = rank * threads; i < (rank + 1) * threads; ++i) {
      all_fenced = all_fenced && !threads_[i].unfenced_writes;
      if (!threads_[i].acquired.empty()) join(b.acquired, threads_[i].acquired);
    }
    if (all_fenced) b.released = b.epoch;
    for (unsigned w = rank * threads / kWarp; w < (rank + 1) * threads / kWarp; ++w) ++warp_epochs_[w];
  }

  void cluster_barrier() override {
    for (unsigned rank = 0; rank < order_.size(); ++rank) block_barrier(rank);
    ++cluster_epoch_;
  }

  void warp_barrier(unsigned first, unsigned mask) override {
    unsigned alive = 0;
    for (unsigned i = 0; i < kWarp; ++i) alive |= (group().fibers[first + i].wait != Wait::kDone ? 1u : 0u) << i;
    if (mask == alive) ++warp_epochs_[first / kWarp];
  }

  void fence(bool whole_device) override {
    if (!whole_device) return;
    Thread& t = self();
    t.fenced_in = order_[running()->rank].epoch + 1;
    t.unfenced_writes = false;
    if (!t.pending.empty()) join(t.acquired, t.pending);
  }

  void atomic(void* p, unsigned) override {
    Region* r = find(static_cast<char*>(p));
    if (!r) return;
    Thread& t = self();
    const BlockOrder& b = order_[running()->rank];
    const uint32_t known = std::max(b.released, t.fenced_in == b.epoch + 1 ? b.epoch : 0);
    Epochs& released = released_[p];
    released.resize(blocks_);
    uint32_t& mine = released[group().blocks[running()->rank].linear];
    mine = std::max(mine, known);
    join(t.pending, released);
    Cell& c = *r->at(static_cast<char*>(p));
    if (!c.written) complain("an atomic on memory that nothing has written", *r, nullptr, nullptr);
    c.atomic = true;
  }

  void set(void* p, size_t bytes) override {
    Region* r = find(static_cast<char*>(p));
    if (!r) return;
    const size_t end = static_cast<size_t>(static_cast<char*>(p) - r->begin) + bytes;
    for (size_t i = static_cast<size_t>(static_cast<char*>(p) - r->begin) / r->granule; i * r->granule < end; ++i) {
      r->cells[i] = Cell{};
      r->cells[i].written = true;
    }
  }

  void access(void* address, size_t bytes, bool is_write, const void* pc) {
    auto* p = static_cast<char*>(address);
    const Fiber* f = running();
    if (f && p >= f->stack && p < f->stack + (1 << 18)) return;
    Region* r = find(p);
    if (!r) {
      if (f) check_guards(p, is_write, pc);
      return;
    }
    if (!f) {
      if (!r->shared) complain("host code accesses device memory", *r, pc, nullptr);
      return;
    }
    if (p + bytes > r->end) complain(is_write ? "writes beyond the end" : "reads beyond the end", *r, pc, nullptr);
    if (reinterpret_cast<uintptr_t>(p) % (bytes <= 16 && std::has_single_bit(bytes) ? bytes : 1) != 0)
      complain(std::to_string(bytes) + " bytes at a misaligned address", *r, pc, nullptr);
    if (races) check(*r, p, std::min<size_t>(bytes, static_cast<size_t>(r->end - p)), is_write, pc);
    if (counts) {
      Instruction& instruction = instructions_[static_cast<size_t>(f - group().fibers.data()) / kWarp][pc];
      instruction.is_write = is_write;
      instruction.shared = r->shared;
      const uint32_t k = instruction.executions[f->thread % kWarp]++;
      if (k >= instruction.requests.size()) instruction.requests.resize(k + 1);
      Request& request = instruction.requests[k];
      request.access[request.lanes++] = {p, static_cast<uint32_t>(bytes)};
      if (request.lanes == kWarp) {
        count(pc, instruction, request);
        request.lanes = 0;
      }
    }
  }

 private:
  std::map<const char*, std::unique_ptr<Region>> regions_;  // by their beginning
  Region* last_ = nullptr;
  uint16_t launch_ = 0;
  unsigned blocks_ = 0;
  std::vector<Thread> threads_;
  std::vector<BlockOrder> order_;
  std::vector<uint16_t> warp_epochs_;
  uint16_t cluster_epoch_ = 0;
  std::map<const void*, Epochs> released_;
  std::vector<std::unordered_map<const void*, Instruction>> instructions_;  // of each warp
  std::set<std::string> reported_;
  std::vector<const void*> sites_{nullptr};
  std::unordered_map<const void*, uint16_t> site_index_;

  Thread& self() { return threads_[static_cast<size_t>(running() - group().fibers.data())]; }

  Region* find(const char* p) {
    if (last_ && p >= last_->begin && p < last_->end) return last_;
    auto next = regions_.upper_bound(p);
    if (next == regions_.begin()) return nullptr;
    Region* r = std::prev(next)->second.get();
    if (p >= r->end) return nullptr;
    return last_ = r;
  }

  void check_guards(const char* p, bool is_write, const void* pc) {
    for (const Region* r : buffer_regions)
      if (p >= r->begin - r->guard && p < r->end + r->guard)
        return complain(is_write ? "writes outside" : "reads outside", *r, pc, nullptr);
  }

  // The driver turns @address@ into a file and line.
  static std::string at(const void* pc) {
    if (!pc) return "";
    Dl_info info{};
    dladdr(pc, &info);
    char text[64];
    std::snprintf(text, sizeof text, " at @%zx@",
                  static_cast<size_t>(static_cast<const char*>(pc) - static_cast<const char*>(info.dli_fbase)) - 1);
    return text;
  }

  void complain(const std::string& what, const Region& r, const void* pc, const Stamp* other) {
    std::string text = what + ", " + r.name + at(pc);
    if (other)
      text += ", after block " + std::to_string(other->block) + " thread " + std::to_string(other->thread) +
              at(sites_[other->site]);
    const std::string key = what + r.name + at(pc);
    if (!reported_.insert(key).second) return;
    const Fiber* f = running();
    if (f)
      text += ", by block " + std::to_string(group().blocks[f->rank].linear) + " thread " + std::to_string(f->thread);
    report(text);
  }

  uint16_t site(const void* pc) {
    auto [entry, is_new] = site_index_.try_emplace(pc, static_cast<uint16_t>(sites_.size()));
    if (is_new) sites_.push_back(pc);
    return entry->second;
  }

  Stamp now(const void* pc) {
    const Fiber& f = *running();
    return {group().blocks[f.rank].linear,
            static_cast<uint16_t>(f.thread),
            launch_,
            static_cast<uint16_t>(order_[f.rank].epoch),
            warp_epochs_[static_cast<size_t>(&f - group().fibers.data()) / kWarp],
            cluster_epoch_,
            site(pc)};
  }

  // Whether the running thread comes after that access.
  bool before(const Stamp& s) {
    if (s.launch != launch_) return true;
    const Fiber& f = *running();
    const Group& g = group();
    const uint32_t block = g.blocks[f.rank].linear, first = g.blocks[0].linear;
    const BlockOrder& order = order_[f.rank];
    if (s.block == block) {
      if (s.thread == f.thread || s.block_epoch < order.epoch) return true;
      const size_t warp = static_cast<size_t>(&f - g.fibers.data()) / kWarp;
      return s.thread / kWarp == f.thread / kWarp && s.warp_epoch < warp_epochs_[warp];
    }
    if (s.block >= first && s.block < first + g.blocks.size()) return s.cluster_epoch < cluster_epoch_;
    const auto knows = [&s](const Epochs& e) { return s.block < e.size() && e[s.block] > s.block_epoch; };
    return knows(order.acquired) || knows(self().acquired);
  }

  void check(Region& r, char* p, size_t bytes, bool is_write, const void* pc) {
    Cell* const end = r.at(p + bytes - 1) + 1;
    const Stamp stamp = now(pc);
    // A wide load may reach beyond the end of what was written, as long as no one uses what it finds there: a NaN.
    if (!is_write && std::none_of(r.at(p), end, [](const Cell& c) { return c.written; }))
      complain("reads what nothing has written", r, pc, nullptr);
    for (Cell* c = r.at(p); c < end; ++c) {
      // The thread that came last to a ticket may use it as it likes.
      const bool ticket = c->atomic && !self().pending.empty();
      if (!ticket && !before(c->write))
        complain(is_write ? "two threads write one place" : "races with a write", r, pc, &c->write);
      if (is_write) {
        for (const Stamp& read : c->reads)
          if (!ticket && !before(read)) complain("races with a read", r, pc, &read);
        c->write = stamp;
        c->reads[0] = c->reads[1] = Stamp{};
        c->written = true;
      } else {
        Stamp& latest = c->reads[0];
        const bool same_warp = latest.block == stamp.block && latest.thread / kWarp == stamp.thread / kWarp;
        if (latest.launch == launch_ && !same_warp) c->reads[1] = latest;
        latest = stamp;
      }
    }
    if (is_write && !r.shared) self().unfenced_writes = true;
  }

  void count(const void* pc, const Instruction& instruction, const Request& request) {
    Access sorted[kWarp] = {};
    std::copy(request.access, request.access + request.lanes, sorted);
    if (instruction.shared) {
      // 32 lanes a turn with 4 bytes each or less, 16 with 8, 8 with 16.
      const size_t lanes = std::min<size_t>(kWarp, 128 / std::max<size_t>(kWord, sorted[0].bytes));
      for (size_t first = 0; first < request.lanes; first += lanes) {
        std::set<uintptr_t> words;
        for (size_t i = first; i < std::min<size_t>(first + lanes, request.lanes); ++i)
          for (size_t word = 0; word < std::max<size_t>(1, sorted[i].bytes / kWord); ++word)
            words.insert(reinterpret_cast<uintptr_t>(sorted[i].p) / kWord + word);
        int in_bank[kBanks] = {}, most = 0;
        for (uintptr_t word : words) most = std::max(most, ++in_bank[word % kBanks]);
        shared_cost.turns += most;
        ++shared_cost.ideal_turns;
      }
      return;
    }
    std::sort(sorted, sorted + request.lanes, [](const Access& a, const Access& b) { return a.p < b.p; });
    Cost c;
    c.requests = 1;
    uintptr_t next_sector = 0, next_byte = 0;
    for (unsigned i = 0; i < request.lanes; ++i) {
      const auto begin = reinterpret_cast<uintptr_t>(sorted[i].p), end = begin + sorted[i].bytes;
      if (end > next_byte) c.bytes += static_cast<int64_t>(end - std::max(begin, next_byte));
      next_byte = std::max(next_byte, end);
      const uintptr_t first = std::max(begin / kSector, next_sector), last = (end + kSector - 1) / kSector;
      if (last > first) c.sectors += static_cast<int64_t>(last - first);
      next_sector = std::max(next_sector, last);
    }
    c.ideal_sectors = (c.bytes + static_cast<int64_t>(kSector) - 1) / static_cast<int64_t>(kSector);
    Region* r = find(sorted[0].p);
    if (!r) return;
    for (Cost* total : {instruction.is_write ? &r->write : &r->read, &by_site[{pc, instruction.is_write}]}) {
      total->bytes += c.bytes;
      total->sectors += c.sectors;
      total->requests += c.requests;
      total->ideal_sectors += c.ideal_sectors;
    }
  }
};

Tracer tracer;
bool tracing = false;

}  // namespace
}  // namespace emulator

using emulator::tracer;
using emulator::tracing;

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void trace_start(int races, int counts) {
  tracing = true;
  tracer.races = races != 0;
  tracer.counts = counts != 0;
  emulator::observer = &tracer;
}
EXPORT void trace_add_buffer(void* p, int64_t bytes, int64_t granule, int64_t guard, const char* name, int holds_data) {
  tracer.add_buffer(static_cast<char*>(p), static_cast<size_t>(bytes), static_cast<size_t>(granule),
                    static_cast<size_t>(guard), name, holds_data != 0);
}
EXPORT void trace_clear() { tracer.clear(); }
// bytes, sectors, requests and sectors at best, read and then written, of the i-th buffer
EXPORT void trace_buffer_cost(int64_t i, int64_t* out) {
  const emulator::Region& r = *tracer.buffer_regions[static_cast<size_t>(i)];
  for (const emulator::Cost* c : {&r.read, &r.write}) {
    *out++ = c->bytes;
    *out++ = c->sectors;
    *out++ = c->requests;
    *out++ = c->ideal_sectors;
  }
}
EXPORT void trace_shared_cost(int64_t* out) {
  out[0] = tracer.shared_cost.turns;
  out[1] = tracer.shared_cost.ideal_turns;
}

// ---- what the compiler calls

#define TSAN extern "C" __attribute__((noinline))
#define CALLER __builtin_return_address(0)

TSAN void __tsan_init() {}
TSAN void __tsan_func_entry(void*) {}
TSAN void __tsan_func_exit() {}
TSAN void __tsan_vptr_update(void**, void*) {}
TSAN void __tsan_vptr_read(void**) {}
TSAN void __tsan_read_range(void* p, size_t n) {
  if (tracing) tracer.access(p, n, false, CALLER);
}
TSAN void __tsan_write_range(void* p, size_t n) {
  if (tracing) tracer.access(p, n, true, CALLER);
}
#define ACCESSES(prefix, n)                          \
  TSAN void __tsan_##prefix##read##n(void* p) {      \
    if (tracing) tracer.access(p, n, false, CALLER); \
  }                                                  \
  TSAN void __tsan_##prefix##write##n(void* p) {     \
    if (tracing) tracer.access(p, n, true, CALLER);  \
  }
ACCESSES(, 1)
ACCESSES(, 2)
ACCESSES(, 4)
ACCESSES(, 8)
ACCESSES(, 16)
ACCESSES(unaligned_, 2)
ACCESSES(unaligned_, 4)
ACCESSES(unaligned_, 8)
ACCESSES(unaligned_, 16)
ACCESSES(volatile_, 1)
ACCESSES(volatile_, 2)
ACCESSES(volatile_, 4)
ACCESSES(volatile_, 8)
ACCESSES(volatile_, 16)

// Guards of function-local statics in host code.
TSAN uint8_t __tsan_atomic8_load(const volatile uint8_t* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
TSAN void __tsan_atomic8_store(volatile uint8_t* p, uint8_t v, int) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
