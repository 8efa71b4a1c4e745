// The order of launches: they are counted for each stream, and every stream has the launch of each other stream that it waits for.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <unordered_map>

#include "problems.h"

namespace pretend {

constexpr int kNumDevices = 8, kNumStreams = 64;  // torch, too, reuses a pool of some 32 streams
using Stream = int;                               // 64 x its device + its number; number 0 is the default stream
using Clock = int64_t;                            // the number of a launch in its stream
using Clocks = std::map<Stream, Clock>;           // an event: the last launch of each stream that it covers

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

  // Returns the launches that are done once everything on the stream at this time is done.
  Clocks reached(Stream stream) {
    Clocks event = waits_[stream];
    event[stream] = launched_[stream];
    return event;
  }

  void wait(Stream stream, const Clocks& event) { merge(waits_[stream], event); }

  // Records that the host knows that the event is done.
  void complete(const Clocks& event) { merge(completed_, event); }

  bool is_complete(Use use) { return completed_[use.stream] >= use.at; }

  // Whether a launch on the stream surely comes after that use.
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
