// Whole numbers that plans, launches and kernels share. Plain C++.
#pragma once

#include <cstdint>

namespace fastnorm::cuda {

constexpr int kWarp = 32;

namespace {  // internal linkage: see isa.h

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace
}  // namespace fastnorm::cuda
