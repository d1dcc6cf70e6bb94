#pragma once
// Which library takes a product of rows on the CPU. The sizes decide, never the number of threads.
//
// torch's matrix product takes the BLAS library that it was built with. With AVX-512 oneDNN's kernels, made for the
// processor at hand, gain over it in float32 (results/op.csv): as an inner product, which it computes alike with any
// number of threads, or as a convolution (conv1x1.h), whose calls cost more and which with one thread torch gives back
// to the BLAS library.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <vector>

#include "conv1x1.h"
#include "gemm.h"
#include "op.h"

// torch's own compiler calls this for linear layers; null in a torch without oneDNN.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise(
    AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias, const char* activation, const double** scalars,
    int64_t n_scalars, const char** algorithm, AtenTensorHandle* out);

namespace ijckd {

constexpr int64_t kInnerWork = 1 << 22;   // multiplications of a gradient from which oneDNN gains more than it costs
constexpr int64_t kInnerDepth = 4096;     // a longer sum it would share between threads
constexpr int64_t kLeastWork = 1 << 14;   // as kInnerWork, of rows times a weight transposed
constexpr int64_t kWeightWork = 1 << 25;  // as kInnerWork, for a weight's gradient by convolution
// Of fewer columns the libraries add up a gradient's rows one after the other, in float: here kPiece rows at a time,
// and the pieces in double.
constexpr int64_t kFewColumns = 16, kPiece = 1024;

// x [M, L] times w [N, L] transposed, by oneDNN, and bias [N] added: [M, N]. w may be a transposed view.
inline Tensor inner_product(const Tensor& x, const Tensor& w, const OptTensor& bias = {}) {
  AtenTensorHandle out = nullptr, added = bias ? bias->get() : nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu__linear_pointwise(x.get(), w.get(), bias ? &added : nullptr, "none", nullptr, 0, nullptr, &out));
  return dense(Tensor(out));
}

inline bool by_inner_product(const Tensor& rows) { return by_convolution(rows) && aoti_torch_cpu__linear_pointwise; }

// Whether rows [N, Cs] times weight [Ct, Cs] transposed is worth a call of oneDNN.
inline bool worth_onednn(const Tensor& rows, const Tensor& weight) {
  return rows.size(0) * rows.size(1) * weight.size(0) >= kLeastWork;
}

// rows [N, Cs], weight [Ct, Cs], both contiguous -> [N, Ct]
inline Tensor rows_times_transposed(const Tensor& rows, const Tensor& weight) {
  if (worth_onednn(rows, weight)) {
    if (by_inner_product(rows)) return inner_product(rows, weight);
    if (by_convolution(rows)) return conv_rows(rows, weight);
  }
  const Tensor out = empty(rows, {rows.size(0), weight.size(0)}, rows.scalar_type());
  matmul_out(rows, transposed(weight), out);
  return out;
}

// d_out [N, Ct], weight [Ct, Cs], both contiguous -> [N, Cs], in `into` where that is given.
inline Tensor rows_times(const Tensor& d_out, const Tensor& weight, const OptTensor& into = {}) {
  const int64_t N = d_out.size(0), Ct = weight.size(0), Cs = weight.size(1);
  if (by_convolution(d_out) && N * Ct * Cs >= kInnerWork) {
    if (by_inner_product(d_out) && Ct <= kInnerDepth) return inner_product(d_out, transposed(weight));
    return *conv_rows_backward(d_out, into ? *into : empty(d_out, {N, Cs}, d_out.scalar_type()), weight, true,
                               false)[0];
  }
  const Tensor out = into ? *into : empty(d_out, {N, Cs}, d_out.scalar_type());
  matmul_out(d_out, weight, out);
  return out;
}

// d_out [N, Ct], rows [N, Cs], both contiguous -> [Ct, Cs]
inline Tensor transposed_times(const Tensor& d_out, const Tensor& rows) {
  const int64_t N = d_out.size(0), Ct = d_out.size(1), Cs = rows.size(1);
  const Tensor out = empty(rows, {Ct, Cs}, rows.scalar_type());
  if (Cs < kFewColumns && N > kPiece && rows.scalar_type() == ScalarType::Float) {
    std::vector<double> sum(Ct * Cs);
    for (int64_t first = 0; first < N; first += kPiece) {
      const int64_t n = std::min(kPiece, N - first);
      matmul_out(transposed(rows_of(d_out, first, n)), rows_of(rows, first, n), out);
      const float* part = out.const_data_ptr<float>();
      for (int64_t i = 0; i < Ct * Cs; ++i) sum[i] += part[i];
    }
    std::copy(sum.begin(), sum.end(), out.mutable_data_ptr<float>());
    return out;
  }
  if (by_convolution(d_out) && N * Ct * Cs >= kWeightWork)
    return *conv_rows_backward(d_out, rows, out, false, true)[1];  // `out` for its shape
  matmul_out(transposed(d_out), rows, out);
  return out;
}

}  // namespace ijckd
