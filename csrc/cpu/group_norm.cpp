// Group and instance normalisation on the CPU. A slice is a group of a sample, an owner what one task reduces and
// normalises:
//
// - Planes (contiguous, planes of 16 elements or more): an owner is a slice, read once from memory for its moments and
//   once more from the cache to normalise it, plane by plane.
// - Flat (contiguous, tiny planes): an owner is some neighbouring slices, normalised as one run with a coefficient an
//   element.
// - Columns (channels_last): an owner is a sample, a matrix whose columns are channels. Parts of it give partial moments
//   of every group; then its rows are normalised with a coefficient a column.
//
// Too few owners for the threads: the same pieces of them, in two parallel sweeps. Sums are float32 within a piece and
// float64 beyond, in an order fixed by the shape alone.
#include "../group_norm.h"

#include <cmath>

#include "../instance_norm.h"
#include "columns.h"
#include "shifted.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

// ---- what all ways share

// Neighbouring owners, and where they leave, one after the other, what their second sweep is to find; null where that
// sweep is far away.
struct Bundle {
  int64_t begin, end;
  void* kept;
};

// A kernel in two sweeps over the pieces of owners, by pointers, so that the order of work is compiled once for them
// all.
struct TwoSweeps {
  const void* kernel;
  void (*first)(const void* kernel, const Bundle&, int64_t piece);
  void (*finish)(const void* kernel, const Bundle&);
  void (*second)(const void* kernel, const Bundle&, int64_t piece);
  int64_t kept_bytes;  // that first() may leave second() of an owner; 0: nothing

  // Calls first() for every piece of an owner, then finish(), then second() for every piece, with no more than that for
  // an order. Small owners go by bundles: from the first sum of one to its last coefficient is a chain of some hundred
  // cycles, in which the processor can work on the others', and what a call costs is shared by them.
  void run(int64_t owners, int64_t pieces, int64_t numel) const {
    constexpr int64_t kBundle = 800;  // elements: more of them would not stay in the first-level cache
    const int64_t bundle = std::max<int64_t>(1, std::min(kBundle / (numel / owners), owners / (4 * num_threads())));
    if (owners >= 2 * num_threads() || pieces == 1) {
      return parallel_for_ranges((owners + bundle - 1) / bundle, numel, [&](int64_t begin_bundle, int64_t end_bundle) {
        const ScratchArray<char> scratch(bundle * kept_bytes);
        for (int64_t i = begin_bundle; i < end_bundle; ++i) {
          const int64_t begin = i * bundle;
          const Bundle of{begin, std::min(owners, begin + bundle), kept_bytes ? scratch.data() : nullptr};
          for (int64_t k = 0; k < pieces; ++k) first(kernel, of, k);
          finish(kernel, of);
          for (int64_t k = 0; k < pieces; ++k) second(kernel, of, k);
        }
      });
    }
    const auto one = [&](int64_t i) { return Bundle{i / pieces, i / pieces + 1, nullptr}; };
    parallel_for(owners * pieces, numel, [&](int64_t i) { first(kernel, one(i), i % pieces); });
    finish(kernel, Bundle{0, owners, nullptr});
    parallel_for(owners * pieces, numel, [&](int64_t i) { second(kernel, one(i), i % pieces); });
  }
};

template <typename Kernel>
void sweep_twice(const Kernel& kernel, int64_t owners, int64_t pieces, int64_t kept_bytes = 0) {
  const TwoSweeps sweeps{
      &kernel, [](const void* k, const Bundle& of, int64_t piece) { static_cast<const Kernel*>(k)->first(of, piece); },
      [](const void* k, const Bundle& of) { static_cast<const Kernel*>(k)->finish(of); },
      [](const void* k, const Bundle& of, int64_t piece) { static_cast<const Kernel*>(k)->second(of, piece); },
      kept_bytes};
  sweeps.run(owners, pieces, kernel.a.shape.numel());
}

// The sizes, and the coefficients of a channel in a slice.
template <typename Args>
struct Groups {
  const Args& a;
  const int64_t C = a.shape.C, S = a.shape.S, G = a.G, D = C / G, L = D * S;  // L elements a slice
  const Parameters parameters{a};
  const bool stream = stream_output(a.shape.numel(), a.dtype);

  // The function that gives those of channel first + d. What it reads of the slice is read once.
  template <typename T>
  auto affine_of(int64_t slice, int64_t first) const {
    return [mean = a.mean[slice], rstd = a.rstd[slice], weight = &parameters.weight[first],
            bias = &parameters.bias[first]](int64_t d) {
      return SliceAffine<acc_type<T>>(mean, rstd, weight[d], bias[d]);
    };
  }
  template <typename T>
  SliceAffine<acc_type<T>> affine(int64_t slice, int64_t c) const {
    return affine_of<T>(slice, c)(0);
  }

  // Calls f(slice, its group) for the slices of a bundle.
  template <typename F>
  void for_slices(const Bundle& of, const F& f) const {
    int64_t g = of.begin % G;
    for (int64_t slice = of.begin; slice < of.end; ++slice) {
      f(slice, g);
      if (++g == G) g = 0;
    }
  }
};

// Sets the coefficients of sample n, whose channels the columns are, once or several times.
template <typename T, typename Args>
void set_sample(const ColumnAffine<T>& affines, const Groups<Args>& groups, int64_t n, int64_t columns) {
  for (int64_t g = 0, c = 0; g < groups.G; ++g) {
    const auto affine = groups.template affine_of<T>(n * groups.G + g, c);
    for (int64_t d = 0; d < groups.D; ++d, ++c) affines.set(c, affine(d));
  }
  for (const auto* array : {&affines.mean, &affines.scale, &affines.shift}) array->repeat(groups.C, columns);
}

// ---- what the columns of a row belong to

// channels_last: rows of a sample in parts. The row that is not full, if any, is a part of its own.
struct Parts {
  static constexpr int64_t kElements = 1 << 17;
  SampleRows sample;
  int64_t mask_bytes_per_sample;
  int64_t rows_per_part = std::clamp(kElements / sample.width / kBlockRows * kBlockRows, 2 * kBlockRows, kShiftRows);
  int64_t full = (sample.rows + rows_per_part - 1) / rows_per_part;

  Parts(const Shape& shape, const uint8_t* mask)
      : sample(long_rows(sample_rows(shape), mask)),
        mask_bytes_per_sample(sample_rows(shape).size() * group_mask_rows(shape).bytes_per_row()) {}
  int64_t size() const { return full + (sample.rest > 0); }
  int64_t begin(int64_t part) const { return std::min(sample.rows, part * rows_per_part); }
  int64_t rows(int64_t part) const { return part == full ? 1 : begin(part + 1) - begin(part); }
  int64_t width(int64_t part) const { return part == full ? sample.rest : sample.width; }

  // What lies ahead by as much is asked for in the second sweep, in which memory would only be written: the next sample,
  // where samples come from memory and two of them stay in the cache.
  template <typename T>
  int64_t ahead(bool from_memory) const {
    constexpr int64_t kNear = 1 << 20;  // bytes
    const int64_t elements = sample.rows * sample.width + sample.rest;
    return from_memory && elements * static_cast<int64_t>(sizeof(T)) <= kNear ? elements : 0;
  }

  // From row to row.
  Strides strides() const { return {sample.width, MaskRows{sample.rows, sample.width}.bytes_per_row()}; }
  // Where a row of a sample has its bits of the mask.
  int64_t mask_byte(int64_t n, int64_t row) const { return n * mask_bytes_per_sample + row * strides().mask_bytes; }
};

// Calls f(ahead), or f() where that is 0: a loop that asks at every pack takes up to a tenth longer. Around an
// exponential memory has time enough.
template <typename Act, typename F>
void with_or_without(Act, int64_t ahead, const F& f) {
  if constexpr (!kMayBeSmooth<Act>)
    if (ahead) return f(ahead);
  f();
}

// a * b - c
template <typename T>
Pack<T> fmsub(const Pack<T>& a, const Pack<T>& b, const Pack<T>& c) {
  return map<T>([](auto x, auto y, auto z) { return vec::fmsub(x, y, z); }, a, b, c);
}

// ---- forward

struct ForwardGroups : Groups<GroupNormForward> {
  void keep_statistics(int64_t slice, const Moments& m) const {
    const double variance = m.biased_variance();
    a.mean[slice] = m.mean;
    a.rstd[slice] = 1.0 / std::sqrt(variance + a.eps);
    if (a.variance) a.variance[slice] = variance;
  }
};

template <typename T>
struct PlanesForward : ForwardGroups {
  const T* x = static_cast<const T*>(a.x);
  const T* residual = static_cast<const T*>(a.residual);
  T* y = static_cast<T*>(a.y);
  const Chunks chunks{Runs{0, D, S, S}};
  const int64_t pieces = chunks.size();
  const ScratchArray<Moments> partial{pieces > 1 ? a.shape.N* G* pieces : 0};
  const MaskBits mask{a.mask, group_mask_rows(a.shape)};
  // The second sweep, in which memory would only be written, asks for the next bundle, if x comes from memory: from the
  // cache that takes longer. Of small slices the processor's own prefetchers bring enough for the arithmetic of 16-bit
  // elements; a slice that is large would not stay in the second-level cache.
  const bool from_memory = come_from_memory(a.shape.numel(), a.dtype);
  const bool fetches_next = from_memory && L * sizeof(T) >= (sizeof(T) >= 4 ? 512 : 8192) && L * sizeof(T) <= 262144;
  const bool stream = stream_planes(a.shape, a.dtype, kLeastStreamed);

  void run() const { sweep_twice(*this, a.shape.N * G, pieces); }

  void first(const Bundle& of, int64_t k) const {
    const Runs chunk = chunks[k];
    for (int64_t slice = of.begin; slice < of.end; ++slice) {
      const Moments m = run_moments(x + slice * L + chunk.offset, chunk.numel());
      pieces == 1 ? keep_statistics(slice, m) : void(partial[slice * pieces + k] = m);
    }
  }
  void finish(const Bundle& of) const {
    if (pieces == 1) return;
    for (int64_t slice = of.begin; slice < of.end; ++slice) {
      Moments all;
      for (int64_t k = 0; k < pieces; ++k) all.merge(partial[slice * pieces + k]);
      keep_statistics(slice, all);
    }
  }
  void second(const Bundle& of, int64_t k) const {
    visit<T>(a.activation, [&](auto act) { normalize(act, of, chunks[k]); });
  }

 private:
  template <typename Act>
  FASTNORM_LOOP void normalize(Act act, const Bundle& of, const Runs& chunk) const {
    const int64_t first_channel = chunk.offset / S, ahead = fetches_next ? (of.end - of.begin) * L : 0;
    for_slices(of, [&](int64_t slice, int64_t group) {
      const auto affine = affine_of<T>(slice, group * D + first_channel);
      for (int64_t run = 0; run < chunk.count; ++run) {
        const int64_t i = slice * L + chunk.offset + run * S;
        normalize_run<true>(act, x + i, offset_by(residual, i), y + i, mask(i), chunk.length, uniform<T>(affine(run)),
                            stream, ahead);
      }
    });
  }
};

// Neighbouring groups of a sample as one run; eight groups are whole bytes of the mask.
struct Blocks {
  int64_t G, groups;

  Blocks(int64_t G_, int64_t L) : G(G_), groups((1024 / L + 8) / 8 * 8) {}
  int64_t size() const { return (G + groups - 1) / groups; }
  int64_t begin(int64_t block) const { return block * groups; }
  int64_t end(int64_t block) const { return std::min(G, begin(block) + groups); }
};

template <typename T>
struct FlatForward : ForwardGroups {
  const T* x = static_cast<const T*>(a.x);
  const T* residual = static_cast<const T*>(a.residual);
  T* y = static_cast<T*>(a.y);
  const Blocks blocks{G, L};
  const MaskBits mask{a.mask, group_mask_rows(a.shape)};

  void run() const { sweep_twice(*this, a.shape.N * blocks.size(), 1); }

  void first(const Bundle& of, int64_t) const {
    for (int64_t owner = of.begin; owner < of.end; ++owner) moments(owner / blocks.size(), owner % blocks.size());
  }
  void finish(const Bundle&) const {}
  void second(const Bundle& of, int64_t) const {
    for (int64_t owner = of.begin; owner < of.end; ++owner) normalize(owner / blocks.size(), owner % blocks.size());
  }

 private:
  void moments(int64_t n, int64_t block) const {
    for (int64_t g = blocks.begin(block); g < blocks.end(block); ++g) {
      const T* slice = x + (n * G + g) * L;
      Moments all;
      for (int64_t i = 0; i < L; i += kChunk) all.merge(run_moments(slice + i, std::min(kChunk, L - i)));
      keep_statistics(n * G + g, all);
    }
  }
  void normalize(int64_t n, int64_t block) const {
    const int64_t begin = blocks.begin(block), end = blocks.end(block), width = (end - begin) * L;
    const ColumnAffine<T> columns(width);
    for (int64_t c = begin * D; c < end * D; ++c) {
      const auto channel = affine<T>(n * G + c / D, c);
      for (int64_t s = 0; s < S; ++s) columns.set((c - begin * D) * S + s, channel);  // S is tiny
    }
    const int64_t i = (n * G + begin) * L;
    const Affine<PerColumn<T>> coefficients = columns;
    visit<T>(a.activation, [&](auto act) {
      normalize_run(act, x + i, offset_by(residual, i), y + i, mask(i), width, coefficients, stream);
    });
  }
};

template <typename T>
struct ColumnsForward : ForwardGroups {
  const T* x = static_cast<const T*>(a.x);
  const T* residual = static_cast<const T*>(a.residual);
  T* y = static_cast<T*>(a.y);
  const Parts parts{a.shape, a.mask};
  const int64_t width = parts.sample.width;
  const ScratchArray<Moments> partial{a.shape.N * parts.size() * G};
  const int64_t ahead = parts.ahead<T>(come_from_memory(a.shape.numel(), a.dtype));

  void run() const { sweep_twice(*this, a.shape.N, parts.size()); }

  void first(const Bundle& of, int64_t part) const {
    for (int64_t n = of.begin; n < of.end; ++n) moments(n, part);
  }
  void finish(const Bundle& of) const {
    for (int64_t slice = of.begin * G; slice < of.end * G; ++slice) {
      Moments all;
      for (int64_t part = 0; part < parts.size(); ++part)
        all.merge(partial[(slice / G * parts.size() + part) * G + slice % G]);
      keep_statistics(slice, all);
    }
  }
  void second(const Bundle& of, int64_t part) const {
    for (int64_t n = of.begin; n < of.end; ++n) normalize(n, part);
  }

 private:
  void moments(int64_t n, int64_t part) const {
    const int64_t columns = parts.width(part), rows = parts.rows(part), repeats = columns / C;
    const ColumnArray<T> shift(columns);
    const ScratchArray<double> mean(columns), m2(columns);
    column_moments(x + n * C * S + parts.begin(part) * width, width, rows, columns, &shift[0], mean.data(), m2.data());
    // Columns of one group have the same count, so their merge needs no weights.
    const double count = static_cast<double>(repeats * D);
    for (int64_t g = 0; g < G; ++g) {
      double sum = 0, within = 0, between = 0;
      const auto for_columns = [&](const auto& f) {
        for (int64_t k = 0; k < repeats; ++k)
          for (int64_t j = k * C + g * D; j < k * C + (g + 1) * D; ++j) f(j);
      };
      for_columns([&](int64_t j) {
        sum += mean[j];
        within += m2[j];
      });
      const double m = sum / count;
      for_columns([&](int64_t j) { between += (mean[j] - m) * (mean[j] - m); });
      const double r = static_cast<double>(rows);
      partial[(n * parts.size() + part) * G + g] = {count * r, m, within + r * between};
    }
  }
  void normalize(int64_t n, int64_t part) const {
    const int64_t columns = parts.width(part), begin = parts.begin(part);
    const ColumnAffine<T> affines(columns);
    set_sample(affines, *this, n, columns);
    const Affine<PerColumn<T>> coefficients = affines;
    visit<T>(a.activation, [&](auto act) {
      for (int64_t row = begin; row < begin + parts.rows(part); ++row) {
        const int64_t i = n * C * S + row * width;
        with_or_without(act, ahead, [&](auto... ahead) {
          normalize_run<sizeof...(ahead) != 0>(act, x + i, offset_by(residual, i), y + i,
                                               offset_by(a.mask, parts.mask_byte(n, row)), columns, coefficients,
                                               stream, ahead...);
        });
      }
    });
  }
};

// ---- backward

// Scalar math: dz = dy * act'(z);  dresidual = dz;  dx = dz * scale - ((x - mean) * slope + offset). Prefetches what lies
// `ahead`, if not 0, and then the next page of dx, too.
template <typename Act, typename T, typename C>
FASTNORM_LOOP void group_gradient_run(Act act, const RunGradient<T>& g, T* dx, T* dresidual, int64_t n,
                                      const Affine<C>& affine, const C& slopes, const C& offsets, bool stream,
                                      int64_t ahead = 0) {
  using P = Pack<T>;
  const RunGradient<T> from = g;
  const Affine<C> local = affine;
  const C slope = slopes, offset = offsets;
  const PastCaches past_caches(from, dx, dresidual, n, stream, ahead);
  from.with_dz(act, [&](const auto& dz_at) {
    for_packs_after<T, GradientOrderFor<T, C, Act>>(past_caches.head, n, [&](int64_t i, auto count, int) {
      if (ahead) {
        from.prefetch(i + ahead);
        if (dx && !past_caches.dx) prefetch_to_write(dx + i + kAhead<T> / 2);
      }
      const P x = P::load(from.x + i, count);
      const P dz = dz_at(i, count, x, local);
      if (dresidual) put(dz, dresidual + i, count, past_caches.dresidual);
      if (dx)
        put(fmsub(dz, local.scale[i], fmadd(x - local.mean[i], slope[i], offset[i])), dx + i, count, past_caches.dx);
    });
  });
}

// Stores dz and dz * xhat of n elements, in whole packs.
template <typename Act, typename T>
FASTNORM_LOOP void keep_row_gradients(Act act, const RunGradient<T>& g, int64_t n, const Affine<PerColumn<T>>& affine,
                                      const Standardize<PerColumn<T>>& standardize, acc_type<T>* dz,
                                      acc_type<T>* dz_xhat) {
  const RunGradient<T> from = g;
  const Affine<PerColumn<T>> local = affine;
  const Standardize<PerColumn<T>> xhat = standardize;
  for_packs<T>(n, [&](int64_t i, auto count, int) {
    const Pack<T> x = Pack<T>::load(from.x + i, count);
    const Pack<T> d = from.dz(act, i, count, x, local);
    d.store_acc(dz + i);
    (d * xhat(x, i)).store_acc(dz_xhat + i);
  });
}

template <typename T>
struct BackwardGroups : Groups<GroupNormBackward> {
  using Base = Groups<GroupNormBackward>;
  using Base::a, Base::C, Base::S, Base::G, Base::D, Base::L;
  const T* x = static_cast<const T*>(a.x);
  const T* dy = static_cast<const T*>(a.dy);
  const T* residual = static_cast<const T*>(a.residual);
  T* dx = static_cast<T*>(a.dx);
  T* dresidual = static_cast<T*>(a.dresidual);
  const bool wants_sums = a.dweight || a.dbias || a.dx, wants_elements = a.dx || a.dresidual;
  const bool in_two_sweeps = wants_sums && wants_elements;
  const MaskRows mask_rows = group_mask_rows(a.shape);

  RunGradient<T> gradient(int64_t i, const uint8_t* mask, acc_type<T>* kept = nullptr) const {
    return {x + i, dy + i, offset_by(residual, i), mask, kept};
  }

  // What an owner of n elements needs to keep dz, in whole packs, from the first sweep to the second.
  int64_t bytes_to_keep(int64_t n) const {
    const bool keeps = in_two_sweeps && keeps_gradient<T>(a.activation, n);
    return keeps ? (n + Pack<T>::kSize) * sizeof(acc_type<T>) : 0;
  }

  // Where dz of an owner stays, from an element of it on.
  static acc_type<T>* kept(const Bundle& of, int64_t owner, int64_t bytes, int64_t element) {
    return reinterpret_cast<acc_type<T>*>(offset_by(
        static_cast<char*>(of.kept), (owner - of.begin) * bytes + element * static_cast<int64_t>(sizeof(acc_type<T>))));
  }

  SliceSummand<acc_type<T>> summand(int64_t slice) const { return {a.mean[slice], a.rstd[slice]}; }

  GroupGradient<acc_type<T>> input_gradient(int64_t slice, const Sums& g) const {
    return {static_cast<double>(L), a.mean[slice], a.rstd[slice], g.dz, g.dz_xhat};
  }

  // Of g = dz * weight over a slice of group `group`, from those of dz over its channels.
  Sums weighted(int64_t group, const Sums* channels) const {
    Sums all;
    for (int64_t d = 0, c = group * D; d < D; ++d, ++c)
      all += Sums{parameters.weight[c] * channels[d].dz, parameters.weight[c] * channels[d].dz_xhat};
    return all;
  }

  // dweight and dbias from `rows` rows of sums a channel, added from the first row to the last.
  void keep_parameter_gradients(const Sums* sums, int64_t rows) const {
    if (!a.dweight && !a.dbias) return;
    constexpr int64_t kChannels = 64;
    parallel_for((C + kChannels - 1) / kChannels, rows * C, [&](int64_t block) {
      const int64_t begin = block * kChannels, end = std::min(C, begin + kChannels);
      Sums total[kChannels];
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t c = begin; c < end; ++c) total[c - begin] += sums[row * C + c];
      for (int64_t c = begin; c < end; ++c) {
        if (a.dweight) write(a.dweight, a.param_dtype, c, total[c - begin].dz_xhat);
        if (a.dbias) write(a.dbias, a.param_dtype, c, total[c - begin].dz);
      }
    });
  }
};

template <typename T>
struct PlanesBackward : BackwardGroups<T> {
  using Base = BackwardGroups<T>;
  using Base::a, Base::C, Base::S, Base::G, Base::D, Base::L, Base::dx, Base::dresidual;
  const Chunks chunks{Runs{0, D, S, S}};
  const int64_t planes = a.shape.N * C, pieces_of_plane = std::max<int64_t>(1, (S + kChunk - 1) / kChunk);
  const ScratchArray<Sums> partial{pieces_of_plane > 1 ? planes* pieces_of_plane : 0};
  const ScratchArray<Sums> channel_sums{planes}, slice_sums{a.shape.N * G};
  const MaskBits mask{const_cast<uint8_t*>(a.mask), Base::mask_rows};
  const bool stream = stream_planes(a.shape, a.dtype, kLeastStreamed);
  // As in forward, but of the smallest slices, too, and from half as large a tensor on: x and dy are twice the bytes.
  const bool fetches_next = Base::in_two_sweeps && (L * sizeof(T) >= 4096 || sizeof(T) >= 4) &&
                            L * sizeof(T) <= 131072 && come_from_memory(a.shape.numel(), a.dtype, /*inputs=*/2);
  const int64_t kept_bytes = Base::bytes_to_keep(L);

  void run() const {
    sweep_twice(*this, a.shape.N * G, chunks.size(), kept_bytes);
    this->keep_parameter_gradients(channel_sums.data(), a.shape.N);
  }

  void first(const Bundle& of, int64_t k) const {
    if (!Base::wants_sums) return;
    const Runs chunk = chunks[k];
    const int64_t first_channel = chunk.offset / S;
    Sums* const to = pieces_of_plane > 1 ? &partial[k] : &channel_sums[first_channel];
    const int64_t sums_of_slice = pieces_of_plane > 1 ? chunks.size() : D;
    visit<T>(a.activation, [&](auto act) FASTNORM_LOOP {
      Base::for_slices(of, [&](int64_t slice, int64_t group) {
        const auto affine = this->template affine_of<T>(slice, group * D + first_channel);
        const SliceSummand<acc_type<T>> summand = Base::summand(slice);
        const auto times = uniform<T>(summand);
        for_runs(of, slice, chunk, [&, to = to + slice * sums_of_slice](int64_t, int64_t run, const RunGradient<T>& g) {
          GradientSums<T> total;
          total.add_run(act, g, chunk.length, uniform<T>(affine(run)), times);
          const double sum_dz = tree_sum(total.dz);
          to[run] = {sum_dz, summand.sum_g_xhat(sum_dz, tree_sum(total.dz_summand))};
        });
      });
    });
  }
  void finish(const Bundle& of) const {
    if (!Base::wants_sums) return;
    if (pieces_of_plane > 1) {
      for (int64_t plane = of.begin * D; plane < of.end * D; ++plane) {
        Sums all;
        for (int64_t k = 0; k < pieces_of_plane; ++k) all += partial[plane * pieces_of_plane + k];
        channel_sums[plane] = all;
      }
    }
    for (int64_t slice = of.begin; slice < of.end; ++slice)
      slice_sums[slice] = Base::weighted(slice % G, &channel_sums[slice * D]);
  }
  void second(const Bundle& of, int64_t k) const {
    if (!Base::wants_elements) return;
    const Runs chunk = chunks[k];
    const int64_t first_channel = chunk.offset / S, ahead = fetches_next ? (of.end - of.begin) * L : 0;
    visit<T>(a.activation, [&](auto act) FASTNORM_LOOP {
      Base::for_slices(of, [&](int64_t slice, int64_t group) {
        const auto affine = this->template affine_of<T>(slice, group * D + first_channel);
        const auto gradient = Base::input_gradient(slice, dx ? slice_sums[slice] : Sums{});
        const Uniform<T> slope(gradient.slope), offset(gradient.offset);
        const auto write = [&, to = dx, to_residual = dresidual, length = chunk.length, past_caches = stream](
                               int64_t i, int64_t run, const RunGradient<T>& g) {
          group_gradient_run(act, g, offset_by(to, i), offset_by(to_residual, i), length, uniform<T>(affine(run)),
                             slope, offset, past_caches, ahead);
        };
        for_runs(of, slice, chunk, write);
      });
    });
  }

 private:
  // Calls f(i, run, what backward knows of it) for each run of a slice's chunk; i is the run's first element. Where dz is
  // kept, a whole pack beyond the end of a run is overwritten by the next.
  template <typename F>
  void for_runs(const Bundle& of, int64_t slice, const Runs& chunk, const F& f) const {
    const T *const x = Base::x, *const dy = Base::dy, *const residual = Base::residual;  // in registers: a store to dx
    const int64_t plane = S, plane_bytes = mask.bytes_per_row();                         // might be one to a member
    const uint8_t* bits = mask(slice * L + chunk.offset);
    acc_type<T>* kept = Base::kept(of, slice, kept_bytes, chunk.offset);
    int64_t i = slice * L + chunk.offset;
    for (int64_t run = 0; run < chunk.count; ++run) {
      f(i, run, RunGradient<T>{x + i, dy + i, offset_by(residual, i), bits, kept});
      i += plane;
      bits += plane_bytes;
      kept = offset_by(kept, plane);
    }
  }
};

// What backward needs for the columns of a row, of one sample.
template <typename T>
struct ColumnCoefficients {
  ColumnAffine<T> affine;
  ColumnArray<T> rstd, rest, slope, offset;

  explicit ColumnCoefficients(int64_t width) : affine(width), rstd(width), rest(width), slope(width), offset(width) {}
  void set(int64_t j, const SliceStandardize<acc_type<T>>& v) const {
    rstd[j] = v.rstd;
    rest[j] = v.rest;
  }
  void set(int64_t j, const GroupGradient<acc_type<T>>& v) const {
    slope[j] = v.slope;
    offset[j] = v.offset;
  }
  Standardize<PerColumn<T>> standardize() const { return {affine.mean, rstd, rest}; }
};

// Samples in parts, so that the parameters' gradients have one row of float32 sums a part.
template <typename T>
struct FlatBackward : BackwardGroups<T> {
  using Base = BackwardGroups<T>;
  using Base::a, Base::C, Base::S, Base::G, Base::D, Base::L, Base::dx, Base::dresidual, Base::stream;
  static constexpr int64_t kSamples = 32;
  const Blocks blocks{G, L};
  const int64_t samples = a.shape.N, parts = (samples + kSamples - 1) / kSamples;
  const ScratchArray<Sums> channel_sums{parts * C};
  const MaskBits mask{const_cast<uint8_t*>(a.mask), Base::mask_rows};

  void run() const {
    parallel_for(parts * blocks.size(), a.shape.numel(),
                 [&](int64_t i) { part_of_block(i / blocks.size(), i % blocks.size()); });
    this->keep_parameter_gradients(channel_sums.data(), parts);
  }

  void part_of_block(int64_t part, int64_t block) const {
    using P = Pack<T>;
    const int64_t begin = blocks.begin(block), end = blocks.end(block), width = (end - begin) * L;
    const ColumnCoefficients<T> columns(width);
    const ColumnArray<T> weight(width), dz(width), dz_xhat(width), sum_dz(width), sum_dz_xhat(width);
    for (int64_t j = 0; j < width; ++j) {
      weight[j] = static_cast<acc_type<T>>(Base::parameters.weight[begin * D + j / S]);
      sum_dz[j] = sum_dz_xhat[j] = 0;
    }
    for (int64_t n = part * kSamples; n < std::min(samples, (part + 1) * kSamples); ++n) {
      for (int64_t c = begin * D; c < end * D; ++c) {
        const int64_t slice = n * G + c / D;
        const auto channel = this->template affine<T>(slice, c);
        const SliceStandardize<acc_type<T>> standardize(a.mean[slice], a.rstd[slice]);
        for (int64_t j = (c - begin * D) * S; j < (c - begin * D + 1) * S; ++j) {
          columns.affine.set(j, channel);
          columns.set(j, standardize);
        }
      }
      const Affine<PerColumn<T>> affine = columns.affine;
      const PerColumn<T> slope = columns.slope, offset = columns.offset;
      const auto standardize = columns.standardize();
      const int64_t first = (n * G + begin) * L;
      const RunGradient<T> g = Base::gradient(first, mask(first), &dz[0]);
      visit<T>(a.activation,
               [&](auto act) { keep_row_gradients(act, g, width, affine, standardize, &dz[0], &dz_xhat[0]); });
      for_packs<T>(width, [&](int64_t j, auto, int) {
        (P::load_acc(&sum_dz[j]) + P::load_acc(&dz[j])).store_acc(&sum_dz[j]);
        (P::load_acc(&sum_dz_xhat[j]) + P::load_acc(&dz_xhat[j])).store_acc(&sum_dz_xhat[j]);
      });
      if (!Base::wants_elements) continue;
      for (int64_t g0 = begin; g0 < end; ++g0) {
        const int64_t at = (g0 - begin) * L;
        Sums all;
        for (int64_t i = 0; i < L; i += kChunk) {
          P s(0), sx(0);
          sum_packs<T, kSumPacks<T>>(std::min(kChunk, L - i), s, sx, [&](int64_t j, auto count, P& sum, P& other_sum) {
            const P w = P::load_acc(&weight[at + i + j]).keep(count);
            sum = sum + w * P::load_acc(&dz[at + i + j]).keep(count);
            other_sum = other_sum + w * P::load_acc(&dz_xhat[at + i + j]).keep(count);
          });
          all += Sums{tree_sum(s), tree_sum(sx)};
        }
        const auto coefficients = Base::input_gradient(n * G + g0, all);
        for (int64_t j = at; j < at + L; ++j) columns.set(j, coefficients);
      }
      visit<T>(a.activation, [&](auto act) {
        group_gradient_run(act, g, offset_by(dx, first), offset_by(dresidual, first), width, affine, slope, offset,
                           stream);
      });
    }
    for (int64_t c = begin * D; c < end * D; ++c) {
      Sums all;
      for (int64_t j = (c - begin * D) * S; j < (c - begin * D + 1) * S; ++j) all += Sums{sum_dz[j], sum_dz_xhat[j]};
      channel_sums[part * C + c] = all;
    }
  }
};

template <typename T>
struct ColumnsBackward : BackwardGroups<T> {
  using Base = BackwardGroups<T>;
  using Base::a, Base::C, Base::S, Base::G, Base::D, Base::L, Base::dx, Base::dresidual;
  const Parts parts{a.shape, a.mask};
  const ScratchArray<Sums> partial{a.shape.N * parts.size() * C};
  const ScratchArray<Sums> channel_sums{a.shape.N * C}, slice_sums{a.shape.N * G};
  const bool stream = stream_output(a.shape.numel(), a.dtype, /*inputs=*/Base::in_two_sweeps ? 2 : 1);
  const int64_t ahead = parts.ahead<T>(Base::in_two_sweeps && come_from_memory(a.shape.numel(), a.dtype, /*inputs=*/2));
  // A pack beyond the end of a row would overwrite the next, which may have been swept before it.
  const int64_t kept_bytes = parts.sample.width % Pack<T>::kSize == 0 ? Base::bytes_to_keep(C * S) : 0;

  void run() const {
    sweep_twice(*this, a.shape.N, parts.size(), kept_bytes);
    this->keep_parameter_gradients(channel_sums.data(), a.shape.N);
  }

  void first(const Bundle& of, int64_t part) const {
    if (!Base::wants_sums) return;
    for (int64_t n = of.begin; n < of.end; ++n) sums(of, n, part);
  }
  void finish(const Bundle& of) const {
    if (!Base::wants_sums) return;
    for (int64_t n = of.begin; n < of.end; ++n) {
      for (int64_t c = 0; c < C; ++c) {
        Sums all;
        for (int64_t part = 0; part < parts.size(); ++part) all += partial[(n * parts.size() + part) * C + c];
        channel_sums[n * C + c] = all;
      }
      for (int64_t g = 0; g < G; ++g) slice_sums[n * G + g] = Base::weighted(g, &channel_sums[n * C + g * D]);
    }
  }
  void second(const Bundle& of, int64_t part) const {
    if (!Base::wants_elements) return;
    for (int64_t n = of.begin; n < of.end; ++n) elements(of, n, part);
  }

 private:
  RunGradient<T> row_gradient(const Bundle& of, int64_t n, int64_t row) const {
    const int64_t at = row * parts.sample.width;
    return Base::gradient(n * C * S + at, offset_by(a.mask, parts.mask_byte(n, row)),
                          Base::kept(of, n, kept_bytes, at));
  }

  void sums(const Bundle& of, int64_t n, int64_t part) const {
    const int64_t columns = parts.width(part), begin = parts.begin(part);
    const ColumnAffine<T> affines(columns);
    set_sample(affines, *this, n, columns);
    const ColumnArray<T> power(columns);
    for (int64_t g = 0; g < G; ++g) std::fill(&power[g * D], &power[(g + 1) * D], Base::summand(n * G + g).power);
    power.repeat(C, columns);
    const ScratchArray<double> dz(columns), dz_summand(columns);
    std::fill(&dz[0], &dz[columns], 0.0);
    std::fill(&dz_summand[0], &dz_summand[columns], 0.0);
    const Affine<PerColumn<T>> affine = affines;
    const Summand<PerColumn<T>> summand{affine.mean, power};
    visit<T>(a.activation, [&](auto act) {
      add_column_gradients(act, row_gradient(of, n, begin), parts.strides(), parts.rows(part), columns, affine, summand,
                           &dz[0], &dz_summand[0]);
    });
    Sums* out = &partial[(n * parts.size() + part) * C];
    for (int64_t g = 0; g < G; ++g) {
      const auto group = Base::summand(n * G + g);
      for (int64_t c = g * D; c < (g + 1) * D; ++c) {
        out[c] = Sums{};
        for (int64_t j = c; j < columns; j += C) out[c] += Sums{dz[j], group.sum_g_xhat(dz[j], dz_summand[j])};
      }
    }
  }

  void elements(const Bundle& of, int64_t n, int64_t part) const {
    const int64_t columns = parts.width(part), begin = parts.begin(part);
    const ColumnCoefficients<T> coefficients(columns);
    set_sample(coefficients.affine, *this, n, columns);
    for (int64_t g = 0; g < G; ++g) {
      const auto gradient = Base::input_gradient(n * G + g, dx ? slice_sums[n * G + g] : Sums{});
      for (int64_t c = g * D; c < (g + 1) * D; ++c) coefficients.set(c, gradient);
    }
    for (const auto* array : {&coefficients.slope, &coefficients.offset}) array->repeat(C, columns);
    const Affine<PerColumn<T>> affine = coefficients.affine;
    const PerColumn<T> slope = coefficients.slope, offset = coefficients.offset;
    visit<T>(a.activation, [&](auto act) {
      for (int64_t row = begin; row < begin + parts.rows(part); ++row) {
        const int64_t i = n * C * S + row * parts.sample.width;
        with_or_without(act, ahead, [&](auto... ahead) {
          group_gradient_run(act, row_gradient(of, n, row), offset_by(dx, i), offset_by(dresidual, i), columns, affine,
                             slope, offset, stream, ahead...);
        });
      }
    });
  }
};

}  // namespace

void group_norm_forward(const GroupNormForward& a) {
  visit(a.dtype, [&](auto type) {
    using T = decltype(type);
    switch (sample_rows(a.shape).layout) {
      case SampleLayout::kPlanes: return PlanesForward<T>{{{a}}}.run();
      case SampleLayout::kFlat: return FlatForward<T>{{{a}}}.run();
      case SampleLayout::kColumns: return ColumnsForward<T>{{{a}}}.run();
    }
  });
}

void group_norm_backward(const GroupNormBackward& a) {
  visit(a.dtype, [&](auto type) {
    using T = decltype(type);
    switch (sample_rows(a.shape).layout) {
      case SampleLayout::kPlanes: return PlanesBackward<T>{{{a}}}.run();
      case SampleLayout::kFlat: return FlatBackward<T>{{{a}}}.run();
      case SampleLayout::kColumns: return ColumnsBackward<T>{{{a}}}.run();
    }
  });
}

// Of instance normalisation, which is group normalisation with G = C in all else.
void instance_norm_running(const InstanceNormRunning& a) {
  const int64_t N = a.shape.N, C = a.shape.C;
  const double count = static_cast<double>(a.shape.S), unbiased = count / (count - 1);
  const auto mean_over_samples = [&](const double* values, int64_t c) {
    double sum = 0;
    for (int64_t n = 0; n < N; ++n) sum += values[n * C + c];
    return sum / static_cast<double>(N);
  };
  update_average(a.running_mean, a.stats_dtype, C, a.momentum, [&](int64_t c) { return mean_over_samples(a.mean, c); });
  update_average(a.running_var, a.stats_dtype, C, a.momentum,
                 [&](int64_t c) { return mean_over_samples(a.variance, c) * unbiased; });
}

}  // namespace fastnorm::cpu::CPU_CAPABILITY
