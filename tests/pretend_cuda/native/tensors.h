// Two tensors on one memory: the CPU's kernels read CUDA tensors as CPU tensors, and their results become CUDA tensors.
#pragma once


#include "copies.h"

namespace pretend {

using at::Tensor;
using c10::DispatchKey;
using c10::DispatchKeySet;

inline void shape_as(const Tensor& made, const Tensor& like) {
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  made._set_conj(like.is_conj());
  made._set_neg(like.is_neg());
}

// Returns a CPU tensor on the device memory, which it keeps alive.
inline Tensor on_cpu(const Tensor& tensor) {
  if (!tensor.defined() || !tensor.is_cuda()) return tensor;
  auto* held = new c10::Storage(tensor.storage());
  at::DataPtr data(held->mutable_data(), held, [](void* p) { delete static_cast<c10::Storage*>(p); }, c10::Device(c10::DeviceType::CPU));
  c10::Storage storage(c10::Storage::use_byte_size_t(), held->nbytes(), std::move(data), nullptr, false);
  Tensor made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), DispatchKeySet(DispatchKey::CPU), tensor.dtype());
  shape_as(made, tensor);
  return made;
}

inline Tensor view_of(const Tensor& base, const Tensor& like) {
  Tensor made = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(base.storage()), base.key_set(), like.dtype());
  shape_as(made, like);
  return made;
}

// Turns an operation's result on the CPU into device memory in place. A result in an input's memory becomes a view of it.
inline Tensor on_cuda(const Tensor& made_by_cpu, int device, const std::vector<Tensor>& inputs, const std::string& operation) {
  if (!made_by_cpu.defined() || made_by_cpu.is_cuda()) return made_by_cpu;
  const c10::Storage& held = made_by_cpu.storage();
  for (const Tensor& input : inputs)
    if (held.data() && held.data() == input.storage().data()) return view_of(input, made_by_cpu);
  auto data = new_block(int64_t(held.nbytes()), device, operation, made_by_cpu, held.mutable_data());
  c10::Storage storage(c10::Storage::use_byte_size_t(), held.nbytes(), std::move(data), &allocator, true);
  Tensor made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), DispatchKeySet(DispatchKey::CUDA), made_by_cpu.dtype());
  shape_as(made, made_by_cpu);
  std::lock_guard<std::recursive_mutex> hold(lock);
  Stream stream = stream_of(device);
  touch(made, true, operation, {stream, order.launched(stream)});
  return made;
}

}  // namespace pretend
