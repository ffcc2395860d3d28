// Whole numbers that plans, launches and kernels share. Plain C++.
#pragma once

#include <cstdint>

#include "../moments.h"  // FASTNORM_HOST_DEVICE

namespace fastnorm::cuda {

constexpr int kWarp = 32;

// Bytes of shared memory that a kernel's own arrays may take: CUDA's limits are of these and the dynamic ones together.
constexpr int64_t kStaticShared = 2 << 10;

// n / d for n < 2^31 and d > 1 by a multiplication.
struct FastDivide {
  uint32_t factor;
  int shift;

  static FastDivide by(uint32_t d) {
    int bits = 1;
    while ((uint64_t{1} << bits) < d) ++bits;
    return {static_cast<uint32_t>((uint64_t{1} << (31 + bits)) / d + 1), bits - 1};
  }
  FASTNORM_HOST_DEVICE uint32_t operator()(uint32_t n) const {
    return static_cast<uint32_t>((static_cast<uint64_t>(n) * factor) >> 32) >> shift;
  }
};

namespace {  // internal linkage: see isa.h

// What is left for dynamic shared memory where a block may have so many bytes.
constexpr int64_t most_dynamic_shared(int64_t per_block) {
  return per_block > kStaticShared ? per_block - kStaticShared : 0;
}

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace
}  // namespace fastnorm::cuda
