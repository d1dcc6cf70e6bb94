// Host side of classifier_loss, with or without a linear connector before it: checks, allocation, library GEMMs around
// the passes of classifier_loss.h. The CPU has a second way, by chunks of classes (cpu/class_chunks.h).
#include "classifier_loss.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

#include "classifier_products.h"
#include "labels.h"
#include "loss_terms.h"
#include "op.h"
#include "projection.h"
#include "rows.h"
#include "workspace.h"

#ifdef IJCKD_CUDA
#include "cuda/stage.h"
#include "cuda/tiled_loss.h"
#else
#include "cpu/class_chunks.h"
#endif

namespace ijckd {
namespace {

#ifndef IJCKD_CUDA
// A share is one of [0, 1]. What is not finite makes its row's loss NaN, as any other argument's does. On a GPU the
// host would have to wait.
template <typename A>
void check_shares(const Tensor& mix, const char* op) {
  const A* m = static_cast<const A*>(mix.const_data_ptr());
  for (int64_t b = 0; b < mix.size(0); ++b)
    check((m[b] >= 0 && m[b] <= 1) || !std::isfinite(m[b]), op, ": mix must lie in [0, 1], got ", m[b], " at position ",
          b);
}

template <typename A>
bool all_finite(const Tensor& x) {
  const A* values = static_cast<const A*>(x.const_data_ptr());
  return std::all_of(values, values + x.numel(), [](A v) { return std::isfinite(v); });
}

// z - pooled_t where the bias is not finite: in a difference of logits it cancels in our algebra alone.
template <typename A>
void spoil(const Tensor& d) {
  std::fill_n(static_cast<A*>(d.mutable_data_ptr()), d.numel(), std::numeric_limits<A>::quiet_NaN());
}
#endif

// Logits of all rows at once, the row losses on them, and dz.
void whole_rows(const LossRows& r, const Launch& launch) {
  const LossTerms& terms = r.terms;
  const DType t = r.dtype;
  const int64_t B = r.z.size(0), Ct = r.z.size(1), K = terms.weight.size(0);
  // logits - logits_t = W (z - pooled_t): the bias cancels and the difference is exact to the accumulator's precision.
  // One product for both: of few rows it takes as long as W takes to be read.
  const bool teacher = terms.match() && terms.logits_t, stacked = terms.match() && !teacher;
  Tensor features = stacked ? empty(r.z, {2 * B, Ct}, t) : as(r.z, t);
  OptTensor far;
  if (stacked) {
    // The logit match is best taken from d; the other terms need the teacher's logits.
    if (terms.weights.both_rows()) far = empty(r.z, {B}, ScalarType::Byte);
    launched(stack_rows({.dtype = t,
                         .z = r.z.const_data_ptr(),
                         .d = data(r.d),
                         .pooled_t = far ? data(terms.pooled_t) : nullptr,
                         .stack = features.mutable_data_ptr(),
                         .far = far ? far->mutable_data_ptr<uint8_t>() : nullptr,
                         .B = B,
                         .Ct = Ct},
                        launch.stream),
             "classifier_loss's rows");
  }
  const Tensor product = to_logits(features, terms.weight);          // [B or 2 B, K]
  const Tensor logits = stacked ? rows_of(product, 0, B) : product;  // become the rows' gradient in place
  const void* delta = stacked ? rows_of(product, B, B).const_data_ptr() : nullptr;
  OptTensor logits_t;
  if (teacher) logits_t = as(*terms.logits_t, accumulator(t));
  int64_t* counts = nullptr;
  launched(device_counts(&counts), "the search for classifier_loss's counters");
  launched(row_loss({.dtype = t,
                     .logits = logits.mutable_data_ptr(),
                     .bias = data(terms.bias),
                     .delta = delta,
                     .far = far ? far->const_data_ptr<uint8_t>() : nullptr,
                     .logits_t = data(logits_t),
                     .labels = labels_of(terms.labels),
                     .labels_b = labels_of(terms.labels_b),
                     .mix = data(terms.mix),
                     .part_rows = r.part_rows,
                     .top1_rows = r.top1_rows,
                     .counts = counts,
                     .B = B,
                     .K = K,
                     .weights = terms.weights,
                     .grad = r.grad},
                    launch.stream),
           "classifier_loss's row pass");
  if (!r.grad) return;
  const Tensor dz_w = times_weight(logits, terms.weight, r.dz);  // [B, Ct]
  launched(feature_grad({.dtype = t,
                         .dz_w = dz_w.const_data_ptr(),
                         .d = terms.weights.fm != 0 ? data(r.d) : nullptr,
                         .dz = r.dz.mutable_data_ptr(),
                         .B = B,
                         .Ct = Ct,
                         .batch = r.batch,
                         .fm = terms.weights.fm},
                        launch.stream),
           "classifier_loss's gradient");
}

#ifdef IJCKD_CUDA
Tensor classifier(const Tensor& weight, DType rounding) { return as(weight, rounding); }

void all_rows(const LossRows& r, const Launch& launch) { whole_rows(r, launch); }
#else
OptTensor maybe_rows_of(const OptTensor& t, int64_t first, int64_t n) {
  return t ? OptTensor(rows_of(*t, first, n)) : OptTensor();
}

// A float32 classifier stays as it is for bfloat16 products: class chunks round it piece by piece, and no copy of the
// whole exists. They also widen one in bfloat16 where its products are taken in float32.
Tensor classifier(const Tensor& weight, DType rounding) {
  const bool by_pieces = rounding == DType::bf16 && weight.scalar_type() == ScalarType::Float && weight.is_contiguous();
  return by_pieces ? weight : as(weight, rounding);
}

// By class chunks where they serve; else some rows after others, as many as rows_at_once says.
void all_rows(LossRows r, const Launch& launch) {
  const int64_t B = r.z.size(0), K = r.terms.weight.size(0);
  if (in_class_chunks(r.terms.weights, r.d && !r.terms.logits_t, r.dtype, B, K, r.z.size(1))) return chunked_loss(r);
  const int64_t most = rows_at_once(B, K);
  r.terms.weight = as(as(r.terms.weight, r.rounding), r.dtype);
  if (most == B) return whole_rows(r, launch);
  for (int64_t first = 0; first < B; first += most) {
    const int64_t n = std::min(most, B - first);
    LossRows some = r;
    some.z = rows_of(r.z, first, n);
    some.d = maybe_rows_of(r.d, first, n);
    some.terms.pooled_t = maybe_rows_of(r.terms.pooled_t, first, n);
    some.terms.logits_t = maybe_rows_of(r.terms.logits_t, first, n);
    some.terms.labels = rows_of(r.terms.labels, first, n);
    some.terms.labels_b = maybe_rows_of(r.terms.labels_b, first, n);
    some.terms.mix = maybe_rows_of(r.terms.mix, first, n);
    some.top1_rows = r.top1_rows + first;
    if (r.grad) some.dz = rows_of(r.dz, first, n);
    Workspace memory;
    const auto part_rows = memory.part(kParts * n, accumulator(r.dtype));
    memory.allocate(r.z);
    some.part_rows = memory[part_rows];
    whole_rows(some, launch);
    const int64_t bytes = int64_t(r.z.element_size());
    for (int part = 0; part < kParts; ++part)
      if (part != kPartFm)
        std::memcpy(static_cast<char*>(r.part_rows) + (part * B + first) * bytes,
                    static_cast<const char*>(some.part_rows) + part * n * bytes, n * bytes);
  }
}
#endif

// On a GPU its bytes are read as they lie; on the CPU, which has no use for it, a wrong one is a mistake all the same.
void check_gram(const OptTensor& gram, int64_t Ct, const char* op) {
  if (!gram) return;
  const bool made_here = gram->dim() == 3 && gram->size(0) == 2 && gram->size(1) == Ct && gram->size(2) == Ct &&
                         gram->scalar_type() == ScalarType::BFloat16 && gram->is_contiguous();
  check(made_here, op,
        ": gram must be what classifier_gram makes of this weight, contiguous bfloat16 [2, Ct, Ct] = [2, ", Ct, ", ",
        Ct, "], got ", gram->is_contiguous() ? "" : "non-contiguous ", name(gram->scalar_type()), " ", shape(*gram),
        ": give classifier_gram(weight), or None");
}

// The description for features [B, Ct]; `like` is the argument that gives them their channels.
void check_terms(const char* op, const LossTerms& terms, int64_t B, int64_t Ct, const char* like) {
  const auto& [weight, bias, labels, labels_b, mix, pooled_t, logits_t, gram, w] = terms;
  check(weight.dim() == 2 && weight.size(1) == Ct, op, ": weight must be [K, Ct] with Ct = ", Ct, " like ", like,
        ", got ", shape(weight));
  const int64_t K = weight.size(0);
  check(Ct > 0 && K > 0, op, ": channels and classes must not be empty, got ", Ct, " channels and weight ",
        shape(weight));
  dtype(weight, op, "weight");
  check(labels_b.has_value() == mix.has_value(), op, ": labels_b and mix go together, got only ",
        mix ? "mix" : "labels_b");
  check_shape(bias, {K}, op, "bias", "[K]");
  check_shape(mix, {B}, op, "mix", "[B]");
  check_shape(pooled_t, {B, Ct}, op, "pooled_t", "[B, Ct]");
  check_shape(logits_t, {B, K}, op, "logits_t", "[B, K]");
  check_gram(gram, Ct, op);
  for (const auto& [x, arg] : {std::pair{OptTensor(weight), "weight"},
                               {bias, "bias"},
                               {mix, "mix"},
                               {pooled_t, "pooled_t"},
                               {logits_t, "logits_t"},
                               {gram, "gram"}})
    check_device(x, op, arg), check_floating(x, op, arg);
  constexpr const char* kParameters[kParts] = {"ce", "sr", "fm", "kl", "hard", "ttm", "wttm", "nkd"};
  for (int i = 0; i < kParts; ++i)
    check(std::isfinite(w.of_part(i)), op, ": the weight ", kParameters[i], " must be a finite number, got ",
          w.of_part(i));
  check(w.ttm_power > 0 || (w.ttm == 0 && w.wttm == 0), op, ": ttm_power must be > 0, got ", w.ttm_power);
  check(std::isfinite(w.ttm_power), op, ": ttm_power must be finite, got ", w.ttm_power);
  check(std::isfinite(w.nkd_gamma), op, ": nkd_gamma must be a finite number, got ", w.nkd_gamma);
  check(w.fm == 0 || pooled_t, op, ": fm = ", w.fm, " needs pooled_t");
  for (int i = 0; i < kParts; ++i)
    check(i == kPartCe || i == kPartFm || w.of_part(i) == 0 || pooled_t || logits_t, op, ": ", kParameters[i], " = ",
          w.of_part(i), " needs pooled_t or logits_t");
  check(w.temperature > 0, op, ": temperature must be > 0, got ", w.temperature);
  check(std::isfinite(w.temperature), op, ": temperature must be finite, got ", w.temperature);
  check(w.label_smoothing >= 0 && w.label_smoothing <= 1, op, ": label_smoothing must lie in [0, 1], got ",
        w.label_smoothing);
}

using Loss = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // loss, parts, top1, dz

// Whether the projection's gradient is made of a rounded dz that the loss has kept (cuda/linear_tiles.h).
#ifdef IJCKD_CUDA
constexpr bool kKeepsRounded = true;
#else
constexpr bool kKeepsRounded = false;
#endif

// Of z, or of what a projection makes; `op` is whose name errors give. dz_t, or null: becomes dz in bfloat16 where that
// costs no launch.
Loss loss_of(const char* op, const OptTensor& z, const std::optional<Projection>& projection, LossTerms terms,
             bool grad, std::optional<ScalarType> product, [[maybe_unused]] OptTensor* dz_t = nullptr) {
  const Tensor& input = projection ? projection->u : *z;
  const char* name_of = projection ? "u" : "z";
  const int64_t B = input.size(0), Ct = projection ? projection->weight.size(0) : z->size(1);
  check_terms(op, terms, B, Ct, projection ? "projection" : "z");
  const int64_t K = terms.weight.size(0);
  const DType own = dtype(terms.weight, op, "weight"), asked = product ? dtype(*product, op, "dtype") : own;
  const DType t = product_type(asked), acc = accumulator(t);
  check(accumulator(dtype(input, op, name_of)) == acc, op, ": ", name_of,
        " and weight must both be float64 or neither, got ", name(input.scalar_type()), " and ",
        name(terms.weight.scalar_type()));
  terms.labels = dense(terms.labels);
  if (terms.labels_b) terms.labels_b = dense(*terms.labels_b);
  check_labels(terms.labels, B, K, op, "labels");
  check_labels(terms.labels_b, B, K, op, "labels_b");

  terms.weight = classifier(terms.weight, asked);
  terms.bias = as(terms.bias, acc);
  terms.mix = as(terms.mix, acc);
  terms.pooled_t = as(terms.pooled_t, acc);
#ifndef IJCKD_CUDA
  const bool wide = acc == DType::f64;
  if (terms.mix) wide ? check_shares<double>(*terms.mix, op) : check_shares<float>(*terms.mix, op);
#endif
  const Tensor loss = empty(input, {}, acc), parts = empty(input, {kParts}, acc),
               top1 = empty(input, {}, ScalarType::Long);
  const Tensor dz = empty(input, {grad ? B : 0, Ct}, acc);
  Launch launch(input);

#ifdef IJCKD_CUDA
  OptTensor kept;
  if (dz_t && t == DType::bf16) kept = empty(input, {B, Ct}, t);
  const bool tiled = tiled_loss({as(z, acc), projection, terms, loss, parts, top1, dz, kept, grad}, launch);
  if (tiled && kept) *dz_t = kept;
  if (tiled) return {loss, parts, top1, dz};
#endif

  const Tensor z_acc = projection ? projected(*projection) : as(*z, acc);
  Workspace memory;
  const auto part_rows_part = memory.part(kParts * B, acc);
  const auto top1_rows_part = memory.part<int64_t>(B);
  memory.allocate(input);
  uint8_t* const part_rows = memory[part_rows_part];
  int64_t* const top1_rows = memory[top1_rows_part];
  OptTensor d;
  if (terms.pooled_t) {
    d = empty(input, {B, Ct}, acc);
    void* fm_rows = part_rows + kPartFm * B * d->element_size();
    if (B > 0)
      launched(feature_diff({acc, z_acc.const_data_ptr(), data(terms.pooled_t), d->mutable_data_ptr(), fm_rows, B, Ct},
                            launch.stream),
               "classifier_loss's feature match");
#ifndef IJCKD_CUDA
    if (terms.match() && !terms.logits_t && terms.bias &&
        !(wide ? all_finite<double>(*terms.bias) : all_finite<float>(*terms.bias)))
      wide ? spoil<double>(*d) : spoil<float>(*d);
#endif
  }
  if (B > 0) all_rows({t, asked, z_acc, terms, d, part_rows, top1_rows, dz, grad, B}, launch);
  launched(loss_sum({.dtype = acc,
                     .part_rows = part_rows,
                     .top1_rows = top1_rows,
                     .loss = loss.mutable_data_ptr(),
                     .parts = parts.mutable_data_ptr(),
                     .top1 = top1.mutable_data_ptr<int64_t>(),
                     .B = B,
                     .K = K,
                     .Ct = Ct,
                     .weights = terms.weights},
                    launch.stream),
           "classifier_loss's sum");
  return {loss, parts, top1, dz};
}

Loss classifier_loss(const Tensor& z, const std::vector<OptTensor>& tensors, const std::vector<double>& numbers,
                     bool grad, std::optional<ScalarType> product) {
  constexpr const char* op = "classifier_loss";
  check(z.dim() == 2, op, ": z must be [B, Ct], got ", shape(z));
  check(on_device(z), op, ": z must be on ", kDevice);
  return loss_of(op, z, {}, LossTerms::from(op, tensors, numbers), grad, product);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> projected_classifier_loss(
    const Tensor& vectors, const Tensor& projection, const OptTensor& projection_bias,
    const std::vector<OptTensor>& tensors, const std::vector<double>& numbers, bool grad,
    std::optional<ScalarType> product) {
  constexpr const char* op = "projected_classifier_loss";
  const Tensor u = vectors_as_rows(vectors);
  const DType t = dtype(u, op, "u");
  const bool cast = product && projection.scalar_type() == ScalarType::Float && t != DType::f32;
  const Tensor weight = cast ? as(projection, t) : projection;
  check_projection(u, weight, op, "projection");
  check(u.size(1) == 1, op, ": u must be vectors [B, 1, Cs], got ", shape(u));
  check_shape(projection_bias, {projection.size(0)}, op, "projection_bias", "[Ct]");
  check_device(projection_bias, op, "projection_bias");
  check_floating(projection_bias, op, "projection_bias");
  const Projection from{u, weight, as(projection_bias, accumulator(t))};
  const bool rounded = kKeepsRounded && grad && t == DType::bf16;
  OptTensor dz_t;
  const auto [loss, parts, top1, dz] =
      loss_of(op, {}, from, LossTerms::from(op, tensors, numbers), grad, product, rounded ? &dz_t : nullptr);
  if (rounded && !dz_t) dz_t = as(dz, t);
  return {loss, parts, top1, dz, dz_t ? *dz_t : empty(u, {0}, t), cast && grad ? weight : empty(u, {0}, t)};
}

}  // namespace
}  // namespace ijckd

#ifdef IJCKD_CUDA
STABLE_TORCH_LIBRARY_IMPL(ijckd, CUDA, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(ijckd, CPU, m) {
#endif
  m.impl("classifier_loss", TORCH_BOX(&ijckd::classifier_loss));
  m.impl("projected_classifier_loss", TORCH_BOX(&ijckd::projected_classifier_loss));
}
