// From torch's tensors to the contracts' shapes, types and pointers.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "activation.h"
#include "dtype.h"
#include "layout.h"

namespace fastnorm {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Dtype dtype_of(const Tensor& t);

// (N, C, S) of a tensor (N, C, *spatial) with at least two dimensions; the layout is channels_last where only that is
// dense, and where torch says so of a part of such a tensor: half of its channels, a crop.
Shape shape_of(const Tensor& t);

// Whether `t` lies in memory as kernels read it: not one of a subclass that says itself what an op does, nor a nested
// one. Torch's tensors of zeros, which forward mode makes of what has no tangent, have none either, but can be copied.
bool has_memory(const Tensor& t);

// `t` itself if it lies densely in `layout`, else one copy that does.
Tensor in_layout(const Tensor& t, Layout layout);
OptionalTensor in_layout(const OptionalTensor& t, Layout layout);

// `t` itself if it is dense in either layout, else a copy in the one that it is read in.
Tensor dense(const Tensor& t);

// `t` itself if it lies as `like`, a dense tensor, does, else a copy that does.
Tensor lying_as(const Tensor& like, const Tensor& t);

// Whether t is dense as (N, C, *spatial), or as (N, *spatial, C). Never what is zero or negated by a mark alone.
bool is_dense(const Tensor& t, Layout layout);

// Whether t, of any rank, is dense in one of the two layouts: what kernels read as it lies.
bool is_dense(const Tensor& t);

// A new tensor of x's sizes, type and device, dense in `layout`. Large ones ask the system for huge pages before the
// first write: faulting in 4 KiB pages one by one takes longer than a kernel's own work.
Tensor empty_in_layout(const Tensor& x, Layout layout);

// Where the gradient of what dy, dense in `layout`, is the gradient of is to be written: over dy, if it lies on the CPU
// and this is the last reference to it and to its memory, or else to a new tensor.
Tensor last_reference_or_empty(const Tensor& dy, Layout layout);

// A mask (mask.h) of so many bytes for a tensor that is read in `layout`, and the shape in which that was. The mask's
// rank tells: a hook on what is kept may bring a tensor back in another layout.
Tensor new_mask(int64_t bytes, Layout layout, at::Device device);
Shape shape_of(const Tensor& t, const OptionalTensor& mask);

// New tensors, row-major where no strides are given; one like t has t's strides, and t must be dense.
Tensor new_empty(at::IntArrayRef sizes, at::ScalarType type, at::Device device);
Tensor new_empty_strided(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType type, at::Device device);
Tensor new_empty_like(const Tensor& t);
Tensor new_zeros(at::IntArrayRef sizes, at::ScalarType type, at::Device device);
Tensor new_zeros_like(const Tensor& t);

// The activation of this name, none for no name; ValueError for an unknown one.
Activation activation_of(const char* op, std::optional<std::string_view> name);

inline const void* data_or_null(const OptionalTensor& t) { return t && t->defined() ? t->const_data_ptr() : nullptr; }
inline void* mutable_data_or_null(const OptionalTensor& t) {
  return t && t->defined() ? t->mutable_data_ptr() : nullptr;
}
inline bool is_given(const OptionalTensor& t) { return t && t->defined(); }

// The type of a norm's parameters, input's where there are none.
inline Dtype param_dtype(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias) {
  return dtype_of(is_given(weight) ? *weight : is_given(bias) ? *bias : input);
}

}  // namespace fastnorm
