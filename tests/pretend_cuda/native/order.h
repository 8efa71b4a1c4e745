// What has run before what: launches are counted per stream, and every stream knows up to where it waits for others.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <unordered_map>

#include "problems.h"

namespace pretend {

constexpr int kNumDevices = 8, kNumStreams = 64;  // torch too hands out some 32 streams again and again
using Stream = int;                               // of all devices: 64 x its device + its number; number 0 is the default stream
using Clock = int64_t;                            // the how-many-th launch of its stream
using Clocks = std::map<Stream, Clock>;           // up to where: what an event is

inline thread_local int current_device = 0;
inline thread_local int current_stream[kNumDevices] = {};
inline Stream stream_of(int device, int number) { return device * kNumStreams + number; }
inline Stream stream_of(int device) { return stream_of(device, current_stream[device]); }
inline std::string name_of(Stream stream) {
  return "stream " + std::to_string(stream % kNumStreams) + " of GPU " + std::to_string(stream / kNumStreams);
}

struct Use {
  Stream stream = -1;
  Clock at = 0;
};

class Order {
 public:
  Clock launch(Stream stream) { return ++launched_[stream]; }
  Clock launched(Stream stream) { return launched_[stream]; }

  // What is done once all is done that is on the stream now.
  Clocks reached(Stream stream) {
    Clocks event = waits_[stream];
    event[stream] = launched_[stream];
    return event;
  }

  void wait(Stream stream, const Clocks& event) { merge(waits_[stream], event); }

  // The host knows that this is done.
  void complete(const Clocks& event) { merge(completed_, event); }

  bool is_complete(Use use) { return completed_[use.stream] >= use.at; }

  // Whether a launch on the stream comes after that use for sure.
  bool is_ordered(Stream stream, Use before) {
    return before.stream < 0 || before.stream == stream || is_complete(before) || waits_[stream][before.stream] >= before.at;
  }

 private:
  static void merge(Clocks& into, const Clocks& from) {
    for (auto& [stream, at] : from) into[stream] = std::max(into[stream], at);
  }

  std::unordered_map<Stream, Clock> launched_;
  std::unordered_map<Stream, Clocks> waits_;
  Clocks completed_;
};

inline Order order;
inline int num_streams_taken = 0;

inline int new_stream() {
  std::lock_guard<std::recursive_mutex> hold(lock);
  return 1 + num_streams_taken++ % (kNumStreams - 1);
}

}  // namespace pretend
