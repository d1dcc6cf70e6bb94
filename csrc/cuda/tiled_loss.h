#pragma once
// Host side of classifier_loss on tensor cores: which arguments it serves, workspace, the order of the launches of
// classifier_tiles.h. The anchored way takes three launches where the classes fit one chunk, two more for each further
// one; that with whole rows of logits takes four. A linear connector's projection is the first of them.

#include "loss_terms.h"
#include "projection.h"

namespace ijckd {

struct TiledLoss {
  OptTensor z;                           // [B, Ct] float32, or
  std::optional<Projection> projection;  // what makes it
  LossTerms terms;                       // weight in T; bias, mix and pooled_t in float32; labels contiguous
  Tensor loss, parts, top1;              // [], [kParts], []  out
  Tensor dz;                             // [B, Ct] float32  out: dloss/dz if `grad`
  OptTensor dz_t;                        // [B, Ct] bfloat16  out, or none: dz rounded
  bool grad;
};

// Runs and returns true, or returns false where the library's GEMMs must serve: types other than bfloat16 and float16,
// channels that are no multiple of 8, more logits than may be kept where whole rows of them are needed, GPUs before
// sm_80. A function of terms, sizes, types and alignment alone.
bool tiled_loss(const TiledLoss& t, const Launch& launch);

}  // namespace ijckd
