#pragma once
// classifier_loss on the CPU for many classes: chunk after chunk of the classifier's rows, so that logits exist for one
// chunk only and W is read once for both GEMMs; a W that has not the GEMMs' dtype is converted by the chunk, too.
// Anchored softmax: with l_a the label's logit, known before any GEMM,
//   s = sum over k != a of exp(l_k - l_a),  cross-entropy = log1p(s),  dCE/dz = (sum over k != a of exp(l_k - l_a) w_k
//   - s w_a) / (1 + s),
// so no chunk needs another, and the loss of a confident sample keeps its digits where lse - l_a would cancel.

#include "loss_terms.h"

namespace ijckd {

// Whether the chunks serve these terms and pay for this size; a function of the arguments alone, so that equal calls
// give equal bits. by_features: the teacher's logits are those of pooled_t.
bool in_class_chunks(const LossWeights& weights, bool by_features, DType t, int64_t B, int64_t K, int64_t Ct);

// Of all of r's rows; r.terms.weight is contiguous: T, float32 or bfloat16.
void chunked_loss(const LossRows& r);

// Rows whose logits may exist at once where the chunks do not serve.
int64_t rows_at_once(int64_t B, int64_t K);

}  // namespace ijckd
