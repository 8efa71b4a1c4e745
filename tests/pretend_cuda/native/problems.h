// Problems that are silent on a GPU: written to a file that all processes share, or raised where they occur.
#pragma once

#include <c10/util/Exception.h>
#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <mutex>
#include <string>
#include <unordered_set>

namespace pretend {

inline std::recursive_mutex lock;  // guards all state of the library; code that waits for Python must not hold it
inline std::string setting(const char* name) { const char* value = std::getenv(name); return value ? value : ""; }

inline std::unordered_set<std::string> told;

// Reports each text once for each process, or each test.
inline void report(const std::string& text) {
  static const std::string path = setting("PRETEND_CUDA_PROBLEMS");
  static const bool is_strict = !setting("PRETEND_CUDA_STRICT").empty();
  TORCH_CHECK(!is_strict, "pretended CUDA: ", text);
  if (path.empty() || !told.insert(text).second) return;
  std::string line = "process " + std::to_string(getpid()) + ": " + text + "\n";
  int file = open(path.c_str(), O_WRONLY | O_APPEND | O_CREAT, 0644);
  if (file < 0 || write(file, line.data(), line.size()) < 0) std::abort();
  close(file);
}

inline std::atomic<bool> is_lost{false};

inline std::string read(const std::string& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

// Fails every call, for good, once the GPU is lost: as after an illegal access, or when a GPU fell off the bus.
// The file that PRETEND_CUDA_LOST names has a part of the command line of the processes whose GPU is lost.
inline void check_lost() {
  static const std::string path = setting("PRETEND_CUDA_LOST");
  if (!is_lost && !path.empty() && access(path.c_str(), F_OK) == 0) {
    std::string who = read(path);
    is_lost = !who.empty() && read("/proc/self/cmdline").find(who) != std::string::npos;
  }
  if (is_lost) throw c10::AcceleratorError({__func__, __FILE__, __LINE__}, 700, "CUDA error: an illegal memory access was encountered");
}

}  // namespace pretend
