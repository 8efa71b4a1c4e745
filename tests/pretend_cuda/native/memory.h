// Device memory: how much there is, what uses it, and what frees it too early.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/CachingDeviceAllocator.h>

#include <cstring>
#include <set>

#include "order.h"

namespace pretend {

constexpr int64_t kMiB = int64_t(1) << 20;
constexpr int64_t kPoisoned = 64 * kMiB;  // bytes of new memory that are filled with garbage; more would cost time and show little

struct Card {
  int64_t total = int64_t(16) << 30, live = 0, peak = 0, reserved = 0, peak_reserved = 0;
  double fraction = 1.0;
  std::string name = "0";  // its number in CUDA_VISIBLE_DEVICES
  int64_t room() const { return int64_t(fraction * double(total)); }
};
inline Card cards[kNumDevices];
inline int num_devices = 1;

// Memory with the operations that made, wrote and used it. It returns to the stream that it was allocated on, as in torch's allocator.
struct Block {
  void* data;
  int64_t num_bytes;
  int device;
  Stream stream;
  std::string made_by, written_by;
  Use written;
  Clocks used;
  std::set<Stream> recorded;
  at::Tensor owner;  // set if the memory is that of a result of the CPU's kernel
};
inline std::unordered_map<void*, Block*> blocks;

// A use of memory that was freed without a record_stream, while another stream may still be working on it.
struct Freed {
  Use use;
  std::string text;
};
inline std::unordered_map<Stream, std::vector<Freed>> freed_early;

inline void check_freed(Stream stream) {
  auto freed = std::exchange(freed_early[stream], {});
  for (auto& one : freed)
    if (!order.is_ordered(stream, one.use)) report(one.text);
}

inline void take_room(int device, int64_t num_bytes) {
  Card& card = cards[device];
  TORCH_CHECK_WITH(OutOfMemoryError, card.live + num_bytes <= card.room(), "CUDA out of memory. Tried to allocate ", num_bytes / kMiB,
                   " MiB. GPU ", device, " has a total capacity of ", card.total / kMiB, " MiB, this process may use ", card.room() / kMiB,
                   " MiB of it, and uses ", card.live / kMiB, " MiB (pretended)");
  card.live += num_bytes;
  card.peak = std::max(card.peak, card.live);
  card.reserved = std::max(card.reserved, card.live);
  card.peak_reserved = std::max(card.peak_reserved, card.reserved);
}

inline void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  const at::Tensor owner = std::move(block->owner);  // destroyed after the lock is released
  std::lock_guard<std::recursive_mutex> hold(lock);
  for (auto& [stream, at] : block->used)
    if (!block->recorded.count(stream) && !order.is_ordered(block->stream, {stream, at}))
      freed_early[block->stream].push_back(
          {{stream, at}, "memory of " + name_of(block->stream) + ", made by " + block->made_by + " and written by " + block->written_by +
           ", is used again, and " + name_of(stream) + " may not be done with it: no record_stream"});
  cards[block->device].live -= block->num_bytes;
  blocks.erase(block->data);
  if (!owner.defined()) std::free(block->data);
  delete block;
}

// owner, data: of a result of the CPU's kernel, which becomes device memory in place.
inline at::DataPtr new_block(int64_t num_bytes, int device, const std::string& made_by, const at::Tensor& owner = {}, void* data = nullptr) {
  std::lock_guard<std::recursive_mutex> hold(lock);
  check_lost();
  num_bytes = (num_bytes + 511) / 512 * 512;
  Stream stream = stream_of(device);
  check_freed(stream);
  take_room(device, num_bytes);
  if (!owner.defined() && num_bytes) {
    data = std::aligned_alloc(512, num_bytes);
    std::memset(data, 0xDD, std::min(num_bytes, kPoisoned));  // so that it is not zero by chance
  }
  // Earlier work on the stream may still use the memory, so the next write must come after it.
  auto* block = new Block{data, num_bytes, device, stream, made_by, made_by, {stream, order.launched(stream)}, {}, {}, owner};
  if (data) blocks[data] = block;
  return {data, block, &free_block, c10::Device(c10::DeviceType::CUDA, c10::DeviceIndex(device))};
}

inline Block* block_of(const at::Tensor& tensor) {
  auto found = blocks.find(tensor.storage().mutable_data());
  return found == blocks.end() ? nullptr : found->second;
}

// Records one operation's use of a tensor, and reports it if its stream does not wait for earlier uses.
inline void touch(const at::Tensor& tensor, bool writes, const std::string& operation, Use use) {
  Block* block = block_of(tensor);
  if (!block) return;
  if (!order.is_ordered(use.stream, block->written))
    report(operation + " on " + name_of(use.stream) + " of what " + block->written_by + " wrote on " + name_of(block->written.stream) +
           ": not told to wait");
  if (writes) {
    for (auto& [stream, at] : block->used)
      if (!order.is_ordered(use.stream, {stream, at}))
        report(operation + " on " + name_of(use.stream) + " writes what " + name_of(stream) + " may still use: not told to wait");
    block->written = use;
    block->written_by = operation;
  }
  block->used[use.stream] = use.at;
}

inline void record_stream(const at::DataPtr& data, Stream stream) {
  std::lock_guard<std::recursive_mutex> hold(lock);
  auto found = blocks.find(data.get());
  if (found != blocks.end()) found->second->recorded.insert(stream);
}

struct Allocator final : c10::DeviceAllocator {
  at::DataPtr allocate(size_t num_bytes) override { return new_block(int64_t(num_bytes), current_device, "empty"); }
  void copy_data(void* to, const void* from, size_t num_bytes) const override { default_copy_data(to, from, num_bytes); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {
    std::lock_guard<std::recursive_mutex> hold(lock);
    for (Card& card : cards) card.reserved = card.live;
  }
  void recordStream(const at::DataPtr& data, c10::Stream stream) override {
    record_stream(data, stream_of(stream.device_index(), int(stream.id())));
  }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex device) override {
    std::lock_guard<std::recursive_mutex> hold(lock);
    c10::CachingDeviceAllocator::DeviceStats stats;
    const Card& card = cards[device];
    for (auto* counted : {&stats.allocated_bytes[0], &stats.active_bytes[0], &stats.requested_bytes[0]})
      counted->current = card.live, counted->peak = card.peak;
    stats.reserved_bytes[0].current = card.reserved;
    stats.reserved_bytes[0].peak = card.peak_reserved;
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex device) override {
    std::lock_guard<std::recursive_mutex> hold(lock);
    cards[device].peak = cards[device].live;
    cards[device].peak_reserved = cards[device].reserved;
  }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex device) override {
    std::lock_guard<std::recursive_mutex> hold(lock);
    return {size_t(cards[device].total - cards[device].reserved), size_t(cards[device].total)};
  }
};
inline Allocator allocator;

}  // namespace pretend
