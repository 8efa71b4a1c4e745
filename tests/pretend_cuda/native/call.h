// Runs any operation on CUDA tensors with the CPU's kernel on the same memory, and checks what a GPU would check.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include "tensors.h"

namespace pretend {

// Operations whose CUDA kernels take indices from the host.
inline const std::unordered_set<std::string> kTakeIndices = {
    "aten::index.Tensor", "aten::index.Tensor_out", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"};
// Operations that wait for their result.
inline const std::unordered_set<std::string> kSynchronize = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select"};

class Call {
 public:
  Call(const c10::OperatorHandle& op, torch::jit::Stack* stack)
      : schema_(op.schema()), stack_(*stack), begin_(stack->size() - schema_.arguments().size()), name_(schema_.name()) {
    if (!schema_.overload_name().empty()) name_ += "." + schema_.overload_name();
    originals_.assign(stack->begin() + int64_t(begin_), stack->end());
  }

  void lower() {
    for (size_t i = 0; i < originals_.size(); ++i) stack_[begin_ + i] = lowered(originals_[i], schema_.arguments()[i]);
    if (device_ < 0) device_ = current_device;
    TORCH_CHECK(!has_host_tensor_ || kTakeIndices.count(name_), "Expected all tensors to be on the same device, but found at least two devices, cuda:",
                device_, " and cpu! (pretended; in ", name_, ")");
  }

  void launch() {
    std::lock_guard<std::recursive_mutex> hold(lock);
    Stream stream = stream_of(device_);
    Use use{stream, order.launch(stream)};
    for (auto& [tensor, writes] : touched_) touch(tensor, writes, name_, use);
    if (kSynchronize.count(name_)) synchronize_stream(stream);
  }

  void raise() {
    size_t first = stack_.size() - schema_.returns().size();
    for (size_t i = 0; i < schema_.returns().size(); ++i) {
      auto& value = stack_[first + i];
      const auto* alias = schema_.returns()[i].alias_info();
      value = alias && alias->isWrite() ? written_argument(*alias, value) : raised(value);
    }
  }

 private:
  static bool writes(const c10::Argument& argument) { return argument.alias_info() && argument.alias_info()->isWrite(); }

  void see(const Tensor& tensor, bool writes) {
    if (!tensor.defined()) return;
    if (!tensor.is_cuda()) {
      has_host_tensor_ |= tensor.device().is_cpu() && (tensor.dim() > 0 || writes);  // numbers may come from the host
      return;
    }
    int device = tensor.device().index();
    TORCH_CHECK(device_ < 0 || device == device_, "Expected all tensors to be on the same device, but found at least two devices, cuda:",
                device_, " and cuda:", device, "! (pretended; in ", name_, ")");
    device_ = device;
    inputs_.push_back(tensor);
    touched_.emplace_back(tensor, writes);
  }

  c10::IValue lowered(const c10::IValue& value, const c10::Argument& argument) {
    if (value.isTensor()) {
      const Tensor& tensor = value.toTensor();
      see(tensor, writes(argument));
      bool is_to_be_sized = writes(argument) && argument.kwarg_only() && tensor.defined() && tensor.is_cuda() && tensor.numel() == 0;
      return is_to_be_sized ? at::empty({0}, tensor.options().device(at::kCPU)) : on_cpu(tensor);
    }
    if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : value.toTensorVector()) see(tensor, writes(argument)), list.push_back(on_cpu(tensor));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor>& tensor : value.toOptionalTensorVector()) {
        if (tensor) see(*tensor, writes(argument));
        list.push_back(tensor ? std::optional<Tensor>(on_cpu(*tensor)) : std::nullopt);
      }
      return list;
    }
    if (value.isDevice() && value.toDevice().is_cuda()) {
      if (device_ < 0) device_ = value.toDevice().has_index() ? value.toDevice().index() : current_device;
      return c10::Device(c10::DeviceType::CPU);
    }
    return value;
  }

  c10::IValue written_argument(const c10::AliasInfo& alias, const c10::IValue& value) {
    for (size_t i = 0; i < originals_.size(); ++i) {
      const auto* of = schema_.arguments()[i].alias_info();
      if (!of || !of->isWrite() || !(*of == alias)) continue;
      if (originals_[i].isTensor() && value.isTensor()) take_size(originals_[i].toTensor(), value.toTensor());
      return originals_[i];
    }
    return value;
  }

  static void take_size(const Tensor& original, const Tensor& result) {
    if (!original.defined() || !original.is_cuda() || original.numel() != 0 || result.numel() == 0) return;
    original.resize_(result.sizes());
    on_cpu(original).copy_(result);
  }

  c10::IValue raised(const c10::IValue& value) {
    if (value.isTensor()) return on_cuda(value.toTensor(), device_, inputs_, name_);
    if (!value.isTensorList()) return value;
    c10::List<Tensor> list;
    for (const Tensor& tensor : value.toTensorVector()) list.push_back(on_cuda(tensor, device_, inputs_, name_));
    return list;
  }

  const c10::FunctionSchema& schema_;
  torch::jit::Stack& stack_;
  size_t begin_;
  std::string name_;
  std::vector<c10::IValue> originals_;
  int device_ = -1;
  bool has_host_tensor_ = false;
  std::vector<Tensor> inputs_;
  std::vector<std::pair<Tensor, bool>> touched_;
};

inline void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  check_lost();
  Call call(op, stack);
  call.lower();
  op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
  call.launch();
  call.raise();
}

}  // namespace pretend
