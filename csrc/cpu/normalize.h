// The inner loops that every norm shares: normalise a run, reduce its gradients, write its dx. What the coefficients
// belong to (one set a run, or one an element of the run) is a template parameter, as is the activation; the residual
// is there or not.
#pragma once

#include "../affine.h"
#include "../layout.h"
#include "../mask.h"
#include "activation.h"
#include "parallel.h"
#include "vec.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

// One value for a whole run.
template <typename T>
struct Uniform {
  Pack<T> value;

  explicit Uniform(acc_type<T> v) : value(v) {}
  const Pack<T>& operator[](int64_t) const { return value; }
};

// One value an element: an array that can be read a pack past its end.
template <typename T>
struct PerColumn {
  const acc_type<T>* values;

  explicit PerColumn(const acc_type<T>* v) : values(v) {}
  Pack<T> operator[](int64_t i) const { return Pack<T>::load_acc(values + i); }
};

// The order in which a loop with such coefficients has whole packs.
template <typename T, typename C>
using OrderFor = std::conditional_t<std::is_same_v<C, Uniform<T>>, AnyOrder, Full>;
// And one in which dz may be kept, whose elements lie in order.
template <typename T, typename C, typename Act>
using GradientOrderFor = std::conditional_t<kMayBeSmooth<Act>, Full, OrderFor<T, C>>;

// z = (x - mean) * scale + shift
template <typename C>
struct Affine {
  C mean, scale, shift;

  template <typename T>
  Pack<T> operator()(const Pack<T>& x, int64_t i) const {
    return fmadd(x - mean[i], scale[i], shift[i]);
  }
};

// Bytes of a run that does not begin and end with cache lines from which its whole lines are worth streaming: of runs
// one after the other, and of those that lie apart, where as they are written the next ones are asked for.
constexpr int64_t kLeastStreamed = 4096, kLeastStreamedApart = 1024;

// Of a run that goes past the caches, the elements that do not as they come before the first pack that can be streamed;
// -1 if all do not: the run is short or, with a mask, not divided there into whole bytes of it.
template <typename T>
int64_t head_of_run(const T* to, int64_t n, const uint8_t* mask, int64_t ahead) {
  if (fills_lines(to, n)) return 0;
  const int64_t head = elements_before_pack(to), bytes = n * static_cast<int64_t>(sizeof(T));
  return bytes < (ahead ? kLeastStreamedApart : kLeastStreamed) || (mask && head % 8 != 0) ? -1 : head;
}

// Scalar math: y = act(z(x) + residual);  mask bit = !(z <= 0). Prefetches what lies `ahead`, if not 0; x, too, if it
// was not just read.
template <bool kPrefetchX = false, typename Act, typename T, typename C>
FASTNORM_LOOP void normalize_run(Act act, const T* x, const T* residual, T* y, uint8_t* mask, int64_t n,
                                 const Affine<C>& affine, bool stream, int64_t ahead = 0) {
  using P = Pack<T>;
  const Affine<C> local = affine;  // in registers: a store to y might be one to what is only referred to
  const int64_t head = stream ? head_of_run(y, n, mask, ahead) : 0;
  stream = stream && head >= 0;
  for_packs_after<T, OrderFor<T, C>>(stream ? head : 0, n, [&](int64_t i, auto count, int) {
    P z = local(P::load(x + i, count), i);
    if (ahead) {
      if constexpr (kPrefetchX) prefetch(x + i + ahead);
      if (residual) prefetch(residual + i + ahead);
      if (!stream) prefetch_to_write(y + i + ahead);
    }
    if (residual) z = z + P::load(residual + i, count);
    if (mask) store_bits<T>(mask + i / 8, positive_bits(z, count), count);
    put(activate(act, z), y + i, count, stream);
  });
}

template <typename T>
Affine<Uniform<T>> uniform(const SliceAffine<acc_type<T>>& a) {
  return {Uniform<T>(a.mean), Uniform<T>(a.scale), Uniform<T>(a.shift)};
}

// weight and bias of every channel, one and zero where there are none.
struct Parameters {
  ScratchArray<double> weight, bias;

  template <typename Args>
  explicit Parameters(const Args& a) : weight(a.shape.C), bias(a.shape.C) {
    read_all(a.weight, a.param_dtype, a.shape.C, 1.0, weight.data());
    read_all(a.bias, a.param_dtype, a.shape.C, 0.0, bias.data());
  }
};

// running = (1 - momentum) * running + momentum * value(c), for each of C channels.
template <typename F>
void update_average(void* running, Dtype dtype, int64_t C, double momentum, const F& value) {
  const ScratchArray<double> average(C);
  read_all(running, dtype, C, 0.0, average.data());
  for (int64_t c = 0; c < C; ++c) average[c] = (1 - momentum) * average[c] + momentum * value(c);
  write_all(running, dtype, C, average.data());
}

// Where the mask bits of an element are.
struct MaskBits {
  uint8_t* bits;  // or null
  MaskRows rows;

  // `offset` elements from the tensor's start, a multiple of eight from its row's start.
  uint8_t* operator()(int64_t offset) const {
    return bits ? bits + offset / rows.length * rows.bytes_per_row() + offset % rows.length / 8 : nullptr;
  }
  // From a row's to the next row's: 0 where there are none, so that null stays null.
  int64_t bytes_per_row() const { return bits ? rows.bytes_per_row() : 0; }
};

// Whether an output is better written past the caches, and one that is written by planes: where it and the inputs, as
// large, do not fit there together. A second input counts in backward, where both are read again from there; LayerNorm's
// reads them once, and they and dx were measured to be too much, too.
inline bool stream_output(int64_t numel, Dtype dtype, int64_t inputs = 1) {
  return (inputs + 1) * numel * size_of(dtype) >= 2 * stream_threshold();
}
inline bool stream_planes(const Shape& shape, Dtype dtype, int64_t least, int64_t inputs = 1) {
  const int64_t plane = shape.S * size_of(dtype);
  return stream_output(shape.numel(), dtype, inputs) &&
         (plane % static_cast<int64_t>(kStreamAlignment) == 0 || plane >= least);
}

// Whether the inputs are too large to lie in the cache when a kernel comes to them.
inline bool come_from_memory(int64_t numel, Dtype dtype, int64_t inputs = 1) {
  return inputs * numel * size_of(dtype) >= memory_threshold();
}

// Whether dz of n elements, which a task sweeps twice, is better kept than computed again: where it takes an exponential,
// and while x, dy and dz are not far away by then.
template <typename T>
bool keeps_gradient(Activation activation, int64_t n) {
  constexpr int64_t kNear = 2 << 20;  // bytes: about a second-level cache
  return is_smooth(activation) && n * static_cast<int64_t>(2 * sizeof(T) + sizeof(acc_type<T>)) <= kNear;
}

// What backward knows of one run.
template <typename T>
struct RunGradient {
  const T *x, *dy, *residual;   // residual or null
  const uint8_t* mask;          // or null
  acc_type<T>* kept = nullptr;  // where dz stays from a first sweep to a second, in whole packs, or null

  // dz = dy * act'(z). z comes from x as forward computed it, bit for bit, or its sign from the mask.
  template <typename Act, typename C, typename Count>
  Pack<T> dz(Act act, int64_t i, Count count, const Pack<T>& x_i, const Affine<C>& affine) const {
    const Pack<T> dy_i = Pack<T>::load(dy + i, count);
    if constexpr (kIsNone<Act>) {
      return dy_i;
    } else {
      if constexpr (kMayBePiecewiseLinear<Act>)
        if (mask) return activate_backward(act, dy_i, load_bits<T>(mask + i / 8, count), count);
      Pack<T> z = affine(x_i, i);
      if (residual) z = z + Pack<T>::load(residual + i, count);
      return activate_backward(act, dy_i, z);
    }
  }

  // Calls sweep(dz) with the function that gives dz(i, count, x_i, affine): what keep() left, if it did, else the above.
  // Either has a loop of its own, for in one the exponential's constants would be loaded again for every pack.
  template <typename Act, typename F>
  void with_dz(Act act, const F& sweep) const {
    if constexpr (kMayBeSmooth<Act>)
      if (kept) return sweep([this](int64_t i, auto&&...) { return Pack<T>::load_acc(kept + i); });
    sweep([this, act](auto&&... at) { return dz(act, at...); });
  }
  template <typename Act>
  void keep(Act, int64_t i, const Pack<T>& dz_i) const {
    if constexpr (kMayBeSmooth<Act>)
      if (kept) dz_i.store_acc(kept + i);
  }

  void prefetch(int64_t i) const {
    cpu::CPU_CAPABILITY::prefetch(x + i);
    cpu::CPU_CAPABILITY::prefetch(dy + i);
  }
};

// xhat = (x - mean) * rstd + rest
template <typename C>
struct Standardize {
  C mean, rstd, rest;

  template <typename T>
  Pack<T> operator()(const Pack<T>& x, int64_t i) const {
    return fmadd(x - mean[i], rstd[i], rest[i]);
  }
};

template <typename T>
Standardize<Uniform<T>> uniform(const SliceStandardize<acc_type<T>>& s) {
  return {Uniform<T>(s.mean), Uniform<T>(s.rstd), Uniform<T>(s.rest)};
}

// What is summed in place of xhat: (x - mean) * power
template <typename C>
struct Summand {
  C mean, power;

  template <typename T>
  Pack<T> operator()(const Pack<T>& x, int64_t i) const {
    return (x - mean[i]) * power[i];
  }
};

template <typename T>
Summand<Uniform<T>> uniform(const SliceSummand<acc_type<T>>& s) {
  return {Uniform<T>(s.mean), Uniform<T>(s.power)};
}

// dx = (dz - ((x - mean) * slope + offset)) * scale
template <typename C>
struct InputGradient {
  C slope, offset;
  bool constant_statistics;  // dx = dz * scale: the statistics did not depend on x
};

template <typename T>
InputGradient<Uniform<T>> uniform(const SliceGradient<acc_type<T>>& g, bool constant_statistics) {
  return {Uniform<T>(g.slope), Uniform<T>(g.offset), constant_statistics};
}

// Which gradients of a run are written past the caches, from `head` elements on. Not a dx that is written over dy, whose
// lines are there.
struct PastCaches {
  int64_t head = 0;
  bool dx = false, dresidual = false;

  template <typename T>
  PastCaches(const RunGradient<T>& g, const T* to, const T* to_residual, int64_t n, bool stream, int64_t ahead) {
    const bool over_dy = to == g.dy;
    const T* const first = to && !over_dy ? to : to_residual;
    if (!stream || !first) return;
    const int64_t before = head_of_run(first, n, g.mask, ahead);
    if (before < 0) return;
    head = before;
    dx = first == to;
    dresidual = to_residual && elements_before_pack(to_residual + head) == 0;
  }
};

// How far from an element what a sweep asks for lies, or 0 where it asks for nothing: of x and dy, which it may find in
// the cache while those of its next task come from memory, and of dx.
struct Prefetches {
  int64_t inputs = 0, outputs = 0;
};

// Scalar math: dz = dy * act'(z);  dresidual = dz;  dx = (dz - (x - mean) * slope - offset) * scale
template <typename Act, typename T, typename C>
FASTNORM_LOOP void input_gradient_run(Act act, const RunGradient<T>& g, T* dx, T* dresidual, int64_t n,
                                      const Affine<C>& affine, const InputGradient<C>& coefficient, bool stream,
                                      const Prefetches& prefetches = {}) {
  using P = Pack<T>;
  const int64_t inputs_ahead = prefetches.inputs, ahead = prefetches.outputs;
  const RunGradient<T> from = g;
  const Affine<C> local = affine;
  const InputGradient<C> by = coefficient;
  const PastCaches past_caches(from, dx, dresidual, n, stream, ahead);
  from.with_dz(act, [&](const auto& dz_at) {
    for_packs_after<T, GradientOrderFor<T, C, Act>>(past_caches.head, n, [&](int64_t i, auto count, int) {
      if (ahead) {
        from.prefetch(i + inputs_ahead);
        if (dx && !past_caches.dx) prefetch_to_write(dx + i + ahead);
      }
      P x(0);
      if constexpr (!kIsNone<Act>) x = P::load(from.x + i, count);
      const P dz = dz_at(i, count, x, local);
      if (dresidual) put(dz, dresidual + i, count, past_caches.dresidual);
      if (dx == nullptr) return;
      P d = dz;
      if (!by.constant_statistics) {
        if constexpr (kIsNone<Act>) x = P::load(from.x + i, count);
        d = d - fmadd(x - local.mean[i], by.slope[i], by.offset[i]);
      }
      d = d * local.scale[i];
      put(d, dx + i, count, past_caches.dx);
    });
  });
}

// Accumulators of a chunk: sum dz and sum dz * summand, from which SliceSummand has sum dz * xhat.
template <typename T>
struct GradientSums {
  Pack<T> dz{0}, dz_summand{0};

  // Elements past the end add nothing: what they come to from x = 0 need not be finite. Prefetches what lies `ahead`, if
  // not 0.
  template <typename Act, typename C>
  FASTNORM_LOOP void add_run(Act act, const RunGradient<T>& g, int64_t n, const Affine<C>& affine,
                             const Summand<C>& summand, int64_t ahead = 0) {
    using P = Pack<T>;
    constexpr int kUnroll = unroll_of<Act>(kSumPacks<T>);
    const RunGradient<T> from = g;
    const Affine<C> local = affine;
    const Summand<C> times = summand;
    sum_packs<T, kUnroll, GradientOrderFor<T, C, Act>>(n, dz, dz_summand, [&](int64_t i, auto count, P& s, P& sx) {
      if (ahead) from.prefetch(i + ahead);
      const P x = P::load(from.x + i, count);
      P d = from.dz(act, i, count, x, local);
      from.keep(act, i, d);
      if constexpr (!kIsNone<Act>) d = d.keep(count);
      s = s + d;
      sx = fmadd(d, times(x, i).keep(count), sx);
    });
  }

  void operator+=(const GradientSums& b) {
    dz = dz + b.dz;
    dz_summand = dz_summand + b.dz_summand;
  }
  double sum_dz() const { return lane_sum(dz); }
  double sum_dz_summand() const { return lane_sum(dz_summand); }
};

}  // namespace
}  // namespace fastnorm::cpu::CPU_CAPABILITY
