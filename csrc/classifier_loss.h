#pragma once
// classifier_loss without torch: pointers, sizes, a stream; loops in cpu/classifier_loss.cpp, kernels in
// cuda/classifier_loss.cu.
//
// Names: B samples, K classes, Ct teacher channels. T is `dtype` (the products'), A its accumulator (dtype.h) and z's
// type. Every function returns 0, or a CUDA error code. The stream is a cudaStream_t; the CPU ignores it.

#include <cstdint>

#include "counts.h"
#include "dtype.h"
#include "host_device.h"

namespace ijckd {

enum { kPartCe = 0, kPartSr, kPartFm, kPartKl, kPartHard, kPartTtm, kPartWttm, kPartNkd, kParts };

struct LossWeights {
  double ce, sr, fm, kl;
  double temperature;
  double label_smoothing;
  double hard, ttm, wttm, nkd;  // soft_row.h's
  double ttm_power;
  double nkd_gamma;
  double standardize;  // not 0: kl, ttm, wttm and nkd see standardised logits

  // Whether a row has terms of soft_row.h.
  IJCKD_HD bool soft() const { return hard != 0 || ttm != 0 || wttm != 0 || nkd != 0 || (kl != 0 && standardize != 0); }
  // The weight of row_math.h's KL.
  IJCKD_HD double plain_kl() const { return standardize != 0 ? 0 : kl; }
  // Whether the gradient needs whole rows of the student's logits and the teacher's, not their difference alone.
  IJCKD_HD bool both_rows() const { return kl != 0 || soft(); }
  // The weights of the parts, in their order.
  IJCKD_HD double of_part(int i) const {
    const double weights[kParts] = {ce, sr, fm, kl, hard, ttm, wttm, nkd};
    return weights[i];
  }
};

// What a part's sum over the batch is divided by, beside B.
IJCKD_HD double part_terms(int i, int64_t K, int64_t Ct) {
  return i == kPartSr ? double(K) : i == kPartFm ? double(Ct) : 1.0;
}

// Per row: cross-entropy, logit match, temperature KL, the terms of soft_row.h, top-1, and in place of the logits the
// gradient of the row's own weighted loss: 1/B, the mean's share, would push small probabilities below float16's range.
struct RowLoss {
  DType dtype;
  void* logits;             // [B, K] T  in: z W^T without bias; out: the gradient if `grad`
  const void* bias;         // [K] A, or null
  const void* delta;        // [B, K] T: W d = logits - logits_t, or null
  const uint8_t* far;       // [B], or null: rows of delta that are W pooled_t, the teacher's logits without bias
  const void* logits_t;     // [B, K] A, or null; read only where delta is null
  const int64_t* labels;    // [B]; a label outside [0, K) makes the row's loss NaN
  const int64_t* labels_b;  // [B], or null
  const void* mix;          // [B] A: share of `labels` in the target, with labels_b
  void* part_rows;          // [kParts, B] A  out: unweighted row losses; row kPartFm is rows.h:feature_diff's
  int64_t* top1_rows;       // [B]  out: 1 where the largest logit (the first, on a tie) is labels[b]
  int64_t* counts;          // [kCounts] in and out: device_counts
  int64_t B, K;
  LossWeights weights;
  bool grad;
};
int row_loss(const RowLoss& r, void* stream);

// The rows of the one product that gives logits and delta of RowLoss: z, and beneath it d = z - pooled_t, or pooled_t
// itself in a row where d is large beside it (row_math.h:far_from).
struct StackRows {
  DType dtype;           // T
  const void* z;         // [B, Ct] A
  const void* d;         // [B, Ct] A
  const void* pooled_t;  // [B, Ct] A, or null: d in every row
  void* stack;           // [2, B, Ct] T  out
  uint8_t* far;          // [B]  out, with pooled_t
  int64_t B, Ct;
};
int stack_rows(const StackRows& s, void* stream);

// Means of the parts over B in index order (NaN where B is 0, as torch's), their weighted sum, and the top-1 count.
struct LossSum {
  DType dtype;               // A
  const void* part_rows;     // [kParts, B] A
  const int64_t* top1_rows;  // [B]
  void* loss;                // []       A  out
  void* parts;               // [kParts] A  out
  int64_t* top1;             // []          out
  int64_t B, K, Ct;
  LossWeights weights;
};
int loss_sum(const LossSum& s, void* stream);

// dz = (dz_w + 2 fm d / Ct) / batch, in A.
struct FeatureGrad {
  DType dtype;       // T
  const void* dz_w;  // [B, Ct] T: row_loss's gradient times W
  const void* d;     // [B, Ct] A, or null without pooled match
  void* dz;          // [B, Ct] A  out
  int64_t B, Ct;
  int64_t batch;  // samples over which the loss is a mean, of which B are here
  double fm;
};
int feature_grad(const FeatureGrad& f, void* stream);

}  // namespace ijckd
