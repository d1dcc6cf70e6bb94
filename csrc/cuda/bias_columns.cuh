#pragma once
// Sums of a gradient over its rows, for the launches that make a projection's gradients.

#include "tile.cuh"

namespace ijckd {

__device__ __forceinline__ float element(const float4& v, int k) {
  return k == 0 ? v.x : k == 1 ? v.y : k == 2 ? v.z : v.w;
}

// out[c] = the sum over the rows of channels c in [col, col + kDepth), col + kDepth clipped to `channels`. load(row, c)
// loads what four neighbours of one row are made of, value(loaded, k) is the k-th of them. In double, for a thread adds
// many rows one after the other, of which it loads eight at a time. lanes [kThreads / 16, kDepth]. Every thread of the
// block calls.
template <int kThreads, typename Load, typename Value>
__device__ __forceinline__ void bias_columns(double* lanes, float* out, int64_t rows, int64_t channels, int col,
                                             const Load& load, const Value& value) {
  constexpr int kWidth = 4, kGroups = kDepth / kWidth, kLanes = kThreads / kGroups, kRows = 8;
  const int lane = threadIdx.x / kGroups, n0 = threadIdx.x % kGroups * kWidth, c = col + n0;
  double sums[kWidth] = {};
  if (c < channels)
    for (int64_t first = lane; first < rows; first += kRows * kLanes) {
      decltype(load(first, c)) loaded[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i)
        if (first + i * kLanes < rows) loaded[i] = load(first + i * kLanes, c);
#pragma unroll
      for (int i = 0; i < kRows; ++i)
        if (first + i * kLanes < rows)
#pragma unroll
          for (int k = 0; k < kWidth; ++k) sums[k] += value(loaded[i], k);
    }
#pragma unroll
  for (int k = 0; k < kWidth; ++k) lanes[lane * kDepth + n0 + k] = sums[k];
  __syncthreads();
  const int n = threadIdx.x;
  if (n >= kDepth || col + n >= channels) return;
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += lanes[i * kDepth + n];
  out[col + n] = float(sum);
}

}  // namespace ijckd
