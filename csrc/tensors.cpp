#include "tensors.h"

// Not ATen/ops/empty.h and its like, which take longer to compile than an op.
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty_ops.h>
#include <ATen/ops/empty_strided_ops.h>
#include <c10/core/CPUAllocator.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastnorm {

Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble: return Dtype::kFloat64;
    case at::kFloat: return Dtype::kFloat32;
    case at::kBFloat16: return Dtype::kBFloat16;
    case at::kHalf: return Dtype::kFloat16;
    default: TORCH_INTERNAL_ASSERT(false, "fastnorm: ", t.scalar_type(), " passed the checks");
  }
}

bool has_memory(const Tensor& t) {
  const at::TensorImpl& impl = *t.unsafeGetTensorImpl();
  return t.has_storage() && (impl.storage_initialized() || t._is_zerotensor()) && !impl.is_python_dispatch() &&
         !t.is_nested();
}

bool is_dense(const Tensor& t, Layout layout) {
  if (t._is_zerotensor() || t.is_neg()) return false;
  if (layout == Layout::kContiguous) return t.is_contiguous();
  // Dimensions from the innermost outwards: C, then the spatial ones from the last, then N.
  int64_t expected = 1;
  const auto matches = [&](int64_t d) {
    const bool match = t.size(d) == 1 || t.stride(d) == expected;
    expected *= t.size(d);
    return match;
  };
  if (!matches(1)) return false;
  for (int64_t d = t.dim() - 1; d > 1; --d)
    if (!matches(d)) return false;
  return matches(0);
}

bool is_dense(const Tensor& t) {
  return is_dense(t, Layout::kContiguous) || (t.dim() > 2 && is_dense(t, Layout::kChannelsLast));
}

Shape shape_of(const Tensor& t) {
  int64_t S = 1;
  for (int64_t d = 2; d < t.dim(); ++d) S *= t.size(d);
  const bool last = !t.is_contiguous() &&
                    (is_dense(t, Layout::kChannelsLast) || t.suggest_memory_format() != at::MemoryFormat::Contiguous);
  return {t.size(0), t.size(1), S, last ? Layout::kChannelsLast : Layout::kContiguous};
}

Shape shape_of(const Tensor& t, const OptionalTensor& mask) {
  Shape shape = shape_of(t);
  if (is_given(mask)) shape.layout = mask->dim() == 2 ? Layout::kChannelsLast : Layout::kContiguous;
  return shape;
}

static at::DimVector strides_in(const Tensor& t, Layout layout) {
  at::DimVector strides(t.dim());
  int64_t next = 1;
  const auto put = [&](int64_t d) {
    strides[d] = next;
    next *= std::max<int64_t>(1, t.size(d));
  };
  const bool last = layout == Layout::kChannelsLast;
  if (last) put(1);
  for (int64_t d = t.dim() - 1; d > (last ? 1 : 0); --d) put(d);
  if (t.dim() > 0) put(0);
  return strides;
}

static void advise_huge_pages(void* p, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + bytes) / kHugePage * kHugePage;
  if (end > begin)
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: a refusal costs nothing
#endif
}

// On the CPU past the dispatcher, which takes longer than the memory of a small tensor.
Tensor new_empty(at::IntArrayRef sizes, at::ScalarType type, at::Device device) {
  if (device.is_cpu()) return Tensor(at::detail::empty_cpu(sizes, type));
  return at::_ops::empty_memory_format::call(c10::fromIntArrayRefSlow(sizes), type, at::kStrided, device,
                                             /*pin_memory=*/false, at::MemoryFormat::Contiguous);
}
Tensor new_empty_strided(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType type, at::Device device) {
  if (device.is_cpu()) return Tensor(at::detail::empty_strided_cpu(sizes, strides, type));
  return at::_ops::empty_strided::call(c10::fromIntArrayRefSlow(sizes), c10::fromIntArrayRefSlow(strides), type,
                                       at::kStrided, device, /*pin_memory=*/false);
}
Tensor new_empty_like(const Tensor& t) {
  return new_empty_strided(t.sizes(), t.strides(), t.scalar_type(), t.device());
}
Tensor new_zeros(at::IntArrayRef sizes, at::ScalarType type, at::Device device) {
  return new_empty(sizes, type, device).zero_();
}
Tensor new_zeros_like(const Tensor& t) { return new_empty_like(t).zero_(); }

Tensor empty_in_layout(const Tensor& x, Layout layout) {
  Tensor y = layout == Layout::kContiguous
                 ? new_empty(x.sizes(), x.scalar_type(), x.device())
                 : new_empty_strided(x.sizes(), strides_in(x, layout), x.scalar_type(), x.device());
  constexpr size_t kWorthHugePages = 8 << 20;
  if (y.is_cpu() && y.nbytes() >= kWorthHugePages) advise_huge_pages(y.mutable_data_ptr(), y.nbytes());
  return y;
}

// As torch's engine asks before it adds one gradient to another in place, and that the memory is no other library's, nor
// more than the tensor.
static bool is_last_reference(const Tensor& t) {
  if (!t.is_cpu() || t.use_count() != 1 || t.requires_grad()) return false;
  const c10::Storage& memory = t.storage();
  return memory.use_count() == 1 && memory.nbytes() == t.nbytes() &&
         memory.data_ptr().get_deleter() == c10::GetCPUAllocator()->raw_deleter();
}

Tensor last_reference_or_empty(const Tensor& dy, Layout layout) {
  return is_last_reference(dy) ? dy : empty_in_layout(dy, layout);
}

Tensor in_layout(const Tensor& t, Layout layout) {
  if (is_dense(t, layout)) return t;
  Tensor copy = empty_in_layout(t, layout);
  copy.copy_(t);
  return copy;
}

OptionalTensor in_layout(const OptionalTensor& t, Layout layout) {
  return is_given(t) ? OptionalTensor(in_layout(*t, layout)) : OptionalTensor();
}

Tensor dense(const Tensor& t) {
  return is_dense(t) ? t : in_layout(t, t.dim() > 2 ? shape_of(t).layout : Layout::kContiguous);
}

Tensor lying_as(const Tensor& like, const Tensor& t) {
  const bool as_it_is = t.strides() == like.strides() && !t._is_zerotensor() && !t.is_neg();
  return as_it_is ? t : new_empty_like(like).copy_(t);
}

Tensor new_mask(int64_t bytes, Layout layout, at::Device device) {
  if (layout == Layout::kContiguous) return new_empty({bytes}, at::kByte, device);
  return new_empty({bytes, 1}, at::kByte, device);
}

Activation activation_of(const char* op, std::optional<std::string_view> name) {
  if (!name) return Activation::kNone;
  if (*name == "relu") return Activation::kRelu;
  if (*name == "leaky_relu") return Activation::kLeakyRelu;
  if (*name == "silu") return Activation::kSilu;
  if (*name == "gelu") return Activation::kGelu;
  TORCH_CHECK_VALUE(false, op, ": activation must be None, 'relu', 'leaky_relu', 'silu' or 'gelu', got '",
                    std::string(*name), "'");
}

}  // namespace fastnorm
