#pragma once
// Scalar formulas that the CPU loops and the CUDA kernels share, so that a CPU test proves the GPU's algebra too.
// Knows neither torch nor the CUDA runtime.

#include <math.h>

#include "host_device.h"

namespace ijckd {

// BatchNorm as an affine map of the normalised value. Without BatchNorm: mean 0, inv_std 1, gamma 1, beta = bias.
template <typename A>
struct Channel {
  A mean, inv_std, gamma, beta;

  IJCKD_HD A normalised(A y) const { return (y - mean) * inv_std; }
  IJCKD_HD A affine(A yhat) const { return gamma * yhat + beta; }
};

// Whether the ReLU lets `pre` through. It does NaN, as torch's: `pre > 0` would make it 0 and hide that a step has
// failed.
template <typename A>
IJCKD_HD bool passes(A pre, bool relu) {
  return !relu || !(pre <= A(0));
}

// The running statistic after a batch's: a share of the way to it, as torch's lerp goes.
template <typename A>
IJCKD_HD A followed(A running, A batch, A share) {
  const A way = batch - running;
  return share < A(0.5) ? running + share * way : batch - way * (A(1) - share);
}

// What the forward pass keeps per (image, channel). Every reduction that BatchNorm's backward needs follows from these
// and the incoming gradient, so backward never sums over the map again. `on` is the set of positions the ReLU lets
// through.
template <typename A>
struct Pooled {
  A out = 0;       // sum of Z
  A count = 0;     // |on|
  A yhat = 0;      // sum of yhat over on
  A square = 0;    // sum of (Z - F_t)^2
  A res = 0;       // sum of (Z - F_t) over on
  A res_yhat = 0;  // sum of (Z - F_t) * yhat over on

  // A float sum over thousands of positions, one after the other, would lose digits: runs of some are added up in
  // double.
  template <typename R>
  IJCKD_HD void add(const Pooled<R>& run) {
    out += run.out, count += run.count, yhat += run.yhat;
    square += run.square, res += run.res, res_yhat += run.res_yhat;
  }

  IJCKD_HD void add(const Channel<A>& ch, A y, bool relu) {
    const A h = ch.normalised(y), pre = ch.affine(h);
    const bool on = passes(pre, relu);
    out += on ? pre : A(0);
    count += on ? A(1) : A(0);
    yhat += on ? h : A(0);
  }

  IJCKD_HD void add_matched(const Channel<A>& ch, A y, bool relu, A target) {
    const A h = ch.normalised(y), pre = ch.affine(h);
    const bool on = passes(pre, relu);
    const A Z = on ? pre : A(0), r = Z - target;
    out += Z;
    square += r * r;
    count += on ? A(1) : A(0);
    yhat += on ? h : A(0);
    res += on ? r : A(0);
    res_yhat += on ? r * h : A(0);
  }
};

// dL/dy at one position.  g_pos: gradient of Z from the pooled path (dL/dz / P); c: 2 dL/dfm / (B P Ct), 0 without map
// match. shift, slope: sum of dL/dpre and of dL/dpre * yhat over all N positions, each divided by N; both 0 unless
// BatchNorm used the batch's own statistics.
template <typename A>
IJCKD_HD A position_grad(const Channel<A>& ch, A y, bool relu, A g_pos, A c, A target, A shift, A slope) {
  const A h = ch.normalised(y), pre = ch.affine(h);
  const bool on = passes(pre, relu);
  const A d_pre = on ? g_pos + c * (pre - target) : A(0);
  return ch.gamma * ch.inv_std * (d_pre - shift - h * slope);
}

// Hard-label target with label smoothing and a two-label mix: q[k] = (1 - eps) (mix [k = a] + (1 - mix) [k = b]) + eps
// / K.
template <typename A>
struct Target {
  long long a, b;
  A mix, eps, uniform;  // uniform = eps / K

  IJCKD_HD A share_a() const { return (A(1) - eps) * mix; }
  IJCKD_HD A share_b() const { return (A(1) - eps) * (A(1) - mix); }

  // Cross-entropy of parts of which none is below 0: `a_below`, `b_below` and `below` say how far the labels' logits
  // and the mean of all lie below a logit l, and `rest` how far log-sum-exp lies above it. 0 of what may be infinite is
  // not taken, except as torch does.
  IJCKD_HD A cross_entropy(A rest, A a_below, A b_below, A below, bool mixed) const {
    A ce = rest + share_a() * a_below;
    if (mixed) ce += share_b() * b_below;
    if (eps != A(0)) ce += eps * below;
    return ce;
  }

  // Softmax minus q at class k, times `sum`. x = exp(l[k] - l[best]); others: the sum of x over all classes but `best`,
  // whose own is 1 and left out, because for a confident sample 1 - p[a] would keep no digit. Without q's uniform part.
  IJCKD_HD A scaled_grad(long long k, A x, long long best, A others) const {
    const A sum = A(1) + others, of_a = share_a(), of_b = share_b();
    if (k != best) return x - (k == a ? of_a * sum : A(0)) - (k == b ? of_b * sum : A(0));
    const A at_best = (best == a ? of_a : A(0)) + (best == b ? of_b : A(0));
    const A left = eps + (best == a ? A(0) : of_a) + (best == b ? A(0) : of_b);  // 1 - at_best
    return at_best < left ? A(1) - at_best * sum : left * sum - others;
  }

  // The same, as it is.
  IJCKD_HD A grad(long long k, A x, long long best, A others) const {
    return scaled_grad(k, x, best, others) / (A(1) + others) - uniform;
  }
};

// Whether the teacher's logits of a row are better taken from pooled_t itself than from d = z - pooled_t, whose
// rounding would be large beside them. square: |d|^2, square_t: |pooled_t|^2.
template <typename A>
IJCKD_HD bool far_from(A square, A square_t) {
  return !(A(4) * square <= square_t);
}

// KL(p_t || p) of one row, both softmaxes of logits over the temperature. The rows are taken relative to their own
// largest logits, a and a_t <= 0, so that the size of the logits does not enter, nor a constant that is added to a row.
// With w = a - a_t and mean = sum of p_t w,
//   KL = log sum e^a - log sum e^a_t - mean                   keeps no digit of a small one, but for it
//   e^KL - 1 = sum of p_t (e^v - 1 - v),  v = w - mean         has no term below 0, and each is 0 where the rows are
//   equal.
template <typename A>
struct RowKl {
  A share, share_t;  // 1 over the sums
  A ratio;           // of the sums
  A mean;
  A rough;  // the first form
  A scale;  // scale e^a = p_t e^v

  // sum, sum_t: of e^a and of e^a_t; weighted: of e^a_t w.
  IJCKD_HD RowKl(A sum, A sum_t, A weighted)
      : share(A(1) / sum),
        share_t(A(1) / sum_t),
        ratio(sum / sum_t),
        mean(weighted * share_t),
        rough(log(sum) - log(sum_t) - mean),
        scale(exp(-mean) * share_t) {}

  IJCKD_HD bool small() const { return rough < A(1); }  // not where NaN or infinite

  // p - p_t, exactly 0 where x = e^a and x_t = e^a_t are equal in all classes.
  IJCKD_HD A grad(A x, A x_t) const { return share * (x - x_t * ratio); }

  // p_t (e^v - 1 - v), from x = e^a and x_t = e^a_t; where `small`.
  IJCKD_HD A excess(A x, A x_t, A w) const {
    constexpr A series = sizeof(A) == sizeof(float) ? A(1) : A(0.0625);  // up to |v|
    const A v = w - mean, p_t = x_t * share_t, size = v < A(0) ? -v : v;
    A sum = A(0.00000027557319) * v + A(0.0000027557319);  // 1 / 10!, 1 / 9! and so on down to 1 / 2!
    sum = sum * v + A(0.000024801587301587302);
    sum = sum * v + A(0.00019841269841269841);
    sum = sum * v + A(0.0013888888888888889);
    sum = sum * v + A(0.0083333333333333333);
    sum = sum * v + A(0.041666666666666667);
    sum = sum * v + A(0.16666666666666667);
    sum = sum * v + A(0.5);
    return size < series ? p_t * (v * v * sum) : x * scale - p_t * (A(1) + v);
  }

  // From the sum of every class's excess, not read where not `small`.
  IJCKD_HD A value(A excess) const { return small() ? log1p(excess) : rough; }
};

}  // namespace ijckd
