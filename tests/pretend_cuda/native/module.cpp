// A simulated CUDA device in torch's CPU-only build: see ../__init__.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "device.h"
#include "operations.h"

PYBIND11_MODULE(pretend_cuda_native, m) {
  using namespace pretend;
  namespace py = pybind11;
  using NoGil = py::call_guard<py::gil_scoped_release>;
  c10::SetAllocator(c10::DeviceType::CUDA, &allocator, 9);
  m.def("set_cards", [](const std::vector<std::string>& names, int64_t total) {
    num_devices = int(names.size());
    for (int i = 0; i < num_devices; ++i) cards[i].name = names[i], cards[i].total = total;
  }, NoGil());
  m.def("num_devices", [] { return num_devices; });
  m.def("card", [](int device) { return cards[device].name; });
  m.def("memory", [](int device) {
    std::lock_guard<std::recursive_mutex> hold(lock);
    const Card& card = cards[device];
    return std::map<std::string, int64_t>{{"allocated", card.live}, {"peak_allocated", card.peak}, {"reserved", card.reserved},
                                          {"peak_reserved", card.peak_reserved}, {"total", card.total}};
  }, NoGil());
  m.def("set_fraction", [](int device, double fraction) {
    std::lock_guard<std::recursive_mutex> hold(lock);
    cards[device].fraction = fraction;
  }, NoGil());
  m.def("empty_cache", [] { allocator.emptyCache({0, 0}); }, NoGil());
  m.def("reset_peaks", [](int device) { allocator.resetPeakStats(c10::DeviceIndex(device)); }, NoGil());
  m.def("forget_problems", [] {
    std::lock_guard<std::recursive_mutex> hold(lock);
    told.clear();
  }, NoGil());
  m.def("lose", [](bool lost) { is_lost = lost; }, py::arg("lost") = true);
}
