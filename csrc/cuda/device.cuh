#pragma once
// What the kernels of every op share: dtype dispatch, loads and stores, sums over columns in a fixed order.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "dtype.h"
#include "launch.cuh"

namespace ijckd {

// Runs `body(T{}, A{})` for the element type and its accumulator, and returns its launch's error.
template <typename F>
int dispatch(DType t, const F& body) {
  switch (t) {
    case DType::f32:
      return body(float{}, float{});
    case DType::f64:
      return body(double{}, double{});
    case DType::bf16:
      return body(__nv_bfloat16{}, float{});
    case DType::f16:
      break;
  }
  return body(__half{}, float{});
}

__host__ __device__ constexpr int ceil_div(int64_t n, int64_t d) { return static_cast<int>((n + d - 1) / d); }

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

// Two neighbouring elements, 4 bytes of a half type; the address is a multiple of their size.
__device__ __forceinline__ float2 load_pair(const float* p) { return *reinterpret_cast<const float2*>(p); }
__device__ __forceinline__ float2 load_pair(const __nv_bfloat16* p) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(p));
}
__device__ __forceinline__ float2 load_pair(const __half* p) {
  return __half22float2(*reinterpret_cast<const __half2*>(p));
}
__device__ __forceinline__ void store_pair(float* p, float2 v) { *reinterpret_cast<float2*>(p) = v; }
__device__ __forceinline__ void store_pair(__nv_bfloat16* p, float2 v) {
  *reinterpret_cast<__nv_bfloat162*>(p) = __floats2bfloat162_rn(v.x, v.y);
}
__device__ __forceinline__ void store_pair(__half* p, float2 v) {
  *reinterpret_cast<__half2*>(p) = __floats2half2_rn(v.x, v.y);
}

// V neighbouring elements as one access moves them, V = 2 for half types only; the address must be a multiple of their
// size. Two halves stay one word until they are used: taken apart sooner, they would be waited for sooner.
template <typename T, int V>
struct Together {
  static_assert(V == 1, "more than one element only of half types, two");
  using type = T;
};
template <>
struct Together<__nv_bfloat16, 2> {
  using type = uint32_t;
};
template <>
struct Together<__half, 2> {
  using type = uint32_t;
};

template <int V, typename T>
__device__ __forceinline__ typename Together<T, V>::type load_together(const T* p, int64_t i) {
  return *reinterpret_cast<const typename Together<T, V>::type*>(p + i);
}

// x[v] = element v of what load_together<V> of T's gave.
template <typename T, int V, typename A>
__device__ __forceinline__ void take_apart(typename Together<T, V>::type loaded, A (&x)[V]) {
  T elements[V];
  memcpy(static_cast<void*>(elements), &loaded, sizeof loaded);
  for (int v = 0; v < V; ++v) x[v] = load<A>(elements, v);
}

template <typename T, typename A>
__device__ __forceinline__ void store_together(T* p, int64_t i, const A (&x)[1]) {
  store(p, i, x[0]);
}
template <typename T>
__device__ __forceinline__ void store_together(T* p, int64_t i, const float (&x)[2]) {
  store_pair(p + i, float2{x[0], x[1]});
}

// Whether every pointer is a multiple of `bytes`; null is.
inline bool aligned(size_t bytes, std::initializer_list<const void*> pointers) {
  for (const void* p : pointers)
    if (reinterpret_cast<uintptr_t>(p) % bytes != 0) return false;
  return true;
}

// A block whose threads stand in lanes (threadIdx.y) of kColumns columns (threadIdx.x): one warp's width of coalesced
// loads.
constexpr int kColumns = 32;

// Adds each of V values up over the kLanes lanes, per column, and gives every thread its column's sums; a binary tree,
// so equal inputs give equal bits. Ends with a barrier before `slots` may be written again.
template <int kLanes, int V, typename A>
__device__ void sum_lanes(A (&v)[V], A (&slots)[V][kLanes][kColumns]) {
  static_assert((kLanes & (kLanes - 1)) == 0, "the tree halves the lanes");
  const unsigned lane = threadIdx.y, column = threadIdx.x;
  for (int k = 0; k < V; ++k) slots[k][lane][column] = v[k];
  __syncthreads();
  for (unsigned half = kLanes / 2; half > 0; half /= 2) {
    if (lane < half)
      for (int k = 0; k < V; ++k) slots[k][lane][column] += slots[k][lane + half][column];
    __syncthreads();
  }
  for (int k = 0; k < V; ++k) v[k] = slots[k][0][column];
  __syncthreads();
}

// Calls use(r, load(r)) for the rows r of the calling thread's lane, kAtOnce loads ahead of their uses. Past the end
// the last row is loaded again: a load on a condition would wait for the one before it.
template <int kLanes, int kAtOnce, typename Load, typename Use>
__device__ __forceinline__ void for_lane(int64_t rows, const Load& load, const Use& use) {
  for (int64_t first = threadIdx.y; first < rows; first += kAtOnce * kLanes) {
    decltype(load(first)) x[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int64_t r = first + k * kLanes;
      x[k] = load(r < rows ? r : rows - 1);
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k)
      if (first + k * kLanes < rows) use(first + k * kLanes, x[k]);
  }
}

// Sum over the rows of column c of x [rows, cols], by the block's lanes; 0 where c lies past the last column. In
// double: a lane adds many rows one after the other.
template <int kLanes, typename A>
__device__ A column_total(const A* x, int64_t rows, int64_t cols, int64_t c, double (&slots)[1][kLanes][kColumns]) {
  double s[1] = {0};
  for_lane<kLanes, 8>(
      c < cols ? rows : 0, [&](int64_t r) { return x[r * cols + c]; }, [&](int64_t, A v) { s[0] += v; });
  sum_lanes(s, slots);
  return A(s[0]);
}

}  // namespace ijckd
