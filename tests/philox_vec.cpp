// KeepBits of csrc/cpu/philox_vec.h for test_philox_vec.py: blocks so far on that no tensor reaches them.
#include "cpu/philox_vec.h"

extern "C" void keep_bits(uint64_t seed, uint64_t offset, uint32_t threshold, uint64_t block, int64_t count,
                          uint64_t* bits) {
  using namespace fastnorm::cpu::CPU_CAPABILITY;
  const KeepBits keep(seed, offset, threshold);
  block -= kGroupBlocks;
  keep.of_groups(count, bits, [&] { return block += kGroupBlocks; });
}
