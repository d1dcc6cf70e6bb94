// The launchers of csrc/cuda for Python: keyword arguments are the structs' members, arrays are numpy's (bfloat16 as
// its bits). Each call tells the emulator which arrays the kernels may read and write.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "class_map_loss.h"
#include "classifier_loss.h"
#include "connector_match.h"
#include "controls.h"
#include "counts.h"
#include "cuda/block_views.h"
#include "cuda/classifier_tiles.h"
#include "cuda/connector_tiles.h"
#include "cuda/linear_tiles.h"
#include "cuda/product_grads.h"
#include "cuda/stage.h"
#include "rows.h"

namespace py = pybind11;

namespace ijckd {

const char* launch_error(int code);

namespace {

class Call {
 public:
  explicit Call(const py::kwargs& arguments) : arguments_(arguments.attr("copy")()) {}

  DType dtype(const char* member = "dtype") {
    const std::string name = take(member).cast<std::string>();
    for (const auto& [t, n] :
         {std::pair{DType::f32, "f32"}, {DType::f64, "f64"}, {DType::bf16, "bf16"}, {DType::f16, "f16"}})
      if (name == n) return t;
    throw py::value_error("dtype must be f32, f64, bf16 or f16, got " + name);
  }
  int64_t integer(const char* name) { return take(name).cast<int64_t>(); }
  double real(const char* name) { return take(name).cast<double>(); }
  bool flag(const char* name) { return take(name).cast<bool>(); }

  template <typename T>
  const T* in(const char* name) {
    return static_cast<const T*>(in(name));
  }
  template <typename T>
  T* out(const char* name) {
    return static_cast<T*>(out(name));
  }
  template <typename T>
  T* inout(const char* name) {
    return static_cast<T*>(inout(name));
  }
  const void* in(const char* name) {
    const std::string of = name;  // what no launch of an op stores to
    const bool frozen = of == "weight" || of == "bias" || of == "gram";
    return array(name, frozen ? emulator::Access::frozen : emulator::Access::in);
  }
  void* out(const char* name) { return array(name, emulator::Access::out); }
  void* inout(const char* name) { return array(name, emulator::Access::inout); }

  Affine affine() { return {in("mean"), in("var"), in("gamma"), in("beta"), real("eps")}; }
  RowParts row_parts(emulator::Access access) {
    const auto floats = [&](const char* name) { return static_cast<float*>(array(name, access)); };
    return {floats("anchor"), floats("logit_b"), floats("fm_rows"), floats("pooled_rows"), int(integer("row_parts"))};
  }
  Losses losses() {
    return {out<float>("loss"), out<float>("parts"), out<int64_t>("top1"), inout<unsigned long long>("shares"),
            inout<int>("arrived")};
  }
  Anchors anchors() {
    return {in("classifier"),
            in<float>("classifier_bias"),
            in<int64_t>("labels"),
            in<int64_t>("labels_b"),
            out("z_t"),
            out("d_t"),
            out("pooled"),
            out("d_split"),
            row_parts(emulator::Access::out),
            inout<int64_t>("counts"),
            integer("K")};
  }
  TileSums sums(emulator::Access access) {
    const auto floats = [&](const char* name) { return static_cast<float*>(array(name, access)); };
    return {floats("others"),
            floats("logits"),
            floats("best"),
            static_cast<int*>(array("best_class", access)),
            floats("square"),
            int(integer("class_tiles")),
            int(integer("gram_tiles"))};
  }
  LossWeights weights() {
    return {.ce = real("ce"),
            .sr = real("sr"),
            .fm = real("fm"),
            .kl = real("kl"),
            .temperature = real("temperature"),
            .label_smoothing = real("label_smoothing"),
            .hard = real("hard"),
            .ttm = real("ttm"),
            .wttm = real("wttm"),
            .nkd = real("nkd"),
            .ttm_power = real("ttm_power"),
            .nkd_gamma = real("nkd_gamma"),
            .standardize = real("standardize")};
  }

  ClassMapWeights map_weights() {
    return {real("kl"), real("dkd_alpha"), real("dkd_beta"), real("cam"), real("temperature")};
  }

  // "files", a list of arrays, as block_views' table of their addresses and bytes.
  std::pair<const int64_t*, int64_t> files() {
    std::vector<int64_t> table;
    for (const py::handle file : py::list(take("files"))) {
      const auto a = file.cast<py::array>();
      const void* copy = arrays_.add("a file", a.data(), a.nbytes(), a.itemsize(), emulator::Access::in);
      table.insert(table.end(), {int64_t(reinterpret_cast<uintptr_t>(copy)), int64_t(a.nbytes())});
    }
    const size_t bytes = table.size() * sizeof(int64_t);
    return {
        static_cast<const int64_t*>(arrays_.add("files", table.data(), bytes, sizeof(int64_t), emulator::Access::in)),
        int64_t(table.size() / 2)};
  }

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
        {c.dtype(), c.in("z"), c.in("pooled_t"), c.out("d"), c.out("square_rows"), c.integer("B"), c.integer("Ct")},
        nullptr);
  });
  def("column_sum", [](Call& c) {
    return column_sum({c.dtype(), c.in("x"), c.out("out"), c.integer("rows"), c.integer("cols"), c.real("scale")},
                      nullptr);
  });
  def("channel_stats", [](Call& c) {
    return channel_stats({c.dtype(), c.in("y"), c.out("part_mean"), c.out("part_m2"), c.integer("N"), c.integer("Ct")},
                         nullptr);
  });
  def("combine_stats", [](Call& c) {
    return combine_stats({c.dtype(), c.in("part_mean"), c.in("part_m2"), c.out("mean"), c.out("var"), c.integer("N"),
                          c.integer("Ct"), c.integer("rows_per_part")},
                         nullptr);
  });
  def("follow_stats", [](Call& c) {
    return follow_stats({c.dtype(), c.in("mean"), c.in("var"), c.inout("running_mean"), c.inout("running_var"),
                         c.inout<int64_t>("batches"), c.integer("Ct"), c.real("unbiased"), c.real("share")},
                        nullptr);
  });
  def("match_forward", [](Call& c) {
    return match_forward({c.dtype(), c.in("y"), c.in("map_t"), c.affine(), c.out("z"), c.out("count"), c.out("yhat"),
                          c.out("square"), c.out("res"), c.out("res_yhat"), c.out<int>("arrived"), c.integer("B"),
                          c.integer("P"), c.integer("Ct"), c.flag("relu")},
                         nullptr);
  });
  def("match_sums", [](Call& c) {
    return match_sums(
        {c.dtype(), c.in("square"), c.in("res"), c.in("res_yhat"), c.out("res_sum"), c.out("res_yhat_sum"), c.out("fm"),
         c.real("scale"), c.inout<double>("shares"), c.inout<int>("arrived"), c.integer("B"), c.integer("Ct")},
        nullptr);
  });
  def("channel_grads", [](Call& c) {
    return channel_grads({c.dtype(), c.in("grad_z"), c.in("scale"), c.in("grad_fm"), c.in("z"), c.in("pooled_t"),
                          c.in("count"), c.in("yhat"), c.in("res"), c.in("res_yhat"), c.out("grad_out"),
                          c.out("d_gamma"), c.out("d_beta"), c.integer("B"), c.integer("P"), c.integer("Ct")},
                         nullptr);
  });
  def("match_backward", [](Call& c) {
    return match_backward({c.dtype(), c.in("y"), c.in("map_t"), c.affine(), c.in("grad_z"), c.in("grad_fm"),
                           c.in("d_gamma"), c.in("d_beta"), c.out("dy"), c.integer("B"), c.integer("P"),
                           c.integer("Ct"), c.real("n_stats"), c.flag("relu")},
                          nullptr);
  });
  def("row_loss", [](Call& c) {
    return row_loss({c.dtype(), c.inout("logits"), c.in("bias"), c.in("delta"), c.in<uint8_t>("far"), c.in("logits_t"),
                     static_cast<const int64_t*>(c.in("labels")), static_cast<const int64_t*>(c.in("labels_b")),
                     c.in("mix"), c.out("part_rows"), static_cast<int64_t*>(c.out("top1_rows")),
                     c.inout<int64_t>("counts"), c.integer("B"), c.integer("K"), c.weights(), c.flag("grad")},
                    nullptr);
  });
  def("stack_rows", [](Call& c) {
    return stack_rows({c.dtype(), c.in("z"), c.in("d"), c.in("pooled_t"), c.out("stack"), c.out<uint8_t>("far"),
                       c.integer("B"), c.integer("Ct")},
                      nullptr);
  });
  def("take_counts",
      [](Call& c) { return take_counts({c.inout<int64_t>("counts"), static_cast<int64_t*>(c.out("out"))}, nullptr); });
  def("loss_sum", [](Call& c) {
    return loss_sum(
        {c.dtype(), c.in("part_rows"), static_cast<const int64_t*>(c.in("top1_rows")), c.out("loss"), c.out("parts"),
         static_cast<int64_t*>(c.out("top1")), c.integer("B"), c.integer("K"), c.integer("Ct"), c.weights()},
        nullptr);
  });
  def("class_map_rows", [](Call& c) {
    return class_map_rows({c.dtype(),
                           c.dtype("gradient_dtype"),
                           c.in("logits"),
                           c.in("delta"),
                           c.in<uint8_t>("far"),
                           c.in<float>("square"),
                           c.in<float>("square_t"),
                           c.in("bias"),
                           c.in<int64_t>("labels"),
                           c.in("share"),
                           c.out("part_rows"),
                           c.out("cam_rows"),
                           c.inout<int64_t>("counts"),
                           c.out("gradient"),
                           c.integer("stride"),
                           c.integer("B"),
                           c.integer("P"),
                           c.integer("K"),
                           c.integer("map"),
                           c.map_weights()},
                          nullptr);
  });
  def("class_map_sum", [](Call& c) {
    return class_map_sum({c.dtype(), c.in("part_rows"), c.in("cam_rows"), c.out("loss"), c.out("parts"), c.integer("B"),
                          c.integer("P"), c.integer("K"), c.integer("map"), c.map_weights()},
                         nullptr);
  });
  def("anchor_rows", [](Call& c) {
    return anchor_rows(
        {c.dtype(), c.in<float>("z"), c.in<float>("pooled_t"), c.anchors(), c.integer("B"), c.integer("Ct")}, nullptr);
  });
  def("logits_exp", [](Call& c) {
    return logits_exp({int(c.integer("stage")),
                       c.in("z_t"),
                       c.in("weight"),
                       c.in<float>("bias"),
                       c.row_parts(emulator::Access::in),
                       c.in<int64_t>("labels"),
                       c.in<int64_t>("labels_b"),
                       c.out("e"),
                       c.integer("stride_e"),
                       c.sums(emulator::Access::out),
                       int(c.integer("first_tile")),
                       c.in("gram"),
                       c.in("d_split"),
                       c.in<float>("z"),
                       c.in<float>("pooled_t"),
                       c.out<float>("gram_d"),
                       c.out<int>("arrived"),
                       c.integer("B"),
                       c.integer("Ct"),
                       c.integer("first_class"),
                       c.integer("classes")},
                      nullptr);
  });
  def("grad_rows", [](Call& c) {
    return grad_rows({int(c.integer("stage")),
                      c.in("e"),
                      c.in("weight"),
                      c.integer("stride_e"),
                      c.integer("first_class"),
                      c.integer("classes"),
                      c.flag("first"),
                      c.flag("last"),
                      c.flag("grad"),
                      c.inout<float>("dz"),
                      c.out("dz_t"),
                      c.in<float>("weight_sums_in"),
                      c.out<float>("weight_sums_out"),
                      c.sums(emulator::Access::in),
                      c.in("z_t"),
                      c.in<float>("bias"),
                      c.row_parts(emulator::Access::in),
                      c.in<int64_t>("labels"),
                      c.in<int64_t>("labels_b"),
                      c.in<float>("mix"),
                      c.in<float>("z"),
                      c.in<float>("pooled_t"),
                      c.in<float>("gram_d"),
                      c.losses(),
                      c.inout<int64_t>("counts"),
                      c.integer("B"),
                      c.integer("K"),
                      c.integer("Ct"),
                      c.weights()},
                     nullptr);
  });
  def("project_tiles", [](Call& c) {
    return project_tiles({int(c.integer("stage")), c.dtype(), c.in("u"), c.in("weight"), c.out("y"),
                          c.out<float>("mean"), c.out<float>("m2"), c.integer("N"), c.integer("Cs"), c.integer("Ct")},
                         nullptr);
  });
  def("linear_tiles", [](Call& c) {
    return linear_tiles(
        {int(c.integer("stage")), c.dtype(), c.in("u"), c.in("weight"), c.in<float>("bias"), c.in<float>("pooled_t"),
         c.out<float>("z"), c.out<float>("squares"), c.out<float>("fm"), c.flag("anchored") ? c.anchors() : Anchors{},
         c.integer("B"), c.integer("Cs"), c.integer("Ct")},
        nullptr);
  });
  def("linear_grad_tiles", [](Call& c) {
    return linear_grad_tiles(
        {c.dtype(), c.in<float>("grad_z"), c.in<float>("scale"), c.in<float>("grad_fm"), c.in<float>("z"),
         c.in<float>("pooled_t"), c.in("u"), c.in("weight"), c.out("du"), c.out("dweight"), c.flag("float_dweight"),
         c.out<float>("dbias"), c.integer("B"), c.integer("Cs"), c.integer("Ct")},
        nullptr);
  });
  def("product_grads", [](Call& c) {
    return product_grads({int(c.integer("stage")), c.dtype(), c.in("dy"), c.in<float>("scale"), c.in<float>("float_dy"),
                          c.in("u"), c.in("weight"), c.out("du"), c.out("dweight"), c.flag("float_dweight"),
                          c.out<float>("dbias"), c.integer("N"), c.integer("Cs"), c.integer("Ct")},
                         nullptr);
  });
  def("logit_rows", [](Call& c) {
    LogitRows l;
    l.stage = int(c.integer("stage"));
    l.dtype = c.dtype();
    l.stack = c.in("stack");
    l.weight = c.in("weight");
    const int64_t B = c.integer("B"), K = c.integer("K");
    float* logits = c.out<float>("logits");
    l.rows = {DType::f32,
              logits,
              c.in("bias"),
              c.flag("features") ? logits + B * K : nullptr,
              nullptr,
              c.in("logits_t"),
              c.in<int64_t>("labels"),
              c.in<int64_t>("labels_b"),
              c.in("mix"),
              c.out("part_rows"),
              c.out<int64_t>("top1_rows"),
              c.inout<int64_t>("counts"),
              B,
              K,
              c.weights(),
              c.flag("grad")};
    l.squares = c.row_parts(emulator::Access::in);
    l.gradient = c.out("gradient");
    l.arrived = c.out<int>("arrived");
    l.Ct = c.integer("Ct");
    l.stride = c.integer("stride");
    return logit_rows(l, nullptr);
  });
  def("times_classifier", [](Call& c) {
    return times_classifier(
        {int(c.integer("stage")), c.dtype(), c.flag("grad"), c.in("gradient"), c.in("weight"), c.in<float>("z"),
         c.in<float>("pooled_t"), c.out<float>("dz"), c.out("dz_t"), c.in<float>("part_rows"),
         c.row_parts(emulator::Access::in), c.in<int64_t>("top1_rows"), c.losses(), c.integer("B"), c.integer("K"),
         c.integer("Ct"), c.integer("stride"), c.integer("batch"), c.weights()},
        nullptr);
  });
  def("logit_products", [](Call& c) {
    return logit_products({int(c.integer("stage")), c.dtype(), c.in("stack"), c.in("weight"), c.out<float>("logits"),
                           c.row_parts(emulator::Access::in), c.integer("B"), c.integer("K"), c.integer("Ct")},
                          nullptr);
  });
  def("block_views", [](Call& c) {
    BlockViews v;
    std::tie(v.files, v.n_files) = c.files();
    v.rows = c.in<int64_t>("rows");
    v.luma_bits = int(c.integer("luma_bits"));
    v.chroma_bits = int(c.integer("chroma_bits"));
    v.type = static_cast<Pixels>(c.integer("type"));
    for (int k = 0; k < kPlanes; ++k) {
      const std::string place = std::to_string(k);
      v.shift[k] = float(c.real(("shift" + place).c_str()));
      v.scale[k] = float(c.real(("scale" + place).c_str()));
    }
    v.out = c.out("out");
    v.status = c.out<uint8_t>("status");
    v.B = c.integer("B");
    v.S = c.integer("S");
    return block_views(v, nullptr);
  });
  module.def("device_counts", [] {
    int64_t* counts = nullptr;
    const int error = device_counts(&counts);
    return std::pair(error, counts != nullptr);
  });
  module.def("compute_capability", &compute_capability);
  module.def("cam_parts", &cam_parts);
  module.def("class_tile", &class_tile);
  module.def("project_rows", &project_rows);
  module.def("linear_blocks", &linear_blocks);
  module.def("linear_parts", &linear_parts);
  def("feature_grad", [](Call& c) {
    return feature_grad({c.dtype(), c.in("dz_w"), c.in("d"), c.out("dz"), c.integer("B"), c.integer("Ct"),
                         c.integer("batch"), c.real("fm")},
                        nullptr);
  });
}

}  // namespace
}  // namespace ijckd
