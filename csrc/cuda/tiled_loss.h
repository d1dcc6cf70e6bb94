#pragma once
// Host side of classifier_loss on tensor cores: which arguments it serves, workspace, the order of the launches of
// classifier_tiles.h. The anchored way takes three launches where the classes fit one chunk, two more for each further one; that
// with whole rows of logits takes four. A linear connector's projection is the first of them.

#include "classifier_loss.h"
#include "op.h"
#include "projection.h"

namespace ijckd {

struct TiledLoss {
  OptTensor z;                           // [B, Ct] float32, or
  std::optional<Projection> projection;  // what makes it
  Tensor weight;                         // [K, Ct] T
  OptTensor bias;                        // [K] float32
  Tensor labels;                         // [B]
  OptTensor labels_b;                    // [B]
  OptTensor mix;                         // [B] float32, with labels_b
  OptTensor pooled_t;                    // [B, Ct] float32
  OptTensor logits_t;                    // [B, K], any dtype; read only where pooled_t is not given
  OptTensor gram;                        // [2, Ct, Ct] bfloat16, ops.py:classifier_gram
  Tensor loss, parts, top1;              // [], [kParts], []  out
  Tensor dz;                             // [B, Ct] float32  out: dloss/dz if `grad`
  LossWeights weights;
  bool grad;
};

// Runs and returns true, or returns false where the library's GEMMs must serve: types other than bfloat16 and float16, channels
// that are no multiple of 8, more logits than may be kept where whole rows of them are needed, GPUs before sm_80. A function of
// terms, sizes, types and alignment alone.
bool tiled_loss(const TiledLoss& t, const Launch& launch);

}  // namespace ijckd
