// The element types of the contracts, by names of our own: kernels know nothing of torch's.
#pragma once

#include <cstdint>

namespace fastnorm {

enum class Dtype : int32_t { kFloat64, kFloat32, kBFloat16, kFloat16 };

inline int64_t size_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat64: return 8;
    case Dtype::kFloat32: return 4;
    case Dtype::kBFloat16:
    case Dtype::kFloat16: return 2;
  }
  return 0;
}

}  // namespace fastnorm
