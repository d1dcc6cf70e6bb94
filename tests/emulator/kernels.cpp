// The launchers of csrc/cuda for Python: keyword arguments are the structs' members, arrays are numpy's (bfloat16 as its bits).
// Each call tells the emulator which arrays the kernels may read and write.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "classifier_loss.h"
#include "connector_match.h"
#include "controls.h"
#include "rows.h"

namespace py = pybind11;

namespace ijckd {

const char* launch_error(int code);

namespace {

class Call {
 public:
  explicit Call(const py::kwargs& arguments) : arguments_(arguments.attr("copy")()) {}

  DType dtype() {
    const std::string name = take("dtype").cast<std::string>();
    for (const auto& [t, n] : {std::pair{DType::f32, "f32"}, {DType::f64, "f64"}, {DType::bf16, "bf16"}, {DType::f16, "f16"}})
      if (name == n) return t;
    throw py::value_error("dtype must be f32, f64, bf16 or f16, got " + name);
  }
  int64_t integer(const char* name) { return take(name).cast<int64_t>(); }
  double real(const char* name) { return take(name).cast<double>(); }
  bool flag(const char* name) { return take(name).cast<bool>(); }

  const void* in(const char* name) { return array(name, emulator::Access::in); }
  void* out(const char* name) { return array(name, emulator::Access::out); }
  void* inout(const char* name) { return array(name, emulator::Access::inout); }

  Affine affine() { return {in("mean"), in("var"), in("gamma"), in("beta"), real("eps")}; }
  LossWeights weights() { return {real("ce"), real("sr"), real("fm"), real("kl"), real("temperature"), real("label_smoothing")}; }

  // What a launcher returned, as torch's caller would see it.
  void launched(int code) {
    if (py::len(arguments_)) throw py::type_error("not a member: " + py::str(arguments_).cast<std::string>());
    if (code) throw std::runtime_error(std::string("launch failed: ") + launch_error(code));
  }

 private:
  py::object take(const char* name) { return arguments_.attr("pop")(name); }

  void* array(const char* name, emulator::Access access) {
    const py::object value = take(name);
    if (value.is_none()) return nullptr;
    const auto a = value.cast<py::array>();
    if (!(a.flags() & py::array::c_style)) throw py::value_error(std::string(name) + " must be contiguous");
    return arrays_.add(name, a.data(), a.nbytes(), a.itemsize(), access);
  }

  py::dict arguments_;
  emulator::Arrays arrays_;
};

// Members are taken in the order of the braces, which C++ evaluates from left to right.
PYBIND11_MODULE(emulated_kernels, module) {
  bind_controls(module);
  const auto def = [&](const char* name, auto body) {
    module.def(name, [body](const py::kwargs& arguments) {
      Call c(arguments);
      c.launched(body(c));
    });
  };
  def("feature_diff", [](Call& c) {
    return feature_diff(
        {c.dtype(), c.in("z"), c.in("pooled_t"), c.out("d"), c.out("square_rows"), c.integer("B"), c.integer("Ct")}, nullptr);
  });
  def("column_sum", [](Call& c) {
    return column_sum({c.dtype(), c.in("x"), c.out("out"), c.integer("rows"), c.integer("cols"), c.real("scale")}, nullptr);
  });
  def("channel_stats", [](Call& c) {
    return channel_stats({c.dtype(), c.in("y"), c.out("mean"), c.out("var"), c.integer("N"), c.integer("Ct")}, nullptr);
  });
  def("match_forward", [](Call& c) {
    return match_forward(
        {c.dtype(), c.in("y"), c.in("map_t"), c.affine(), c.out("z"), c.out("count"), c.out("yhat"), c.out("square"),
         c.out("res"), c.out("res_yhat"), c.integer("B"), c.integer("P"), c.integer("Ct"), c.flag("relu")},
        nullptr);
  });
  def("channel_grads", [](Call& c) {
    return channel_grads(
        {c.dtype(), c.in("grad_z"), c.in("grad_fm"), c.in("z"), c.in("pooled_t"), c.in("count"), c.in("yhat"), c.in("res"),
         c.in("res_yhat"), c.out("grad_out"), c.out("d_gamma"), c.out("d_beta"), c.integer("B"), c.integer("P"), c.integer("Ct")},
        nullptr);
  });
  def("match_backward", [](Call& c) {
    return match_backward(
        {c.dtype(), c.in("y"), c.in("map_t"), c.affine(), c.in("grad_z"), c.in("grad_fm"), c.in("d_gamma"), c.in("d_beta"),
         c.out("dy"), c.integer("B"), c.integer("P"), c.integer("Ct"), c.real("n_stats"), c.flag("relu")},
        nullptr);
  });
  def("row_loss", [](Call& c) {
    return row_loss(
        {c.dtype(), c.inout("logits"), c.in("bias"), c.in("delta"), c.in("logits_t"), static_cast<const int64_t*>(c.in("labels")),
         static_cast<const int64_t*>(c.in("labels_b")), c.in("mix"), c.out("part_rows"),
         static_cast<int64_t*>(c.out("top1_rows")), c.integer("B"), c.integer("K"), c.weights(), c.flag("grad")},
        nullptr);
  });
  def("loss_sum", [](Call& c) {
    return loss_sum({c.dtype(), c.in("part_rows"), static_cast<const int64_t*>(c.in("top1_rows")), c.out("loss"), c.out("parts"),
                     static_cast<int64_t*>(c.out("top1")), c.integer("B"), c.integer("K"), c.integer("Ct"), c.weights()},
                    nullptr);
  });
  def("feature_grad", [](Call& c) {
    return feature_grad({c.dtype(), c.in("dz_w"), c.in("d"), c.out("dz"), c.integer("B"), c.integer("Ct"), c.real("fm")},
                        nullptr);
  });
}

}  // namespace
}  // namespace ijckd
