// Every kernel of csrc/cpu is compiled once per instruction set, each time inside a namespace of that name, and chosen
// at run time as torch chooses its own (ATEN_CPU_CAPABILITY=default|avx2|avx512 forces one). So one build runs on any
// processor.
//
// What kernels share with the host in a header has internal linkage (an unnamed namespace). An inline function with a
// global name would be emitted by several instruction sets, the linker would keep any one of them, and an old processor
// would meet AVX512 instructions in code that it runs: setup.py checks the objects for such names.
#pragma once

#include "dtype.h"

namespace fastnorm {

enum class Isa { kDefault, kAvx2, kAvx512 };

Isa isa();  // the best that both this processor and this build have

// Whether small calls take AVX2 where isa() is AVX512. Intel's processors let the upper half of their widest units sleep,
// and run slower until it is awake: that costs 1 to 7 us, of the 6 to 80 that such a call takes. Not where
// ATEN_CPU_CAPABILITY names AVX512.
bool small_calls_take_avx2();

// What runs a kernel with these arguments. AVX512 has no kernels of float64, which memory limits as it is and whose code
// would be a quarter of that set's. A contract says what is small, and says nothing where a sample alone would have
// other last bits than in a batch: sums have another order in each set.
template <typename Args>
Isa isa_for(const Args& args) {
  if (isa() != Isa::kAvx512) return isa();
  if constexpr (requires { args.dtype; })
    if (args.dtype == Dtype::kFloat64) return Isa::kAvx2;
  if constexpr (requires { args.is_small(); })
    if (args.is_small() && small_calls_take_avx2()) return Isa::kAvx2;
  return Isa::kAvx512;
}

}  // namespace fastnorm

#if defined(__x86_64__) && !defined(FASTNORM_PLAIN)
#define FASTNORM_DECLARE_CPU_KERNEL(name, Args)       \
  namespace fastnorm::cpu {                           \
  namespace DEFAULT {                                 \
  void name(const Args&);                             \
  }                                                   \
  namespace AVX2 {                                    \
  void name(const Args&);                             \
  }                                                   \
  namespace AVX512 {                                  \
  void name(const Args&);                             \
  }                                                   \
  inline void name(const Args& args) {                \
    switch (isa_for(args)) {                          \
      case Isa::kAvx512: return AVX512::name(args);   \
      case Isa::kAvx2: return AVX2::name(args);       \
      case Isa::kDefault: return DEFAULT::name(args); \
    }                                                 \
  }                                                   \
  }
#else  // Arm, where NEON is part of the default; or a build of the default alone
#define FASTNORM_DECLARE_CPU_KERNEL(name, Args)               \
  namespace fastnorm::cpu {                                   \
  namespace DEFAULT {                                         \
  void name(const Args&);                                     \
  }                                                           \
  inline void name(const Args& args) { DEFAULT::name(args); } \
  }
#endif
