#pragma once
// emulator.h's switches and counts for Python, the same in every module.
#include <pybind11/pybind11.h>

#include "emulator.h"

inline void bind_controls(pybind11::module_& module) {
  namespace py = pybind11;
  using emulator::Async;
  using emulator::Counts;
  using emulator::Schedule;
  py::enum_<Schedule>(module, "Schedule", py::module_local())
      .value("forward", Schedule::forward)
      .value("reverse", Schedule::reverse)
      .value("greedy", Schedule::greedy)
      .value("greedy_reverse", Schedule::greedy_reverse)
      .value("random", Schedule::random);
  py::enum_<Async>(module, "Async", py::module_local()).value("lazy", Async::lazy).value("eager", Async::eager);
  py::class_<Counts>(module, "Counts", py::module_local())
      .def_readonly("launches", &Counts::launches)
      .def_readonly("questions", &Counts::questions)
      .def_readonly("maps", &Counts::maps)
      .def_readonly("copies", &Counts::copies)
      .def_readonly("load_matrix", &Counts::load_matrix)
      .def_readonly("multiply_add", &Counts::multiply_add)
      .def_readonly("bank_conflicts", &Counts::bank_conflicts)
      .def_readonly("tile_copies", &Counts::tile_copies)
      .def_readonly("warpgroup_multiply_add", &Counts::warpgroup_multiply_add);
  module.def("set_schedule", &emulator::set_schedule, py::arg("schedule"), py::arg("seed") = 1);
  module.def("set_async", &emulator::set_async);
  module.def("set_device", &emulator::set_device);
  module.def("refuse", &emulator::refuse);
  module.def("refused", &emulator::refused);
  module.def("capture_mode", &emulator::capture_mode);
  module.def("last_error", &emulator::last_error);
  module.def("counts", [] { return emulator::counts(); });
  module.def("clear_counts", &emulator::clear_counts);
}
