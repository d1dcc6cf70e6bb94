// CPU loops of classifier_loss: one task per sample.
#include "classifier_loss.h"

#include <cmath>
#include <limits>
#include <vector>

#include "loops.h"
#include "vectorise.h"

namespace ijckd {
namespace {

constexpr int64_t kScratch =
    4;  // rows of scratch that one sample needs: logits, gradient, exponentials, logits - logits_t

// x[k] = e^(scale (l[k] - top)); returns the sum over k.
template <typename A>
IJCKD_INLINE A exponentials(const A* l, A top, A scale, int64_t n, A* x) {
  for (int64_t k = 0; k < n; ++k) x[k] = exponential((l[k] - top) * scale);
  return lane_sum<A>(n, [&](int64_t k) __attribute__((always_inline)) { return x[k]; });
}

// One sample: all losses on its logits, and the gradient in their place.
template <typename T, typename A>
IJCKD_INLINE void sample(const RowLoss& r, int64_t b, A* scratch) {
  const int64_t B = r.B, K = r.K;
  const LossWeights& w = r.weights;
  T* logits = static_cast<T*>(r.logits) + b * K;
  A *l = scratch, *g = l + K, *x = g + K, *diff = x + K;  // [K] each
  const A* bias = static_cast<const A*>(r.bias);
  const auto total = [&](const A* v) __attribute__((always_inline)) {
    return lane_sum<A>(K, [&](int64_t k) __attribute__((always_inline)) { return v[k]; });
  };

  if (bias)
    for (int64_t k = 0; k < K; ++k) l[k] = load(logits, k) + bias[k];
  else
    for (int64_t k = 0; k < K; ++k) l[k] = load(logits, k);
  if (r.delta) {
    const T* delta = static_cast<const T*>(r.delta) + b * K;
    for (int64_t k = 0; k < K; ++k) diff[k] = load(delta, k);
  } else if (r.logits_t) {
    const T* logits_t = static_cast<const T*>(r.logits_t) + b * K;
    for (int64_t k = 0; k < K; ++k) diff[k] = l[k] - load(logits_t, k);
  }
  const A top = lane_max(K, l);
  int64_t best = 0;
  while (best < K - 1 && l[best] != top) ++best;
  const int64_t label_a = r.labels[b], label_b = r.labels_b ? r.labels_b[b] : label_a;
  r.top1_rows[b] = best == label_a;

  A ce = 0;
  if (w.ce != 0) {
    const A eps = A(w.label_smoothing), q = A(1) - eps, share = r.labels_b ? static_cast<const A*>(r.mix)[b] : A(1);
    const bool valid = label_a >= 0 && label_a < K && label_b >= 0 && label_b < K;
    // Relative to the largest logit, whose own exponential, 1, is left out: lse - top = log1p(others) keeps the digits
    // of a confident sample. An infinite logit would hide itself that way.
    for (int64_t k = 0; k < K; ++k) g[k] = exponential(l[k] - top);
    g[best] = 0;
    const A others =
        valid && std::abs(top) < std::numeric_limits<A>::infinity() ? total(g) : std::numeric_limits<A>::quiet_NaN();
    const A sum = A(1) + others, scale = A(w.ce) / sum, uniform = A(w.ce) * eps / A(K);
    ce = others;
    if (valid) {
      ce = (top - l[label_a]) + std::log1p(others);
      if (r.labels_b) ce += q * (A(1) - share) * (l[label_a] - l[label_b]);
      if (eps != 0) ce += eps * (l[label_a] - total(l) / A(K));
      // Softmax minus target, times `sum`; where the label is the best class, 1 - sum would cancel.
      if (best == label_a) {
        g[best] = (A(1) - q * share) * sum - others;
      } else {
        g[best] = 1;
        g[label_a] -= q * share * sum;
      }
      if (r.labels_b) g[label_b] -= q * (A(1) - share) * sum;
    }
    for (int64_t k = 0; k < K; ++k) g[k] = scale * g[k] - uniform;
  } else {
    for (int64_t k = 0; k < K; ++k) g[k] = 0;
  }

  A sr = 0;
  if (w.sr != 0) {
    sr = lane_sum<A>(K, [&](int64_t k) __attribute__((always_inline)) { return diff[k] * diff[k]; });
    const A c = A(2 * w.sr) / A(K);
    for (int64_t k = 0; k < K; ++k) g[k] += c * diff[k];
  }

  A kl = 0;
  if (w.kl != 0) {
    const A temperature = A(w.temperature), cold = A(1) / temperature, c = A(w.kl) * temperature;
    const A sum_s = exponentials(l, top, cold, K, x), lse_s = top * cold + std::log(sum_s);
    for (int64_t k = 0; k < K; ++k) {
      g[k] += c / sum_s * x[k];
      l[k] -= diff[k];  // the teacher's logits from here on
    }
    const A top_t = lane_max(K, l);
    const A sum_t = exponentials(l, top_t, cold, K, x), shift = lse_s - (top_t * cold + std::log(sum_t));
    kl = temperature * temperature / sum_t *
         lane_sum<A>(K, [&](int64_t k) __attribute__((always_inline)) { return x[k] * (shift - diff[k] * cold); });
    for (int64_t k = 0; k < K; ++k) g[k] -= c / sum_t * x[k];
  }

  A* rows = static_cast<A*>(r.part_rows);
  rows[kPartCe * B + b] = ce;
  rows[kPartSr * B + b] = sr;
  rows[kPartKl * B + b] = kl;
  if (!r.grad) return;
  for (int64_t k = 0; k < K; ++k) store(logits, k, g[k]);
}

IJCKD_CLONES void sample_f32(const RowLoss& r, int64_t b, float* scratch) { sample<float, float>(r, b, scratch); }
IJCKD_CLONES void sample_f64(const RowLoss& r, int64_t b, double* scratch) { sample<double, double>(r, b, scratch); }
IJCKD_CLONES void sample_bf16(const RowLoss& r, int64_t b, float* scratch) {
  sample<c10::BFloat16, float>(r, b, scratch);
}

constexpr int64_t kRowCost = 64;  // a row of few classes takes as long as so many: sums in lanes, ends of loops

template <typename A, typename Sample>
void every_sample(const RowLoss& r, const Sample& one) {
  parallel_for(r.B, row_grain(r.K + kRowCost, 1 << 13), [&](int64_t first, int64_t last) {
    std::vector<A> scratch(kScratch * r.K);
    for (int64_t b = first; b < last; ++b) one(r, b, scratch.data());
  });
}

template <typename T, typename A>
IJCKD_INLINE void add_feature_grad(const FeatureGrad& f, int64_t first, int64_t last) {
  const T* dz_w = static_cast<const T*>(f.dz_w);
  const A* d = static_cast<const A*>(f.d);
  A* dz = static_cast<A*>(f.dz);
  const A share = A(1 / double(f.batch)), c = A(2 * f.fm / (double(f.batch) * double(f.Ct)));
  if (d)
    for (int64_t i = first; i < last; ++i) dz[i] = share * load(dz_w, i) + c * d[i];
  else
    for (int64_t i = first; i < last; ++i) dz[i] = share * load(dz_w, i);
}
IJCKD_CLONES void add_feature_grad_f32(const FeatureGrad& f, int64_t first, int64_t last) {
  add_feature_grad<float, float>(f, first, last);
}
IJCKD_CLONES void add_feature_grad_f64(const FeatureGrad& f, int64_t first, int64_t last) {
  add_feature_grad<double, double>(f, first, last);
}
IJCKD_CLONES void add_feature_grad_bf16(const FeatureGrad& f, int64_t first, int64_t last) {
  add_feature_grad<c10::BFloat16, float>(f, first, last);
}

}  // namespace

int row_loss(const RowLoss& r, void*) {
  by_dtype(
      r.dtype, [&] { every_sample<float>(r, sample_f32); }, [&] { every_sample<double>(r, sample_f64); },
      [&] { every_sample<float>(r, sample_bf16); });
  return 0;
}

int loss_sum(const LossSum& s, void*) {
  dispatch(s.dtype, [&](auto, auto a) {
    using A = decltype(a);
    const A* rows = static_cast<const A*>(s.part_rows);
    A* parts = static_cast<A*>(s.parts);
    const double scale[kParts] = {1, 1 / double(s.K), 1 / double(s.Ct), 1};
    const double weight[kParts] = {s.weights.ce, s.weights.sr, s.weights.fm, s.weights.kl};
    double loss = 0;
    for (int i = 0; i < kParts; ++i) {
      parts[i] = 0;
      if (weight[i] == 0) continue;
      double sum = 0;
      for (int64_t b = 0; b < s.B; ++b) sum += double(rows[i * s.B + b]);
      parts[i] = A(sum * scale[i] / double(s.B));
      loss += weight[i] * sum * scale[i] / double(s.B);
    }
    *static_cast<A*>(s.loss) = A(loss);
    int64_t hits = 0;
    for (int64_t b = 0; b < s.B; ++b) hits += s.top1_rows[b];
    *s.top1 = hits;
  });
  return 0;
}

int feature_grad(const FeatureGrad& f, void*) {
  const auto run = [&](auto part) { parallel_for(f.B * f.Ct, 1 << 14, [&](int64_t i, int64_t n) { part(f, i, n); }); };
  by_dtype(
      f.dtype, [&] { run(add_feature_grad_f32); }, [&] { run(add_feature_grad_f64); },
      [&] { run(add_feature_grad_bf16); });
  return 0;
}

}  // namespace ijckd
