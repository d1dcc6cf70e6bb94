// CPU loops of classifier_loss: one task per sample.
#include "classifier_loss.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "lanes.h"
#include "loops.h"
#include "row_math.h"
#include "soft_row.h"
#include "vectorise.h"

namespace ijckd {
namespace {

constexpr int64_t kScratch = 6;  // rows of scratch that one sample needs

// Cross-entropy of logits l, whose largest is l[best] = top; g [K] becomes its gradient.
template <typename A>
IJCKD_INLINE A cross_entropy(const RowLoss& r, const A* l, int64_t best, A top, const Target<A>& q, A* g) {
  const int64_t K = r.K;
  const auto total = [&](const auto& item) __attribute__((always_inline)) { return lane_sum<A>(K, item); };
  const bool valid = q.a >= 0 && q.a < K && q.b >= 0 && q.b < K;
  // Relative to the largest logit, whose own exponential, 1, is left out: lse - top = log1p(others) keeps the digits
  // of a confident sample. An infinite logit would hide itself that way.
  for (int64_t k = 0; k < K; ++k) g[k] = exponential(l[k] - top);
  g[best] = 0;
  const A others = valid && std::abs(top) < std::numeric_limits<A>::infinity()
                       ? total([&](int64_t k) __attribute__((always_inline)) { return g[k]; })
                       : std::numeric_limits<A>::quiet_NaN();
  if (valid) {
    const std::pair<int64_t, A> targets[] = {{q.a, g[q.a]}, {q.b, g[q.b]}, {best, A(1)}};
    for (const auto& [k, x] : targets) g[k] = q.scaled_grad(k, x, best, others);
  }
  const A scale = A(r.weights.ce) / (A(1) + others), uniform = A(r.weights.ce) * q.uniform;
  for (int64_t k = 0; k < K; ++k) g[k] = scale * g[k] - uniform;
  if (!valid) return others;
  const A below =
      q.eps != 0 ? total([&](int64_t k) __attribute__((always_inline)) { return top - l[k]; }) / A(K) : A(0);
  return q.cross_entropy(std::log1p(others), top - l[q.a], top - l[q.b], below, r.labels_b != nullptr);
}

// T^2 KL of logits l [K] to the teacher's, whose gradient is added to g. With `near`, t [K] is scratch and diff the
// difference of both; else t has the teacher's logits. l, t and diff are overwritten, x is scratch.
template <typename A>
IJCKD_INLINE A divergence(const RowLoss& r, bool near, A top, A* l, A* t, A* diff, A* x, A* g) {
  const int64_t K = r.K;
  const A temperature = A(r.weights.temperature), cold = A(1) / temperature, c = A(r.weights.kl) * temperature;
  for (int64_t k = 0; k < K; ++k) l[k] -= top;
  if (near)
    for (int64_t k = 0; k < K; ++k) t[k] = l[k] - diff[k];
  const A top_t = lane_max(K, t);
  for (int64_t k = 0; k < K; ++k) t[k] -= top_t;
  if (near)
    for (int64_t k = 0; k < K; ++k) diff[k] = (diff[k] + top_t) * cold;
  else
    for (int64_t k = 0; k < K; ++k) diff[k] = (l[k] - t[k]) * cold;
  for (int64_t k = 0; k < K; ++k) x[k] = exponential(l[k] * cold);
  for (int64_t k = 0; k < K; ++k) t[k] = exponential(t[k] * cold);
  const A sum = lane_sum<A>(K, [&](int64_t k) __attribute__((always_inline)) { return x[k]; });
  const A sum_t = lane_sum<A>(K, [&](int64_t k) __attribute__((always_inline)) { return t[k]; });
  const RowKl<A> kl(sum, sum_t,
                    lane_sum<A>(K, [&](int64_t k) __attribute__((always_inline)) { return t[k] * diff[k]; }));
  for (int64_t k = 0; k < K; ++k) g[k] += c * kl.grad(x[k], t[k]);
  const A excess =
      kl.small()
          ? lane_sum<A>(K, [&](int64_t k) __attribute__((always_inline)) { return kl.excess(x[k], t[k], diff[k]); })
          : A(0);
  return temperature * temperature * kl.value(excess);
}

// One sample: all losses on its logits, and the gradient in their place.
template <typename T, typename A>
IJCKD_INLINE void sample(const RowLoss& r, int64_t b, A* scratch) {
  const int64_t B = r.B, K = r.K;
  const LossWeights& w = r.weights;
  T* logits = static_cast<T*>(r.logits) + b * K;
  A *l = scratch, *g = l + K, *x = g + K, *diff = x + K, *t = diff + K, *item = t + K;  // [K] each
  const A* bias = static_cast<const A*>(r.bias);
  const auto with_bias = [&](const T* from, A* to) __attribute__((always_inline)) {
    if (bias)
      for (int64_t k = 0; k < K; ++k) to[k] = load(from, k) + bias[k];
    else
      for (int64_t k = 0; k < K; ++k) to[k] = load(from, k);
  };

  with_bias(logits, l);
  const T* delta = r.delta ? static_cast<const T*>(r.delta) + b * K : nullptr;
  const bool near = delta && !(r.far && r.far[b]);
  if (near) {
    for (int64_t k = 0; k < K; ++k) diff[k] = load(delta, k);
  } else if (delta || r.logits_t) {
    if (delta)
      with_bias(delta, t);
    else
      std::copy_n(static_cast<const A*>(r.logits_t) + b * K, K, t);
    for (int64_t k = 0; k < K; ++k) diff[k] = l[k] - t[k];
  }
  const A top = lane_max(K, l);
  int64_t best = 0;
  while (best < K - 1 && l[best] != top) ++best;
  const int64_t label_a = r.labels[b], label_b = r.labels_b ? r.labels_b[b] : label_a;
  r.top1_rows[b] = best == label_a;

  A ce = 0;
  const A eps = A(w.label_smoothing), share = r.labels_b ? static_cast<const A*>(r.mix)[b] : A(1);
  const Target<A> q{label_a, label_b, share, eps, eps / A(K)};
  if (w.ce != 0) {
    ce = cross_entropy(r, l, best, top, q, g);
  } else {
    std::fill_n(g, K, A(0));
  }

  A sr = 0;
  if (w.sr != 0) {
    sr = lane_sum<A>(K, [&](int64_t k) __attribute__((always_inline)) { return diff[k] * diff[k]; });
    const A c = A(2 * w.sr) / A(K);
    for (int64_t k = 0; k < K; ++k) g[k] += c * diff[k];
  }

  A* rows = static_cast<A*>(r.part_rows);
  for (int part = kPartKl; part < kParts; ++part) rows[part * B + b] = 0;
  if (w.soft()) {
    if (near)
      for (int64_t k = 0; k < K; ++k) t[k] = l[k] - diff[k];
    const auto of = [](const A* row) { return [row](int64_t k) __attribute__((always_inline)) { return row[k]; }; };
    const Lanes<A> lanes{K, item};
    SoftRow<A> soft;
    soft.take(w, lanes, of(l), of(t), K, q, r.labels_b != nullptr);
    const auto add = [&]<unsigned kOn>(std::integral_constant<unsigned, kOn>) __attribute__((always_inline)) {
      for (int64_t k = 0; k < K; ++k) g[k] += soft.template grad<kOn>(lanes, k, l[k], t[k]);
    };
    // Of standardised rows always all: where one term is alone, the compiler forms the student's z-score apart from the
    // teacher's (a multiplication joined to an addition), and equal rows would have a gradient.
    switch (w.standardize ? kSoftAll : soft.on()) {
      case kSoftTtm:
        add(std::integral_constant<unsigned, kSoftTtm>());
        break;
      case kSoftNkd:
        add(std::integral_constant<unsigned, kSoftNkd>());
        break;
      case kSoftHard:
        add(std::integral_constant<unsigned, kSoftHard>());
        break;
      default:
        add(std::integral_constant<unsigned, kSoftAll>());
    }
    for (int part = kPartKl; part < kParts; ++part) rows[part * B + b] = soft.values[part];
  }
  if (w.plain_kl() != 0) rows[kPartKl * B + b] = divergence(r, near, top, l, t, diff, x, g);
  rows[kPartCe * B + b] = ce;
  rows[kPartSr * B + b] = sr;
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
IJCKD_INLINE void stack(const StackRows& s, int64_t first, int64_t last) {
  const int64_t n = s.Ct;
  for (int64_t b = first; b < last; ++b) {
    const A *z = static_cast<const A*>(s.z) + b * n, *d = static_cast<const A*>(s.d) + b * n, *from = d;
    if (s.pooled_t) {
      const A* pooled_t = static_cast<const A*>(s.pooled_t) + b * n;
      const auto square = [&](const A* v) __attribute__((always_inline)) {
        return lane_sum<A>(n, [&](int64_t i) __attribute__((always_inline)) { return v[i] * v[i]; });
      };
      s.far[b] = far_from(square(d), square(pooled_t));
      if (s.far[b]) from = pooled_t;
    }
    T *to = static_cast<T*>(s.stack) + b * n, *beneath = to + s.B * n;
    for (int64_t i = 0; i < n; ++i) store(to, i, z[i]);
    for (int64_t i = 0; i < n; ++i) store(beneath, i, from[i]);
  }
}
IJCKD_CLONES void stack_f32(const StackRows& s, int64_t first, int64_t last) { stack<float, float>(s, first, last); }
IJCKD_CLONES void stack_f64(const StackRows& s, int64_t first, int64_t last) { stack<double, double>(s, first, last); }
IJCKD_CLONES void stack_bf16(const StackRows& s, int64_t first, int64_t last) {
  stack<c10::BFloat16, float>(s, first, last);
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

int stack_rows(const StackRows& s, void*) {
  const auto run = [&](auto part) {
    parallel_for(s.B, row_grain(s.Ct, 1 << 15), [&](int64_t first, int64_t last) { part(s, first, last); });
  };
  by_dtype(s.dtype, [&] { run(stack_f32); }, [&] { run(stack_f64); }, [&] { run(stack_bf16); });
  return 0;
}

int loss_sum(const LossSum& s, void*) {
  dispatch(s.dtype, [&](auto, auto a) {
    using A = decltype(a);
    const A* rows = static_cast<const A*>(s.part_rows);
    A* parts = static_cast<A*>(s.parts);
    double loss = 0;
    for (int i = 0; i < kParts; ++i) {
      const double weight = s.weights.of_part(i), scale = 1 / part_terms(i, s.K, s.Ct);
      parts[i] = 0;
      if (weight == 0) continue;
      double sum = 0;
      for (int64_t b = 0; b < s.B; ++b) sum += double(rows[i * s.B + b]);
      parts[i] = A(sum * scale / double(s.B));
      loss += weight * sum * scale / double(s.B);
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
