#include "cuda/tiled_loss.h"

#include <algorithm>

#include "counts.h"
#include "cuda/classifier_tiles.h"
#include "cuda/linear_tiles.h"
#include "cuda/stage.h"

namespace ijckd {
namespace {

#ifdef IJCKD_SMALL_SIZES  // tests/emulator: several chunks at sizes that a CPU can emulate
constexpr int64_t kWhole = 1 << 12, kChunk = 1 << 11, kLeastClasses = 72, kRowPass = 1 << 20;
#else
constexpr int64_t kWhole =
    1 << 24;  // exponentials up to which all classes are one chunk: 32 MiB, most of a large GPU's L2
constexpr int64_t kChunk =
    1 << 23;  // exponentials in a chunk: with their rows of W they stay in L2 between the two GEMMs
constexpr int64_t kLeastClasses = 1024;  // in a chunk
// Operations of the tensor cores that take about as long as the pass over rows of logits which the anchored way spares:
// by arithmetic (5 us, 200 TFLOP/s in products that small), not yet measured.
constexpr int64_t kRowPass = 1 << 30;
#endif
constexpr int64_t kMostLogits = 1 << 23;  // float logits that are kept where whole rows of them are needed: 32 MiB

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

bool aligned(const OptTensor& t, uintptr_t bytes) {
  return !t || reinterpret_cast<uintptr_t>(t->const_data_ptr()) % bytes == 0;
}

template <typename T>
T* out(const OptTensor& t) {
  return t ? static_cast<T*>(t->mutable_data_ptr()) : nullptr;
}

template <typename T>
const T* in(const OptTensor& t) {
  return static_cast<const T*>(data(t));
}

Losses losses(const TiledLoss& t) { return {out<float>(t.loss), out<float>(t.parts), out<int64_t>(t.top1)}; }

// Into how many parts the first launch cuts its sums over a row's channels.
int first_parts(const TiledLoss& t, int stage) {
  return t.projection ? static_cast<int>(linear_parts(stage, t.terms.labels.size(0), t.terms.weight.size(1))) : 1;
}

// What each row needs before the GEMMs, of z [B, Ct], or with the projection that makes it.
void first_launch(const TiledLoss& t, int stage, DType type, const Tensor& z, const Anchors& anchors,
                  const Launch& launch) {
  const int64_t B = z.size(0), Ct = z.size(1);
  const float* pooled_t = in<float>(t.terms.pooled_t);
  if (t.projection)
    launched(linear_tiles({.stage = stage,
                           .dtype = type,
                           .u = torch::stable::contiguous(t.projection->u).const_data_ptr(),
                           .weight = torch::stable::contiguous(t.projection->weight).const_data_ptr(),
                           .bias = in<float>(t.projection->bias),
                           .pooled_t = pooled_t,
                           .z = z.mutable_data_ptr<float>(),
                           .squares = nullptr,
                           .fm = nullptr,
                           .anchors = anchors,
                           .B = B,
                           .Cs = t.projection->u.size(2),
                           .Ct = Ct},
                          launch.stream),
             "classifier_loss's projection");
  else
    launched(anchor_rows({type, in<float>(z), pooled_t, anchors, B, Ct}, launch.stream),
             "classifier_loss's first pass over z");
}

// The anchored way (classifier_tiles.h).
void anchored(const TiledLoss& t, int stage, int64_t* counts, const Launch& launch) {
  const int64_t B = t.terms.labels.size(0), Ct = t.terms.weight.size(1), K = t.terms.weight.size(0);
  const Tensor z = t.z ? *t.z : empty(t.terms.weight, {B, Ct}, DType::f32);
  const bool match = t.terms.weights.sr != 0,
             smoothing = t.terms.weights.ce != 0 && t.terms.weights.label_smoothing != 0;
  const int64_t size = B * K <= kWhole ? K : std::min(K, std::max(kChunk / B / 128 * 128, kLeastClasses));
  const int64_t stride_e = round_up(size, 8);

  const int parts = first_parts(t, stage);
  const Tensor z_t = empty(z, {B, Ct}, DType::bf16), sums_of_rows = empty(z, {3, parts, B}, DType::f32);
  float* anchor = sums_of_rows.mutable_data_ptr<float>();
  const RowParts rows{anchor, anchor + parts * B, t.terms.pooled_t ? anchor + 2 * parts * B : nullptr, nullptr, parts};
  OptTensor d_split, gram_d, e, weight_sums;
  if (match) d_split = empty(z, {2, B, Ct}, DType::bf16), gram_d = empty(z, {B, Ct}, DType::f32);
  if (t.grad) e = empty(z, {B, stride_e}, DType::bf16);
  if (t.grad && smoothing) weight_sums = empty(z, {2, Ct}, DType::f32);

  const auto tiles = [&](int64_t classes) {
    const int width = class_tile(stage, B, classes);
    return static_cast<int>((classes + width - 1) / width);
  };
  int class_tiles = 0;
  for (int64_t k = 0; k < K; k += size) {
    const int64_t n = std::min(size, K - k);
    class_tiles += tiles(n);
  }
  const int64_t first_tile_width = class_tile(stage, B, size);
  const int gram_tiles = match ? static_cast<int>((Ct + first_tile_width - 1) / first_tile_width) : 0;
  const Tensor sums = empty(z, {3, class_tiles, B}, DType::f32);  // others, logits, best
  const Tensor classes = torch::stable::new_empty(z, {class_tiles, B}, ScalarType::Int);
  const Tensor square = empty(z, {gram_tiles, B}, DType::f32);
  float* others = sums.mutable_data_ptr<float>();
  const int64_t of_tiles = class_tiles * B;
  const TileSums tile_sums{others,
                           smoothing ? others + of_tiles : nullptr,
                           others + 2 * of_tiles,
                           static_cast<int*>(classes.mutable_data_ptr()),
                           match ? square.mutable_data_ptr<float>() : nullptr,
                           class_tiles,
                           gram_tiles};

  const int64_t* labels = in<int64_t>(t.terms.labels);
  const int64_t* labels_b = in<int64_t>(t.terms.labels_b);
  const Anchors anchors{data(t.terms.weight),
                        in<float>(t.terms.bias),
                        labels,
                        labels_b,
                        z_t.mutable_data_ptr(),
                        nullptr,
                        nullptr,
                        out<void>(d_split),
                        rows,
                        counts,
                        K};
  first_launch(t, stage, DType::bf16, z, anchors, launch);
  int tile = 0;
  for (int64_t k = 0, chunk = 0; k < K; k += size, ++chunk) {
    const int64_t n = std::min(size, K - k);
    const bool first = k == 0, last = k + n == K, gram_here = match && first;
    launched(logits_exp({.stage = stage,
                         .z_t = z_t.const_data_ptr(),
                         .weight = data(t.terms.weight),
                         .bias = in<float>(t.terms.bias),
                         .rows = rows,
                         .labels = labels,
                         .labels_b = labels_b,
                         .e = out<void>(e),
                         .stride_e = round_up(n, 8),
                         .sums = tile_sums,
                         .first_tile = tile,
                         .gram = gram_here ? data(t.terms.gram) : nullptr,
                         .d_split = data(d_split),
                         .z = in<float>(z),
                         .pooled_t = in<float>(t.terms.pooled_t),
                         .gram_d = out<float>(gram_d),
                         .B = B,
                         .Ct = Ct,
                         .first_class = k,
                         .classes = n},
                        launch.stream),
             "classifier_loss's logits");
    tile += tiles(n);
    if (!t.grad && !last) continue;
    float* so_far = out<float>(weight_sums);  // two rows, written and read in turn
    launched(grad_rows({.stage = stage,
                        .e = data(e),
                        .weight = data(t.terms.weight),
                        .stride_e = round_up(n, 8),
                        .first_class = k,
                        .classes = n,
                        .first = first,
                        .last = last,
                        .grad = t.grad,
                        .dz = out<float>(t.dz),
                        .dz_t = nullptr,
                        .weight_sums_in = so_far && !first ? so_far + (chunk - 1) % 2 * Ct : nullptr,
                        .weight_sums_out = so_far && !last ? so_far + chunk % 2 * Ct : nullptr,
                        .sums = tile_sums,
                        .z_t = z_t.const_data_ptr(),
                        .bias = in<float>(t.terms.bias),
                        .rows = rows,
                        .labels = labels,
                        .labels_b = labels_b,
                        .mix = in<float>(t.terms.mix),
                        .z = in<float>(z),
                        .pooled_t = in<float>(t.terms.pooled_t),
                        .gram_d = in<float>(gram_d),
                        .losses = losses(t),
                        .counts = counts,
                        .B = B,
                        .K = K,
                        .Ct = Ct,
                        .weights = t.terms.weights},
                       launch.stream),
             "classifier_loss's gradient");
  }
}

// That with whole rows of logits, in float.
void whole_rows(const TiledLoss& t, int stage, int64_t* counts, const Launch& launch) {
  const int64_t B = t.terms.labels.size(0), Ct = t.terms.weight.size(1), K = t.terms.weight.size(0),
                stride = round_up(K, 8);
  const Tensor z = t.z ? *t.z : empty(t.terms.weight, {B, Ct}, DType::f32);
  const DType type = dtype(t.terms.weight, "classifier_loss", "weight");
  const bool match = t.terms.match(), features = match && !t.terms.logits_t;
  // The KL alone needs the teacher's logits, which d does not give where it is large beside pooled_t.
  const bool either = features && t.terms.weights.kl != 0;
  // z's rows, then d's and pooled_t's: one product reads W once for all
  const int64_t stacked = (1 + features + either) * B;
  const int parts = first_parts(t, stage);
  const Tensor stack = empty(z, {stacked, Ct}, type), logits = empty(z, {(1 + features) * B, K}, DType::f32);
  const Tensor part_rows = empty(z, {kParts, B}, DType::f32), hits = torch::stable::new_empty(z, {B}, ScalarType::Long);
  OptTensor logits_t, squares;
  if (match && !features) logits_t = as(*t.terms.logits_t, DType::f32);
  if (t.terms.pooled_t) squares = empty(z, {2, parts, B}, DType::f32);
  char* z_t = static_cast<char*>(stack.mutable_data_ptr());
  float* l = logits.mutable_data_ptr<float>();
  float* fm = out<float>(squares);
  const RowParts rows{nullptr, nullptr, fm, either ? fm + parts * B : nullptr, parts};
  first_launch(t, stage, type, z,
               {.weight = data(t.terms.weight),
                .bias = nullptr,
                .labels = in<int64_t>(t.terms.labels),
                .labels_b = nullptr,
                .z_t = z_t,
                .d_t = features ? z_t + B * Ct * 2 : nullptr,
                .pooled = either ? z_t + 2 * B * Ct * 2 : nullptr,
                .d_split = nullptr,
                .rows = rows,
                .counts = nullptr,
                .K = K},
               launch);
  OptTensor gradient;
  if (t.grad) gradient = empty(z, {B, stride}, type);
  launched(logit_rows({.stage = stage,
                       .dtype = type,
                       .stack = z_t,
                       .weight = data(t.terms.weight),
                       .rows = {.dtype = DType::f32,
                                .logits = l,
                                .bias = data(t.terms.bias),
                                .delta = features ? l + B * K : nullptr,
                                .far = nullptr,
                                .logits_t = data(logits_t),
                                .labels = in<int64_t>(t.terms.labels),
                                .labels_b = in<int64_t>(t.terms.labels_b),
                                .mix = data(t.terms.mix),
                                .part_rows = part_rows.mutable_data_ptr(),
                                .top1_rows = out<int64_t>(hits),
                                .counts = counts,
                                .B = B,
                                .K = K,
                                .weights = t.terms.weights,
                                .grad = t.grad},
                       .squares = rows,
                       .gradient = out<void>(gradient),
                       .Ct = Ct,
                       .stride = stride},
                      launch.stream),
           "classifier_loss's logits");
  launched(times_classifier({.stage = stage,
                             .dtype = type,
                             .grad = t.grad,
                             .gradient = data(gradient),
                             .weight = data(t.terms.weight),
                             .z = in<float>(z),
                             .pooled_t = in<float>(t.terms.pooled_t),
                             .dz = out<float>(t.dz),
                             .dz_t = nullptr,
                             .part_rows = in<float>(part_rows),
                             .rows = rows,
                             .top1_rows = in<int64_t>(hits),
                             .losses = losses(t),
                             .B = B,
                             .K = K,
                             .Ct = Ct,
                             .stride = stride,
                             .weights = t.terms.weights},
                            launch.stream),
           "classifier_loss's gradient");
}

}  // namespace

bool tiled_loss(const TiledLoss& t, const Launch& launch) {
  const int64_t B = t.terms.labels.size(0), Ct = t.terms.weight.size(1), K = t.terms.weight.size(0);
  const bool bf16 = t.terms.weight.scalar_type() == ScalarType::BFloat16,
             half = bf16 || t.terms.weight.scalar_type() == ScalarType::Half;
  if (B == 0 || !half || Ct % 8 != 0 || K > INT32_MAX || !aligned(t.terms.weight, 16) || !aligned(t.terms.gram, 16) ||
      !aligned(t.z, 8) || !aligned(t.terms.pooled_t, 8))
    return false;
  const int tile_stage = stage(launch);
  if (tile_stage == 0) return false;
  const bool few = B * K <= kMostLogits, match = t.terms.weights.sr != 0;
  // By G the logit match costs three products of Ct columns, by the logits' own difference one of K.
  const bool by_gram = t.terms.gram && !t.terms.logits_t && (!few || 2 * B * Ct * (3 * Ct - K) < kRowPass);
  const bool by_anchor = bf16 && t.terms.weights.kl == 0 && (!match || by_gram);
  if (!by_anchor && !few) return false;
  int64_t* counts = nullptr;
  launched(device_counts(&counts), "the search for classifier_loss's counters");
  TiledLoss served = t;
  if (t.projection &&
      (t.projection->u.scalar_type() != t.terms.weight.scalar_type() || !linear_stage(*t.projection, {}, launch)))
    served.z = projected(*t.projection), served.projection.reset();
  if (by_anchor)
    anchored(served, tile_stage, counts, launch);
  else
    whole_rows(served, tile_stage, counts, launch);
  return true;
}

}  // namespace ijckd
