#include "connector_products.h"

#ifdef IJCKD_CUDA
#include "cuda/product_grads.h"
#include "cuda/stage.h"
#else
#include "cpu/products.h"
#endif

namespace ijckd {

#ifdef IJCKD_CUDA
namespace {

// Up to this depth of the product stage 1's tiles, whose statistics save a pass over y, outweigh the library's faster
// GEMM on a Hopper GPU: by arithmetic, not yet measured. On earlier GPUs both use the same instructions.
constexpr int64_t kTileDepth = 320;

// Multiplications up to which a Hopper GPU makes both gradients of a product in one launch of its tiles. Beyond, the
// library's larger tiles, which read less of the L2 for as much work, outweigh two launches: by arithmetic as well.
constexpr int64_t kGradProducts = int64_t(1) << 32;

// d_out [N, Ct] times weight [Ct, Cs], and d_out transposed times rows [N, Cs]: by the library's GEMM.
Tensor rows_times(const Tensor& d_out, const Tensor& weight) { return torch::stable::matmul(d_out, weight); }
Tensor transposed_times(const Tensor& d_out, const Tensor& rows) {
  return torch::stable::matmul(transposed(d_out), rows);
}

}  // namespace

int readable_stage(const Tensor& rows, const Tensor& weight, const Launch& launch) {
  const bool half = rows.scalar_type() == ScalarType::BFloat16 || rows.scalar_type() == ScalarType::Half;
  return half && weight.size(1) % 8 == 0 && aligned(rows) && aligned(weight) ? stage(launch) : 0;
}

int tile_stage(const Tensor& rows, const Tensor& weight, const Launch& launch) {
  const int readable = weight.size(0) % 2 == 0 ? readable_stage(rows, weight, launch) : 0;
  return readable == 1 && compute_capability() >= 90 && weight.size(1) > kTileDepth ? 0 : readable;
}
#endif

Tensor times_weight(const Tensor& rows, const Tensor& weight) {
#ifndef IJCKD_CUDA
  const DType t = dtype(rows, kConnectorOp, "u"), products = product_type(t);
  if (products != t) return as(times_weight(as(rows, products), as(weight, products)), t);
  return rows_times_transposed(rows, dense(weight));
#else
  return dense(matmul_nt(rows, weight));
#endif
}

std::tuple<Tensor, Tensor> grads_of_product(const Tensor& dy, const Tensor& u, const Tensor& weight, bool need_du,
                                            bool need_dweight, bool wide, [[maybe_unused]] const Launch& launch) {
  const DType t = dtype(u, kConnectorOp, "u"), of_weight = wide ? accumulator(t) : t;
  const int64_t B = u.size(0), P = u.size(1), Cs = u.size(2), N = B * P;
  Tensor du = none(u, t), dweight = none(u, of_weight);
#ifdef IJCKD_CUDA
  const int64_t Ct = weight.size(0);
  const Tensor rows_u = dense(u), w = dense(weight);
  if (N > 0 && (need_du || need_dweight) && N * Ct * Cs <= kGradProducts && Ct % 8 == 0 && aligned(dy) &&
      readable_stage(rows_u, w, launch) == 2) {
    if (need_du) du = empty(u, {B, P, Cs}, t);
    if (need_dweight) dweight = empty(u, {Ct, Cs}, of_weight);
    launched(product_grads({.stage = 2,
                            .dtype = t,
                            .dy = dy.const_data_ptr(),
                            .scale = nullptr,
                            .float_dy = nullptr,
                            .u = rows_u.const_data_ptr(),
                            .weight = w.const_data_ptr(),
                            .du = need_du ? du.mutable_data_ptr() : nullptr,
                            .dweight = need_dweight ? dweight.mutable_data_ptr() : nullptr,
                            .float_dweight = wide,
                            .dbias = nullptr,
                            .N = N,
                            .Cs = Cs,
                            .Ct = Ct},
                           launch.stream),
             "connector_match's products");
    return {du, dweight};
  }
#endif
  const DType products = product_type(t);
  const Tensor d_out = as(dy, products);
  if (need_du) du = strided(as(rows_times(d_out, as(weight, products)), t), {B, P, Cs}, {P * Cs, Cs, 1});
  if (need_dweight) {
    const Tensor rows = strided(as(u, products), {N, Cs}, {Cs, 1});
    dweight = as(as(transposed_times(d_out, rows), t), of_weight);
  }
  return {du, dweight};
}

}  // namespace ijckd
