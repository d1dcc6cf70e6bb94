#pragma once
// What the student's row of logits and the teacher's at one position of a map give: KL and DKD (Zhao et al. 2022), with
// the weights of scale decoupled distillation (Wei et al. 2024). soft_row.h says how a row is gone through.

#include <math.h>

#include <cstdint>

#include "class_map_loss.h"
#include "host_device.h"
#include "row_math.h"
#include "soft_row.h"

namespace ijckd {

// KL of two classes, with logits `lead` and 0: the label against all others together.
template <typename A>
struct Binary {
  A lead = 0;
  A x = 1, x_t = 1, y = 1, y_t = 1;  // exponentials of the label's and of the others', relative to the larger
  RowKl<A> kl{A(2), A(2), A(0)};

  IJCKD_HD Binary() = default;
  IJCKD_HD Binary(A lead, A lead_t)
      : lead(lead),
        x(exp(below(lead))),
        x_t(exp(below(lead_t))),
        y(exp(below(-lead))),
        y_t(exp(below(-lead_t))),
        kl(x + y, x_t + y_t, x_t * (below(lead) - below(lead_t)) + y_t * (below(-lead) - below(-lead_t))) {}

  IJCKD_HD A value(A lead_t) const {
    const A excess = kl.excess(x, x_t, below(lead) - below(lead_t)) + kl.excess(y, y_t, below(-lead) - below(-lead_t));
    return kl.value(excess);
  }

  // d/dlead: the label's probability less the teacher's. Of a sure row the others' keep the digits.
  IJCKD_HD A grad() const { return lead > A(0) ? -kl.grad(y, y_t) : kl.grad(x, x_t); }

 private:
  static IJCKD_HD A below(A lead) { return lead < A(0) ? lead : A(0) * lead; }  // NaN stays
};

// T^2 (alpha TCKD + beta NCKD) with label y.
template <typename A>
struct Dkd {
  Divergence<A> others;   // NCKD
  Binary<A> target;       // TCKD
  A alpha = 0, beta = 0;  // with T^2
  A value = 0;
  A pull = 0;  // dTCKD/dlead's share in the gradient

  template <typename Passes, typename Row, typename RowT>
  static IJCKD_PASSES Dkd of(const Passes& passes, const Row& l, const RowT& t, int64_t K, int64_t y, A alpha, A beta,
                             A T) {
    Dkd out;
    if (K == 1) {  // there are no others
      out.value = A(0) * (l(0) + t(0));
      return out;
    }
    Divergence<A>& d = out.others;
    d.without = y, d.cold = d.cold_t = A(1) / T;
    d.top = passes.most([&](int64_t k) IJCKD_ITEM { return k == y ? lowest<A>() : l(k); });
    d.top_t = passes.most([&](int64_t k) IJCKD_ITEM { return k == y ? lowest<A>() : t(k); });
    d.take(passes, l, t);
    // the label's logit over log-sum-exp of the others'
    const A lead = d.below(l(y)) + log(d.kl.share), lead_t = d.below_t(t(y)) + log(d.kl.share_t);
    out.target = Binary<A>(lead, lead_t);
    out.alpha = alpha * T * T, out.beta = beta * T * T;
    out.value = out.alpha * out.target.value(lead_t) + out.beta * d.value;
    out.pull = out.alpha * d.cold * out.target.grad();
    d.rate = out.beta * d.cold;
    return out;
  }

  // x and x_t: exp(below), exp(below_t) of `others`
  IJCKD_HD A grad(int64_t k, A x, A x_t) const {
    return k == others.without ? pull : others.grad(k, x, x_t) - pull * others.kl.share * x;
  }
};

// Both, for one row; `factor` is the row's.
template <typename A>
struct PositionRow {
  Divergence<A> kl;
  Dkd<A> dkd;
  A factor = 0;
  A values[kMapCam] = {};  // KL with T^2, and DKD, times the factor

  template <typename Passes, typename Row, typename RowT>
  IJCKD_PASSES PositionRow(const ClassMapWeights& w, const Passes& passes, const Row& l, const RowT& t, int64_t K,
                           int64_t y, A factor)
      : factor(factor) {
    const A T = A(w.temperature);
    if (w.kl != 0) {
      kl.top = passes.most(l), kl.top_t = passes.most(t);
      kl.cold = kl.cold_t = A(1) / T, kl.rate = A(w.kl) * T;
      kl.take(passes, l, t);
      values[kMapKl] = factor * T * T * kl.value;
    }
    if (w.dkd_alpha != 0 || w.dkd_beta != 0) {
      dkd = Dkd<A>::of(passes, l, t, K, y, A(w.dkd_alpha), A(w.dkd_beta), T);
      values[kMapDkd] = factor * dkd.value;
    }
  }

  // Of the weighted loss, dloss/dl[k] from l[k] and t[k]. kKl, kDkd: whether these may be on (soft_row.h).
  template <bool kKl = true, bool kDkd = true, typename Passes>
  IJCKD_PASSES A grad(const Passes& passes, int64_t k, A l, A t) const {
    A g = 0;
    if (kKl && kl.rate != A(0)) g += kl.grad(k, passes.exponential(kl.below(l)), passes.exponential(kl.below_t(t)));
    const Divergence<A>& d = dkd.others;
    if (kDkd && d.without >= 0) g += dkd.grad(k, passes.exponential(d.below(l)), passes.exponential(d.below_t(t)));
    return factor * g;
  }
};

}  // namespace ijckd
