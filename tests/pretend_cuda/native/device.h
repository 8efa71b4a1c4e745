// The interfaces that torch needs of a device: its guard (current device, streams, events) and CUDA's hooks.
#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "copies.h"

namespace pretend {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;

inline Device cuda(int index) { return Device(DeviceType::CUDA, DeviceIndex(index)); }
inline int index_of(Device device) { return device.has_index() ? device.index() : current_device; }
inline Stream key_of(const c10::Stream& stream) { return stream_of(stream.device_index(), int(stream.id())); }
inline c10::Stream torch_stream(int device, int number) { return c10::Stream(c10::Stream::UNSAFE, cuda(device), number); }

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device getDevice() const override { return cuda(current_device); }
  void setDevice(Device device) const override { current_device = index_of(device); }
  void uncheckedSetDevice(Device device) const noexcept override { current_device = index_of(device); }
  Device exchangeDevice(Device device) const override { return cuda(std::exchange(current_device, index_of(device))); }
  DeviceIndex deviceCount() const noexcept override { return DeviceIndex(num_devices); }
  void synchronizeDevice(const DeviceIndex index) const override { synchronize_device(index < 0 ? current_device : index); }
  c10::DeviceCapability getDeviceCapability(Device) const override { return {}; }

  c10::Stream getStream(Device device) const override { return torch_stream(index_of(device), current_stream[index_of(device)]); }
  c10::Stream getDefaultStream(Device device) const override { return torch_stream(index_of(device), 0); }
  c10::Stream getStreamFromGlobalPool(Device device, bool) const override { return torch_stream(index_of(device), new_stream()); }
  c10::Stream getNewStream(Device device, int) const override { return torch_stream(index_of(device), new_stream()); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return torch_stream(stream.device_index(), std::exchange(current_stream[stream.device_index()], int(stream.id())));
  }
  bool queryStream(const c10::Stream&) const override {
    check_lost();
    return true;
  }
  void synchronizeStream(const c10::Stream& stream) const override { synchronize_stream(key_of(stream)); }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const override { record_stream(data, key_of(stream)); }

  // An event is a `Clocks`; null if it was never recorded.
  void record(void** event, const c10::Stream& stream, const DeviceIndex, const c10::EventFlag) const override {
    std::lock_guard<std::recursive_mutex> hold(lock);
    if (!*event) *event = new Clocks;
    *static_cast<Clocks*>(*event) = order.reached(key_of(stream));
  }
  void block(void* event, const c10::Stream& stream) const override {
    std::lock_guard<std::recursive_mutex> hold(lock);
    if (event) order.wait(key_of(stream), *static_cast<Clocks*>(event));
  }
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void* event) const override {
    if (event) synchronize(*static_cast<Clocks*>(event));
  }
  double elapsedTime(void*, void*, const DeviceIndex) const override { return 0.0; }
  void destroyEvent(void* event, const DeviceIndex) const noexcept override { delete static_cast<Clocks*>(event); }
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

}  // namespace pretend

namespace at {

struct PretendedHooks final : CUDAHooksInterface {
  PretendedHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return pretend::num_devices > 0; }
  bool hasCUDA() const override { return pretend::num_devices > 0; }
  int getNumGPUs() const override { return pretend::num_devices; }
  DeviceIndex deviceCount() const override { return DeviceIndex(pretend::num_devices); }
  DeviceIndex current_device() const override { return DeviceIndex(pretend::current_device); }
  DeviceIndex getCurrentDevice() const override { return current_device(); }
  void setCurrentDevice(DeviceIndex index) const override { pretend::current_device = index; }
  DeviceIndex exchangeDevice(DeviceIndex index) const override { return DeviceIndex(std::exchange(pretend::current_device, index)); }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override { return index < 0 ? current_device() : exchangeDevice(index); }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  Device getDeviceFromPtr(void*) const override { return pretend::cuda(pretend::current_device); }
  bool isPinnedPtr(const void* data) const override { return pretend::is_pinned(data); }
  Allocator* getPinnedMemoryAllocator() const override { return &pretend::pinned_allocator; }
  Allocator* getCUDADeviceAllocator() const override { return &pretend::allocator; }
  const Generator& getDefaultGenerator(DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
  Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  void deviceSynchronize(DeviceIndex index) const override { pretend::synchronize_device(index); }
};

// torch looks the hooks up by this name.
using HooksOfCuda = c10::Registerer<std::string, std::unique_ptr<CUDAHooksInterface>, CUDAHooksArgs>;
static HooksOfCuda hooks_of_cuda("CUDAHooks", CUDAHooksRegistry(), HooksOfCuda::DefaultCreator<PretendedHooks>);

}  // namespace at
