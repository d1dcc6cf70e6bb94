#pragma once
// What the kernels of every op share: dtype dispatch, block sums in a fixed order, launch errors.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "dtype.h"

namespace ijckd {

// Runs `body(T{}, A{})` for the element type and its accumulator.
template <typename F>
int dispatch(DType t, const F& body) {
  switch (t) {
    case DType::f32:
      body(float{}, float{});
      break;
    case DType::f64:
      body(double{}, double{});
      break;
    case DType::bf16:
      body(__nv_bfloat16{}, float{});
      break;
    case DType::f16:
      body(__half{}, float{});
      break;
  }
  return static_cast<int>(cudaGetLastError());
}

constexpr int ceil_div(int64_t n, int64_t d) { return static_cast<int>((n + d - 1) / d); }

template <typename A, typename T>
__device__ __forceinline__ A load(const T* p, int64_t i) {
  return static_cast<A>(p[i]);
}
template <>
__device__ __forceinline__ float load<float, __nv_bfloat16>(const __nv_bfloat16* p, int64_t i) {
  return __bfloat162float(p[i]);
}
template <>
__device__ __forceinline__ float load<float, __half>(const __half* p, int64_t i) {
  return __half2float(p[i]);
}

template <typename A>
__device__ __forceinline__ void store(A* p, int64_t i, A v) {
  p[i] = v;
}
__device__ __forceinline__ void store(__nv_bfloat16* p, int64_t i, float v) { p[i] = __float2bfloat16_rn(v); }
__device__ __forceinline__ void store(__half* p, int64_t i, float v) { p[i] = __float2half_rn(v); }

// Sum over the kThreads threads of a block, given to every thread; a binary tree in shared memory, so equal inputs give equal
// bits. Ends with a barrier before `slots` may be written again.
template <int kThreads, typename A, typename Op>
__device__ A block_reduce(A v, A* slots, Op op) {
  static_assert((kThreads & (kThreads - 1)) == 0, "the tree halves the block");
  slots[threadIdx.x] = v;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) slots[threadIdx.x] = op(slots[threadIdx.x], slots[threadIdx.x + half]);
    __syncthreads();
  }
  const A out = slots[0];
  __syncthreads();
  return out;
}

struct Sum {
  template <typename A>
  __device__ A operator()(A a, A b) const {
    return a + b;
  }
};

}  // namespace ijckd
