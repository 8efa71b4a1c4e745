// Pinned host memory, and the copies to or from it, which are pending until the host waits for their stream.
#pragma once

#include "memory.h"

namespace pretend {

struct Copy {
  Clock at;
  char *to, *from;          // one of them is null; the other is the host's memory
  std::vector<char> bytes;  // the bytes to be written, or those that the source had
};
inline std::unordered_map<Stream, std::vector<Copy>> copies;

inline void finish(const Copy& copy) {
  if (copy.to) std::memcpy(copy.to, copy.bytes.data(), copy.bytes.size());
  if (copy.from && std::memcmp(copy.from, copy.bytes.data(), copy.bytes.size()))
    report("host memory was changed before the non_blocking copy out of it was done");
}

// Lets the host wait for the event.
inline void synchronize(const Clocks& event) {
  std::lock_guard<std::recursive_mutex> hold(lock);
  check_lost();
  order.complete(event);
  for (auto& [stream, at] : event) {
    auto& pending = copies[stream];
    auto is_over = [&, until = at](const Copy& copy) { return copy.at <= until; };
    for (const Copy& copy : pending)
      if (is_over(copy)) finish(copy);
    std::erase_if(pending, is_over);
  }
}

inline void synchronize_stream(Stream stream) {
  std::lock_guard<std::recursive_mutex> hold(lock);
  synchronize(order.reached(stream));
}

inline void synchronize_device(int device) {
  std::lock_guard<std::recursive_mutex> hold(lock);
  for (int number = 0; number < kNumStreams; ++number) synchronize_stream(stream_of(device, number));
}

inline std::vector<char> bytes_of(const at::Tensor& dense) {
  auto* begin = static_cast<const char*>(dense.const_data_ptr());
  return {begin, begin + dense.nbytes()};
}

// Copies to the host: until the copy is done, its target is garbage.
inline void copy_late(const at::Tensor& to, const at::Tensor& from, Use use) {
  at::Tensor done = at::empty_like(to);
  done.copy_(from);
  std::lock_guard<std::recursive_mutex> hold(lock);
  copies[use.stream].push_back({use.at, static_cast<char*>(to.mutable_data_ptr()), nullptr, bytes_of(done)});
  std::memset(to.mutable_data_ptr(), 0xEE, to.nbytes());
}

// Watches the source of a copy, which must not change until the copy is done.
inline void watch_source(const at::Tensor& from, Use use) {
  std::lock_guard<std::recursive_mutex> hold(lock);
  copies[use.stream].push_back({use.at, nullptr, static_cast<char*>(const_cast<void*>(from.const_data_ptr())), bytes_of(from)});
}

inline std::map<const char*, size_t> pinned;

inline bool is_pinned(const void* data) {
  std::lock_guard<std::recursive_mutex> hold(lock);
  auto* at = static_cast<const char*>(data);
  auto after = pinned.upper_bound(at);
  return after != pinned.begin() && at < (--after)->first + after->second;
}

struct PinnedAllocator final : c10::Allocator {
  at::DataPtr allocate(size_t num_bytes) override {
    void* data = num_bytes ? std::aligned_alloc(64, (num_bytes + 63) / 64 * 64) : nullptr;
    std::lock_guard<std::recursive_mutex> hold(lock);
    if (data) pinned[static_cast<char*>(data)] = num_bytes;
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }
  // torch keeps the memory until its copies are done; here pending copies are dropped with the memory.
  static void release(void* data) {
    std::lock_guard<std::recursive_mutex> hold(lock);
    char* begin = static_cast<char*>(data);
    size_t num_bytes = pinned[begin];
    pinned.erase(begin);
    auto is_inside = [&](const char* at) { return at >= begin && at < begin + num_bytes; };
    for (auto& [stream, pending] : copies)
      std::erase_if(pending, [&](const Copy& copy) { return is_inside(copy.to ? copy.to : copy.from); });
    std::free(data);
  }
  void copy_data(void* to, const void* from, size_t num_bytes) const override { default_copy_data(to, from, num_bytes); }
};
inline PinnedAllocator pinned_allocator;

}  // namespace pretend
