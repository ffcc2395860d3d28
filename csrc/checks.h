// Checks that every op makes before it touches memory. Messages: the op, the argument, what was wanted, what came.
#pragma once

#include <c10/util/Exception.h>

#include "device.h"
#include "tensors.h"

namespace fastnorm {

inline void check_memory(const char* op, const char* name, const Tensor& t) {
  TORCH_CHECK_NOT_IMPLEMENTED(has_memory(t), op, ": no kernel for ", name,
                              " without memory of its own, as a wrapping subclass or a nested tensor is");
}

// NotImplementedError, which Python turns into a call of torch's own op: work that no kernel covers.
inline void check_supported(const char* op, const Tensor& input, const char* name = "input") {
  TORCH_CHECK_NOT_IMPLEMENTED(input.layout() == at::kStrided, op, ": no kernel for ", name, " of layout ",
                              input.layout(), ", wanted Strided");
  check_device(op, input, name);
  check_memory(op, name, input);
  const auto type = input.scalar_type();
  TORCH_CHECK_NOT_IMPLEMENTED(type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf,
                              op, ": no kernel for ", name, " of type ", type,
                              ", wanted Double, Float, BFloat16 or Half");
}

// Of a tensor beside the input.
inline void check_place(const char* op, const char* name, const Tensor& t, const Tensor& input) {
  TORCH_CHECK(t.device() == input.device(), op, ": ", name, " must be on ", input.device(), " like input, got ",
              t.device());
  TORCH_CHECK(t.layout() == at::kStrided, op, ": ", name, " must be a strided tensor, got ", t.layout());
  check_memory(op, name, t);
}

// A parameter or statistic: one number a channel, in the input's type or float32.
inline void check_per_channel(const char* op, const char* name, const OptionalTensor& t, const Tensor& input) {
  if (!is_given(t)) return;
  check_place(op, name, *t, input);
  TORCH_CHECK(t->dim() == 1 && t->size(0) == input.size(1), op, ": ", name, " must have shape [", input.size(1),
              "] (input.size(1)), got ", t->sizes());
  const auto type = t->scalar_type(), wanted = input.scalar_type();
  const bool low_precision = wanted == at::kBFloat16 || wanted == at::kHalf;
  TORCH_CHECK(type == wanted || (low_precision && type == at::kFloat), op, ": ", name, " must be of type ", wanted,
              low_precision ? " or Float" : "", " for an input of type ", wanted, ", got ", type);
}

// Of statistics that a kernel updates as they lie; each may be none.
inline void check_updatable(const char* op, const OptionalTensor& running_mean, const OptionalTensor& running_var) {
  for (const OptionalTensor* t : {&running_mean, &running_var})
    TORCH_CHECK_NOT_IMPLEMENTED(!is_given(*t) || is_dense(**t, Layout::kContiguous), op,
                                ": no kernel that updates running statistics which are not contiguous");
}

// Two tensors that the kernel reads as one type.
inline void check_same_type(const char* op, const char* name_a, const OptionalTensor& a, const char* name_b,
                            const OptionalTensor& b) {
  TORCH_CHECK(!is_given(a) || !is_given(b) || a->scalar_type() == b->scalar_type(), op, ": ", name_a, " and ", name_b,
              " must be of one type, got ", a->scalar_type(), " and ", b->scalar_type());
}

inline void check_like_input(const char* op, const char* name, const OptionalTensor& t, const Tensor& input) {
  if (!is_given(t)) return;
  check_place(op, name, *t, input);
  TORCH_CHECK(t->sizes() == input.sizes(), op, ": ", name, " must have input's shape ", input.sizes(), ", got ",
              t->sizes());
  TORCH_CHECK(t->scalar_type() == input.scalar_type(), op, ": ", name, " must be of input's type ", input.scalar_type(),
              ", got ", t->scalar_type());
}

}  // namespace fastnorm
