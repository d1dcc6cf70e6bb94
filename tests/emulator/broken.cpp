// broken.h for Python.
#include "broken.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "controls.h"

namespace py = pybind11;

namespace {

template <typename Entry>
py::list names(const Entry* entries, int count) {
  py::list names;
  for (int i = 0; i < count; ++i) names.append(entries[i].name);
  return names;
}

template <typename Entry, typename... Args>
void run(const Entry* entries, int count, const std::string& name, Args... args) {
  const Entry* entry = std::find_if(entries, entries + count, [&](const Entry& e) { return name == e.name; });
  if (entry == entries + count) throw py::key_error(name);
  const int code = entry->run(args...);
  if (code) throw std::runtime_error("launch failed: " + std::to_string(code));
}

template <typename T = void>
T* add(emulator::Arrays& arrays, const char* name, const py::array& a, emulator::Access access) {
  return static_cast<T*>(arrays.add(name, a.data(), a.nbytes(), a.itemsize(), access));
}

}  // namespace

PYBIND11_MODULE(emulated_broken, module) {
  using emulator::Access;
  bind_controls(module);
  const auto define_kernels = [&](const char* list, const char* runner, const broken::Kernel* kernels, int count) {
    module.def(list, [=] { return names(kernels, count); });
    module.def(runner, [=](const std::string& name, const py::array_t<float>& in, py::array_t<float>& out) {
      emulator::Arrays arrays;
      const float* from = add<float>(arrays, "in", in, Access::in);
      run(kernels, count, name, from, add<float>(arrays, "out", out, Access::out));
    });
  };
  define_kernels("names", "run", broken::kKernels, broken::kCount);
  define_kernels("group_names", "run_group", broken::kGroups, broken::kGroupCount);
  const auto define_tiles = [&](const char* list, const char* runner, const broken::Tile* tiles, int count) {
    module.def(list, [=] { return names(tiles, count); });
    module.def(runner, [=](const std::string& name, const py::array& a, const py::array& b, py::array_t<float>& out) {
      emulator::Arrays arrays;
      const void *from_a = add(arrays, "a", a, Access::in), *from_b = add(arrays, "b", b, Access::in);
      const auto size = [](const py::array& of, int dimension) { return static_cast<int>(of.shape(dimension)); };
      run(tiles, count, name, from_a, from_b, add<float>(arrays, "out", out, Access::out), size(out, 0), size(out, 1),
          size(a, 1));
    });
  };
  define_tiles("tile_names", "run_tile", broken::kTiles, broken::kTileCount);
  define_tiles("hopper_names", "run_hopper", broken::kHopperTiles, broken::kHopperTileCount);
  define_tiles("ring_names", "run_ring", broken::kRings, broken::kRingCount);
}
