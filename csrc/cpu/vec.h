// Pack<T>: the unit every CPU kernel works in. A pack is a whole number of vectors (vectors.h) in the arithmetic's type
// (float64 for float64, float32 for the rest) that holds as many elements as one vector of T, and at least eight, so
// that its mask bits are whole bytes on every instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "../dtype.h"
#include "vectors.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

// On a loop over packs: everything it calls is inlined, so that coefficients stay in registers. Left to itself the
// compiler outlines a lambda now and then, which costs three times the loop.
#define FASTNORM_LOOP __attribute__((flatten))
// On what packs are made of: inlined before anything else is done, so that vectors in arrays of known indices are values
// from the beginning.
#define FASTNORM_INLINE __attribute__((always_inline))

template <typename T>
using acc_type = std::conditional_t<std::is_same_v<T, double>, double, float>;

// How many elements of a pack are there: all, known to the compiler, or the first few. AnyOrder: all, of which a loop
// treats none differently, but by mask bits; on each instruction set they have the order that it likes best.
struct Full {};
struct Partial {
  int count;
};
struct AnyOrder {};

constexpr size_t kStreamAlignment = 64;

// Calls f(0) ... f(n - 1). Not a loop: arrays that are indexed in one stay in memory until the compiler has unrolled it,
// which with -O1 comes too late.
template <int n, typename F>
FASTNORM_INLINE inline void for_each_index(const F& f) {
  if constexpr (n > 0) {
    for_each_index<n - 1>(f);
    f(n - 1);
  }
}

template <typename T>
struct Pack {
  using acc_t = acc_type<T>;
  using Vec = vec::Vectorized<acc_t>;
  using Storage = vec::Vectorized<T>;
  static constexpr bool kConverts = !std::is_same_v<T, acc_t>;
  static constexpr int kSize = Storage::size() < 8 ? 8 : Storage::size();
  static constexpr int kVecs = kSize / Vec::size();
  static constexpr int kStorages = kSize / Storage::size();

  Vec v[kVecs];

  Pack() = default;
  explicit Pack(acc_t value) {
    for_each_index<kVecs>([&](int k) FASTNORM_INLINE { v[k] = Vec(value); });
  }

  // Whole: Full or AnyOrder.
  template <typename Whole = Full>
  static Pack load(const T* p, Whole order = {}) {
    return load_each([&](int k) { return Storage::loadu(p + k * Storage::size()); }, order);
  }
  // The elements that are not there read as zero.
  static Pack load(const T* p, Partial n) {
    return load_each([&](int k) { return load_lanes(p + k * Storage::size(), n.count - k * Storage::size()); }, Full{});
  }

  template <typename Whole = Full>
  void store(T* p, Whole order = {}) const {
    store_each([&](int k, const Storage& s) { s.store(p + k * Storage::size()); }, order);
  }
  void store(T* p, Partial n) const {
    store_each(
        [&](int k, const Storage& s) {
          store_lanes(p + k * Storage::size(), n.count - k * static_cast<int>(Storage::size()), s);
        },
        Full{});
  }
  // Past the caches; p is aligned to kStreamAlignment.
  template <typename Whole = Full>
  void stream(T* p, Whole order = {}) const {
    store_each([&](int k, const Storage& s) { stream_vector(p + k * Storage::size(), s); }, order);
  }

  // From and to arrays of the arithmetic's type that are at least a pack long.
  static Pack load_acc(const acc_t* p) {
    Pack r;
    for_each_index<kVecs>([&](int k) FASTNORM_INLINE { r.v[k] = Vec::loadu(p + k * Vec::size()); });
    return r;
  }
  void store_acc(acc_t* p) const {
    for_each_index<kVecs>([&](int k) FASTNORM_INLINE { v[k].store(p + k * Vec::size()); });
  }

  // The same with the elements from the count on set to zero: for tails of sums of anything but products with x.
  template <typename Whole>
  Pack keep(Whole) const {
    return *this;
  }
  Pack keep(Partial n) const {
    Pack r;
    for_each_index<kVecs>([&](int k) FASTNORM_INLINE { r.v[k] = keep_lanes(n.count - k * Vec::size(), v[k]); });
    return r;
  }

 private:
  template <typename F, typename Order>
  static Pack load_each(const F& storage, Order) {
    Pack r;
    for_each_index<kStorages>([&](int k) FASTNORM_INLINE {
      if constexpr (kConverts) {
        static_assert(Storage::size() == 2 * Vec::size());
        if constexpr (std::is_same_v<Order, AnyOrder>) {
          std::tie(r.v[2 * k], r.v[2 * k + 1]) = widen_any_order<T>(storage(k));
        } else {
          std::tie(r.v[2 * k], r.v[2 * k + 1]) = widen<T>(storage(k));
        }
      } else {
        r.v[k] = storage(k);
      }
    });
    return r;
  }

  template <typename F, typename Order>
  void store_each(const F& put, Order) const {
    for_each_index<kStorages>([&](int k) FASTNORM_INLINE {
      if constexpr (kConverts) {
        if constexpr (std::is_same_v<Order, AnyOrder>) {
          put(k, narrow_any_order<T>(v[2 * k], v[2 * k + 1]));
        } else {
          put(k, narrow<T>(v[2 * k], v[2 * k + 1]));
        }
      } else {
        put(k, v[k]);
      }
    });
  }
};

// Packs of accumulators for a long sum: as many as hide an addition's latency, and 32 lanes of float32, for the error grows
// with how much a lane adds up.
template <typename T>
constexpr int kSumPacks = std::max({1, 4 / Pack<T>::kVecs, 128 / (Pack<T>::kSize * int{sizeof(acc_type<T>)})});

// Whether n elements from p on are whole cache lines: only those are worth streaming, a part of one is read back.
template <typename T>
bool fills_lines(const T* p, int64_t n) {
  return reinterpret_cast<uintptr_t>(p) % kStreamAlignment == 0 && n * sizeof(T) % kStreamAlignment == 0;
}

// Asks for the cache line at p, which may lie past the end of what may be read, to come to the first-level cache: for what
// the processor's own prefetchers do not foresee, as the next plane.
inline void prefetch(const void* p) { __builtin_prefetch(p, 0); }
inline void prefetch_to_write(const void* p) { __builtin_prefetch(p, 1); }

// How far ahead of a sweep the elements are that it asks for where they come from memory: two pages, at whose ends the
// processor's own prefetchers begin anew.
template <typename T>
constexpr int64_t kAhead = 8192 / sizeof(T);

template <typename T, typename Count>
void put(const Pack<T>& pack, T* p, Count count, bool stream) {
  if constexpr (!std::is_same_v<Count, Partial>) {
    if (stream) return pack.stream(p, count);
  }
  pack.store(p, count);
}

template <typename T, typename F, typename... P>
Pack<T> map(const F& f, const P&... packs) {
  Pack<T> r;
  for_each_index<Pack<T>::kVecs>([&](int k) FASTNORM_INLINE { r.v[k] = f(packs.v[k]...); });
  return r;
}

template <typename T>
Pack<T> operator+(const Pack<T>& a, const Pack<T>& b) {
  return map<T>([](auto x, auto y) { return x + y; }, a, b);
}
template <typename T>
Pack<T> operator-(const Pack<T>& a, const Pack<T>& b) {
  return map<T>([](auto x, auto y) { return x - y; }, a, b);
}
template <typename T>
Pack<T> operator*(const Pack<T>& a, const Pack<T>& b) {
  return map<T>([](auto x, auto y) { return x * y; }, a, b);
}
template <typename T>
Pack<T> fmadd(const Pack<T>& a, const Pack<T>& b, const Pack<T>& c) {
  return map<T>([](auto x, auto y, auto z) { return vec::fmadd(x, y, z); }, a, b, c);
}

// Bit i of the result: whether !(z[i] <= 0), so true for NaN.
template <typename T, typename Count = Full>
uint32_t positive_bits(const Pack<T>& z, Count = {}) {
  using Vec = typename Pack<T>::Vec;
  if constexpr (std::is_same_v<Count, AnyOrder> && Pack<T>::kConverts) {
    static_assert(Pack<T>::kVecs == 2);
    return zero_mask_any_order<T>(z.v[0] <= Vec(0), z.v[1] <= Vec(0));
  }
  uint32_t bits = 0;
  for_each_index<Pack<T>::kVecs>([&](int k) FASTNORM_INLINE {
    bits |= static_cast<uint32_t>((z.v[k] <= Vec(0)).zero_mask()) << (k * Vec::size());
  });
  return bits;
}

// Bits beyond a pack's are not looked at.
template <typename T, typename Count = Full>
Pack<T> choose(uint32_t bits, const Pack<T>& a, const Pack<T>& b, Count = {}) {
  Pack<T> r;
  for_each_index<Pack<T>::kVecs>([&](int k) FASTNORM_INLINE {
    const int first = k * Pack<T>::Vec::size();
    if constexpr (std::is_same_v<Count, AnyOrder>) {
      r.v[k] = choose_any_order<T>(bits, first, a.v[k], b.v[k]);
    } else {
      r.v[k] = choose(bits, first, a.v[k], b.v[k]);
    }
  });
  return r;
}

// A pack's mask bits in memory: kSize / 8 bytes, fewer at the end of a row.
template <typename T, typename Whole = Full>
uint32_t load_bits(const uint8_t* p, Whole = {}) {
  uint32_t bits = 0;
  std::memcpy(&bits, p, Pack<T>::kSize / 8);
  return bits;
}
template <typename T>
uint32_t load_bits(const uint8_t* p, Partial n) {
  uint32_t bits = p[0];  // byte by byte: memcpy of as many as the compiler does not know is a call
  if constexpr (Pack<T>::kSize > 8) bits |= n.count > 8 ? uint32_t{p[1]} << 8 : 0;
  if constexpr (Pack<T>::kSize > 16) bits |= n.count > 16 ? uint32_t{p[2]} << 16 : 0;
  if constexpr (Pack<T>::kSize > 24) bits |= n.count > 24 ? uint32_t{p[3]} << 24 : 0;
  return bits;
}
// The bits of any pack and what follows, where four bytes can be read: one instruction brings these to all lanes.
inline uint32_t load_bits_and_more(const uint8_t* p) {
  uint32_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return bits;
}
template <typename T, typename Whole = Full>
void store_bits(uint8_t* p, uint32_t bits, Whole = {}) {
  std::memcpy(p, &bits, Pack<T>::kSize / 8);
}
template <typename T>
void store_bits(uint8_t* p, uint32_t bits, Partial n) {
  p[0] = static_cast<uint8_t>(bits);
  if constexpr (Pack<T>::kSize > 8)
    if (n.count > 8) p[1] = static_cast<uint8_t>(bits >> 8);
  if constexpr (Pack<T>::kSize > 16)
    if (n.count > 16) p[2] = static_cast<uint8_t>(bits >> 16);
  if constexpr (Pack<T>::kSize > 24)
    if (n.count > 24) p[3] = static_cast<uint8_t>(bits >> 24);
}

template <typename T>
double lane_sum(const Pack<T>& p) {
  auto all = p.v[0];
  for (int k = 1; k < Pack<T>::kVecs; ++k) all = all + p.v[k];
  return lane_sum(all);
}

template <typename T, int kCount>
double lane_sum(const Pack<T> (&sums)[kCount]) {
  Pack<T> all = sums[0];
  for (int u = 1; u < kCount; ++u) all = all + sums[u];
  return lane_sum(all);
}

// Elements from p on before the first place where a pack can be streamed to: a cache line's beginning, or its middle.
template <typename T>
int64_t elements_before_pack(const T* p) {
  return static_cast<int64_t>(-reinterpret_cast<uintptr_t>(p) % (Pack<T>::kSize * sizeof(T)) / sizeof(T));
}

// Calls f(i, Whole, u), Whole being Full or AnyOrder, for each whole pack of n elements, kUnroll of them together with
// u = 0 .. kUnroll - 1 (independent accumulators hide the latency of an addition, 4 cycles), and f(i, Partial, 0) for what
// is left.
template <typename T, int kUnroll = 1, typename Whole = Full, typename F>
void for_packs(int64_t n, const F& f) {
  constexpr int kSize = Pack<T>::kSize;
  int64_t i = 0;
  if constexpr (kUnroll > 1) {
    for (; i + kUnroll * kSize <= n; i += kUnroll * kSize) {
#pragma GCC unroll 8
      for (int u = 0; u < kUnroll; ++u) f(i + u * kSize, Whole{}, u);
    }
  }
  for (; i + kSize <= n; i += kSize) f(i, Whole{}, 0);
  if (i < n) f(i, Partial{static_cast<int>(n - i)}, 0);
}

// How many packs, or sums of short runs, a register adds up before it starts anew and its sum goes to one of such sums.
// Where elements are much alike, as those of a mask or a constant gradient, every addition to a lane is rounded the same
// way, and the error grows with the chain's length instead of its root.
constexpr int kChain = 16;

// The elements that kUnroll registers, each from zero on, add up.
template <typename T, int kUnroll>
constexpr int64_t kSumPiece = int64_t{kChain} * kUnroll * Pack<T>::kSize;

// Calls f(first element, elements) for such pieces of n elements.
template <typename T, int kUnroll, typename F>
void for_sum_pieces(int64_t n, const F& f) {
  constexpr int64_t kPiece = kSumPiece<T, kUnroll>;
  for (int64_t first = 0; first < n; first += kPiece) f(first, std::min(kPiece, n - first));
}

// How many runs of n elements kUnroll registers add up before they start anew.
template <typename T, int kUnroll>
int64_t sum_runs(int64_t n) {
  constexpr int64_t kTogether = kUnroll * Pack<T>::kSize;
  return std::max<int64_t>(1, kChain / ((n + kTogether - 1) / kTogether));
}

// Adds to two sums what add(i, Whole | Partial, its sum, its other sum) adds for each pack of n elements, by pieces.
// kUnroll pairs of sums where there are as many whole packs; a shorter run has no use for them, and one pair stays in
// registers.
template <typename T, int kUnroll, typename Whole = Full, typename F>
void sum_packs(int64_t n, Pack<T>& sum, Pack<T>& other_sum, const F& add) {
  constexpr int64_t kSize = Pack<T>::kSize;
  for_sum_pieces<T, kUnroll>(n, [&](int64_t begin, int64_t left) {
    Pack<T> a(0), b(0);
    if constexpr (kUnroll > 1) {
      if (left >= kUnroll * kSize) {
        Pack<T> more_a[kUnroll - 1], more_b[kUnroll - 1];
        for (int u = 0; u < kUnroll - 1; ++u) more_a[u] = more_b[u] = Pack<T>(0);
        for (; left >= kUnroll * kSize; begin += kUnroll * kSize, left -= kUnroll * kSize) {
          add(begin, Whole{}, a, b);
#pragma GCC unroll 8
          for (int u = 0; u < kUnroll - 1; ++u) add(begin + (u + 1) * kSize, Whole{}, more_a[u], more_b[u]);
        }
        for (int u = 0; u < kUnroll - 1; ++u) {
          a = a + more_a[u];
          b = b + more_b[u];
        }
      }
    }
    for_packs<T, 1, Whole>(left, [&](int64_t i, auto count, int) { add(begin + i, count, a, b); });
    sum = sum + a;
    other_sum = other_sum + b;
  });
}

// As for_packs, for a run whose whole packs begin after `head` elements, less than a pack. Ends that are not whole packs
// share one copy of f's code. What lies first comes first: streamed stores that come before an ordinary one to the line
// in front of them take up to twice as long.
template <typename T, typename Whole = Full, typename F>
void for_packs_after(int64_t head, int64_t n, const F& f) {
  constexpr int64_t kSize = Pack<T>::kSize;
  int64_t begin = 0, end = std::min(head, n);
  for (;;) {
    if (begin < end) f(begin, Partial{static_cast<int>(end - begin)}, 0);
    if (end == n) return;
    for (begin = head; begin + kSize <= n; begin += kSize) f(begin, Whole{}, 0);
    end = n;
  }
}

template <typename T>
T* offset_by(T* p, int64_t n) {
  return p ? p + n : nullptr;
}

// Calls f with a value of the C++ type of dtype.
template <typename F>
void visit_any(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kFloat64: return f(double{});
    case Dtype::kFloat32: return f(float{});
    case Dtype::kBFloat16: return f(c10::BFloat16{});
    case Dtype::kFloat16: return f(c10::Half{});
  }
}

// The same for a kernel, of the types that this instruction set has kernels for (isa.h).
template <typename F>
void visit(Dtype dtype, const F& f) {
#if defined(CPU_CAPABILITY_AVX512)
  switch (dtype) {
    case Dtype::kFloat64: std::abort();  // isa_for() takes AVX2's
    case Dtype::kFloat32: return f(float{});
    case Dtype::kBFloat16: return f(c10::BFloat16{});
    case Dtype::kFloat16: return f(c10::Half{});
  }
#else
  visit_any(dtype, f);
#endif
}

inline bool is_finite_as(Dtype dtype, double value) {
  bool finite = false;
  visit_any(dtype, [&](auto type) { finite = std::isfinite(static_cast<double>(static_cast<decltype(type)>(value))); });
  return finite;
}

// Element i of a parameter or statistic; `missing` where there is none.
inline double read(const void* p, Dtype dtype, int64_t i, double missing) {
  if (p == nullptr) return missing;
  double value = 0;
  visit_any(dtype, [&](auto type) { value = static_cast<double>(static_cast<const decltype(type)*>(p)[i]); });
  return value;
}
inline void write(void* p, Dtype dtype, int64_t i, double value) {
  visit_any(dtype, [&](auto type) { static_cast<decltype(type)*>(p)[i] = static_cast<decltype(type)>(value); });
}

// The same for elements 0 .. n - 1.
inline void read_all(const void* p, Dtype dtype, int64_t n, double missing, double* values) {
  if (p == nullptr) {
    std::fill(values, values + n, missing);
    return;
  }
  visit_any(dtype, [&](auto type) {
    const auto from = static_cast<const decltype(type)*>(p);
    for (int64_t i = 0; i < n; ++i) values[i] = static_cast<double>(from[i]);
  });
}
inline void write_all(void* p, Dtype dtype, int64_t n, const double* values) {
  visit_any(dtype, [&](auto type) {
    const auto to = static_cast<decltype(type)*>(p);
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<decltype(type)>(values[i]);
  });
}

}  // namespace
}  // namespace fastnorm::cpu::CPU_CAPABILITY
