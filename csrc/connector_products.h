#pragma once
// The matrix products of connector_match, by own tiles or by the library.

#include <tuple>

#include "op.h"

namespace ijckd {

constexpr const char* kConnectorOp = "connector_match";

inline Tensor none(const Tensor& like, DType t) { return empty(like, {0}, t); }

// rows [N, Cs] times weight [Ct, Cs] transposed -> [N, Ct]
Tensor times_weight(const Tensor& rows, const Tensor& weight);

// What y = u W^T, u [B, P, Cs], hands on of its gradient dy [N, Ct], each where it is needed, else empty; W's in the
// accumulator's type if `wide`.
std::tuple<Tensor, Tensor> grads_of_product(const Tensor& dy, const Tensor& u, const Tensor& weight, bool need_du,
                                            bool need_dweight, bool wide, const Launch& launch);

#ifdef IJCKD_CUDA
// Whether tiles, which read pieces of 16 bytes, can read it.
inline bool aligned(const OptTensor& t) { return !t || reinterpret_cast<uintptr_t>(t->const_data_ptr()) % 16 == 0; }

// The stage whose tiles can read these rows [N, Cs] and this weight [Ct, Cs]; 0: none.
int readable_stage(const Tensor& rows, const Tensor& weight, const Launch& launch);

// The stage whose tiles serve the product of both; 0: the library's GEMM.
int tile_stage(const Tensor& rows, const Tensor& weight, const Launch& launch);
#endif

}  // namespace ijckd
