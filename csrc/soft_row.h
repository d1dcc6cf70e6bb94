#pragma once
// What a row of the student's logits l and one of the teacher's t give beside row_math.h's cross-entropy, logit match
// and KL: TTM, WTTM, NKD, the cross-entropy with the teacher's class, and all of them, and KL, on standardised logits.
//
// One algebra for the CPU's loops and the GPU's blocks. `passes` is how a row is gone through, with
//   sums<N>(item)    sums over k of item(k), a Sums<A, N>; N is 1 or 5
//   most(item)       the largest of item(k), not below the lowest finite number
//   first_most(item) the first k of the largest item(k)
//   exponential(x)
//   once(store)      store(), whose results all who go through the row then see
// l and t give an element, l(k). What is asked for twice is computed twice: a row may have any length.

#include <float.h>
#include <math.h>

#include <cstdint>

#include "classifier_loss.h"
#include "host_device.h"
#include "row_math.h"

namespace ijckd {

template <typename A, int N>
struct Sums {
  A of[N] = {};

  IJCKD_HD Sums operator+(const Sums& o) const {
    Sums out;
    for (int i = 0; i < N; ++i) out.of[i] = of[i] + o.of[i];
    return out;
  }
};

template <typename A>
IJCKD_HD constexpr A lowest() {
  return sizeof(A) == sizeof(float) ? A(-FLT_MAX) : A(-DBL_MAX);
}

// (l - mean) / (standard deviation + 1e-7), the deviation unbiased: Sun et al. 2024. Or the row as it is.
template <typename A>
struct Standardised {
  A mean = 0, scale = 1;
  A along = 0;  // of the gradient's share along the row, which the deviation takes: 1 / (K - 1) and what 1e-7 adds

  template <typename Passes, typename Row>
  static IJCKD_PASSES Standardised of(const Passes& passes, const Row& row, int64_t K) {
    Standardised out;
    out.mean = passes.template sums<1>([&](int64_t k) IJCKD_ITEM { return Sums<A, 1>{{row(k)}}; }).of[0] / A(K);
    if (K == 1) return out;  // has no deviation
    const A square = passes
                         .template sums<1>([&](int64_t k) IJCKD_ITEM {
                           const A from_mean = row(k) - out.mean;
                           return Sums<A, 1>{{from_mean * from_mean}};
                         })
                         .of[0];
    const A deviation = sqrt(square / A(K - 1)), wider = deviation + A(1e-7);
    out.scale = A(1) / wider;
    // Equal logits: no direction along them, and no gradient that it could take.
    out.along = deviation > A(0) ? wider / (deviation * A(K - 1)) : A(0) * deviation;
    return out;
  }

  IJCKD_HD A operator()(A x) const { return (x - mean) * scale; }
};

// -log softmax(l)[y] and its gradient, relative to the largest logit of the other classes, so that neither a confident
// row nor a hopeless one loses its digits.
template <typename A>
struct Pull {
  int64_t y = -1;
  A top = 0;     // the others' largest
  A lead = 0;    // l[y] - top
  A shift = 0;   // max(lead, 0)
  A others = 0;  // sum over the others of exp(l - top - shift)
  A total = 1;   // with y's

  template <typename Passes, typename Row>
  static IJCKD_PASSES Pull of(const Passes& passes, const Row& l, int64_t y, A top) {
    Pull out;
    out.y = y, out.top = top, out.lead = l(y) - top;
    out.shift = out.lead > A(0) ? out.lead : A(0);
    out.others = passes
                     .template sums<1>([&](int64_t k) IJCKD_ITEM {
                       return Sums<A, 1>{{k == y ? A(0) : passes.exponential(l(k) - out.top - out.shift)}};
                     })
                     .of[0];
    out.total = out.others + exp(out.lead - out.shift);
    return out;
  }

  IJCKD_HD A value() const { return lead > A(0) ? log1p(others) : log(total) - lead; }
  IJCKD_HD A share() const { return exp(lead - shift) / total; }  // softmax(l)[y]

  // x = exp(l[k] - top - shift)
  IJCKD_HD A grad(int64_t k, A x) const { return (k == y ? -others : x) / total; }
};

// KL(softmax(t cold_t) || softmax(l cold)) over all classes but `without`.
template <typename A>
struct Divergence {
  int64_t without = -1;
  A top = 0, top_t = 0;
  A cold = 0, cold_t = 0;  // 1 over the temperatures
  A rate = 0;              // its weight, times cold; 0: off
  RowKl<A> kl{A(1), A(1), A(0)};
  A value = 0;
  A entropy = 0;  // of the teacher's softmax
  A apart = 0;  // 1 - kl.ratio, from differences class by class: where both are sure of one class no digits are left of
                // their sums'

  IJCKD_HD A below(A l) const { return (l - top) * cold; }
  IJCKD_HD A below_t(A t) const { return (t - top_t) * cold_t; }

  template <typename Passes, typename Row, typename RowT>
  IJCKD_PASSES void take(const Passes& passes, const Row& l, const RowT& t) {
    const Sums<A, 5> sums = passes.template sums<5>([&](int64_t k) IJCKD_ITEM {
      const A a = below(l(k)), a_t = below_t(t(k));
      const bool on = k != without;  // whose exponential may be infinite
      const A e = on ? passes.exponential(a) : A(0), e_t = on ? passes.exponential(a_t) : A(0);
      return Sums<A, 5>{{e, e_t, on ? e_t * (a - a_t) : A(0), on ? e_t * a_t : A(0), e_t - e}};
    });
    kl = RowKl<A>(sums.of[0], sums.of[1], sums.of[2]);
    apart = sums.of[4] * kl.share_t;
    entropy = log(sums.of[1]) - sums.of[3] / sums.of[1];
    A excess = 0;
    if (kl.small())
      excess = passes
                   .template sums<1>([&](int64_t k) IJCKD_ITEM {
                     const A a = below(l(k)), a_t = below_t(t(k));
                     const A one = kl.excess(passes.exponential(a), passes.exponential(a_t), a - a_t);
                     return Sums<A, 1>{{k == without ? A(0) : one}};
                   })
                   .of[0];
    value = kl.value(excess);
  }

  // x and x_t: exp(below), exp(below_t)
  IJCKD_HD A grad(int64_t k, A x, A x_t) const {
    return k == without ? A(0) : rate * kl.share * (x - x_t + x_t * apart);
  }
};

// NKD with label y (Yang et al. 2023): -t[y] log s[y] - gamma T^2 sum over k != y of t'[k] log s'[k], t' and s' the
// softmaxes at T over the other classes.
template <typename A>
struct Nkd {
  Pull<A> own;
  Divergence<A> others;
  A share_t = 0;  // t[y]
  A rate = 0;     // its weight; 0: off
  A gamma = 0;    // with T^2

  template <typename Passes, typename Row, typename RowT>
  static IJCKD_PASSES Nkd of(const Passes& passes, const Row& l, const RowT& t, int64_t K, int64_t y, A rate, A gamma,
                             A T) {
    Nkd out;
    const A top = passes.most([&](int64_t k) IJCKD_ITEM { return k == y ? lowest<A>() : l(k); });
    const A top_t = passes.most([&](int64_t k) IJCKD_ITEM { return k == y ? lowest<A>() : t(k); });
    out.own = Pull<A>::of(passes, l, y, top);
    out.share_t = Pull<A>::of(passes, t, y, top_t).share();
    out.rate = rate, out.gamma = gamma * T * T;
    if (K == 1) return out;  // there are no others
    Divergence<A>& d = out.others;
    d.without = y, d.top = top, d.top_t = top_t, d.cold = d.cold_t = A(1) / T, d.rate = rate * out.gamma * d.cold;
    d.take(passes, l, t);
    return out;
  }

  IJCKD_HD A value() const { return share_t * own.value() + gamma * (others.value + others.entropy); }
};

// What can be on, as bits.
enum : unsigned { kSoftKl = 1, kSoftTtm = 2, kSoftNkd = 4, kSoftNkdB = 8, kSoftHard = 16, kSoftAll = 31 };

// All of it, for one row. values: unweighted, in the places of LossWeights' parts; grad: of their weighted sum. May lie
// where all of a block's threads see it, which have no registers for as much.
template <typename A>
struct SoftRow {
  Standardised<A> of_l, of_t;
  Divergence<A> kl, ttm;
  Nkd<A> nkd, nkd_b;
  Pull<A> hard;
  A hard_rate = 0;
  A along = 0;  // Standardised::along times the gradient's sum along the row
  A values[kParts] = {};

  // Of a row whose labels lie in [0, K).
  template <typename Passes, typename Row, typename RowT>
  IJCKD_PASSES void take(const LossWeights& w, const Passes& passes, const Row& l, const RowT& t, int64_t K,
                         const Target<A>& q, bool mixed) {
    const A T = A(w.temperature), cold = A(1) / T;
    passes.once([&]() IJCKD_ITEM { *this = SoftRow(); });
    if (w.hard != 0) {
      const int64_t y = passes.first_most(t);
      const A top = passes.most([&](int64_t k) IJCKD_ITEM { return k == y ? lowest<A>() : l(k); });
      const Pull<A> pull = Pull<A>::of(passes, l, y, top);
      passes.once([&]() IJCKD_ITEM { hard = pull, hard_rate = A(w.hard), values[kPartHard] = pull.value(); });
    }
    if (w.standardize) {
      const Standardised<A> a = Standardised<A>::of(passes, l, K), b = Standardised<A>::of(passes, t, K);
      passes.once([&]() IJCKD_ITEM { of_l = a, of_t = b; });
    }
    const auto s = [&](int64_t k) IJCKD_ITEM { return of_l(l(k)); };
    const auto s_t = [&](int64_t k) IJCKD_ITEM { return of_t(t(k)); };
    const bool own_kl = w.kl != 0 && w.standardize;  // else row_math.h's
    Divergence<A> d;
    if (own_kl || w.ttm != 0 || w.wttm != 0) d.top = passes.most(s), d.top_t = passes.most(s_t);
    if (own_kl) {
      d.cold = d.cold_t = cold, d.rate = A(w.kl) * T;
      d.take(passes, s, s_t);
      passes.once([&]() IJCKD_ITEM { kl = d, values[kPartKl] = T * T * d.value; });
    }
    if (w.ttm != 0 || w.wttm != 0) {
      d.cold = A(1), d.cold_t = A(w.ttm_power);
      d.take(passes, s, s_t);
      // U = sum of p_t^g, of which the numerator is the divergence's own sum
      const A all = passes
                        .template sums<1>([&](int64_t k)
                                              IJCKD_ITEM { return Sums<A, 1>{{passes.exponential(s_t(k) - d.top_t)}}; })
                        .of[0];
      const A mass = exp(-log(d.kl.share_t) - log(all) * d.cold_t);
      d.rate = A(w.ttm) + A(w.wttm) * mass;
      passes.once([&]() IJCKD_ITEM { ttm = d, values[kPartTtm] = d.value, values[kPartWttm] = mass * d.value; });
    }
    if (w.nkd != 0) {
      const A share = mixed ? q.mix : A(1), gamma = A(w.nkd_gamma);
      const Nkd<A> of_a = Nkd<A>::of(passes, s, s_t, K, q.a, A(w.nkd) * share, gamma, T);
      passes.once([&]() IJCKD_ITEM { nkd = of_a, values[kPartNkd] = share * of_a.value(); });
      if (mixed) {
        const Nkd<A> of_b = Nkd<A>::of(passes, s, s_t, K, q.b, A(w.nkd) * (A(1) - share), gamma, T);
        passes.once([&]() IJCKD_ITEM { nkd_b = of_b, values[kPartNkd] += (A(1) - share) * of_b.value(); });
      }
    }
    if (w.standardize) {
      const A sum = passes
                        .template sums<1>([&](int64_t k) IJCKD_ITEM {
                          return Sums<A, 1>{{s(k) * of_standardised(passes, k, s(k), s_t(k))}};
                        })
                        .of[0];
      passes.once([&]() IJCKD_ITEM { along = of_l.along * sum; });
    }
  }

  // Of a row whose labels do not.
  template <typename Passes>
  IJCKD_PASSES void refuse(const LossWeights& w, const Passes& passes) {
    if (w.nkd != 0) passes.once([&]() IJCKD_ITEM { nkd.rate = values[kPartNkd] = NAN; });
  }

  unsigned on() const {
    const auto bit = [](A rate, unsigned of) { return rate != A(0) ? of : 0u; };
    return bit(kl.rate, kSoftKl) | bit(ttm.rate, kSoftTtm) | bit(nkd.rate, kSoftNkd) | bit(nkd_b.rate, kSoftNkdB) |
           bit(hard_rate, kSoftHard);
  }

  // dloss/dl[k], from l[k] and t[k]. kOn: at least the bits that are on; a compiler that makes a loop's conditions
  // values computes all the others too.
  template <unsigned kOn = kSoftAll, typename Passes>
  IJCKD_PASSES A grad(const Passes& passes, int64_t k, A l, A t) const {
    const A s = of_l(l);
    A g = of_l.scale * (of_standardised<kOn>(passes, k, s, of_t(t)) - along * s);
    if ((kOn & kSoftHard) && hard_rate != A(0))
      g += hard_rate * hard.grad(k, passes.exponential(l - hard.top - hard.shift));
    return g;
  }

 private:
  // The same of what sees standardised logits, with respect to these.
  template <unsigned kOn = kSoftAll, typename Passes>
  IJCKD_PASSES A of_standardised(const Passes& passes, int64_t k, A s, A s_t) const {
    A g = 0;
    const auto add = [&](const Divergence<A>& d) IJCKD_ITEM {
      if (d.rate != A(0)) g += d.grad(k, passes.exponential(d.below(s)), passes.exponential(d.below_t(s_t)));
    };
    const auto add_nkd = [&](const Nkd<A>& n) IJCKD_ITEM {
      if (n.rate == A(0)) return;
      g += n.rate * n.share_t * n.own.grad(k, passes.exponential(s - n.own.top - n.own.shift));
      add(n.others);
    };
    if constexpr (kOn & kSoftKl) add(kl);
    if constexpr (kOn & kSoftTtm) add(ttm);
    if constexpr (kOn & kSoftNkd) add_nkd(nkd);
    if constexpr (kOn & kSoftNkdB) add_nkd(nkd_b);
    return g;
  }
};

}  // namespace ijckd
