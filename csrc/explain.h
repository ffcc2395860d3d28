// What the CUDA launchers decide, told to the host: by the same functions, in any build.
#pragma once

#include <cstdint>
#include <map>
#include <string>

namespace fastnorm {

// Name and value of each number that was decided. A device is described by its multiprocessors, the most shared memory that
// a block may have, in bytes, and its compute capability's major version.
using Decision = std::map<std::string, int64_t>;

// Batch normalisation (D = 1, not per sample), group and instance normalisation of a tensor [N, C, S]; cuda/plan.h has
// the words.
Decision plan_slices(int64_t N, int64_t C, int64_t S, bool channels_last, int64_t D, bool per_sample, int64_t element,
                     bool backward, int multiprocessors, int64_t shared, int major);

// Dropout of a tensor [N, C, S], one draw an element or a channel; cuda/dropout_plan.h has the words.
Decision plan_dropout(int64_t N, int64_t C, int64_t S, bool channels_last, bool by_channel, int64_t element);

// Local response normalisation of a tensor [N, C, H, W], or [N, C, 1, W] for a window along the channels;
// cuda/window_plan.h has the words.
Decision plan_windows(int64_t N, int64_t C, int64_t H, int64_t W, bool channels_last, bool intra, int64_t before,
                      int64_t after, int64_t element, bool backward, int multiprocessors, int64_t shared);

// Weight normalisation of slices [N, S] of a weight [N, C, S]; cuda/weight_plan.h has the words.
Decision plan_weights(int64_t N, int64_t C, int64_t S, int64_t element, bool backward, int multiprocessors,
                      int64_t shared);

// Layer and RMS normalisation of M rows of N elements; cuda/row_plan.h has the words.
Decision plan_rows(int64_t M, int64_t N, int64_t element, bool is_bfloat16, bool backward, int multiprocessors,
                   int major);

}  // namespace fastnorm
