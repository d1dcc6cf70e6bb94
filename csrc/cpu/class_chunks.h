#pragma once
// classifier_loss on the CPU for many classes: chunk after chunk of the classifier's rows, so that logits exist for one chunk
// only and W is read once for both GEMMs; a W that has not the GEMMs' dtype is converted by the chunk, too. Anchored softmax:
// with l_a the label's logit, known before any GEMM,
//   s = sum over k != a of exp(l_k - l_a),  cross-entropy = log1p(s),  dCE/dz = (sum over k != a of exp(l_k - l_a) w_k - s w_a) /
//   (1 + s),
// so no chunk needs another, and the loss of a confident sample keeps its digits where lse - l_a would cancel.

#include "classifier_loss.h"
#include "op.h"

namespace ijckd {

struct ChunkedLoss {
  DType dtype;              // T, of the GEMMs
  DType rounding;           // what W is rounded to before it becomes T: T, or bfloat16 where T is float32
  Tensor z;                 // [B, Ct] A
  Tensor weight;            // [K, Ct] T, float32 or bfloat16; contiguous
  OptTensor bias;           // [K] A
  const int64_t* labels;    // [B], in [0, K)
  const int64_t* labels_b;  // [B], or null
  const void* mix;          // [B] A, with labels_b
  OptTensor d;              // [B, Ct] A: z - pooled_t; needed for the logit match
  void* part_rows;          // [kParts, B] A  out: the cross-entropy's and the logit match's rows
  int64_t* top1_rows;       // [B]            out
  Tensor dz;                // [B, Ct] A      out: dloss/dz if `grad`, the feature match's part included
  LossWeights weights;
  bool grad;
};

// Whether the chunks serve these terms and pay for this size; a function of the arguments alone, so that equal calls give equal
// bits.
bool in_class_chunks(const LossWeights& weights, bool pooled_t, DType t, int64_t B, int64_t K, int64_t Ct);

void chunked_loss(const ChunkedLoss& c);

// Rows whose logits may exist at once where the chunks do not serve.
int64_t rows_at_once(int64_t B, int64_t K);

}  // namespace ijckd
