// What packs (vec.h) are made of: `vec`, which is at::vec wherever that has instructions, and what it lacks, by the
// same names in every instruction set:
//
//   widen, narrow     a vector of float16 or bfloat16 as two of float32, and back
//   widen_any_order, narrow_any_order
//                     the same for loops that treat all elements alike, in the order that takes the fewest instructions
//   load_lanes, store_lanes, keep_lanes
//                     lanes 0 .. n - 1 alone: loaded with zeros behind them, stored, kept with the others set to zero.
//                     Any n will do, for a pack has several vectors
//   choose, choose_any_order
//                     lane i of one vector where bit `first` + i is set, of another elsewhere; bits of elements, whose
//                     order is that of the above
//   zero_mask_any_order
//                     bit i: whether element i is zero, of two vectors in that order whose lanes are zero or all ones
//   lane_sum          in float64, in a tree: what a row or chunk costs once, so in few instructions
//   exponential       exp(x) for float32, to 1 ulp or so; of NaN it is anything. With AVX512; activation.h has it for others
//   power_of_2_below  2^(n - 1), or 0 if that is no normal number, n being the last bits of 1.5 * 2^23 + n. For that, on x86
//   stream_vector     a store past the caches, to an address that is a multiple of the vector's size. Not ordered with
//                     other stores, but every range of parallel_ranges() ends with a fence
#pragma once

#if defined(CPU_CAPABILITY_AVX512)
#include "vectors_avx512.h"
#elif defined(CPU_CAPABILITY_AVX2)
#include "vectors_avx2.h"
#elif defined(__x86_64__)
#include "vectors_sse2.h"
#else
#include "vectors_other.h"
#endif

#if !defined(CPU_CAPABILITY_AVX2)
namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

// The order in memory costs no more.
template <typename T>
auto widen_any_order(const vec::Vectorized<T>& x) {
  return widen<T>(x);
}
template <typename T, typename Vec>
vec::Vectorized<T> narrow_any_order(const Vec& low, const Vec& high) {
  return narrow<T>(low, high);
}
template <typename T, typename Vec>
Vec choose_any_order(uint32_t bits, int first, const Vec& a, const Vec& b) {
  return choose(bits, first, a, b);
}
template <typename T, typename Vec>
uint32_t zero_mask_any_order(const Vec& first, const Vec& second) {
  return static_cast<uint32_t>(first.zero_mask()) | static_cast<uint32_t>(second.zero_mask()) << Vec::size();
}

}  // namespace
}  // namespace fastnorm::cpu::CPU_CAPABILITY
#endif
