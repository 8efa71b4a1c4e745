// Operations of CUDA's dispatch key: those that make, view, resize and copy tensors, and a fallback for all others.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/view_native.h>
#include <torch/library.h>

#include "call.h"

namespace pretend {

using c10::SymIntArrayRef;
template <typename T>
using Maybe = std::optional<T>;

// Switches the current device of the calling thread during its scope.
class DeviceSwitch {
 public:
  explicit DeviceSwitch(const Maybe<c10::Device>& device)
      : before_(std::exchange(current_device, device && device->has_index() ? device->index() : current_device)) {}
  ~DeviceSwitch() { current_device = before_; }

 private:
  int before_;
};

inline at::ScalarType type_of(Maybe<at::ScalarType> dtype) { return dtype.value_or(c10::typeMetaToScalarType(at::get_default_dtype())); }

inline Tensor empty(SymIntArrayRef size, Maybe<at::ScalarType> dtype, Maybe<at::Layout>, Maybe<c10::Device> device, Maybe<bool>,
                    Maybe<at::MemoryFormat> format) {
  DeviceSwitch there(device);
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &allocator, DispatchKeySet(DispatchKey::CUDA), type_of(dtype), format);
}

inline Tensor empty_strided(SymIntArrayRef size, SymIntArrayRef stride, Maybe<at::ScalarType> dtype, Maybe<at::Layout>, Maybe<c10::Device> device,
                            Maybe<bool>) {
  DeviceSwitch there(device);
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &allocator,
                                           DispatchKeySet(DispatchKey::CUDA), type_of(dtype));
}

inline Tensor as_strided(const Tensor& self, SymIntArrayRef size, SymIntArrayRef stride, Maybe<c10::SymInt> offset) {
  Tensor made = view_of(self, self);
  made.unsafeGetTensorImpl()->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                                                    offset ? offset->guard_int(__FILE__, __LINE__) : self.storage_offset());
  return made;
}

inline Tensor view(const Tensor& self, SymIntArrayRef size) { return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size)); }

inline Tensor reshape_alias(const Tensor& self, SymIntArrayRef size, SymIntArrayRef stride) { return as_strided(self, size, stride, std::nullopt); }

inline const Tensor& resize_(const Tensor& self, SymIntArrayRef size, Maybe<at::MemoryFormat>) {
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  const c10::Storage& storage = self.storage();
  int64_t num_bytes = (c10::multiply_integers(sizes) + self.storage_offset()) * int64_t(self.element_size());
  if (num_bytes > int64_t(storage.nbytes())) {
    auto data = new_block(num_bytes, self.device().index(), "resize_");
    if (storage.nbytes()) std::memcpy(data.get(), storage.data(), storage.nbytes());
    storage.set_data_ptr_noswap(std::move(data));
    storage.set_nbytes(num_bytes);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return self;
}

inline void copy_between_host_and_device(const Tensor& to, const Tensor& from, bool non_blocking, Use use) {
  const Tensor& host = to.is_cuda() ? from : to;
  bool is_async = non_blocking && is_pinned(host.storage().data()) && host.is_non_overlapping_and_dense();
  if (is_async && to.is_cpu()) {
    copy_late(to, on_cpu(from), use);
  } else {
    on_cpu(to).copy_(on_cpu(from));
    if (is_async) watch_source(from, use);
    else synchronize_stream(use.stream);
  }
}

// Between GPUs the source's stream copies, and both streams wait for each other, as in torch.
inline Tensor& copy_(Tensor& to, const Tensor& from, bool non_blocking) {
  check_lost();
  if (to.numel() == 0 && from.numel() == 0) return to;
  Stream target = stream_of((to.is_cuda() ? to : from).device().index());
  Stream stream = stream_of((from.is_cuda() ? from : to).device().index());
  std::unique_lock<std::recursive_mutex> hold(lock);
  if (stream != target) order.wait(stream, order.reached(target));
  Use use{stream, order.launch(stream)};
  if (from.is_cuda()) touch(from, false, "a copy from it", use);
  if (to.is_cuda()) touch(to, true, "a copy to it", use);
  if (stream != target) order.wait(target, order.reached(stream));
  hold.unlock();  // destroying a tensor's handle may wait for Python
  if (to.is_cuda() && from.is_cuda()) on_cpu(to).copy_(on_cpu(from));
  else copy_between_host_and_device(to, from, non_blocking, use);
  return to;
}

inline void record_stream_(Tensor& self, c10::Stream stream) {
  record_stream(self.storage().data_ptr(), stream_of(stream.device_index(), int(stream.id())));
}

}  // namespace pretend

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&pretend::run_on_cpu>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &pretend::empty);
  m.impl("empty_strided", &pretend::empty_strided);
  m.impl("as_strided", &pretend::as_strided);
  m.impl("view", &pretend::view);
  m.impl("_reshape_alias", &pretend::reshape_alias);
  m.impl("resize_", &pretend::resize_);
  m.impl("copy_", &pretend::copy_);
  m.impl("record_stream", &pretend::record_stream_);
  // Composites that depend on the kind of device take the CPU's path, so that results equal the CPU's bit for bit.
  for (auto name : {"linear", "matmul", "convolution", "scaled_dot_product_attention", "layer_norm", "group_norm", "rms_norm", "einsum"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&pretend::run_on_cpu>());
}

// bitsandbytes has its CUDA kernels in its own library; the CPU's are used here.
TORCH_LIBRARY_IMPL(bitsandbytes, CUDA, m) {
  for (auto name : {"int8_mixed_scaled_mm", "int8_scaled_mm", "int8_linear_matmul", "int8_linear_matmul.out", "int8_vectorwise_quant",
                    "int8_vectorwise_dequant", "int8_mm_dequant", "int8_double_quant", "quantize_4bit", "dequantize_4bit", "dequantize_4bit.out",
                    "gemm_4bit", "gemv_4bit", "gemv_4bit.out", "quantize_blockwise", "dequantize_blockwise", "dequantize_blockwise.out"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&pretend::run_on_cpu>());
}
