#pragma once
// Sums, and what else is joined in pairs, over the threads of a block in a fixed order.

#include <cstring>

#include "instructions.cuh"

namespace ijckd {

// The value of lane (own lane ^ mask), of any type that is made of words. All 32 lanes call it together.
template <typename A>
__device__ __forceinline__ A shuffle_xor(const A& v, int mask) {
  static_assert(sizeof(A) % 4 == 0);
  int words[sizeof(A) / 4];
  memcpy(words, &v, sizeof v);
#pragma unroll
  for (int& word : words) word = shuffle_xor(word, mask);
  A out;
  memcpy(static_cast<void*>(&out), words, sizeof out);
  return out;
}

// op over the values of the kThreads threads of a block, given to every thread: a binary tree within each warp, then
// the warps in their order through `slots` (kThreads / 32), so equal inputs give equal bits. Every thread calls; ends
// with a barrier before `slots` may be written again.
template <int kThreads, typename A, typename Op>
__device__ A block_reduce(A v, A* slots, Op op) {
  static_assert(kThreads % 32 == 0);
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) v = op(v, shuffle_xor(v, mask));
  // Where one lane's result may differ (NaN) the first one's counts.
  if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = v;
  __syncthreads();
  A out = slots[0];
#pragma unroll
  for (int warp = 1; warp < kThreads / 32; ++warp) out = op(out, slots[warp]);
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
