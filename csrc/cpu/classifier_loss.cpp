// CPU loops of classifier_loss: one task per sample.
#include "classifier_loss.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "loops.h"
#include "row_math.h"

namespace ijckd {
namespace {

// log sum_k exp(x[k] / T); overflow-free.
template <typename A>
A log_sum_exp(const std::vector<A>& x, A temperature) {
  const A top = *std::max_element(x.begin(), x.end());
  A s = 0;
  for (const A v : x) s += std::exp((v - top) / temperature);
  return top / temperature + std::log(s);
}

}  // namespace

int row_loss(const RowLoss& r, void*) {
  dispatch(r.dtype, [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    const int64_t B = r.B, K = r.K;
    const A *bias = static_cast<const A*>(r.bias), *mix = static_cast<const A*>(r.mix);
    const T *delta = static_cast<const T*>(r.delta), *logits_t = static_cast<const T*>(r.logits_t);
    A* rows = static_cast<A*>(r.part_rows);
    const LossWeights& w = r.weights;
    const A temp = A(w.temperature), inv_b = A(1) / A(B);
    const bool has_teacher = delta || logits_t;
    parallel_for(B, 1, [&](int64_t first, int64_t last) {
      std::vector<A> l(K), l_t(has_teacher ? K : 0);
      for (int64_t b = first; b < last; ++b) {
        T* logits = static_cast<T*>(r.logits) + b * K;
        for (int64_t k = 0; k < K; ++k) l[k] = A(logits[k]) + (bias ? bias[k] : A(0));
        const auto diff = [&](int64_t k) { return delta ? A(delta[b * K + k]) : l[k] - A(logits_t[b * K + k]); };

        const int64_t top = std::max_element(l.begin(), l.end()) - l.begin();
        r.top1_rows[b] = top == r.labels[b];

        const int64_t label_b = r.labels_b ? r.labels_b[b] : r.labels[b];
        const bool valid = r.labels[b] >= 0 && r.labels[b] < K && label_b >= 0 && label_b < K;
        const A smoothing = A(w.label_smoothing);
        const Target<A> q{r.labels[b], label_b, r.labels_b ? mix[b] : A(1), smoothing, smoothing / A(K)};
        A ce = 0, lse = 0;
        if (w.ce != 0) {
          lse = log_sum_exp(l, A(1));
          if (!valid) {
            ce = std::numeric_limits<A>::quiet_NaN();
          } else {
            A mean = 0;
            if (smoothing != 0) {
              for (const A v : l) mean += v;
              mean /= A(K);
            }
            ce = (A(1) - smoothing) * (q.mix * (lse - l[q.a]) + (A(1) - q.mix) * (lse - l[q.b])) +
                 (smoothing != 0 ? smoothing * (lse - mean) : A(0));
          }
        }
        A sr = 0;
        if (w.sr != 0)
          for (int64_t k = 0; k < K; ++k) sr += diff(k) * diff(k);
        A kl = 0, lse_s = 0, lse_t = 0;
        if (w.kl != 0) {
          for (int64_t k = 0; k < K; ++k) l_t[k] = l[k] - diff(k);
          lse_s = log_sum_exp(l, temp);
          lse_t = log_sum_exp(l_t, temp);
          for (int64_t k = 0; k < K; ++k) kl += std::exp(l_t[k] / temp - lse_t) * ((lse_s - lse_t) - (l[k] - l_t[k]) / temp);
          kl *= temp * temp;
        }
        rows[kPartCe * B + b] = ce;
        rows[kPartSr * B + b] = sr;
        rows[kPartKl * B + b] = kl;

        if (!r.grad) continue;
        const A c_sr = A(2 * w.sr) * inv_b / A(K), c_kl = A(w.kl) * temp * inv_b;
        for (int64_t k = 0; k < K; ++k) {
          A g = 0;
          if (w.ce != 0) g += A(w.ce) * inv_b * (valid ? std::exp(l[k] - lse) - q.prob(k) : ce);
          if (w.sr != 0) g += c_sr * diff(k);
          if (w.kl != 0) g += c_kl * (std::exp(l[k] / temp - lse_s) - std::exp(l_t[k] / temp - lse_t));
          logits[k] = T(g);
        }
      }
    });
  });
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
      double sum = 0;
      if (weight[i] != 0)
        for (int64_t b = 0; b < s.B; ++b) sum += double(rows[i * s.B + b]);
      parts[i] = A(sum * scale[i] / double(s.B));
      if (weight[i] != 0) loss += weight[i] * sum * scale[i] / double(s.B);
    }
    *static_cast<A*>(s.loss) = A(loss);
    int64_t hits = 0;
    for (int64_t b = 0; b < s.B; ++b) hits += s.top1_rows[b];
    *s.top1 = hits;
  });
  return 0;
}

int feature_grad(const FeatureGrad& f, void*) {
  dispatch(f.dtype, [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    const T* dz_w = static_cast<const T*>(f.dz_w);
    const A* d = static_cast<const A*>(f.d);
    A* dz = static_cast<A*>(f.dz);
    const A c = A(2 * f.fm / (double(f.B) * double(f.Ct)));
    for (int64_t i = 0; i < f.B * f.Ct; ++i) dz[i] = A(dz_w[i]) + (d ? c * d[i] : A(0));
  });
  return 0;
}

}  // namespace ijckd
