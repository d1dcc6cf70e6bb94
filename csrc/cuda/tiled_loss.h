#pragma once
// Host side of classifier_loss on tensor cores: which arguments it serves, workspace, the order of the launches of
// classifier_tiles.h. Three launches where the classes fit one chunk, two more for each further one.

#include "classifier_loss.h"
#include "op.h"

namespace ijckd {

struct TiledLoss {
  Tensor z;                  // [B, Ct] float32
  Tensor weight;             // [K, Ct] bfloat16
  OptTensor bias;            // [K] float32
  Tensor labels;             // [B]
  OptTensor labels_b;        // [B]
  OptTensor mix;             // [B] float32, with labels_b
  OptTensor pooled_t;        // [B, Ct] float32
  OptTensor gram;            // [2, Ct, Ct] bfloat16, ops.py:classifier_gram; needed for the logit match
  Tensor loss, parts, top1;  // [], [kParts], []  out
  Tensor dz;                 // [B, Ct] float32  out: dloss/dz if `grad`
  LossWeights weights;
  bool grad;
};

// A function of sizes, types and alignment alone. Temperature KL, teacher's logits given instead of features, other types and
// channels that are no multiple of 8 go through the library's GEMMs.
bool in_tiles(const TiledLoss& t);

void tiled_loss(const TiledLoss& t, const Launch& launch);

}  // namespace ijckd
