// Host side of class_map_loss: checks, allocation, library GEMMs around the passes of class_map_loss.h, some images
// after others, so that pooled positions and logits exist of a few only.
#include "class_map_loss.h"

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "classifier_loss.h"
#include "classifier_products.h"
#include "labels.h"
#include "op.h"
#include "rows.h"
#include "workspace.h"

#ifdef IJCKD_CUDA
#include "cuda/classifier_tiles.h"
#include "cuda/stage.h"
#endif

namespace ijckd {
namespace {

// Logits of student and teacher that exist at once, each: on the CPU they stay in the last-level cache between the
// products, on a GPU they are few large launches.
#ifdef IJCKD_SMALL_SIZES  // tests/emulator: several chunks at sizes that a CPU can emulate
constexpr int64_t kMapLogits = 1 << 13;
#elif defined(IJCKD_CUDA)
constexpr int64_t kMapLogits = 1 << 24;
#else
constexpr int64_t kMapLogits = 1 << 17;
#endif

constexpr const char* kOp = "class_map_loss";

// The positions of maps [B, Ct, H, W], of any floating dtype, by their means [P, H*W] A; without means they are pooled
// already, [B, P, Ct] A.
struct Positions {
  Tensor maps;
  OptTensor means;

  int64_t channels() const { return maps.size(means ? 1 : 2); }

  // Of images [first, first + n): [n, P, Ct] A, contiguous.
  Tensor of_images(int64_t first, int64_t n) const {
    const Tensor some = rows_of(maps, first, n);
    if (!means) return some;
    const int64_t Ct = some.size(1), H = some.size(2), W = some.size(3);
    // A map whose positions lie at one distance is read where it is, in either memory format.
    const bool even = H == 1 || W == 1 || some.stride(2) == W * some.stride(3);
    const Tensor whole = even ? some : dense(some);
    const Tensor rows = strided(whole, {n, H * W, Ct}, {whole.stride(0), whole.stride(W > 1 ? 3 : 2), whole.stride(1)});
    const ScalarType acc = means->scalar_type();
    return dense(torch::stable::matmul(*means, rows.scalar_type() == acc ? rows : torch::stable::to(rows, acc)));
  }
};

struct ClassMapTerms {
  Tensor weight;     // [K, Ct]
  OptTensor bias;    // [K]
  Positions x_t;     // the teacher's
  OptTensor labels;  // [B] int64
  OptTensor share;   // [B]
  std::vector<int64_t> scales;
  ClassMapWeights weights;
};

// How many positions the scales have.
int64_t positions(const std::vector<int64_t>& scales) {
  check(!scales.empty(), kOp, ": scales must be 1 or more numbers, got none");
  std::ostringstream list;
  int64_t P = 0, before = 0;
  bool nested = true;
  for (const int64_t s : scales) {
    list << (P > 0 ? ", " : "") << s;
    nested = nested && s > before && scales.back() % std::max<int64_t>(s, 1) == 0;
    before = s, P += s * s;
  }
  check(nested, kOp, ": scales must rise, from 1 or more, and each divide the last, got [", list.str(), "]");
  return P;
}

// Of maps with P positions: B images, Ct channels, or -1 where any will do.
void check_positions(const Positions& x, const char* arg, int64_t P, int64_t B, int64_t Ct) {
  const Tensor& maps = x.maps;
  const bool pooled = maps.dim() == 3 && !x.means, whole = maps.dim() == 4 && x.means;
  bool same = whole || (pooled && maps.size(1) == P);
  same = same && (B < 0 || (maps.size(0) == B && x.channels() == Ct));
  if (!same) {
    std::ostringstream like;
    if (B >= 0) like << ", B = " << B << " and Ct = " << Ct << " like maps";
    fail(kOp, ": ", arg, " must be [B, Ct, H, W], or pooled [B, P, Ct] with P = ", P, " positions of the scales",
         like.str(), ", got ", shape(maps));
  }
  if (!whole) return;
  check(maps.size(2) > 0 && maps.size(3) > 0, kOp, ": ", arg, " must have positions, got ", shape(maps));
  check_shape(x.means, {P, maps.size(2) * maps.size(3)}, kOp, "means", "[P, H*W]");
  check_device(x.means, kOp, "means");
}

void check_terms(const Positions& x, const ClassMapTerms& t) {
  const ClassMapWeights& w = t.weights;
  const int64_t P = positions(t.scales);
  check_positions(x, "maps", P, -1, -1);
  const int64_t B = x.maps.size(0), Ct = x.channels();
  check(t.weight.dim() == 2 && t.weight.size(1) == Ct, kOp, ": weight must be [K, Ct] with Ct = ", Ct,
        " like maps, got ", shape(t.weight));
  const int64_t K = t.weight.size(0);
  check(Ct > 0 && K > 0, kOp, ": channels and classes must not be empty, got ", Ct, " channels and weight ",
        shape(t.weight));
  check_shape(t.bias, {K}, kOp, "bias", "[K]");
  check_positions(t.x_t, "maps_t", P, B, Ct);
  check_shape(t.share, {B}, kOp, "share", "[B]");
  for (const auto& [tensor, arg] :
       {std::pair{OptTensor(t.weight), "weight"}, {t.bias, "bias"}, {t.x_t.maps, "maps_t"}, {t.share, "share"}})
    check_device(tensor, kOp, arg), check_floating(tensor, kOp, arg);
  for (const auto& [number, arg] :
       {std::pair{w.kl, "kl"}, {w.dkd_alpha, "dkd_alpha"}, {w.dkd_beta, "dkd_beta"}, {w.cam, "cam"}})
    check(std::isfinite(number), kOp, ": the weight ", arg, " must be a finite number, got ", number);
  check(w.temperature > 0, kOp, ": temperature must be > 0, got ", w.temperature);
  check(std::isfinite(w.temperature), kOp, ": temperature must be finite, got ", w.temperature);
  if (!w.of_rows()) return;
  check(t.labels.has_value(), kOp, ": kl and DKD need labels");
  check(t.scales.front() == 1, kOp, ": scales must begin with 1 where kl or DKD are on, got ", t.scales.front(),
        ": a position's weight follows from the teacher's answer to the whole map");
}

// What all images need.
struct Images {
  DType dtype;  // T
  int64_t P;
  Positions x;
  ClassMapTerms terms;  // bias and share in A; weight in T
  Tensor dx;            // [B, P, Ct] A  out, if `grad`
  bool grad;
  void* part_rows;  // ClassMapRows'
  void* cam_rows;
};

// Images [first, first + n).
struct Some {
  const Images& all;
  int64_t first, n;

  int64_t rows() const { return n * all.P; }
  int64_t classes() const { return all.terms.weight.size(0); }
  int64_t bytes() const { return accumulator(all.dtype) == DType::f64 ? 8 : 4; }

  // Of the pass over the logits all but these, and the gradient's place.
  ClassMapRows pass() const {
    int64_t* counts = nullptr;
    launched(device_counts(&counts), "the search for class_map_loss's counters");
    const ClassMapTerms& t = all.terms;
    const char* share = static_cast<const char*>(data(t.share));
    const int64_t P = all.P, K = classes(), map = t.scales.back() * t.scales.back();
    ClassMapRows r{};
    r.dtype = r.gradient_dtype = all.dtype;
    r.bias = data(t.bias);
    r.labels = t.labels ? t.labels->const_data_ptr<int64_t>() + first : nullptr;
    r.share = share ? share + first * bytes() : nullptr;
    r.part_rows = static_cast<char*>(all.part_rows) + first * P * kMapCam * bytes();
    r.cam_rows = static_cast<char*>(all.cam_rows) + first * cam_parts(K) * bytes();
    r.counts = counts, r.stride = K, r.B = n, r.P = P, r.K = K, r.map = map, r.weights = t.weights;
    return r;
  }
};

// Any type and shape.
void some_images(const Some& some, const Launch& launch) {
  const Images& all = some.all;
  const DType t = all.dtype, acc = accumulator(t);
  const int64_t Ct = all.x.channels(), K = some.classes(), rows = some.rows();
  const Tensor x = all.x.of_images(some.first, some.n), x_t = all.terms.x_t.of_images(some.first, some.n);
  Workspace memory;
  const auto d = memory.part(rows * Ct, acc), square = memory.part(rows, acc);
  const auto far = memory.part<uint8_t>(rows);
  memory.allocate(x);
  launched(
      feature_diff({acc, x.const_data_ptr(), x_t.const_data_ptr(), memory[d], memory[square], rows, Ct}, launch.stream),
      "class_map_loss's differences");
  const Tensor stack = empty(x, {2 * rows, Ct}, t);
  launched(stack_rows({.dtype = t,
                       .z = x.const_data_ptr(),
                       .d = memory[d],
                       .pooled_t = x_t.const_data_ptr(),
                       .stack = stack.mutable_data_ptr(),
                       .far = memory[far],
                       .B = rows,
                       .Ct = Ct},
                      launch.stream),
           "class_map_loss's rows");
  const Tensor product = to_logits(stack, all.terms.weight);  // [2 rows, K]
  const Tensor logits = rows_of(product, 0, rows);
#ifdef IJCKD_CUDA
  const Tensor gradient = empty(x, {all.grad ? rows : 0, K}, t);  // a block reads the rows of others
#else
  const Tensor gradient = logits;
#endif
  ClassMapRows pass = some.pass();
  pass.logits = logits.const_data_ptr(), pass.delta = rows_of(product, rows, rows).const_data_ptr();
  pass.far = memory[far], pass.gradient = all.grad ? gradient.mutable_data_ptr() : nullptr;
  launched(class_map_rows(pass, launch.stream), "class_map_loss's pass over the logits");
  if (!all.grad) return;
  const Tensor dx = rows_of(all.dx, some.first, some.n);
  const Tensor into = strided(dx, {rows, Ct}, {Ct, 1});
  const Tensor dx_w = times_weight(gradient, all.terms.weight, into);  // [rows, Ct]
  launched(feature_grad({.dtype = t,
                         .dz_w = dx_w.const_data_ptr(),
                         .d = nullptr,
                         .dz = into.mutable_data_ptr(),
                         .B = rows,
                         .Ct = Ct,
                         .batch = all.dx.size(0) * all.P,
                         .fm = 0},
                        launch.stream),
           "class_map_loss's gradient");
}

#ifdef IJCKD_CUDA
// The highest stage whose tiles take them, or 0.
int tile_stage(const Images& all, const Launch& launch) {
  const auto aligned = [](const Tensor& t, uintptr_t bytes) {
    return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % bytes == 0;
  };
  const Tensor& weight = all.terms.weight;
  const auto rows_aligned = [&](const Positions& x) { return x.means || aligned(x.maps, 8); };
  const bool half = all.dtype == DType::bf16 || all.dtype == DType::f16;
  if (!half || weight.size(1) % 8 != 0 || weight.size(0) > INT32_MAX || !aligned(weight, 16) || !rows_aligned(all.x) ||
      !rows_aligned(all.terms.x_t))
    return 0;
  return stage(launch);
}

// By classifier_tiles.h, with float logits.
void some_images_in_tiles(const Some& some, int stage, const Launch& launch) {
  const Images& all = some.all;
  const int64_t Ct = all.x.channels(), K = some.classes(), rows = some.rows(), stride = (K + 7) / 8 * 8;
  const Tensor x = all.x.of_images(some.first, some.n), x_t = all.terms.x_t.of_images(some.first, some.n);
  Workspace memory;
  const auto stack_part = memory.part<uint16_t>(3 * rows * Ct);  // in `dtype`, as the gradient
  const auto square_part = memory.part<float>(rows), square_t_part = memory.part<float>(rows);
  const auto logits_part = memory.part<float>(2 * rows * K);
  const auto gradient_part = memory.part<uint16_t>(all.grad ? rows * stride : 0);
  memory.allocate(x);
  uint16_t *stack = memory[stack_part], *gradient = memory[gradient_part];
  float* logits = memory[logits_part];
  const RowParts squares{nullptr, nullptr, memory[square_part], memory[square_t_part], 1};
  const void* weight = all.terms.weight.const_data_ptr();
  launched(anchor_rows({.dtype = all.dtype,
                        .z = x.const_data_ptr<float>(),
                        .pooled_t = x_t.const_data_ptr<float>(),
                        .anchors = {.weight = weight,
                                    .bias = nullptr,
                                    .labels = nullptr,
                                    .labels_b = nullptr,
                                    .z_t = stack,
                                    .d_t = stack + rows * Ct,
                                    .pooled = stack + 2 * rows * Ct,
                                    .d_split = nullptr,
                                    .rows = squares,
                                    .counts = nullptr,
                                    .K = K},
                        .B = rows,
                        .Ct = Ct},
                       launch.stream),
           "class_map_loss's rows");
  launched(logit_products({.stage = stage,
                           .dtype = all.dtype,
                           .stack = stack,
                           .weight = weight,
                           .logits = logits,
                           .squares = squares,
                           .B = rows,
                           .K = K,
                           .Ct = Ct},
                          launch.stream),
           "class_map_loss's logits");
  ClassMapRows pass = some.pass();
  pass.dtype = DType::f32;
  pass.logits = logits, pass.delta = logits + rows * K, pass.square = squares.fm, pass.square_t = squares.pooled;
  pass.gradient = gradient, pass.stride = stride;
  launched(class_map_rows(pass, launch.stream), "class_map_loss's pass over the logits");
  if (!all.grad) return;
  TimesClassifier product{};
  product.stage = stage, product.dtype = all.dtype, product.grad = true, product.gradient = gradient;
  product.weight = weight, product.dz = rows_of(all.dx, some.first, some.n).mutable_data_ptr<float>();
  product.B = rows, product.K = K, product.Ct = Ct, product.stride = stride;
  product.batch = all.dx.size(0) * all.P;
  launched(times_classifier(product, launch.stream), "class_map_loss's gradient");
}
#endif

std::tuple<Tensor, Tensor, Tensor> class_map_loss(const Tensor& maps, const Tensor& weight, const OptTensor& bias,
                                                  const Tensor& maps_t, const OptTensor& labels, const OptTensor& share,
                                                  const OptTensor& means, const OptTensor& means_t,
                                                  const std::vector<int64_t>& scales,
                                                  const std::vector<double>& numbers, bool grad,
                                                  std::optional<ScalarType> product) {
  check(on_device(maps), kOp, ": maps must be on ", kDevice);
  check(numbers.size() == 5, kOp, ": the loss must be 5 numbers, got ", numbers.size());
  Positions x{maps, means};
  ClassMapTerms terms{weight,
                      bias,
                      {maps_t, means_t},
                      labels,
                      share,
                      scales,
                      {numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]}};
  const DType of_maps = dtype(maps, kOp, "maps");
  check_terms(x, terms);
  const int64_t B = maps.size(0), P = positions(scales), Ct = x.channels(), K = weight.size(0);
  const DType own = dtype(weight, kOp, "weight"), asked = product ? dtype(*product, kOp, "dtype") : own;
  const DType t = product_type(asked), acc = accumulator(t);
  check(accumulator(of_maps) == acc, kOp, ": maps and weight must both be float64 or neither, got ",
        name(maps.scalar_type()), " and ", name(weight.scalar_type()));
  if (terms.labels) terms.labels = dense(*terms.labels);
  check_labels(terms.labels, B, K, kOp, "labels");
  terms.weight = as(as(terms.weight, asked), t);
  terms.bias = as(terms.bias, acc), terms.share = as(terms.share, acc);
  for (Positions* each : {&x, &terms.x_t})
    if (each->means)
      each->means = as(each->means, acc);
    else
      each->maps = as(each->maps, acc);

  const Tensor loss = empty(maps, {}, acc), parts = empty(maps, {kMapParts}, acc);
  const Tensor dx = empty(maps, {grad ? B : 0, P, Ct}, acc);
  Launch launch(maps);
  Workspace memory;
  const auto part_rows = memory.part(kMapCam * B * P, acc), cam_rows = memory.part(B * cam_parts(K), acc);
  memory.allocate(maps);
  const Images images{t, P, x, terms, dx, grad, memory[part_rows], memory[cam_rows]};
  const int64_t most = std::max<int64_t>(1, kMapLogits / (P * K));
#ifdef IJCKD_CUDA
  const int stage = B > 0 ? tile_stage(images, launch) : 0;
#endif
  for (int64_t first = 0; first < B; first += most) {
    const Some some{images, first, std::min(most, B - first)};
#ifdef IJCKD_CUDA
    if (stage > 0) {
      some_images_in_tiles(some, stage, launch);
      continue;
    }
#endif
    some_images(some, launch);
  }
  launched(class_map_sum({.dtype = acc,
                          .part_rows = memory[part_rows],
                          .cam_rows = memory[cam_rows],
                          .loss = loss.mutable_data_ptr(),
                          .parts = parts.mutable_data_ptr(),
                          .B = B,
                          .P = P,
                          .K = K,
                          .map = scales.back() * scales.back(),
                          .weights = terms.weights},
                         launch.stream),
           "class_map_loss's sum");
  return {loss, parts, dx};
}

}  // namespace
}  // namespace ijckd

#ifdef IJCKD_CUDA
STABLE_TORCH_LIBRARY_IMPL(ijckd, CUDA, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(ijckd, CPU, m) {
#endif
  m.impl("class_map_loss", TORCH_BOX(&ijckd::class_map_loss));
}
