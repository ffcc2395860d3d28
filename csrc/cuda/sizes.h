// Whole numbers that plans, launches and kernels share. Plain C++.
#pragma once

#include <cstdint>

namespace fastnorm::cuda {

constexpr int kWarp = 32;

// Bytes of shared memory that a kernel's own arrays may take: CUDA's limits are of these and the dynamic ones together.
constexpr int64_t kStaticShared = 2 << 10;

namespace {  // internal linkage: see isa.h

// What is left for dynamic shared memory where a block may have so many bytes.
constexpr int64_t most_dynamic_shared(int64_t per_block) {
  return per_block > kStaticShared ? per_block - kStaticShared : 0;
}

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace
}  // namespace fastnorm::cuda
