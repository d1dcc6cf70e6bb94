// broken.h for Python.
#include "broken.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "emulator.h"

namespace py = pybind11;

PYBIND11_MODULE(emulated_broken, module) {
  using emulator::Schedule;
  module.def("names", [] {
    py::list names;
    for (int i = 0; i < broken::kCount; ++i) names.append(broken::kKernels[i].name);
    return names;
  });
  module.def("set_schedule", [](int schedule) { emulator::set_schedule(static_cast<Schedule>(schedule), 1); });
  module.def("run", [](const std::string& name, const py::array_t<float>& in, py::array_t<float>& out) {
    emulator::Arrays arrays;
    arrays.add("in", in.data(), in.nbytes(), sizeof(float), emulator::Access::in);
    arrays.add("out", out.data(), out.nbytes(), sizeof(float), emulator::Access::out);
    for (int i = 0; i < broken::kCount; ++i) {
      if (name != broken::kKernels[i].name) continue;
      const int code = broken::kKernels[i].run(in.data(), out.mutable_data());
      if (code) throw std::runtime_error("launch failed: " + std::to_string(code));
      return;
    }
    throw py::key_error(name);
  });
}
