#include "cuda/tiled_loss.h"

#include <algorithm>

#include "counts.h"
#include "cuda/classifier_tiles.h"
#include "cuda/linear_tiles.h"
#include "cuda/stage.h"
#include "workspace.h"

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

Losses losses(const TiledLoss& t, unsigned long long* shares, int* arrived) {
  return {out<float>(t.loss), out<float>(t.parts), out<int64_t>(t.top1), shares, arrived};
}

// Into how many parts the first launch cuts its sums over a row's channels.
int first_parts(const TiledLoss& t, int stage) {
  return t.projection ? static_cast<int>(linear_parts(stage, t.terms.labels.size(0), t.terms.weight.size(1))) : 1;
}

// What each row needs before the GEMMs, of t.z, or with the projection that makes it: `made` [B, Ct].
void first_launch(const TiledLoss& t, int stage, DType type, float* made, const Anchors& anchors,
                  const Launch& launch) {
  const int64_t B = t.terms.labels.size(0), Ct = t.terms.weight.size(1);
  const float* pooled_t = in<float>(t.terms.pooled_t);
  if (t.projection)
    launched(linear_tiles({.stage = stage,
                           .dtype = type,
                           .u = data(t.projection->u),
                           .weight = data(t.projection->weight),
                           .bias = in<float>(t.projection->bias),
                           .pooled_t = pooled_t,
                           .z = made,
                           .squares = nullptr,
                           .fm = nullptr,
                           .anchors = anchors,
                           .B = B,
                           .Cs = t.projection->u.size(2),
                           .Ct = Ct},
                          launch.stream),
             "classifier_loss's projection");
  else
    launched(anchor_rows({type, in<float>(t.z), pooled_t, anchors, B, Ct}, launch.stream),
             "classifier_loss's first pass over z");
}

// The anchored way (classifier_tiles.h).
void anchored(const TiledLoss& t, int stage, int64_t* counts, const Launch& launch) {
  const int64_t B = t.terms.labels.size(0), Ct = t.terms.weight.size(1), K = t.terms.weight.size(0);
  const bool match = t.terms.weights.sr != 0,
             smoothing = t.terms.weights.ce != 0 && t.terms.weights.label_smoothing != 0;
  const int64_t size = B * K <= kWhole ? K : std::min(K, std::max(kChunk / B / 128 * 128, kLeastClasses));
  const int64_t stride_e = round_up(size, 8);
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
  const int parts = first_parts(t, stage);

  Workspace memory;
  const auto z_part = memory.part<float>(t.z ? 0 : B * Ct);
  const auto z_t_part = memory.part<uint16_t>(B * Ct);  // bfloat16, as d_split and e
  const auto anchor_part = memory.part<float>(parts * B), logit_b_part = memory.part<float>(parts * B);
  const auto fm_part = memory.part<float>(t.terms.pooled_t ? parts * B : 0);
  const auto d_split_part = memory.part<uint16_t>(match ? 2 * B * Ct : 0);
  const auto gram_d_part = memory.part<float>(match ? B * Ct : 0);
  const auto e_part = memory.part<uint16_t>(t.grad ? B * stride_e : 0);
  const auto weight_sums_part = memory.part<float>(t.grad && smoothing && size < K ? 2 * Ct : 0);
  const int64_t of_tiles = class_tiles * B;
  const auto others_part = memory.part<float>(of_tiles), logits_part = memory.part<float>(smoothing ? of_tiles : 0);
  const auto best_part = memory.part<float>(of_tiles);
  const auto best_class_part = memory.part<int>(of_tiles);
  const auto square_part = memory.part<float>(gram_tiles * B);
  const auto shares_part = memory.part<unsigned long long>(kLossShares);
  const auto arrived_part = memory.part<int>(1);
  memory.allocate(t.terms.weight);

  float* made = memory[z_part];
  const float* z = t.z ? in<float>(t.z) : made;
  uint16_t *z_t = memory[z_t_part], *d_split = memory[d_split_part], *e = memory[e_part];
  float *gram_d = memory[gram_d_part], *weight_sums = memory[weight_sums_part];
  const RowParts rows{memory[anchor_part], memory[logit_b_part], memory[fm_part], nullptr, parts};
  const TileSums tile_sums{memory[others_part], memory[logits_part], memory[best_part], memory[best_class_part],
                           memory[square_part], class_tiles,         gram_tiles};

  const int64_t* labels = in<int64_t>(t.terms.labels);
  const int64_t* labels_b = in<int64_t>(t.terms.labels_b);
  const Anchors anchors{
      data(t.terms.weight), in<float>(t.terms.bias), labels, labels_b, z_t, nullptr, nullptr, d_split, rows, counts, K};
  first_launch(t, stage, DType::bf16, made, anchors, launch);
  int tile = 0;
  for (int64_t k = 0, chunk = 0; k < K; k += size, ++chunk) {
    const int64_t n = std::min(size, K - k);
    const bool first = k == 0, last = k + n == K, gram_here = match && first;
    launched(logits_exp({.stage = stage,
                         .z_t = z_t,
                         .weight = data(t.terms.weight),
                         .bias = in<float>(t.terms.bias),
                         .rows = rows,
                         .labels = labels,
                         .labels_b = labels_b,
                         .e = e,
                         .stride_e = round_up(n, 8),
                         .sums = tile_sums,
                         .first_tile = tile,
                         .gram = gram_here ? data(t.terms.gram) : nullptr,
                         .d_split = d_split,
                         .z = z,
                         .pooled_t = in<float>(t.terms.pooled_t),
                         .gram_d = gram_d,
                         .arrived = memory[arrived_part],
                         .B = B,
                         .Ct = Ct,
                         .first_class = k,
                         .classes = n},
                        launch.stream),
             "classifier_loss's logits");
    tile += tiles(n);
    if (!t.grad && !last) continue;
    // of weight_sums two rows, written and read in turn
    launched(grad_rows({.stage = stage,
                        .e = e,
                        .weight = data(t.terms.weight),
                        .stride_e = round_up(n, 8),
                        .first_class = k,
                        .classes = n,
                        .first = first,
                        .last = last,
                        .grad = t.grad,
                        .dz = out<float>(t.dz),
                        .dz_t = out<void>(t.dz_t),
                        .weight_sums_in = weight_sums && !first ? weight_sums + (chunk - 1) % 2 * Ct : nullptr,
                        .weight_sums_out = weight_sums && !last ? weight_sums + chunk % 2 * Ct : nullptr,
                        .sums = tile_sums,
                        .z_t = z_t,
                        .bias = in<float>(t.terms.bias),
                        .rows = rows,
                        .labels = labels,
                        .labels_b = labels_b,
                        .mix = in<float>(t.terms.mix),
                        .z = z,
                        .pooled_t = in<float>(t.terms.pooled_t),
                        .gram_d = gram_d,
                        .losses = losses(t, memory[shares_part], memory[arrived_part]),
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
  const DType type = dtype(t.terms.weight, "classifier_loss", "weight");
  const bool match = t.terms.match(), features = match && !t.terms.logits_t;
  // All but the logit match need the teacher's logits, which d does not give where it is large beside pooled_t.
  const bool either = features && t.terms.weights.both_rows();
  // z's rows, then d's and pooled_t's: one product reads W once for all
  const int64_t stacked = 1 + features + either;
  const int parts = first_parts(t, stage);

  Workspace memory;
  const auto z_part = memory.part<float>(t.z ? 0 : B * Ct);
  const auto stack_part = memory.part<uint16_t>(stacked * B * Ct);  // in `type`, as the gradient
  const auto logits_part = memory.part<float>((1 + features) * B * K);
  const auto part_rows_part = memory.part<float>(kParts * B);
  const auto hits_part = memory.part<int64_t>(B);
  const auto fm_part = memory.part<float>(t.terms.pooled_t ? parts * B : 0);
  const auto pooled_part = memory.part<float>(either ? parts * B : 0);
  const auto gradient_part = memory.part<uint16_t>(t.grad ? B * stride : 0);
  const auto shares_part = memory.part<unsigned long long>(kLossShares);
  const auto arrived_part = memory.part<int>(1);
  memory.allocate(t.terms.weight);

  OptTensor logits_t;
  if (match && !features) logits_t = as(*t.terms.logits_t, DType::f32);
  float *made = memory[z_part], *logits = memory[logits_part];
  const float* z = t.z ? in<float>(t.z) : made;
  uint16_t *stack = memory[stack_part], *gradient = memory[gradient_part];
  float* part_rows = memory[part_rows_part];
  int64_t* hits = memory[hits_part];
  const RowParts rows{nullptr, nullptr, memory[fm_part], memory[pooled_part], parts};
  first_launch(t, stage, type, made,
               {.weight = data(t.terms.weight),
                .bias = nullptr,
                .labels = in<int64_t>(t.terms.labels),
                .labels_b = nullptr,
                .z_t = stack,
                .d_t = features ? stack + B * Ct : nullptr,
                .pooled = either ? stack + 2 * B * Ct : nullptr,
                .d_split = nullptr,
                .rows = rows,
                .counts = nullptr,
                .K = K},
               launch);
  launched(logit_rows({.stage = stage,
                       .dtype = type,
                       .stack = stack,
                       .weight = data(t.terms.weight),
                       .rows = {.dtype = DType::f32,
                                .logits = logits,
                                .bias = data(t.terms.bias),
                                .delta = features ? logits + B * K : nullptr,
                                .far = nullptr,
                                .logits_t = data(logits_t),
                                .labels = in<int64_t>(t.terms.labels),
                                .labels_b = in<int64_t>(t.terms.labels_b),
                                .mix = data(t.terms.mix),
                                .part_rows = part_rows,
                                .top1_rows = hits,
                                .counts = counts,
                                .B = B,
                                .K = K,
                                .weights = t.terms.weights,
                                .grad = t.grad},
                       .squares = rows,
                       .gradient = gradient,
                       .arrived = memory[arrived_part],
                       .Ct = Ct,
                       .stride = stride},
                      launch.stream),
           "classifier_loss's logits");
  launched(times_classifier({.stage = stage,
                             .dtype = type,
                             .grad = t.grad,
                             .gradient = gradient,
                             .weight = data(t.terms.weight),
                             .z = z,
                             .pooled_t = in<float>(t.terms.pooled_t),
                             .dz = out<float>(t.dz),
                             .dz_t = out<void>(t.dz_t),
                             .part_rows = part_rows,
                             .rows = rows,
                             .top1_rows = hits,
                             .losses = losses(t, memory[shares_part], memory[arrived_part]),
                             .B = B,
                             .K = K,
                             .Ct = Ct,
                             .stride = stride,
                             .batch = B,
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
  const bool by_anchor = bf16 && !t.terms.weights.both_rows() && (!match || by_gram);
  if (!by_anchor && !few) return false;
  int64_t* counts = nullptr;
  launched(device_counts(&counts), "the search for classifier_loss's counters");
  TiledLoss served = t;
  if (t.projection) {
    Projection& from = *served.projection;
    from.u = dense(from.u), from.weight = dense(from.weight);
    if (from.u.scalar_type() != t.terms.weight.scalar_type() || !linear_stage(from, {}, launch))
      served.z = projected(from), served.projection.reset();
  }
  if (by_anchor)
    anchored(served, tile_stage, counts, launch);
  else
    whole_rows(served, tile_stage, counts, launch);
  return true;
}

}  // namespace ijckd
