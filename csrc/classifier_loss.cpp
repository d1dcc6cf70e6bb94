// Host side of classifier_loss, with or without a linear connector before it: checks, allocation, library GEMMs around the passes
// of classifier_loss.h. The CPU has a second way, by chunks of classes (cpu/class_chunks.h).
#include "classifier_loss.h"

#include <algorithm>
#include <cstring>
#include <tuple>

#include "op.h"
#include "projection.h"
#include "rows.h"

#ifdef IJCKD_CUDA
#include "cuda/stage.h"
#include "cuda/tiled_loss.h"
#else
#include "cpu/class_chunks.h"
#include "cpu/conv1x1.h"
#include "cpu/gemm.h"
#endif

namespace ijckd {
namespace {

void check_labels(const OptTensor& labels, int64_t B, int64_t K, const char* op, const char* arg) {
  if (!labels) return;
  check_shape(labels, {B}, op, arg, "[B]");
  check_device(labels, op, arg);
  check(labels->scalar_type() == ScalarType::Long, op, ": ", arg, " must be int64, got ", name(labels->scalar_type()));
#ifndef IJCKD_CUDA  // on a GPU the check would wait for the device; there such a row's loss is NaN and the row is counted
  const int64_t* l = labels->const_data_ptr<int64_t>();
  for (int64_t b = 0; b < B; ++b)
    check(l[b] >= 0 && l[b] < K, op, ": ", arg, " must lie in [0, K) = [0, ", K, "), got ", l[b], " at position ", b);
#else
  (void)K;
#endif
}

// The checked arguments, and where the results go.
struct Rows {
  DType dtype;              // T
  DType rounding;           // what the classifier is rounded to before it becomes T
  Tensor z, weight;         // [B, Ct] A, [K, Ct] as `classifier` below gives it
  OptTensor bias;           // [K] A
  OptTensor logits_t;       // [B, K], any dtype
  Tensor labels;            // [B]
  OptTensor labels_b, mix;  // [B], [B] A
  OptTensor d;              // [B, Ct] A: z - pooled_t
  Tensor part_rows;         // [kParts, B] A  out
  Tensor top1_rows;         // [B]            out
  Tensor dz;                // [B, Ct] A      out, if `grad`
  LossWeights weights;
  bool grad;
  int64_t batch;  // samples over which the loss is a mean
};

const int64_t* labels_of(const OptTensor& t) { return t ? t->const_data_ptr<int64_t>() : nullptr; }

#ifdef IJCKD_CUDA
// [B, Ct] times the classifier transposed, z's and d's where there is one; and dlogits [B, K] times the classifier.
Tensor to_logits(const Tensor& features, const Tensor& weight) { return torch::stable::contiguous(matmul_nt(features, weight)); }

std::pair<Tensor, OptTensor> to_both_logits(const Tensor& z, const OptTensor& d, const Tensor& weight) {
  return {to_logits(z, weight), d ? OptTensor(to_logits(*d, weight)) : OptTensor()};
}

Tensor times_weight(const Tensor& dlogits, const Tensor& weight, const Tensor&) {
  return torch::stable::contiguous(torch::stable::matmul(dlogits, weight));
}
#else
Tensor to_logits(const Tensor& features, const Tensor& weight) {
  return by_convolution(features) ? conv_rows(features, weight) : torch::stable::contiguous(matmul_nt(features, weight));
}

// One product for both: of few rows it takes as long as W takes to be read.
std::pair<Tensor, OptTensor> to_both_logits(const Tensor& z, const OptTensor& d, const Tensor& weight) {
  if (!d) return {to_logits(z, weight), OptTensor()};
  const int64_t B = z.size(0), bytes = B * z.size(1) * int64_t(z.element_size());
  const Tensor stack = torch::stable::new_empty(z, {2 * B, z.size(1)});
  char* to = static_cast<char*>(stack.mutable_data_ptr());
  std::memcpy(to, z.const_data_ptr(), bytes);
  std::memcpy(to + bytes, d->const_data_ptr(), bytes);
  const Tensor both = to_logits(stack, weight);  // [2 B, K]
  return {rows_of(both, 0, B), rows_of(both, B, B)};
}

// Straight into dz where it has the product's dtype: fresh memory is dear on the CPU.
Tensor times_weight(const Tensor& dlogits, const Tensor& weight, const Tensor& dz) {
  if (by_convolution(dlogits)) return *conv_rows_backward(dlogits, dz, weight, true, false)[0];  // dz for its shape
  if (dz.scalar_type() != weight.scalar_type()) return torch::stable::contiguous(torch::stable::matmul(dlogits, weight));
  matmul_out(dlogits, weight, dz);
  return dz;
}
#endif

// Logits of all rows at once, the row losses on them, and dz.
void whole_rows(const Rows& r, const Launch& launch) {
  const DType t = r.dtype;
  const int64_t B = r.z.size(0), Ct = r.z.size(1), K = r.weight.size(0);
  // logits - logits_t = W (z - pooled_t): the bias cancels and the difference is exact to the accumulator's precision.
  const bool match = r.weights.sr != 0 || r.weights.kl != 0;
  OptTensor teacher;
  if (match && !r.d) teacher = as(*r.logits_t, t);
  // [B, K] each; the logits become the rows' gradient in place
  const auto [logits, delta] = to_both_logits(as(r.z, t), match ? as(r.d, t) : OptTensor(), r.weight);
  int64_t* counts = nullptr;
  launched(device_counts(&counts), "the search for classifier_loss's counters");
  launched(row_loss({t, logits.mutable_data_ptr(), data(r.bias), data(delta), data(teacher), labels_of(r.labels),
                     labels_of(r.labels_b), data(r.mix), r.part_rows.mutable_data_ptr(), r.top1_rows.mutable_data_ptr<int64_t>(),
                     counts, B, K, r.weights, r.grad},
                    launch.stream),
           "classifier_loss's row pass");
  if (!r.grad) return;
  const Tensor dz_w = times_weight(logits, r.weight, r.dz);  // [B, Ct]
  launched(feature_grad({t, dz_w.const_data_ptr(), r.weights.fm != 0 ? data(r.d) : nullptr, r.dz.mutable_data_ptr(), B, Ct,
                         r.batch, r.weights.fm},
                        launch.stream),
           "classifier_loss's gradient");
}

#ifdef IJCKD_CUDA
Tensor classifier(const Tensor& weight, DType rounding) { return as(weight, rounding); }

void all_rows(const Rows& r, const Launch& launch) { whole_rows(r, launch); }
#else
OptTensor maybe_rows_of(const OptTensor& t, int64_t first, int64_t n) {
  return t ? OptTensor(rows_of(*t, first, n)) : OptTensor();
}

// A float32 classifier stays as it is for bfloat16 products: class chunks round it piece by piece, and no copy of the whole
// exists. They also widen one in bfloat16 where its products are taken in float32.
Tensor classifier(const Tensor& weight, DType rounding) {
  const bool by_pieces = rounding == DType::bf16 && weight.scalar_type() == ScalarType::Float && weight.is_contiguous();
  return by_pieces ? weight : as(weight, rounding);
}

// By class chunks where they serve; else some rows after others, as many as rows_at_once says.
void all_rows(Rows r, const Launch& launch) {
  const int64_t B = r.z.size(0), K = r.weight.size(0);
  if (in_class_chunks(r.weights, r.d.has_value(), r.dtype, B, K, r.z.size(1)))
    return chunked_loss({r.dtype, r.rounding, r.z, r.weight, r.bias, labels_of(r.labels), labels_of(r.labels_b), data(r.mix), r.d,
                         r.part_rows.mutable_data_ptr(), r.top1_rows.mutable_data_ptr<int64_t>(), r.dz, r.weights, r.grad});
  const int64_t most = rows_at_once(B, K);
  r.weight = as(as(r.weight, r.rounding), r.dtype);
  if (most == B) return whole_rows(r, launch);
  for (int64_t first = 0; first < B; first += most) {
    const int64_t n = std::min(most, B - first);
    Rows some = r;
    some.z = rows_of(r.z, first, n), some.d = maybe_rows_of(r.d, first, n), some.logits_t = maybe_rows_of(r.logits_t, first, n);
    some.labels = rows_of(r.labels, first, n), some.labels_b = maybe_rows_of(r.labels_b, first, n),
    some.mix = maybe_rows_of(r.mix, first, n);
    some.top1_rows = rows_of(r.top1_rows, first, n);
    if (r.grad) some.dz = rows_of(r.dz, first, n);
    some.part_rows = empty(r.z, {kParts, n}, accumulator(r.dtype));
    whole_rows(some, launch);
    const int64_t bytes = int64_t(r.part_rows.element_size());
    for (const int part : {kPartCe, kPartSr, kPartKl})
      std::memcpy(static_cast<char*>(r.part_rows.mutable_data_ptr()) + (part * B + first) * bytes,
                  static_cast<const char*>(some.part_rows.const_data_ptr()) + part * n * bytes, n * bytes);
  }
}
#endif

using Loss = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // loss, parts, top1, dz

// Of z, or of what a projection makes; `op` is whose name errors give.
Loss loss_of(const char* op, const OptTensor& z, const std::optional<Projection>& projection, const Tensor& weight,
             const OptTensor& bias, const Tensor& labels, const OptTensor& labels_b, const OptTensor& mix,
             const OptTensor& pooled_t, const OptTensor& logits_t, double label_smoothing, double ce, double sr, double fm,
             double kl, double temperature, bool grad, std::optional<ScalarType> product, const OptTensor& gram) {
  const Tensor& input = projection ? projection->u : *z;
  const char* name_of = projection ? "u" : "z";
  const int64_t B = input.size(0), Ct = projection ? projection->weight.size(0) : z->size(1);
  check(weight.dim() == 2 && weight.size(1) == Ct, op, ": weight must be [K, Ct] with Ct = ", Ct,
        projection ? " like projection" : " like z", ", got ", shape(weight));
  const int64_t K = weight.size(0);
  check(Ct > 0 && K > 0, op, ": channels and classes must not be empty, got ", Ct, " channels and weight ", shape(weight));
  const DType own = dtype(weight, op, "weight"), asked = product ? dtype(*product, op, "dtype") : own;
  const DType t = product_type(asked), acc = accumulator(t);
  check(accumulator(dtype(input, op, name_of)) == acc, op, ": ", name_of, " and weight must both be float64 or neither, got ",
        name(input.scalar_type()), " and ", name(weight.scalar_type()));
  const Tensor labels_row = torch::stable::contiguous(labels);
  const OptTensor labels_b_row = labels_b ? OptTensor(torch::stable::contiguous(*labels_b)) : OptTensor();
  check_labels(labels_row, B, K, op, "labels");
  check_labels(labels_b_row, B, K, op, "labels_b");
  check(labels_b.has_value() == mix.has_value(), op, ": labels_b and mix go together, got only ", mix ? "mix" : "labels_b");
  check_shape(bias, {K}, op, "bias", "[K]");
  check_shape(mix, {B}, op, "mix", "[B]");
  check_shape(pooled_t, {B, Ct}, op, "pooled_t", "[B, Ct]");
  check_shape(logits_t, {B, K}, op, "logits_t", "[B, K]");
  for (const auto& [x, arg] : {std::pair{OptTensor(weight), "weight"},
                               {bias, "bias"},
                               {mix, "mix"},
                               {pooled_t, "pooled_t"},
                               {logits_t, "logits_t"},
                               {gram, "gram"}})
    check_device(x, op, arg);
  check(fm == 0 || pooled_t, op, ": fm = ", fm, " needs pooled_t");
  check((sr == 0 && kl == 0) || pooled_t || logits_t, op, ": sr = ", sr, " and kl = ", kl, " need pooled_t or logits_t");
  check(temperature > 0, op, ": temperature must be > 0, got ", temperature);
  check(label_smoothing >= 0 && label_smoothing <= 1, op, ": label_smoothing must lie in [0, 1], got ", label_smoothing);

  const LossWeights weights{ce, sr, fm, kl, temperature, label_smoothing};
  const Tensor w = classifier(weight, asked);
  const OptTensor bias_acc = as(bias, acc), mix_acc = as(mix, acc), pooled_acc = as(pooled_t, acc);
  const Tensor part_rows = empty(input, {kParts, B}, acc), top1_rows = torch::stable::new_empty(input, {B}, ScalarType::Long);
  const Tensor loss = empty(input, {}, acc), parts = empty(input, {kParts}, acc),
               top1 = torch::stable::new_empty(input, {}, ScalarType::Long);
  const Tensor dz = empty(input, {grad ? B : 0, Ct}, acc);
  Launch launch(input);

#ifdef IJCKD_CUDA
  if (gram) check_shape(gram, {2, Ct, Ct}, op, "gram", "what classifier_gram makes of this weight, [2, Ct, Ct]");
  const TiledLoss tiled{as(z, acc), projection, w,    bias_acc, labels_row, labels_b_row, mix_acc, pooled_acc,
                        logits_t,   gram,       loss, parts,    top1,       dz,           weights, grad};
  if (tiled_loss(tiled, launch)) return {loss, parts, top1, dz};
#endif

  const Tensor z_acc = projection ? projected(*projection) : as(*z, acc);
  OptTensor d;
  if (pooled_t) {
    d = empty(input, {B, Ct}, acc);
    void* fm_rows = static_cast<char*>(part_rows.mutable_data_ptr()) + kPartFm * B * part_rows.element_size();
    if (B > 0)
      launched(feature_diff({acc, z_acc.const_data_ptr(), pooled_acc->const_data_ptr(), d->mutable_data_ptr(), fm_rows, B, Ct},
                            launch.stream),
               "classifier_loss's feature match");
  }
  if (B > 0)
    all_rows({t, asked, z_acc, w, bias_acc, logits_t, labels_row, labels_b_row, mix_acc, d, part_rows, top1_rows, dz, weights,
              grad, B},
             launch);
  launched(loss_sum({acc, part_rows.const_data_ptr(), top1_rows.const_data_ptr<int64_t>(), loss.mutable_data_ptr(),
                     parts.mutable_data_ptr(), top1.mutable_data_ptr<int64_t>(), B, K, Ct, weights},
                    launch.stream),
           "classifier_loss's sum");
  return {loss, parts, top1, dz};
}

Loss classifier_loss(const Tensor& z, const Tensor& weight, const OptTensor& bias, const Tensor& labels,
                     const OptTensor& labels_b, const OptTensor& mix, const OptTensor& pooled_t, const OptTensor& logits_t,
                     double label_smoothing, double ce, double sr, double fm, double kl, double temperature, bool grad,
                     std::optional<ScalarType> product, const OptTensor& gram) {
  constexpr const char* op = "classifier_loss";
  check(z.dim() == 2, op, ": z must be [B, Ct], got ", shape(z));
  check(on_device(z), op, ": z must be on ", kDevice);
  return loss_of(op, z, {}, weight, bias, labels, labels_b, mix, pooled_t, logits_t, label_smoothing, ce, sr, fm, kl, temperature,
                 grad, product, gram);
}

Loss projected_classifier_loss(const Tensor& u, const Tensor& projection, const OptTensor& projection_bias, const Tensor& weight,
                               const OptTensor& bias, const Tensor& labels, const OptTensor& labels_b, const OptTensor& mix,
                               const OptTensor& pooled_t, const OptTensor& logits_t, double label_smoothing, double ce, double sr,
                               double fm, double kl, double temperature, bool grad, std::optional<ScalarType> product,
                               const OptTensor& gram) {
  constexpr const char* op = "projected_classifier_loss";
  check_projection(u, projection, op, "projection");
  check(u.size(1) == 1, op, ": u must be vectors [B, 1, Cs], got ", shape(u));
  check_shape(projection_bias, {projection.size(0)}, op, "projection_bias", "[Ct]");
  check_device(projection_bias, op, "projection_bias");
  const Projection from{u, projection, as(projection_bias, accumulator(dtype(u, op, "u")))};
  return loss_of(op, {}, from, weight, bias, labels, labels_b, mix, pooled_t, logits_t, label_smoothing, ce, sr, fm, kl,
                 temperature, grad, product, gram);
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
