#pragma once
// The two products with the classifier that the losses have around their passes over logits, by a library.

#include "op.h"

#ifndef IJCKD_CUDA
#include "cpu/products.h"
#endif

namespace ijckd {

#ifdef IJCKD_CUDA
// [B, Ct] times the classifier transposed, and dlogits [B, K] times the classifier.
inline Tensor to_logits(const Tensor& features, const Tensor& weight) { return dense(matmul_nt(features, weight)); }

inline Tensor times_weight(const Tensor& dlogits, const Tensor& weight, const Tensor&) {
  return dense(torch::stable::matmul(dlogits, weight));
}
#else
inline Tensor to_logits(const Tensor& features, const Tensor& weight) {
  return rows_times_transposed(features, weight);
}

// Straight into dz where it has the product's dtype: fresh memory is dear on the CPU.
inline Tensor times_weight(const Tensor& dlogits, const Tensor& weight, const Tensor& dz) {
  return rows_times(dlogits, weight, dz.scalar_type() == weight.scalar_type() ? OptTensor(dz) : OptTensor());
}
#endif

}  // namespace ijckd
