// Batch normalisation on the CPU. Two ways through memory:
//
// planes   (contiguous, planes of 16 elements or more): a task owns a channel, or a bundle of small ones whose planes it
//          takes by turns, for these are neighbours in each sample. It reads them once from memory for their moments and
//          once more from the cache to normalise them, as rows of a sample's if planes are so short that their ends count.
//          Too few channels for the threads: the same chunks, in two parallel sweeps.
// columns  (channels_last, and contiguous with tiny planes): a matrix whose columns are channels. Blocks of rows give
//          partial moments of every column, merged in a fixed order; the second sweep takes the tasks' parts from the
//          last to the first.
//
// Backward with constant statistics, whose dx needs no sums, takes both of its sweeps as one, block by block.
//
// Sums are float32 within a chunk or block and float64 beyond, in an order fixed by the shape alone.
#include "../batch_norm.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>

#include "columns.h"
#include "plane_bits.h"
#include "shifted.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

// ---- what both ways share

double mean_of(const BatchNormForward& a, int64_t c) { return a.given_mean ? a.given_mean[c] : a.mean[c]; }
double rstd_of(const BatchNormForward& a, int64_t c) { return a.given_rstd ? a.given_rstd[c] : a.rstd[c]; }
double mean_of(const BatchNormBackward& a, int64_t c) { return a.mean[c]; }
double rstd_of(const BatchNormBackward& a, int64_t c) { return a.rstd[c]; }

template <typename acc_t, typename Args>
SliceAffine<acc_t> channel_affine(const Args& a, const Parameters& parameters, int64_t c) {
  const double mean = mean_of(a, c), rstd = rstd_of(a, c), weight = parameters.weight[c], bias = parameters.bias[c];
  if (a.r) return {mean, rstd, weight * a.r[c], bias + weight * a.d[c]};  // xhat * r + d in place of xhat
  return {mean, rstd, weight, bias};
}

// Stores what backward keeps of channel c.
void keep_statistics(const BatchNormForward& a, int64_t c, double mean, double biased_variance) {
  a.mean[c] = mean;
  a.rstd[c] = 1.0 / std::sqrt(biased_variance + a.eps);
  if (a.r == nullptr) return;
  const double sigma = std::sqrt(read(a.running_var, a.stats_dtype, c, 1) + a.eps);
  a.r[c] = std::clamp(std::sqrt(biased_variance + a.eps) / sigma, 1 / a.r_max, a.r_max);
  a.d[c] = std::clamp((mean - read(a.running_mean, a.stats_dtype, c, 0)) / sigma, -a.d_max, a.d_max);
}

// What eval mode normalises by, kept as those of a batch.
void take_running_statistics(const BatchNormForward& a) {
  using Vec = vec::Vectorized<double>;
  const int64_t C = a.shape.C;
  read_all(a.running_mean, a.stats_dtype, C, 0, a.mean);
  read_all(a.running_var, a.stats_dtype, C, 1, a.rstd);
  for (int64_t c = 0; c < C; c += Vec::size()) {
    const int64_t here = std::min<int64_t>(C - c, Vec::size());
    (Vec(1) / (Vec::loadu(a.rstd + c, here) + Vec(a.eps)).sqrt()).store(a.rstd + c, here);
  }
}

// running = (1 - momentum) * running + momentum * new, the variance unbiased
void update_running_statistics(const BatchNormForward& a, const double* biased_variance) {
  const int64_t C = a.shape.C;
  const double count = static_cast<double>(a.shape.N * a.shape.S), unbiased = count / (count - 1);
  if (a.skip_nonfinite_stats) {
    for (int64_t c = 0; c < C; ++c)
      if (!is_finite_as(a.stats_dtype, a.mean[c]) || !is_finite_as(a.stats_dtype, biased_variance[c] * unbiased))
        return;
  }
  double momentum = a.momentum;
  if (a.num_batches_tracked) {
    ++*a.num_batches_tracked;
    if (std::isnan(momentum)) momentum = 1.0 / static_cast<double>(*a.num_batches_tracked);
  }
  if (a.running_mean == nullptr) return;
  update_average(a.running_mean, a.stats_dtype, C, momentum, [&](int64_t c) { return a.mean[c]; });
  update_average(a.running_var, a.stats_dtype, C, momentum, [&](int64_t c) { return biased_variance[c] * unbiased; });
}

// The coefficients of dx that lie beside each other, as those of ColumnAffine: of all columns, or of a bundle's planes in
// a sample.
template <typename T>
struct ColumnInputGradient {
  ColumnArray<T> slope, offset;

  explicit ColumnInputGradient(int64_t width) : slope(width), offset(width) {}
  InputGradient<PerColumn<T>> of_row(bool constant_statistics) const { return {slope, offset, constant_statistics}; }
  void set(int64_t first, int64_t n, const SliceGradient<acc_type<T>>& gradient) const {
    std::fill_n(&slope[first], n, gradient.slope);
    std::fill_n(&offset[first], n, gradient.offset);
  }
};

// The mask of rows whose bits are `to_next` bytes apart. Those of each `plane` elements begin with a byte, and a row of
// several planes, which a run has together, has them in a buffer.
class RowMasks {
 public:
  struct Place {
    uint8_t* bits = nullptr;  // the first row's
    int64_t to_next = 0, plane = 0;
  };

  // `length` elements a row, of whole planes if there are several.
  RowMasks(const Place& place, int64_t length)
      : place_(place),
        planes_(place.bits && place.plane < length ? length / place.plane : 1),
        buffer_(planes_ > 1 ? length / 8 + 1 + static_cast<int64_t>(sizeof(uint64_t)) : 0) {}

  // Where a run of row `i` has its bits; null stays null.
  uint8_t* of_run(int64_t i) const { return planes_ > 1 ? buffer_.data() : of_row(i); }
  void load(int64_t i) const {
    if (planes_ > 1) join_bits(of_row(i), planes_, place_.plane, buffer_.data());
  }
  void store(int64_t i) const {
    if (planes_ > 1) split_bits(buffer_.data(), planes_, place_.plane, of_row(i));
  }

 private:
  uint8_t* of_row(int64_t i) const { return offset_by(place_.bits, i * place_.to_next); }

  Place place_;
  int64_t planes_;
  ScratchArray<uint8_t> buffer_;
};

// The elements of rows, one after the other in memory or a bundle's in the samples. Not inlined: both ways share what is
// compiled for each activation.
template <typename T>
__attribute__((noinline, noclone)) void normalize_rows(const BatchNormForward& a, const Runs& rows,
                                                       const RowMasks::Place& mask_place,
                                                       const Affine<PerColumn<T>>& affine, bool stream) {
  const T *const x = static_cast<const T*>(a.x), *const residual = static_cast<const T*>(a.residual);
  T* const y = static_cast<T*>(a.y);
  const RowMasks mask(mask_place, rows.length);
  visit<T>(a.activation, [&](auto act) {
    for (int64_t row = 0; row < rows.count; ++row) {
      const int64_t i = rows.offset + row * rows.stride;
      normalize_run(act, x + i, offset_by(residual, i), y + i, mask.of_run(row), rows.length, affine, stream);
      mask.store(row);
    }
  });
}

// ---- planes

// Whether backward asks for the next bundle's planes while it writes dx. Measured on one processor each: with
// AVX512 it takes up to a seventh longer, without a ninth to a third less.
#if defined(CPU_CAPABILITY_AVX512)
constexpr bool kAsksForNextBundle = false;
#else
constexpr bool kAsksForNextBundle = true;
#endif

constexpr int64_t kLeastRows = 8;  // of a bundle's samples, for which its coefficients are laid out as a row

// Whether a plane is so few packs that the part of one at its end counts.
template <typename T>
bool few_packs(int64_t plane) {
  return plane < 8 * Pack<T>::kSize && plane % Pack<T>::kSize != 0;
}

// Whether the elements of a task's channels are taken as one run of each sample, their planes one after the other: where
// a plane is few packs and a part of one, or so short that it is streamed with its neighbours or not at all. The latter
// not with a mask, where planes, which ask for the next bundle's, take less time. Not for so few samples that a
// coefficient for each element of the run does not pay.
template <typename T>
bool by_rows(const Shape& shape, const uint8_t* mask, bool stream, bool stream_rows) {
  return shape.N >= kLeastRows && (few_packs<T>(shape.S) || (mask == nullptr && stream_rows && !stream));
}

// Of rows of planes, whose first element is the mask's element `offset`.
RowMasks::Place place_of_rows(const MaskBits& mask, const Shape& shape, int64_t offset) {
  return {mask(offset), shape.C * mask.bytes_per_row(), shape.S};
}

// Neighbouring channels that a task owns together: small planes are gathered until a sample's share is a few pages
// long, which the prefetchers and the TLB like. For rows it is whole cache lines if kMost channels or fewer make some.
struct Bundles {
  static constexpr int64_t kMost = 32, kBytes = 8192;
  int64_t C, channels;

  // `inputs` tensors of `element` bytes an element are read together.
  Bundles(const Shape& shape, int64_t element, int64_t inputs, bool rows) : C(shape.C) {
    const int64_t plane = shape.S * element, fit = kBytes / (plane * inputs);
    channels = std::clamp<int64_t>(fit, 1, kMostSlices);
    if (!rows) return;
    const int64_t whole_lines = kLine / std::gcd(kLine, plane);
    if (whole_lines <= channels)
      channels -= channels % whole_lines;
    else if (whole_lines <= fit && C >= 4 * num_threads() * whole_lines)
      channels = whole_lines;
  }

  int64_t size() const { return (C + channels - 1) / channels; }
  int64_t begin(int64_t i) const { return i * channels; }
  int64_t end(int64_t i) const { return std::min(C, (i + 1) * channels); }

 private:
  static constexpr int64_t kLine = kStreamAlignment;
};

// Something of each channel of a bundle, from its first on.
template <typename V>
class PerChannel {
 public:
  template <typename F>
  PerChannel(int64_t begin, int64_t end, const F& of) {
    for (int64_t c = begin; c < end; ++c) values_[c - begin].emplace(of(c));
  }
  V& operator[](int64_t i) { return *values_[i]; }

 private:
  std::optional<V> values_[Bundles::kMost];
};

template <typename T>
struct PlanesForward {
  using acc_t = acc_type<T>;
  const BatchNormForward& a;
  const Parameters parameters{a};
  const T* x = static_cast<const T*>(a.x);
  const T* residual = static_cast<const T*>(a.residual);
  T* y = static_cast<T*>(a.y);
  const int64_t C = a.shape.C, S = a.shape.S;
  const Chunks chunks{Runs{0, a.shape.N, C* S, S}};  // of a channel, from its first element
  const MaskBits mask{a.mask, mask_rows(a.shape)};
  // From a channel's plane to the next sample's, to prefetch by: that lies in another page, where the processor's own
  // prefetchers begin anew.
  const int64_t ahead = C * S;
  const bool stream = stream_planes(a.shape, a.dtype, kLeastStreamedApart);
  const bool stream_rows = stream_output(a.shape.numel(), a.dtype);
  const bool rows = by_rows<T>(a.shape, a.mask, stream, stream_rows);
  const Bundles bundles{a.shape, sizeof(T), /*inputs=*/1, rows};

  // Some channels' coefficients, which the runs of a chunk have in turn.
  struct Coefficients {
    const SliceAffine<acc_t>*begin, *end, *next;
  };

  // Each run of a chunk, and those of the next channels - 1 channels beside it.
  void normalize(const Runs& chunk, int64_t channels, const Coefficients& affine, int64_t to_next) const {
    visit<T>(a.activation, [&](auto act) { normalize(act, chunk, channels, affine, to_next); });
  }
  template <typename Act>
  FASTNORM_LOOP void normalize(Act act, Runs chunk, int64_t channels, Coefficients affine, int64_t to_next) const {
    const T *const from = x, *const from_residual = residual;  // in registers: a store to y might be one to a member
    T* const to = y;
    const int64_t plane = S;
    const bool past_caches = stream;
    uint8_t* bits = mask(chunk.offset);
    const int64_t plane_bytes = mask.bytes_per_row(), stride_bytes = chunk.stride / S * plane_bytes;
    for (int64_t run = 0; run < chunk.count; ++run, chunk.offset += chunk.stride, bits += stride_bytes) {
      int64_t i = chunk.offset;
      uint8_t* bits_of_plane = bits;
      for (int64_t c = 0; c < channels; ++c, i += plane, bits_of_plane += plane_bytes) {
        normalize_run(act, from + i, offset_by(from_residual, i), to + i, bits_of_plane, chunk.length,
                      uniform<T>(*affine.next), past_caches, to_next);
        if (++affine.next == affine.end) affine.next = affine.begin;
      }
    }
  }

  // The channels begin .. end of the samples first .. last, one run of each sample.
  void normalize_bundle(int64_t begin, int64_t end, int64_t first, int64_t last,
                        const ScratchArray<SliceAffine<acc_t>>& affine) const {
    const ColumnAffine<T> row((end - begin) * S);
    for (int64_t c = begin; c < end; ++c) row.set((c - begin) * S, S, affine[c]);
    const Runs samples{first * C * S + begin * S, last - first, C * S, (end - begin) * S};
    normalize_rows<T>(a, samples, place_of_rows(mask, a.shape, samples.offset), row, stream_rows);
  }

  // All elements, in the order they lie in or by bundles.
  void normalize_all() const {
    const ScratchArray<SliceAffine<acc_t>> affine(C);
    for (int64_t c = 0; c < C; ++c) affine[c] = channel_affine<acc_t>(a, parameters, c);
    if (Pack<T>::kConverts && rows && few_packs<T>(S)) {  // else one sweep in order is as fast
      // x comes from memory, so a row is long; some samples a task, for as many tasks as keep the threads busy.
      constexpr int64_t kRow = 8192;
      const int64_t N = a.shape.N, channels = std::max<int64_t>(1, kRow / S / Bundles::kMost) * Bundles::kMost;
      const int64_t blocks = (C + channels - 1) / channels;
      const int64_t parts = std::clamp<int64_t>(4 * num_threads() / blocks + 1, 1, N / kLeastRows);
      parallel_for(blocks * parts, a.shape.numel(), [&](int64_t i) {
        const int64_t begin = i % blocks * channels, part = i / blocks;
        normalize_bundle(begin, std::min(C, begin + channels), N * part / parts, N * (part + 1) / parts, affine);
      });
      return;
    }
    const Chunks all(Runs{0, a.shape.N * C, S, S});
    parallel_for(all.size(), a.shape.numel(), [&](int64_t k) {
      const Runs chunk = all[k];
      normalize(chunk, 1, {affine.data(), affine.data() + C, affine.data() + chunk.offset / S % C}, 0);
    });
  }

  void run(double* variance) const {
    if (!a.training) return normalize_all();
    const int64_t per_channel = chunks.size(), numel = a.shape.numel();
    const auto finish = [&](int64_t c, const Moments& m) {
      variance[c] = m.biased_variance();
      keep_statistics(a, c, m.mean, variance[c]);
    };
    if (bundles.size() < 2 * num_threads()) {
      const ScratchArray<Moments> partial(C * per_channel);
      parallel_for(C * per_channel, numel,
                   [&](int64_t i) { partial[i] = chunk_moments(x + i / per_channel * S, chunks[i % per_channel]); });
      for (int64_t c = 0; c < C; ++c) {
        Moments m;
        for (int64_t k = 0; k < per_channel; ++k) m.merge(partial[c * per_channel + k]);
        finish(c, m);
      }
      if (a.y) normalize_all();
      return;
    }
    const ScratchArray<SliceAffine<acc_t>> affine(C);
    parallel_for(bundles.size(), numel, [&](int64_t bundle) {
      const int64_t begin = bundles.begin(bundle), end = bundles.end(bundle);
      Moments m[Bundles::kMost], part[Bundles::kMost];
      for (int64_t k = 0; k < per_channel; ++k) {
        for (int64_t c = begin; c < end; c += kMostSlices) {
          const int64_t together = std::min<int64_t>(kMostSlices, end - c);
          chunk_moments(x + c * S, chunks[k], static_cast<int>(together), S, ahead, part + (c - begin));
        }
        for (int64_t c = begin; c < end; ++c) m[c - begin].merge(part[c - begin]);
      }
      for (int64_t c = begin; c < end; ++c) finish(c, m[c - begin]);
      if (a.y == nullptr) return;
      for (int64_t c = begin; c < end; ++c) affine[c] = channel_affine<acc_t>(a, parameters, c);
      if (rows) return normalize_bundle(begin, end, 0, a.shape.N, affine);
      const Coefficients own{affine.data() + begin, affine.data() + end, affine.data() + begin};
      for (int64_t k = 0; k < per_channel; ++k) {
        Runs chunk = chunks[k];
        chunk.offset += begin * S;
        normalize(chunk, end - begin, own, ahead);
      }
    });
  }
};

// What the sums of a channel are for: parameter gradients now, dx coefficients later.
void keep_sums(const BatchNormBackward& a, int64_t c, const Sums& sums) {
  if (a.dweight) write(a.dweight, a.param_dtype, c, a.r ? a.r[c] * sums.dz_xhat + a.d[c] * sums.dz : sums.dz_xhat);
  if (a.dbias) write(a.dbias, a.param_dtype, c, sums.dz);
  if (a.sums) {
    a.sums[c] = sums.dz;
    a.sums[a.shape.C + c] = sums.dz_xhat;
  }
}

// Of channel c, before those of this batch are added.
Sums given_sums(const BatchNormBackward& a, int64_t c) {
  return a.given_sums ? Sums{a.given_sums[c], a.given_sums[a.shape.C + c]} : Sums{};
}
template <typename acc_t>
SliceGradient<acc_t> channel_gradient(const BatchNormBackward& a, const Sums& all, int64_t c) {
  const double count = a.given_sums ? a.count : static_cast<double>(a.shape.N * a.shape.S);
  return {count, a.mean[c], a.rstd[c], all.dz, all.dz_xhat};
}

// Which sweeps backward needs: with constant statistics dx does not depend on the sums.
bool wants_sums(const BatchNormBackward& a) {
  return a.dweight || a.dbias || a.sums || (a.training && a.dx && a.given_sums == nullptr);
}
bool wants_elements(const BatchNormBackward& a) { return a.dx || a.dresidual; }
// Each block's sums and elements in one go.
bool in_one_sweep(const BatchNormBackward& a) { return !a.training && wants_sums(a) && wants_elements(a); }
// The elements after all sums.
bool in_two_sweeps(const BatchNormBackward& a) { return wants_sums(a) && wants_elements(a) && !in_one_sweep(a); }

// As normalize_rows().
template <typename T>
__attribute__((noinline, noclone)) void input_gradient_rows(const BatchNormBackward& a, const Runs& rows,
                                                            const RowMasks::Place& mask_place,
                                                            const Affine<PerColumn<T>>& affine,
                                                            const InputGradient<PerColumn<T>>& coefficient,
                                                            bool stream) {
  const T *const x = static_cast<const T*>(a.x), *const dy = static_cast<const T*>(a.dy);
  const T* const residual = static_cast<const T*>(a.residual);
  T *const dx = static_cast<T*>(a.dx), *const dresidual = static_cast<T*>(a.dresidual);
  const RowMasks mask(mask_place, rows.length);
  visit<T>(a.activation, [&](auto act) {
    for (int64_t row = 0; row < rows.count; ++row) {
      const int64_t i = rows.offset + row * rows.stride;
      mask.load(row);
      const RunGradient<T> gradient{x + i, dy + i, offset_by(residual, i), mask.of_run(row)};
      input_gradient_run(act, gradient, offset_by(dx, i), offset_by(dresidual, i), rows.length, affine, coefficient,
                         stream);
    }
  });
}

template <typename T>
struct PlanesBackward {
  using acc_t = acc_type<T>;
  const BatchNormBackward& a;
  const Parameters parameters{a};
  const T* x = static_cast<const T*>(a.x);
  const T* dy = static_cast<const T*>(a.dy);
  const T* residual = static_cast<const T*>(a.residual);
  T* dx = static_cast<T*>(a.dx);
  T* dresidual = static_cast<T*>(a.dresidual);
  const int64_t C = a.shape.C, S = a.shape.S;
  const Chunks chunks{Runs{0, a.shape.N, C* S, S}};
  const MaskBits mask{const_cast<uint8_t*>(a.mask), mask_rows(a.shape)};
  const int64_t inputs = in_two_sweeps(a) ? 2 : 1;  // that count for what stays in the cache
  const bool stream = stream_planes(a.shape, a.dtype, kLeastStreamedApart, inputs);

  // Where the dz of a bundle's channels stays from its first sweep to its second, if anywhere.
  struct Kept {
    acc_t* dz = nullptr;
    int64_t of_channel = 0;
  };

  // Calls f(i, c - begin, what backward knows of the run) for each run of a chunk, of the channels begin <= c < end in
  // turn; i is the run's first element.
  template <typename F>
  void for_runs(const Runs& chunk, int64_t begin, int64_t end, const Kept& kept, const F& f) const {
    const RunGradient<T> all{x, dy, residual, mask.bits};  // in registers: a store to dx might be one to a member
    const int64_t plane = S, plane_bytes = mask.bytes_per_row();
    const int64_t stride = chunk.stride, stride_bytes = stride / S * plane_bytes, kept_stride = stride / C;
    int64_t first = begin * S + chunk.offset;
    const uint8_t* bits = mask(first);
    acc_t* dz = offset_by(kept.dz, chunk.offset / (C * S) * S + chunk.offset % (C * S));
    for (int64_t run = 0; run < chunk.count; ++run) {
      for (int64_t c = 0; c < end - begin; ++c) {
        const int64_t i = first + c * plane;
        f(i, c,
          RunGradient<T>{all.x + i, all.dy + i, offset_by(all.residual, i), bits + c * plane_bytes,
                         offset_by(dz, c * kept.of_channel)});
      }
      first += stride;
      bits += stride_bytes;
      dz = offset_by(dz, kept_stride);
    }
  }

  // Adds to the sums of the channels begin .. end those of a chunk. Prefetches what lies `ahead`, if not 0.
  void add_sums(int64_t begin, int64_t end, const Runs& chunk, Sums* total, const Kept& kept, int64_t ahead) const {
    PerChannel<SliceAffine<acc_t>> affine(begin, end,
                                          [&](int64_t c) { return channel_affine<acc_t>(a, parameters, c); });
    PerChannel<SliceSummand<acc_t>> summand(begin, end,
                                            [&](int64_t c) { return SliceSummand<acc_t>(a.mean[c], a.rstd[c]); });
    const auto zeros = [](int64_t) { return GradientSums<T>(); };
    PerChannel<GradientSums<T>> sums(begin, end, zeros);
    visit<T>(a.activation, [&](auto act) FASTNORM_LOOP {
      const int64_t length = chunk.length, to_next = ahead;
      for (int64_t first = 0; first < chunk.count; first += kChain) {
        PerChannel<GradientSums<T>> part(begin, end, zeros);
        for_runs(chunk.part(first, kChain), begin, end, kept, [&](int64_t, int64_t c, const RunGradient<T>& run) {
          part[c].add_run(act, run, length, uniform<T>(affine[c]), uniform<T>(summand[c]), to_next);
        });
        for (int64_t c = 0; c < end - begin; ++c) sums[c] += part[c];
      }
    });
    for (int64_t c = 0; c < end - begin; ++c) {
      const double sum_dz = sums[c].sum_dz();
      total[c] += Sums{sum_dz, summand[c].sum_g_xhat(sum_dz, sums[c].sum_dz_summand())};
    }
  }

  void elements(int64_t begin, int64_t end, const Runs& chunk, const Sums* total, const Kept& kept,
                const Prefetches& ahead) const {
    PerChannel<SliceAffine<acc_t>> affine(begin, end,
                                          [&](int64_t c) { return channel_affine<acc_t>(a, parameters, c); });
    PerChannel<SliceGradient<acc_t>> slice(begin, end,
                                           [&](int64_t c) { return channel_gradient<acc_t>(a, total[c - begin], c); });
    visit<T>(a.activation, [&](auto act) FASTNORM_LOOP {
      T *const to = dx, *const to_residual = dresidual;
      const int64_t length = chunk.length;
      const Prefetches to_next = ahead;
      const bool constant_statistics = !a.training, past_caches = stream;
      for_runs(chunk, begin, end, kept, [&](int64_t i, int64_t c, const RunGradient<T>& run) {
        input_gradient_run(act, run, offset_by(to, i), offset_by(to_residual, i), length, uniform<T>(affine[c]),
                           uniform<T>(slice[c], constant_statistics), past_caches, to_next);
      });
    });
  }

  void run() const {
    const int64_t per_channel = chunks.size(), numel = a.shape.numel();
    const bool one_sweep = in_one_sweep(a), stream_rows = stream_output(numel, a.dtype, inputs);
    // Not where dz may be kept, which goes by planes.
    const bool rows = !one_sweep && !is_smooth(a.activation) && by_rows<T>(a.shape, a.mask, stream, stream_rows);
    const Bundles bundles(a.shape, sizeof(T), /*inputs=*/2, rows);  // x and dy
    const bool past_caches = rows ? stream_rows : stream;
    // To the next sample's plane of the channel, as in forward.
    const int64_t sample = C * S;
    const Prefetches next_sample{sample, sample};
    const auto add_sums_of = [&](int64_t begin, int64_t end, int64_t k, Sums* total, const Kept& kept, int64_t ahead) {
      add_sums(begin, end, chunks[k], total, kept, ahead);
      if (one_sweep) elements(begin, end, chunks[k], total, Kept{}, next_sample);
    };
    if (bundles.size() < 2 * num_threads()) {
      const ScratchArray<Sums> partial(C * per_channel), total(C);
      for (int64_t c = 0; c < C; ++c) total[c] = given_sums(a, c);
      if (wants_sums(a)) {
        parallel_for(C * per_channel, numel, [&](int64_t i) {
          const int64_t c = i / per_channel;
          partial[i] = Sums{};
          add_sums_of(c, c + 1, i % per_channel, &partial[i], Kept{}, sample);
        });
        for (int64_t i = 0; i < C * per_channel; ++i) total[i / per_channel] += partial[i];
        for (int64_t c = 0; c < C; ++c) keep_sums(a, c, total[c]);
      }
      if (wants_elements(a) && !one_sweep) {
        parallel_for(C * per_channel, numel, [&](int64_t i) {
          const int64_t c = i / per_channel;
          elements(c, c + 1, chunks[i % per_channel], &total[c], Kept{}, next_sample);
        });
      }
      return;
    }
    // dz of each channel of a task, for its second sweep. A whole pack beyond the end of a run is overwritten by the next.
    const bool keeps = in_two_sweeps(a) && keeps_gradient<T>(a.activation, bundles.channels * a.shape.N * S);
    const int64_t kept_of_channel = keeps ? a.shape.N * S + Pack<T>::kSize : 0;
    // In its second sweep a task finds its planes in the cache, and memory would only be written. Where they came from
    // memory it asks for the next bundle's, unless two bundles drive each other out; and it goes from the last sample to
    // the first, for the last ones are the nearest.
    const int64_t read = 2 * sizeof(T) * bundles.channels * a.shape.N * S;  // bytes of a bundle
    const bool fetches_next = kAsksForNextBundle && !rows && in_two_sweeps(a) &&
                              come_from_memory(numel, a.dtype, /*inputs=*/2) && read <= 1 << 20;
    const bool stays_near = read <= 256 << 10;  // in the second-level cache, until the first sweep comes to it
    parallel_for_ranges(bundles.size(), numel, [&](int64_t first, int64_t last) {
      const ScratchArray<acc_t> scratch(bundles.channels * kept_of_channel);
      const int64_t width = rows ? bundles.channels * S : 0;
      const ColumnAffine<T> row(width);
      const ColumnInputGradient<T> row_gradient(width);
      for (int64_t bundle = first; bundle < last; ++bundle) {
        const int64_t begin = bundles.begin(bundle), end = bundles.end(bundle);
        const Kept kept{keeps ? scratch.data() : nullptr, kept_of_channel};
        Sums total[Bundles::kMost];
        for (int64_t c = begin; c < end; ++c) total[c - begin] = given_sums(a, c);
        if (wants_sums(a)) {
          const int64_t ahead = fetches_next && stays_near && bundle > first ? 0 : sample;
          for (int64_t k = 0; k < per_channel; ++k) add_sums_of(begin, end, k, total, kept, ahead);
          for (int64_t c = begin; c < end; ++c) keep_sums(a, c, total[c - begin]);
        }
        if (!wants_elements(a) || one_sweep) continue;
        if (rows) {
          for (int64_t c = begin; c < end; ++c) {
            row.set((c - begin) * S, S, channel_affine<acc_t>(a, parameters, c));
            row_gradient.set((c - begin) * S, S, channel_gradient<acc_t>(a, total[c - begin], c));
          }
          const Runs samples{begin * S, a.shape.N, sample, (end - begin) * S};
          input_gradient_rows<T>(a, samples, place_of_rows(mask, a.shape, samples.offset), row,
                                 row_gradient.of_row(!a.training), past_caches);
          continue;
        }
        for (int64_t k = 0; k < per_channel; ++k) {
          if (fetches_next) {
            const Prefetches ahead{(end - begin) * S, -sample};
            elements(begin, end, chunks[per_channel - 1 - k].reversed(), total, kept, ahead);
          } else {
            elements(begin, end, chunks[k], total, kept, next_sample);
          }
        }
      }
    });
  }
};

// ---- columns

// The rows of a ColumnView as tasks. The row that is not full, if any, is a part of its own.
struct Parts {
  ColumnView view;
  RowParts full{view.rows, view.width};

  int64_t size() const { return full.size() + (view.rest > 0); }
  bool is_rest(int64_t part) const { return part == full.size(); }
  int64_t mask_bytes() const { return MaskRows{view.rows, view.width}.bytes_per_row(); }
  int64_t rows(int64_t part) const { return is_rest(part) ? 1 : full.end(part) - full.begin(part); }
  int64_t width(int64_t part) const { return is_rest(part) ? view.rest : view.width; }

  // Calls f(first row, rows, columns) for each block of a part.
  template <typename F>
  void for_blocks(int64_t part, const F& f) const {
    if (is_rest(part)) return f(view.rows, int64_t{1}, view.rest);
    for (int64_t row = full.begin(part); row < full.end(part); row += kBlockRows)
      f(row, std::min(kBlockRows, full.end(part) - row), view.width);
  }
  // The same for spans of at most kShiftRows rows.
  template <typename F>
  void for_spans(int64_t part, const F& f) const {
    if (is_rest(part)) return f(view.rows, int64_t{1}, view.rest);
    const int64_t begin = full.begin(part), rows = full.end(part) - begin;
    const int64_t spans = (rows + kShiftRows - 1) / kShiftRows, size = (rows + spans - 1) / spans;
    for (int64_t row = 0; row < rows; row += size) f(begin + row, std::min(size, rows - row), view.width);
  }
  int64_t first_row(int64_t part) const { return is_rest(part) ? view.rows : full.begin(part); }
  // Of rows of `length` elements from `row` on.
  RowMasks::Place masks(uint8_t* mask, int64_t row, int64_t length) const {
    return {offset_by(mask, row * mask_bytes()), mask_bytes(), length};
  }
  // All rows of a part.
  Runs runs(int64_t part) const { return {first_row(part) * view.width, rows(part), view.width, width(part)}; }
  // Calls f(first column, columns) for the columns of channel c, those that lie beside each other at once, in order.
  template <typename F>
  void for_columns(int64_t c, const F& f) const {
    for (int64_t first = c * view.S; first < view.width; first += view.C * view.S) f(first, view.S);
  }
};

template <typename T>
struct ColumnsForward {
  using acc_t = acc_type<T>;
  const BatchNormForward& a;
  const Parameters parameters{a};
  const T* x = static_cast<const T*>(a.x);
  const Parts parts{long_rows(column_view(a.shape), a.mask)};
  const int64_t width = parts.view.width;
  const bool stream = stream_output(a.shape.numel(), a.dtype);

  void statistics(double* variance) const {
    const ScratchArray<double> mean(parts.size() * width), m2(parts.size() * width);
    parallel_for(parts.size(), a.shape.numel(), [&](int64_t part) {
      double *part_mean = &mean[part * width], *part_m2 = &m2[part * width];
      const ColumnArray<T> shift(width);
      const ScratchArray<double> more(2 * width);
      double before = 0;
      parts.for_spans(part, [&](int64_t row, int64_t rows, int64_t columns) {
        const double count = static_cast<double>(rows);
        const auto moments = [&](double* to_mean, double* to_m2) {
          column_moments(x + row * width, width, rows, columns, &shift[0], to_mean, to_m2);
        };
        if (before == 0) {
          moments(part_mean, part_m2);
        } else {
          moments(&more[0], &more[width]);
          for (int64_t j = 0; j < columns; ++j) {
            Moments all{before, part_mean[j], part_m2[j]};
            all.merge({count, more[j], more[width + j]});
            part_mean[j] = all.mean;
            part_m2[j] = all.m2;
          }
        }
        before += count;
      });
    });
    parallel_for(a.shape.C, parts.size() * width, [&](int64_t c) {
      Moments m;
      parts.for_columns(c, [&](int64_t first, int64_t n) {
        for (int64_t j = first; j < first + n; ++j)
          for (int64_t part = 0; part < parts.size(); ++part)
            if (j < parts.width(part))
              m.merge({static_cast<double>(parts.rows(part)), mean[part * width + j], m2[part * width + j]});
      });
      variance[c] = m.biased_variance();
      keep_statistics(a, c, m.mean, variance[c]);
    });
  }

  void run(double* variance) const {
    if (a.training) statistics(variance);
    if (a.y == nullptr) return;
    const ColumnAffine<T> affine(width);
    for (int64_t c = 0; c < a.shape.C; ++c) {
      const SliceAffine<acc_t> channel = channel_affine<acc_t>(a, parameters, c);
      parts.for_columns(c, [&](int64_t j, int64_t n) { affine.set(j, n, channel); });
    }
    parallel_for_reversed(parts.size(), a.shape.numel(), [&](int64_t part) {
      const Runs rows = parts.runs(part);
      normalize_rows<T>(a, rows, parts.masks(a.mask, parts.first_row(part), rows.length), affine, stream);
    });
  }
};

template <typename T>
struct ColumnsBackward {
  using acc_t = acc_type<T>;
  const BatchNormBackward& a;
  const Parameters parameters{a};
  const T* x = static_cast<const T*>(a.x);
  const T* dy = static_cast<const T*>(a.dy);
  const T* residual = static_cast<const T*>(a.residual);
  const bool one_sweep = in_one_sweep(a);
  const Parts parts{long_rows(column_view(a.shape), a.mask)};
  const int64_t width = parts.view.width;
  const bool stream = stream_output(a.shape.numel(), a.dtype, /*inputs=*/in_two_sweeps(a) ? 2 : 1);

  RunGradient<T> gradient(int64_t row) const {
    const int64_t i = row * width;
    return {x + i, dy + i, offset_by(residual, i), offset_by(a.mask, row * parts.mask_bytes())};
  }

  // The elements of rows from `row` on.
  void elements(int64_t row, const Runs& rows, const Affine<PerColumn<T>>& affine,
                const InputGradient<PerColumn<T>>& coefficient) const {
    const RowMasks::Place mask = parts.masks(const_cast<uint8_t*>(a.mask), row, rows.length);
    input_gradient_rows<T>(a, rows, mask, affine, coefficient, stream);
  }

  // Writes the elements, too, if in one sweep.
  void channel_sums(const Affine<PerColumn<T>>& affine, const Summand<PerColumn<T>>& summand,
                    const InputGradient<PerColumn<T>>& coefficient, Sums* total) const {
    const ScratchArray<double> dz(parts.size() * width), dz_summand(parts.size() * width);
    const Strides strides{width, parts.mask_bytes()};
    parallel_for(parts.size(), a.shape.numel(), [&](int64_t part) {
      double *s = &dz[part * width], *sx = &dz_summand[part * width];
      std::fill(s, s + width, 0.0);
      std::fill(sx, sx + width, 0.0);
      visit<T>(a.activation, [&](auto act) {
        parts.for_blocks(part, [&](int64_t row, int64_t rows, int64_t columns) {
          add_column_gradients(act, gradient(row), strides, rows, columns, affine, summand, s, sx);
          if (one_sweep) elements(row, {row * width, rows, width, columns}, affine, coefficient);
        });
      });
    });
    parallel_for(a.shape.C, parts.size() * width, [&](int64_t c) {
      const SliceSummand<acc_t> channel(a.mean[c], a.rstd[c]);
      parts.for_columns(c, [&](int64_t first, int64_t n) {
        for (int64_t j = first; j < first + n; ++j) {
          for (int64_t part = 0; part < parts.size(); ++part) {
            const double sum_dz = dz[part * width + j];
            total[c] += Sums{sum_dz, channel.sum_g_xhat(sum_dz, dz_summand[part * width + j])};
          }
        }
      });
      keep_sums(a, c, total[c]);
    });
  }

  void run() const {
    const int64_t C = a.shape.C;
    const ColumnAffine<T> row(width);
    const ColumnInputGradient<T> row_gradient(width);
    const ColumnArray<T> power(width);
    for (int64_t c = 0; c < C; ++c) {
      const SliceAffine<acc_t> channel = channel_affine<acc_t>(a, parameters, c);
      const SliceSummand<acc_t> summand(a.mean[c], a.rstd[c]);
      parts.for_columns(c, [&](int64_t j, int64_t n) {
        row.set(j, n, channel);
        std::fill_n(&power[j], n, summand.power);
      });
    }
    const Affine<PerColumn<T>> affine = row;
    const InputGradient<PerColumn<T>> coefficient = row_gradient.of_row(!a.training);
    const ScratchArray<Sums> total(C);
    for (int64_t c = 0; c < C; ++c) total[c] = given_sums(a, c);
    if (wants_sums(a)) channel_sums(affine, Summand<PerColumn<T>>{row.mean, power}, coefficient, total.data());
    if (!wants_elements(a) || one_sweep) return;

    for (int64_t c = 0; c < C; ++c) {
      const SliceGradient<acc_t> channel = channel_gradient<acc_t>(a, total[c], c);
      parts.for_columns(c, [&](int64_t j, int64_t n) { row_gradient.set(j, n, channel); });
    }
    parallel_for_reversed(parts.size(), a.shape.numel(), [&](int64_t part) {
      elements(parts.first_row(part), parts.runs(part), affine, coefficient);
    });
  }
};

}  // namespace

void batch_norm_forward(const BatchNormForward& a) {
  const ScratchArray<double> scratch(a.variance ? 0 : a.shape.C);
  double* const variance = a.variance ? a.variance : scratch.data();
  if (!a.training && a.given_mean == nullptr) take_running_statistics(a);
  visit(a.dtype, [&](auto type) {
    using T = decltype(type);
    by_columns(a.shape) ? ColumnsForward<T>{a}.run(variance) : PlanesForward<T>{a}.run(variance);
  });
  if (a.training) update_running_statistics(a, variance);
}

void batch_norm_backward(const BatchNormBackward& a) {
  visit(a.dtype, [&](auto type) {
    using T = decltype(type);
    by_columns(a.shape) ? ColumnsBackward<T>{a}.run() : PlanesBackward<T>{a}.run();
  });
}

}  // namespace fastnorm::cpu::CPU_CAPABILITY
