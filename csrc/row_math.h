#pragma once
// Scalar formulas that the CPU loops and the CUDA kernels share, so that a CPU test proves the GPU's algebra too.
// Knows neither torch nor the CUDA runtime.

#include <math.h>

#if defined(__CUDACC__)
#define IJCKD_HD __host__ __device__ __forceinline__
#else
#define IJCKD_HD inline
#endif

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

  // Softmax minus q at class k. x = exp(l[k] - l[best]); others: the sum of x over all classes but `best`, whose own is
  // 1 and left out, because for a confident sample 1 - p[a] would keep no digit.
  IJCKD_HD A grad(long long k, A x, long long best, A others) const {
    const A sum = A(1) + others, share_a = (A(1) - eps) * mix, share_b = (A(1) - eps) * (A(1) - mix);
    A g = k != best ? x : best == a ? (A(1) - share_a) * sum - others : A(1);
    if (k == a && best != a) g -= share_a * sum;
    if (k == b) g -= share_b * sum;
    return g / sum - uniform;
  }
};

}  // namespace ijckd
