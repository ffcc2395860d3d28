// Local response normalisation on the CPU. A task takes its share of the tensor tile by tile, and a tile a step of some
// rows at a time, through buffers of the arithmetic's type that stay in the first-level cache:
//
//   squares   x^2 with zeros around it, as far as the windows reach
//   sums      of the squares over the window, one axis after the other: the flat buffer added to itself, shifted
//   y         from x and the sums, straight to memory
//
// Backward puts u = dy * x * scale^(-beta - 1) between zeros likewise and sums it over the mirrored window. What the
// windows of two steps share is kept from one to the next.
//
// What differs between the four cases (inter and intra, contiguous and channels_last) is only how a tile's runs of
// contiguous elements lie in memory and in the buffer: see plan(). Every window is summed afresh, in an order that
// depends on its size alone: a running sum that adds what enters and subtracts what leaves would keep the rounding
// error of every large value it has seen.
#include "../local_response_norm.h"

#include <algorithm>
#include <cmath>

#include "parallel.h"
#include "vec.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

// ---- scale^-beta

enum class Power { kHalf, kThreeQuarters, kOne, kAny };

template <typename F>
void visit_power(double beta, const F& f) {
  if (beta == 0.5) return f(std::integral_constant<Power, Power::kHalf>{});
  if (beta == 0.75) return f(std::integral_constant<Power, Power::kThreeQuarters>{});
  if (beta == 1.0) return f(std::integral_constant<Power, Power::kOne>{});
  return f(std::integral_constant<Power, Power::kAny>{});
}

// 1 / sqrt(s) to 13 bits or more; anything for s that is not a normal positive number.
template <typename Vec>
Vec rough_rsqrt(Vec s) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<Vec, vec::Vectorized<float>>) return _mm512_rsqrt14_ps(s);
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<Vec, vec::Vectorized<float>>) {
    const Vec r = _mm256_rsqrt_ps(s);  // 11 bits, doubled by a Newton step
    return r * vec::fmadd(s * r, r * Vec(-0.5), Vec(1.5));
  }
#endif
  return s.sqrt().reciprocal();
}

template <typename Vec>
struct Powers {
  Vec power, inverse;  // s^-beta, 1 / s
};

// s^-1/2 or s^-3/4, and 1 / s if wanted. Square roots and divisions take ten cycles each where everything else takes
// one, so the roots come from rough ones r = s^-1/2 (1 + ..) and q = r^1/2 (1 + ..), whose errors are computed, if
// kExact to twice the precision, and taken out to first order: the second is below 2^-26. What remains is the rounding
// of the last step, as in torch's pow. Zero, infinity, NaN, negative and, in some instruction sets, subnormal numbers
// all end as a power that is not finite.
//
// Scalar math: s r^2 = 1 + h,  q^2 = r (1 + d)
//              s^-1/2 = r (1 - h/2),  s^-3/4 = r q (1 - 3/4 h - d/2),  1 / s = r^2 (1 - h)
template <Power kPower, bool kExact, bool kInverse, typename Vec>
Powers<Vec> refined_powers(Vec s) {
  using vec::fmadd;
  using vec::fmsub;
  const Vec one(1), r = rough_rsqrt(s), t = s * r;
  Vec h = fmsub(t, r, one);
  if constexpr (kExact) h = fmadd(fmsub(s, r, t), r, h);
  Powers<Vec> result;
  if constexpr (kInverse) result.inverse = r * r * (one - h);
  if constexpr (kPower == Power::kHalf) {
    result.power = fmadd(r * h, Vec(-1. / 2), r);
  } else {
    const Vec g = rough_rsqrt(r), q = r * g, d = fmsub(q, q, r) * g * g;
    const Vec rq = r * q, correction = fmadd(h, Vec(-3. / 4), d * Vec(-1. / 2));
    if constexpr (kExact) {
      result.power = fmadd(rq, correction, fmsub(r, q, rq)) + rq;
    } else {
      result.power = fmadd(rq, correction, rq);
    }
  }
  return result;
}

// The same for any s: where the refined power is not finite, by division.
template <Power kPower, bool kExact, bool kInverse, typename Vec>
Powers<Vec> careful_powers(Vec s) {
  Powers<Vec> result = refined_powers<kPower, kExact, kInverse>(s);
  const Vec not_finite = (result.power - result.power).isnan();
  const Vec root = kPower == Power::kHalf ? s.sqrt() : s.pow(Vec(3. / 4));
  result.power = Vec::blendv(result.power, root.reciprocal(), not_finite);
  if constexpr (kInverse) result.inverse = Vec::blendv(result.inverse, s.reciprocal(), not_finite);
  return result;
}

constexpr bool is_root(Power power) { return power == Power::kHalf || power == Power::kThreeQuarters; }

// How scale^-beta is computed for an element type; what is exact enough to be rounded to 16 bits needs no second
// precision. Roots that are not kCareful are for most numbers and remember whether they met another: a call of pow in
// the loop, taken or not, costs it the registers.
template <Power kPower, bool kCareful, typename T>
struct Raise {
  using Vec = typename Pack<T>::Vec;
  static constexpr bool kExact = !Pack<T>::kConverts;
  Vec beta;
  Vec doubt{0};  // NaN once a power was not finite

  // x * s^-beta
  Vec divide(Vec x, Vec s) {
    if constexpr (is_root(kPower)) {
      return x * roots<false>(s).power;
    } else if constexpr (kPower == Power::kOne) {
      return x / s;
    } else {
      return x / s.pow(beta);
    }
  }

  Powers<Vec> powers(Vec s) {
    if constexpr (is_root(kPower)) {
      return roots<true>(s);
    } else {
      const Vec inverse = s.reciprocal();
      return {kPower == Power::kOne ? inverse : s.pow(beta).reciprocal(), inverse};
    }
  }

  bool met_other() const { return doubt.has_inf_nan(); }

 private:
  template <bool kInverse>
  Powers<Vec> roots(Vec s) {
    if constexpr (kCareful) return careful_powers<kPower, kExact, kInverse>(s);
    const Powers<Vec> result = refined_powers<kPower, kExact, kInverse>(s);
    doubt = vec::fmadd(result.power, Vec(0), doubt);
    return result;
  }
};

// Calls run(raise); once more, with one that takes any number, where the first met what it is not for.
template <Power kPower, typename T, typename F>
void with_raise(double beta, const F& run) {
  const typename Pack<T>::Vec exponent(static_cast<acc_type<T>>(beta));
  if constexpr (is_root(kPower)) {
    Raise<kPower, false, T> raise{exponent};
    run(raise);
    if (!raise.met_other()) [[likely]]
      return;
  }
  Raise<kPower, true, T> raise{exponent};
  run(raise);
}

// ---- sums of a flat buffer shifted against itself

constexpr int64_t kSlack = 64;  // elements that may be read and written beyond the end of a buffer

// Scalar math: to[i] = from[i] + from[i + shift] + ... (kCount terms), in pairs; `to` may be `from`.
template <int kCount, typename acc_t>
void sum_shifted(const acc_t* from, acc_t* to, int64_t n, int64_t shift) {
  using Vec = vec::Vectorized<acc_t>;
  for (int64_t i = 0; i < n; i += Vec::size()) {
    Vec sum[2] = {Vec::loadu(from + i), Vec::loadu(from + i + shift)};
    for (int j = 2; j < kCount; ++j) sum[j % 2] = sum[j % 2] + Vec::loadu(from + i + j * shift);
    (sum[0] + sum[1]).store(to + i);
  }
}

constexpr int64_t kMostTerms = 8;  // up to here one sweep over all terms is less work than doubling

// The same for `count` >= 2 terms. `from`, `to` and `spare` hold n + (count - 1) * shift elements; `from` is not
// written unless it is `to`. Many terms: windows of 1, 2, 4 ... elements in `spare`, those that make up `count` joined
// in `to`.
template <typename acc_t>
void sum_windows(const acc_t* from, acc_t* to, acc_t* spare, int64_t n, int64_t shift, int64_t count) {
  switch (count) {
    case 2: return sum_shifted<2>(from, to, n, shift);
    case 3: return sum_shifted<3>(from, to, n, shift);
    case 4: return sum_shifted<4>(from, to, n, shift);
    case 5: return sum_shifted<5>(from, to, n, shift);
    case 6: return sum_shifted<6>(from, to, n, shift);
    case 7: return sum_shifted<7>(from, to, n, shift);
    case kMostTerms: return sum_shifted<kMostTerms>(from, to, n, shift);
  }
  using Vec = vec::Vectorized<acc_t>;
  const acc_t* doubled = from;  // sums of `terms` elements
  int64_t joined = 0;           // elements in the sums of `to`
  for (int64_t terms = 1;; terms *= 2) {
    if (count & terms) {
      const int64_t end = n + (count - joined - terms) * shift;
      if (joined > 0) {
        for (int64_t i = 0; i < end; i += Vec::size())
          (Vec::loadu(doubled + i) + Vec::loadu(to + i + terms * shift)).store(to + i);
      } else if (to != doubled) {
        std::copy(doubled, doubled + end, to);
      }
      joined += terms;
    }
    if (2 * terms > count) return;
    sum_shifted<2>(doubled, spare, n + (count - 2 * terms) * shift, terms * shift);
    doubled = spare;
  }
}

// ---- tiles

// A window along one axis, clipped to what can matter; `shift` elements of the buffer from one of its elements to the
// next.
struct Window {
  int64_t before = 0, after = 0, shift = 0;

  int64_t count() const { return before + 1 + after; }
  int64_t reach() const { return (count() - 1) * shift; }
};

constexpr int64_t kLine = 64;  // bytes of a strip of channels: a cache line, and a whole pack

// The tensor as `slices` that no window crosses, a slice as strips of `width` elements out of `extent`, a strip as
// `rows` of `runs` of contiguous elements, a tile as `chunk` rows of a strip, swept `step` rows at a time. Strides are
// those of memory, pitches those of the buffer.
struct Plan {
  int64_t slices, slice_stride;
  int64_t extent, width;
  int64_t rows, row_stride, row_pitch;
  int64_t runs, run_stride, run_pitch;
  int64_t chunk, step;
  Window outer, inner;  // across rows; within a row

  int64_t strips() const { return (extent + width - 1) / width; }
  int64_t chunks() const { return (rows + chunk - 1) / chunk; }
  int64_t tiles() const { return slices * strips() * chunks(); }
  // Rows that follow each other without a gap, in memory and in the buffer, are one run.
  bool is_one_run() const { return runs == 1 && row_stride == width && row_pitch == width; }
  // Whether all runs of a tensor that begins at a cache line are whole lines.
  bool fills_lines(int64_t element_size) const {
    const auto whole = [=](int64_t elements) { return elements * element_size % kLine == 0; };
    if (is_one_run()) return whole(chunk * row_stride) && whole(step * row_stride) && whole(slice_stride);
    return whole(extent) && whole(width) && whole(row_stride) && whole(run_stride) && whole(slice_stride);
  }
};

constexpr int64_t kStrip = 128;     // elements of a strip, about: of a few lines many would be fetched for nothing
constexpr int64_t kStep = 1 << 11;  // elements of a step: the buffers' rows then stay in the first-level cache
constexpr int64_t kTaskElements = 1 << 15;
constexpr int64_t kElements = 16;  // of a buffer in a cache line

Window window_of(const LocalResponseNormSetting& setting, int64_t length, int64_t shift) {
  return {std::min(setting.before, length - 1), std::min(setting.after, length - 1), shift};
}

// Chooses rows a tile and a step. Around a tile the windows reach rows that are read and summed once more; from a step
// to the next they are kept.
void divide_rows(Plan& p) {
  const int64_t around = p.outer.count() - 1;
  p.chunk = std::clamp(kTaskElements / p.row_pitch, std::min(p.rows, std::max<int64_t>(4, 4 * around)), p.rows);
  p.step = std::clamp(kStep / p.row_pitch, std::min(p.chunk, std::max<int64_t>(1, 2 * around)), p.chunk);
}

// As many strips as it takes for kStrip elements each, as equal as whole cache lines of the buffers allow.
int64_t strip_width(int64_t extent) {
  if (extent <= 2 * kStrip) return extent;
  const int64_t strips = (extent + kStrip - 1) / kStrip, even = (extent + strips - 1) / strips;
  return std::min(extent, (even + kElements - 1) / kElements * kElements);
}

// Rows that begin at a cache line are added to each other without loads across two lines: where this makes them longer
// by one in `least` elements at most.
int64_t aligned_pitch(int64_t pitch, int64_t least) {
  const int64_t aligned = (pitch + kElements - 1) / kElements * kElements;
  return (aligned - pitch) * least <= pitch ? aligned : pitch;
}

Plan plan(const Shape& shape, int64_t H, int64_t W, const LocalResponseNormSetting& setting, int64_t element_size) {
  const int64_t N = shape.N, C = shape.C, S = shape.S;
  const bool last = shape.layout == Layout::kChannelsLast;
  Plan p{};
  p.runs = 1;
  if (setting.region == Region::kInter && !last) {  // rows are channels
    p.slices = N, p.slice_stride = C * S, p.extent = S;
    p.width = strip_width(S), p.rows = C, p.row_stride = S;
    p.row_pitch = aligned_pitch(p.width, 16);
    p.outer = window_of(setting, C, p.row_pitch);
  } else if (setting.region == Region::kInter) {  // rows are positions
    p.inner = window_of(setting, C, 1);
    p.slices = 1, p.extent = p.width = C;
    p.rows = N * S, p.row_stride = C, p.row_pitch = C + p.inner.reach();
  } else if (!last) {  // rows are those of the image
    p.inner = window_of(setting, W, 1);
    p.slices = N * C, p.slice_stride = S, p.extent = p.width = W;
    p.rows = H, p.row_stride = W, p.row_pitch = aligned_pitch(W + p.inner.reach(), 8);
    p.outer = window_of(setting, H, p.row_pitch);
  } else {  // likewise, of strips of channels; a strip of all channels has whole rows contiguous
    const bool whole = C * element_size <= 2 * kLine;
    const int64_t strip = whole ? C : kLine / element_size;
    p.inner = window_of(setting, W, strip);
    p.slices = N, p.slice_stride = S * C, p.extent = whole ? W * C : C, p.width = whole ? W * C : strip;
    p.rows = H, p.row_stride = W * C, p.row_pitch = W * strip + p.inner.reach();
    if (!whole) p.runs = W, p.run_stride = C, p.run_pitch = strip;
    p.outer = window_of(setting, H, p.row_pitch);
  }
  divide_rows(p);
  return p;
}

struct Tile {
  int64_t offset;      // of its strip's first element in memory
  int64_t begin, end;  // rows
  int64_t length;      // of a run
  int64_t next;        // from its first row to the next tile's

  // From a row of the step that begins at `row` to the one at its place in the next step.
  int64_t to_next_step(const Plan& p, int64_t row) const {
    return row + p.step < end ? p.step * p.row_stride : next - (row - begin) * p.row_stride;
  }
};

Tile tile_of(const Plan& p, int64_t i) {
  struct Place {
    int64_t offset, row, strip;
  };
  const auto place = [&](int64_t j) {
    const int64_t strip = j / p.chunks() % p.strips(), slice = j / p.chunks() / p.strips();
    return Place{slice * p.slice_stride + strip * p.width, j % p.chunks() * p.chunk, strip};
  };
  const Place here = place(i), next = place(std::min(i + 1, p.tiles() - 1));
  return {here.offset, here.row, std::min(p.rows, here.row + p.chunk),
          std::min(p.width, p.extent - here.strip * p.width),
          next.offset - here.offset + (next.row - here.row) * p.row_stride};
}

// Steps read in bursts, between which the memory would idle: each line is asked for while the step before is worked on,
// and each line to be written while its step is. By a pack's last element: the line that the first may share with the
// pack before it has been asked for with that.
template <typename T>
void prefetch(const T* p, int64_t i) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + (i + Pack<T>::kSize - 1) * static_cast<int64_t>(sizeof(T)));
}

// Calls f(offset in memory, offset in a buffer whose first row is `begin`, length) for every run of the rows begin ..
// end.
template <typename F>
void for_runs(const Plan& plan, const Tile& of, int64_t begin, int64_t end, const F& f) {
  if (plan.is_one_run()) {
    return f(of.offset + begin * plan.row_stride, 0, (end - begin) * plan.row_pitch);
  }
  const Plan p = plan;
  const Tile tile = of;
  for (int64_t row = begin; row < end; ++row)
    for (int64_t run = 0; run < p.runs; ++run)
      f(tile.offset + row * p.row_stride + run * p.run_stride, (row - begin) * p.row_pitch + run * p.run_pitch,
        tile.length);
}

// Fills a buffer's rows begin .. end, which may lie outside of the tensor and are zero there. f(first, last, to) writes
// the others, whole packs with zeros from a run's end on: these land between the rows, where zeros belong, or where a
// later run or row is going to be written.
template <typename acc_t, typename F>
void fill_rows(const Plan& p, int64_t begin, int64_t end, acc_t* buffer, const F& f) {
  const int64_t first = std::clamp<int64_t>(0, begin, end), last = std::clamp(p.rows, first, end);
  std::fill(buffer, buffer + (first - begin) * p.row_pitch, acc_t(0));
  f(first, last, buffer + (first - begin) * p.row_pitch);
  std::fill(buffer + (last - begin) * p.row_pitch, buffer + (end - begin) * p.row_pitch, acc_t(0));
}

// The buffers of a task, zero at first; between the runs they stay so.
template <typename acc_t>
class Buffers {
 public:
  Buffers(const Plan& p, int64_t rows, int64_t count)
      : size_((rows * p.row_pitch + p.inner.reach() + kSlack + 15) / 16 * 16), memory_(count * size_) {
    std::fill(memory_.data(), memory_.data() + count * size_, acc_t(0));
  }
  acc_t* operator[](int64_t i) const { return memory_.data() + i * size_; }

 private:
  int64_t size_;
  ScratchArray<acc_t> memory_;
};

template <typename T>
struct Kernel {
  using P = Pack<T>;
  using Vec = typename P::Vec;
  using acc_t = acc_type<T>;
  const LocalResponseNormSetting& setting;
  const Plan p;
  const int64_t numel;
  const T *x, *dy;   // dy: backward only
  T* out;            // y or dx
  const bool large;  // y or dx is to go past the caches
  const bool stream = large && p.fills_lines(sizeof(T)) && fills_lines(out, 0);
  const P a{static_cast<acc_t>(setting.a)}, k{static_cast<acc_t>(setting.k)};

  // Sums over the windows of `rows` rows; the one of an element begins where the element would be without zeros before
  // it.
  const acc_t* sums(const acc_t* from, acc_t* to, acc_t* spare, int64_t rows) const {
    const int64_t n = rows * p.row_pitch;
    if (p.outer.count() > 1) {
      sum_windows(from, to, spare, n + p.inner.reach(), p.outer.shift, p.outer.count());
      from = to;
    }
    if (p.inner.count() > 1) {
      sum_windows(from, to, spare, n, p.inner.shift, p.inner.count());
      from = to;
    }
    return from;
  }

  // The loops over rows begin .. end of a tile, of which the first is at the buffers' beginning. What they need is in
  // locals: for all the compiler knows a store may be to anything that it reaches by a pointer, this object too.

  FASTNORM_LOOP void square_rows(const Tile& tile, int64_t begin, int64_t end, acc_t* to) const {
    const T *const from = x, *const written_soon = !dy && !stream ? out : nullptr;
    for_runs(p, tile, begin, end, [=](int64_t offset, int64_t at, int64_t length) {
      for_packs<T>(length, [=](int64_t i, auto count, int) {
        const P v = P::load(from + offset + i, count);
        if (written_soon) prefetch(written_soon, offset + i);
        (v * v).store_acc(to + at + i);
      });
    });
  }

  template <typename R>
  FASTNORM_LOOP void forward_rows(R& raises, const Tile& tile, int64_t begin, int64_t end, int64_t next,
                                  const acc_t* sum) const {
    const T* const from = x;
    T* const to = out;
    const P slope = a, base = k;
    const int64_t next_x = next + p.outer.after * p.row_stride;
    const bool streams = stream;
    R raise = raises;
    for_runs(p, tile, begin, end, [=, &raise](int64_t offset, int64_t at, int64_t length) {
      const bool past_caches = streams && fills_lines(to + offset, length);
      for_packs<T>(length, [=, &raise](int64_t i, auto count, int) {
        const P scale = fmadd(P::load_acc(sum + at + i), slope, base);
        prefetch(from, offset + i + next_x);
        put(map<T>([&](Vec v, Vec s) { return raise.divide(v, s); }, P::load(from + offset + i, count), scale),
            to + offset + i, count, past_caches);
      });
    });
    raises = raise;
  }

  // g and u of backward
  template <typename R>
  FASTNORM_LOOP void terms_rows(R& raises, const Tile& tile, int64_t begin, int64_t end, int64_t next, const acc_t* sum,
                                acc_t* g, acc_t* u) const {
    const T *const from = x, *const from_dy = dy, *const written_soon = stream ? nullptr : out;
    const P slope = a, base = k;
    const int64_t next_x = next + p.outer.after * p.row_stride;
    R raise = raises;
    for_runs(p, tile, begin, end, [=, &raise](int64_t offset, int64_t at, int64_t length) {
      for_packs<T>(length, [=, &raise](int64_t i, auto count, int) {
        const P v = P::load(from + offset + i, count), d = P::load(from_dy + offset + i, count);
        if (written_soon) prefetch(written_soon, offset + i);
        prefetch(from, offset + i + next_x);
        prefetch(from_dy, offset + i + next);
        const P scale = fmadd(P::load_acc(sum + at + i), slope, base);
        P g_i, u_i;
        for (int j = 0; j < P::kVecs; ++j) {
          const Powers<Vec> powers = raise.powers(scale.v[j]);
          g_i.v[j] = d.v[j] * powers.power;
          u_i.v[j] = g_i.v[j] * v.v[j] * powers.inverse;
        }
        g_i.keep(count).store_acc(g + at + i);
        u_i.keep(count).store_acc(u + at + i);
      });
    });
    raises = raise;
  }

  FASTNORM_LOOP void backward_rows(const Tile& tile, int64_t begin, int64_t end, const acc_t* sum,
                                   const acc_t* g) const {
    const T* const from = x;
    T* const to = out;
    const P coefficient(static_cast<acc_t>(-2 * setting.a * setting.beta));
    const bool streams = stream;
    for_runs(p, tile, begin, end, [=](int64_t offset, int64_t at, int64_t length) {
      const bool past_caches = streams && fills_lines(to + offset, length);
      for_packs<T>(length, [=](int64_t i, auto count, int) {
        const P v = P::load(from + offset + i, count);
        put(fmadd(v * coefficient, P::load_acc(sum + at + i), P::load_acc(g + at + i)), to + offset + i, count,
            past_caches);
      });
    });
  }

  // Moves the last of `rows` and `around` rows of a buffer to its beginning.
  void keep_last(acc_t* buffer, int64_t rows) const {
    std::copy(buffer + rows * p.row_pitch, buffer + (rows + p.outer.count() - 1) * p.row_pitch, buffer);
  }

  // Scalar math: y = x * (k + a * sum)^-beta
  template <Power kPower>
  void forward(const Tile& tile, const Buffers<acc_t>& buffer) const {
    const int64_t margin = p.inner.before * p.inner.shift;
    int64_t kept = 0;
    for (int64_t row = tile.begin; row < tile.end; row += p.step) {
      const int64_t end = std::min(row + p.step, tile.end);
      if (kept > 0) keep_last(buffer[0], p.step);
      fill_rows(p, row - p.outer.before + kept, end + p.outer.after, buffer[0] + kept * p.row_pitch,
                [&](int64_t from, int64_t to, acc_t* at) { square_rows(tile, from, to, at + margin); });
      const acc_t* sum = sums(buffer[0], buffer[1], buffer[2], end - row);
      with_raise<kPower, T>(setting.beta,
                            [&](auto& raise) { forward_rows(raise, tile, row, end, tile.to_next_step(p, row), sum); });
      kept = p.outer.count() - 1;
    }
  }

  // Scalar math: g = dy * scale^-beta,  u = g * x / scale,  dx = g - 2 * a * beta * x * sum u
  template <Power kPower>
  void backward(const Tile& tile, const Buffers<acc_t>& buffer) const {
    const int64_t margin = p.inner.before * p.inner.shift, margin_u = p.inner.after * p.inner.shift;
    acc_t *square = buffer[0], *g = buffer[1], *u = buffer[2], *total = buffer[3], *spare = buffer[4];
    int64_t kept = 0, rows = 0;
    for (int64_t row = tile.begin; row < tile.end; row += p.step) {
      // dx of row .. end takes u of row - after .. end + before, which takes squares of as many rows more.
      const int64_t end = std::min(row + p.step, tile.end);
      if (kept > 0) {
        keep_last(square, rows);
        keep_last(g, p.step);
        keep_last(u, p.step);
      }
      const int64_t begin_u = row - p.outer.after + kept, end_u = end + p.outer.before;
      fill_rows(p, begin_u - p.outer.before + kept, end_u + p.outer.after, square + kept * p.row_pitch,
                [&](int64_t from, int64_t to, acc_t* at) { square_rows(tile, from, to, at + margin); });
      rows = end_u - begin_u;
      const acc_t* sum = sums(square, total, spare, rows);
      with_raise<kPower, T>(setting.beta, [&](auto& raise) {
        fill_rows(p, begin_u, end_u, u + kept * p.row_pitch, [&](int64_t from, int64_t to, acc_t* at) {
          terms_rows(raise, tile, from, to, tile.to_next_step(p, row), sum + (from - begin_u) * p.row_pitch,
                     g + (at - u), at + margin_u);
        });
      });
      sum = sums(u, total, spare, end - row);
      backward_rows(tile, row, end, sum, g + p.outer.after * p.row_pitch);
      kept = p.outer.count() - 1;
    }
  }

  template <typename F>
  void for_tiles(int64_t buffers, const F& f) const {
    const bool doubles =
        std::max(p.outer.count(), p.inner.count()) > kMostTerms;  // the last buffer is for sum_windows then
    const int64_t tiles = p.tiles(),
                  per_task = std::max<int64_t>(1, kTaskElements * tiles / std::max<int64_t>(1, numel));
    parallel_for((tiles + per_task - 1) / per_task, numel, [&](int64_t task) {
      const Buffers<acc_t> buffer(p, p.step + 2 * (p.outer.count() - 1), buffers + doubles);
      for (int64_t i = task * per_task; i < std::min(tiles, (task + 1) * per_task); ++i) f(tile_of(p, i), buffer);
    });
  }
};

}  // namespace

void local_response_norm_forward(const LocalResponseNormForward& args) {
  visit(args.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t numel = args.shape.numel();
    const Kernel<T> kernel{args.setting,
                           plan(args.shape, args.H, args.W, args.setting, size_of(args.dtype)),
                           numel,
                           static_cast<const T*>(args.x),
                           nullptr,
                           static_cast<T*>(args.y),
                           numel * size_of(args.dtype) >= stream_threshold()};
    visit_power(args.setting.beta, [&](auto power) {
      kernel.for_tiles(2, [&](const Tile& tile, const auto& buffer) {
        kernel.template forward<decltype(power)::value>(tile, buffer);
      });
    });
  });
}

void local_response_norm_backward(const LocalResponseNormBackward& args) {
  visit(args.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t numel = args.shape.numel();
    const Kernel<T> kernel{args.setting,
                           plan(args.shape, args.H, args.W, args.setting, size_of(args.dtype)),
                           numel,
                           static_cast<const T*>(args.x),
                           static_cast<const T*>(args.dy),
                           static_cast<T*>(args.dx),
                           numel * size_of(args.dtype) >= stream_threshold()};
    visit_power(args.setting.beta, [&](auto power) {
      kernel.for_tiles(4, [&](const Tile& tile, const auto& buffer) {
        kernel.template backward<decltype(power)::value>(tile, buffer);
      });
    });
  });
}

}  // namespace fastnorm::cpu::CPU_CAPABILITY
