// Kernels of rows.h, and what the host asks of the CUDA runtime.
#include "block_reduce.cuh"
#include "cuda/stage.h"
#include "device.cuh"
#include "instructions.cuh"
#include "rows.h"

namespace ijckd {

int compute_capability() {
  int device;
  return cudaGetDevice(&device) == cudaSuccess ? capability_of(device) : 0;
}

const char* launch_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 16;  // row lanes per column
constexpr int kSumThreads = kColumns * kLanes;

// One block per row b: d = z - pooled_t and its sum of squares. Reads z and pooled_t once.
template <typename A>
__global__ void feature_diff_kernel(const A* z,         // [B, Ct]
                                    const A* pooled_t,  // [B, Ct]
                                    A* d,               // [B, Ct] out
                                    A* square_rows,     // [B]     out
                                    int64_t Ct) {
  __shared__ A slots[kThreads / 32];
  const int64_t row = int64_t(blockIdx.x) * Ct;
  A s = 0;
  for (int64_t c = threadIdx.x; c < Ct; c += kThreads) {
    const A v = z[row + c] - pooled_t[row + c];
    d[row + c] = v;
    s += v * v;
  }
  s = block_reduce<kThreads>(s, slots, Sum{});
  if (threadIdx.x == 0) square_rows[blockIdx.x] = s;
}

// A block per kColumns columns.
template <typename A>
__global__ void __launch_bounds__(kSumThreads) column_sum_kernel(const A* x,  // [rows, cols]
                                                                 A* out,      // [cols] out
                                                                 int64_t rows, int64_t cols, A scale) {
  __shared__ double slots[1][kLanes][kColumns];
  wait_for_earlier_launches();
  const int64_t c = int64_t(blockIdx.x) * kColumns + threadIdx.x;
  const A s = column_total(x, rows, cols, c, slots);
  if (c < cols && threadIdx.y == 0) out[c] = s * scale;
}

// One column: one block.
template <typename A>
__global__ void __launch_bounds__(kSumThreads) array_sum_kernel(const A* x,  // [n]
                                                                A* out,      // [1] out
                                                                int64_t n, A scale) {
  __shared__ double slots[kSumThreads / 32];
  wait_for_earlier_launches();
  double s = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < n; i += kSumThreads) s += x[i];
  s = block_reduce<kSumThreads>(s, slots, Sum{});
  if (threadIdx.x == 0) *out = s * scale;
}

}  // namespace

int feature_diff(const FeatureDiff& f, void* stream) {
  return dispatch(f.dtype, [&](auto, auto a) {
    using A = decltype(a);
    return launch(feature_diff_kernel<A>, f.B, kThreads, stream, static_cast<const A*>(f.z),
                  static_cast<const A*>(f.pooled_t), static_cast<A*>(f.d), static_cast<A*>(f.square_rows), f.Ct);
  });
}

int column_sum(const ColumnSum& s, void* stream) {
  return dispatch(s.dtype, [&](auto, auto a) {
    using A = decltype(a);
    const A* x = static_cast<const A*>(s.x);
    A* out = static_cast<A*>(s.out);
    if (s.cols == 1)
      return launch_dependent(0, array_sum_kernel<A>, 1, kSumThreads, stream, x, out, s.rows, A(s.scale));
    return launch_dependent(0, column_sum_kernel<A>, ceil_div(s.cols, kColumns), dim3(kColumns, kLanes), stream, x, out,
                            s.rows, s.cols, A(s.scale));
  });
}

}  // namespace ijckd
