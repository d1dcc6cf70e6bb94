#pragma once
// classifier_loss.h:row_loss of one row by one block, for the kernels that have rows of logits.

#include "block_reduce.cuh"
#include "classifier_loss.h"
#include "device.cuh"
#include "row_math.h"
#include "soft_row.h"

namespace ijckd {

// What one look at a row finds.
template <typename A>
struct RowTops {
  int64_t index;  // of the largest logit, the first on a tie; K where all are NaN
  A value;        // that logit
  A value_t;      // the teacher's largest, where its logits are given
  A square;       // sum of (logits - logits_t)^2

  // NaN is never larger.
  __device__ void meet(A v, int64_t k) {
    if (v > value || (v == value && k < index)) value = v, index = k;
  }
};

struct JoinTops {
  template <typename A>
  __device__ RowTops<A> operator()(RowTops<A> a, const RowTops<A>& b) const {
    a.meet(b.value, b.index);
    if (b.value_t > a.value_t) a.value_t = b.value_t;
    a.square += b.square;
    return a;
  }
};

// Relative to the largest logits.
template <typename A>
struct RowExponentials {
  A others, s, t;  // all but the largest's; at the temperature; the teacher's at the temperature
  A weighted;      // row_math.h:RowKl's
  A below;         // sum of how far logits lie below the largest

  __device__ RowExponentials operator+(const RowExponentials& o) const {
    return {others + o.others, s + o.s, t + o.t, weighted + o.weighted, below + o.below};
  }
};

struct Larger {
  template <typename A>
  __device__ A operator()(A a, A b) const {
    return b > a ? b : a;
  }
};

// Shared memory for a block's sums, an element per warp: they are in use one after another, and may be one piece of
// memory. soft: one beside them, where the row has terms of soft_row.h.
template <typename A>
struct RowSlots {
  RowTops<A>* tops;
  RowExponentials<A>* exponentials;
  A* kl;
  SoftRow<A>* soft = nullptr;
};

// soft_row.h's passes over K classes by a block. Each ends with a barrier.
template <int kThreads, typename A>
struct BlockPasses {
  int64_t K;
  RowSlots<A> slots;

  template <int N, typename Item>
  __device__ Sums<A, N> sums(const Item& item) const {
    static_assert(N == 1 || sizeof(Sums<A, N>) == sizeof(RowExponentials<A>));  // slots of their size
    Sums<A, N> sum;
    for (int64_t k = threadIdx.x; k < K; k += kThreads) sum = sum + item(k);
    void* const to = N == 1 ? static_cast<void*>(slots.kl) : slots.exponentials;
    return block_reduce<kThreads>(sum, static_cast<Sums<A, N>*>(to), Sum{});
  }
  template <typename Item>
  __device__ A most(const Item& item) const {
    A top = lowest<A>();
    for (int64_t k = threadIdx.x; k < K; k += kThreads) top = Larger{}(top, item(k));
    return block_reduce<kThreads>(top, slots.kl, Larger{});
  }
  template <typename Item>
  __device__ int64_t first_most(const Item& item) const {
    RowTops<A> tops{K - 1, -INFINITY, -INFINITY, 0};
    for (int64_t k = threadIdx.x; k < K; k += kThreads) tops.meet(item(k), k);
    return block_reduce<kThreads>(tops, slots.tops, JoinTops{}).index;
  }
  static __device__ A exponential(A x) { return exp(x); }
  template <typename Store>
  __device__ void once(const Store& store) const {
    if (threadIdx.x == 0) store();
    __syncthreads();
  }
};

// Passes over row b, whose logits and delta, or null, the caller has at hand: largest logits and the logit match; the
// teacher's largest logit where it follows from the student's; exponentials; with kSoft what is on in soft_row.h;
// KL and the gradient, which may take the logits' place. Sums in A, in fixed order: deterministic. A label outside
// [0, K) gives a NaN loss and is counted. The gradient's row, of type G, is 0 between K and `stride`. `far`: as RowLoss
// says of the row. kSoft: RowLoss::weights.soft(). Ends with a barrier.
template <int kThreads, bool kSoft, typename T, typename A, typename G>
__device__ void row_loss_by_block(const RowLoss& r, int64_t b, const T* logits, const T* delta, bool far, G* gradient,
                                  int64_t stride, const RowSlots<A>& slots) {
  const int64_t K = r.K;
  const A* bias = static_cast<const A*>(r.bias);
  const A* logits_t = r.logits_t ? static_cast<const A*>(r.logits_t) + b * K : nullptr;
  const LossWeights& w = r.weights;
  const double w_kl = kSoft ? w.plain_kl() : w.kl;
  const bool match = w.sr != 0 || w_kl != 0, near = delta && !far;
  const A temp = A(w.temperature);

  const auto logit = [&](int64_t k) { return load<A>(logits, k) + (bias ? bias[k] : A(0)); };
  const auto logit_t = [&](int64_t k) { return delta ? load<A>(delta, k) + (bias ? bias[k] : A(0)) : logits_t[k]; };
  const auto diff = [&](int64_t k, A l) { return near ? load<A>(delta, k) : l - logit_t(k); };

  RowTops<A> tops{K, -INFINITY, -INFINITY, 0};
  for (int64_t k = threadIdx.x; k < K; k += kThreads) {
    const A l = logit(k);
    tops.meet(l, k);
    if (!match) continue;
    const A d = diff(k, l);
    if (!near && logit_t(k) > tops.value_t) tops.value_t = logit_t(k);
    tops.square += d * d;
  }
  tops = block_reduce<kThreads>(tops, slots.tops, JoinTops{});
  if (near && w_kl != 0) {
    A top_t = -INFINITY;
    for (int64_t k = threadIdx.x; k < K; k += kThreads)
      top_t = Larger{}(top_t, (logit(k) - tops.value) - load<A>(delta, k));
    tops.value_t = block_reduce<kThreads>(top_t, slots.kl, Larger{});
  }
  // The teacher's logit below its largest, and by how much more the student's, `below`, lies below its own.
  const auto below_t = [&](int64_t k, A below) {
    return (near ? below - load<A>(delta, k) : logit_t(k)) - tops.value_t;
  };
  const auto moved = [&](int64_t k, A below) {
    return (near ? load<A>(delta, k) + tops.value_t : below - below_t(k, below)) / temp;
  };

  const long long label_a = r.labels[b], label_b = r.labels_b ? r.labels_b[b] : label_a;
  const bool valid = label_a >= 0 && label_a < K && label_b >= 0 && label_b < K;
  const A smoothing = A(w.label_smoothing);
  const Target<A> q{label_a, label_b, r.labels_b ? static_cast<const A*>(r.mix)[b] : A(1), smoothing, smoothing / A(K)};
  // Before a gradient takes their place.
  const A l_a = valid ? logit(label_a) : A(0), l_b = valid ? logit(label_b) : A(0);

  RowExponentials<A> sums{};
  if (w.ce != 0 || w_kl != 0)
    for (int64_t k = threadIdx.x; k < K; k += kThreads) {
      const A below = logit(k) - tops.value;
      sums.below -= below;
      if (w.ce != 0 && k != tops.index) sums.others += exp(below);
      if (w_kl == 0) continue;
      const A e_t = exp(below_t(k, below) / temp);
      sums.s += exp(below / temp);
      sums.t += e_t;
      sums.weighted += e_t * moved(k, below);
    }
  sums = block_reduce<kThreads>(sums, slots.exponentials, Sum{});
  // The largest logit's own exponential is left out, so that a confident sample keeps its digits; an infinite one would
  // hide itself.
  if (!valid || !(fabs(tops.value) < A(INFINITY))) sums.others = NAN;

  const BlockPasses<kThreads, A> passes{K, slots};
  const auto of_teacher = [&](int64_t k) { return near ? logit(k) - load<A>(delta, k) : logit_t(k); };
  if constexpr (kSoft) {
    const Target<A> in_range = valid ? q : Target<A>{0, 0, q.mix, q.eps, q.uniform};
    slots.soft->take(w, passes, logit, of_teacher, K, in_range, r.labels_b != nullptr);
    if (!valid) slots.soft->refuse(w, passes);
  }

  A excess = 0;
  const RowKl<A> kl(sums.s, sums.t, sums.weighted);
  const A c_sr = A(2 * w.sr) / A(K), c_kl = A(w_kl) * temp;
  if (r.grad || w_kl != 0)
    for (int64_t k = threadIdx.x; k < K; k += kThreads) {
      const A l = logit(k), below = l - tops.value;
      A g = 0;
      if (w.ce != 0) g += A(w.ce) * q.grad(k, exp(below), tops.index, sums.others);
      if (w.sr != 0) g += c_sr * diff(k, l);
      if (w_kl != 0) {
        const A e = exp(below / temp), e_t = exp(below_t(k, below) / temp);
        if (kl.small()) excess += kl.excess(e, e_t, moved(k, below));
        g += c_kl * kl.grad(e, e_t);
      }
      if constexpr (kSoft) g += slots.soft->grad(passes, k, l, of_teacher(k));
      if (r.grad) store(gradient + b * stride, k, g);
    }
  if (r.grad)
    for (int64_t k = K + threadIdx.x; k < stride; k += kThreads) store(gradient + b * stride, k, A(0));
  excess = block_reduce<kThreads>(excess, slots.kl, Sum{});
  if (threadIdx.x != 0) return;
  A ce = 0;
  if (w.ce != 0) {
    ce = sums.others;
    if (valid)
      ce = q.cross_entropy(log1p(ce), tops.value - l_a, tops.value - l_b, sums.below / A(K), r.labels_b != nullptr);
  }
  A* rows = static_cast<A*>(r.part_rows);
  rows[kPartCe * r.B + b] = ce;
  rows[kPartSr * r.B + b] = w.sr != 0 ? tops.square : A(0);
  if constexpr (kSoft)
    for (int part = kPartKl; part < kParts; ++part) rows[part * r.B + b] = slots.soft->values[part];
  if (!kSoft || w_kl != 0) rows[kPartKl * r.B + b] = w_kl != 0 ? temp * temp * kl.value(excess) : A(0);
  r.top1_rows[b] = tops.index == label_a;
  if (!valid) atomicAdd(reinterpret_cast<unsigned long long*>(r.counts + kBadLabels), 1ull);
}

// Row b of [rows, K].
template <typename T>
__device__ __forceinline__ const T* row_of_matrix(const void* p, int64_t b, int64_t K) {
  return p ? static_cast<const T*>(p) + b * K : nullptr;
}

}  // namespace ijckd
