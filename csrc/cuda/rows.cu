// Kernels of rows.h, and the text of a launch error.
#include "device.cuh"
#include "rows.h"

namespace ijckd {

const char* launch_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

namespace {

constexpr int kThreads = 256;

// One block per row b: d = z - pooled_t and its sum of squares. Reads z and pooled_t once.
template <typename A>
__global__ void feature_diff_kernel(const A* z,         // [B, Ct]
                                    const A* pooled_t,  // [B, Ct]
                                    A* d,               // [B, Ct] out
                                    A* square_rows,     // [B]     out
                                    int64_t Ct) {
  __shared__ A slots[kThreads];
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

// One thread per column; rows in index order, coalesced across columns.
template <typename A>
__global__ void column_sum_kernel(const A* x,  // [rows, cols]
                                  A* out,      // [cols] out
                                  int64_t rows, int64_t cols, A scale) {
  const int64_t c = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= cols) return;
  A s = 0;
  for (int64_t r = 0; r < rows; ++r) s += x[r * cols + c];
  out[c] = s * scale;
}

}  // namespace

int feature_diff(const FeatureDiff& f, void* stream) {
  return dispatch(f.dtype, [&](auto, auto a) {
    using A = decltype(a);
    return launch(feature_diff_kernel<A>, f.B, kThreads, stream, static_cast<const A*>(f.z), static_cast<const A*>(f.pooled_t),
                  static_cast<A*>(f.d), static_cast<A*>(f.square_rows), f.Ct);
  });
}

int column_sum(const ColumnSum& s, void* stream) {
  return dispatch(s.dtype, [&](auto, auto a) {
    using A = decltype(a);
    return launch(column_sum_kernel<A>, ceil_div(s.cols, kThreads), kThreads, stream, static_cast<const A*>(s.x),
                  static_cast<A*>(s.out), s.rows, s.cols, A(s.scale));
  });
}

}  // namespace ijckd
