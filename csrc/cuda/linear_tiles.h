#pragma once
// A linear connector on vectors on tensor cores (sm_80 and newer), without torch: the projection with its bias, and all
// its gradients, in one launch each. Both are short, so that the launches around a library's products would take longer
// than they.
//
// Names: B images, Cs student and Ct teacher channels, both multiples of 8. Every array is aligned to 16 bytes. Each
// function returns 0 or a CUDA error code.

#include <cstdint>

#include "classifier_tiles.h"
#include "dtype.h"

namespace ijckd {

// z = u W^T + bias, in float as it comes from the product; with what classifier_loss wants of it, where that follows.
struct LinearTiles {
  int stage;              // 1 or 2: stage.h
  DType dtype;            // T: bfloat16 or float16
  const void* u;          // [B, Cs] T
  const void* weight;     // [Ct, Cs] T
  const float* bias;      // [Ct], or null
  const float* pooled_t;  // [B, Ct], or null: no match
  float* z;               // [B, Ct]  out
  float* squares;         // [linear_blocks(stage, B, Ct)]  out, with pooled_t: parts of the sum of (z - pooled_t)^2
  float* fm;              // []  out, without pooled_t: 0
  Anchors anchors;        // out, in linear_parts(stage, B, Ct) parts; then squares and fm are not. z_t null: not needed
  int64_t B, Cs, Ct;
};
int linear_tiles(const LinearTiles& p, void* stream);

int64_t linear_blocks(int stage, int64_t B, int64_t Ct);
int64_t linear_parts(int stage, int64_t B, int64_t Ct);

// With dz = scale grad_z (+ 2 grad_fm (z - pooled_t) / (B Ct) with a match), rounded to T for the products only:
// du = dz W,  dweight = dz^T u,  dbias = dz's sum over the images. At least one of the three is needed.
// Where what made grad_z has kept it in T, product_grads.h:product_grads is the faster way.
struct LinearGradTiles {
  DType dtype;            // T
  const float* grad_z;    // [B, Ct]
  const float* scale;     // [], or null: 1
  const float* grad_fm;   // [], with pooled_t
  const float* z;         // [B, Ct], with pooled_t
  const float* pooled_t;  // [B, Ct], or null
  const void* u;          // [B, Cs] T
  const void* weight;     // [Ct, Cs] T
  void* du;               // [B, Cs] T   out, or null
  void* dweight;          // [Ct, Cs] T, or float if float_dweight  out, or null
  bool float_dweight;
  float* dbias;  // [Ct]  out, or null
  int64_t B, Cs, Ct;
};
int linear_grad_tiles(const LinearGradTiles& p, void* stream);

}  // namespace ijckd
