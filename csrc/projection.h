#pragma once
// A linear connector on vectors, as connector_match.cpp makes it for classifier_loss.cpp: z = u W^T + bias.

#include "op.h"

namespace ijckd {

struct Projection {
  Tensor u;        // [B, 1, Cs]
  Tensor weight;   // [Ct, Cs], u's dtype
  OptTensor bias;  // [Ct] A
};

// Of what is no projection says so in the name of `op`, whose argument the weight is.
void check_projection(const Tensor& u, const Tensor& weight, const char* op, const char* weight_arg);

// z [B, Ct] in u's accumulator type.
Tensor projected(const Projection& p);

#ifdef IJCKD_CUDA
// The stage whose tiles (cuda/linear_tiles.h) serve the projection; 0: the library's GEMM. The other tensors it reads
// have Ct columns.
int linear_stage(const Projection& p, std::initializer_list<OptTensor> others, const Launch& launch);
#endif

}  // namespace ijckd
