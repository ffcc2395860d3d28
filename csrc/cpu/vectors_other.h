// vectors.h by at::vec alone, on processors other than x86: its vectors are NEON's on Arm.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <tuple>

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

namespace vec = at::vec;

template <typename T>
std::tuple<vec::Vectorized<float>, vec::Vectorized<float>> widen(const vec::Vectorized<T>& x) {
  return vec::convert_to_float<T>(x);
}
template <typename T>
vec::Vectorized<T> narrow(const vec::Vectorized<float>& low, const vec::Vectorized<float>& high) {
  return vec::convert_from_float<T>(low, high);
}

template <typename T>
int lanes_of(int n) {
  return std::min(std::max(n, 0), static_cast<int>(vec::Vectorized<T>::size()));
}
template <typename T>
vec::Vectorized<T> load_lanes(const T* p, int n) {
  return n > 0 ? vec::Vectorized<T>::loadu(p, lanes_of<T>(n)) : vec::Vectorized<T>(T(0));
}
template <typename T>
void store_lanes(T* p, int n, const vec::Vectorized<T>& v) {
  if (n > 0) v.store(p, lanes_of<T>(n));
}
template <typename T>
vec::Vectorized<T> keep_lanes(int n, const vec::Vectorized<T>& v) {
  return vec::Vectorized<T>::set(vec::Vectorized<T>(T(0)), v, lanes_of<T>(n));
}

template <typename T>
vec::Vectorized<T> choose(uint32_t bits, int first, const vec::Vectorized<T>& a, const vec::Vectorized<T>& b) {
  T x[vec::Vectorized<T>::size()], y[vec::Vectorized<T>::size()];
  a.store(x);
  b.store(y);
  for (int i = 0; i < vec::Vectorized<T>::size(); ++i) x[i] = bits >> (first + i) & 1 ? x[i] : y[i];
  return vec::Vectorized<T>::loadu(x);
}

template <typename T>
double lane_sum(const vec::Vectorized<T>& v) {
  T lane[vec::Vectorized<T>::size()];
  v.store(lane);
  double total = 0;
  for (const T e : lane) total += e;
  return total;
}

template <typename T>
void stream_vector(T* p, const vec::Vectorized<T>& v) {
  v.store(p);
}

}  // namespace
}  // namespace fastnorm::cpu::CPU_CAPABILITY
