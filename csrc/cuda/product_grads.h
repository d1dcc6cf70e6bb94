#pragma once
// Both gradients of y = u W^T on tensor cores (sm_80 and newer), without torch, in one launch. Returns 0 or a CUDA
// error code.

#include <cstdint>

#include "dtype.h"

namespace ijckd {

// du = scale dy W,  dweight = scale dy^T u,  dbias = scale times the sum of dy over the rows. At least one of the three
// is needed. The scale comes after the sums, which are in float: dy is what it multiplies, in T.
struct ProductGrads {
  int stage;              // 1 or 2: stage.h
  DType dtype;            // T: bfloat16 or float16
  const void* dy;         // [N, Ct] T
  const float* scale;     // [], or null: 1
  const float* float_dy;  // [N, Ct]: dy before it was rounded, for dbias
  const void* u;          // [N, Cs] T
  const void* weight;     // [Ct, Cs] T
  void* du;               // [N, Cs] T   out, or null
  void* dweight;          // [Ct, Cs] T, or float if float_dweight  out, or null
  bool float_dweight;
  float* dbias;  // [Ct]  out, or null
  int64_t N, Cs, Ct;
};
int product_grads(const ProductGrads& p, void* stream);

}  // namespace ijckd
