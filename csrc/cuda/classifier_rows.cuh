#pragma once
// What the steps of classifier_tiles.h know of a row of logits: its anchor and its sums over tiles of classes; and the
// batch's losses.

#include "anchors.cuh"
#include "block_reduce.cuh"

namespace ijckd {

// Two threads gather a row's sums: lanes l and l + 16 of a warp, so that a warp's loads are of 16 neighbouring rows.
// All 32 lanes call together.
struct RowPair {
  static constexpr int kLane = 16;

  static __device__ __forceinline__ int row() { return threadIdx.x / 32 * kLane + threadIdx.x % kLane; }
  static __device__ __forceinline__ int half() { return threadIdx.x / kLane % 2; }

  // Calls use(load(i)) for those i in [0, n) that are the calling thread's, eight loads ahead of their uses.
  template <typename Load, typename Use>
  static __device__ __forceinline__ void share(int n, const Load& load, const Use& use) {
    constexpr int kAtOnce = 8;
    for (int first = half(); first < n; first += 2 * kAtOnce) {
      decltype(load(first)) x[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) x[k] = load(first + 2 * k < n ? first + 2 * k : n - 1);  // unused past the end
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k)
        if (first + 2 * k < n) use(x[k]);
    }
  }

  // Sum of parts [n, B] in column b.
  static __device__ __forceinline__ float total(const float* parts, int n, int64_t B, int64_t b) {
    float sum = 0;
    share(n, [&](int part) { return parts[part * B + b]; }, [&](float v) { sum += v; });
    return sum + shuffle_xor(sum, kLane);
  }
};

// Of row b's labels the one with the larger logit, the first if they are equal, anchors its exponentials.
struct RowAnchor {
  float logit;  // NaN where it is not finite: it would hide itself, every other exponential 0 and the loss that of a
                // perfect sample
  float other;  // labels_b's logit, or that of `labels` where labels_b anchors
  bool second;  // whether labels_b does
};

// Both threads of a RowPair call, of row 0 where theirs is past the last one.
__device__ __forceinline__ RowAnchor row_anchor(const RowParts& rows, bool two_labels, int64_t B, int64_t b) {
  const float logit_a = RowPair::total(rows.anchor, rows.parts, B, b);
  const float logit_b = two_labels ? RowPair::total(rows.logit_b, rows.parts, B, b) : logit_a;
  const bool second = logit_b > logit_a;
  const float logit = second ? logit_b : logit_a;
  return {fabsf(logit) < INFINITY ? logit : NAN, second ? logit_a : logit_b, second};
}

// Largest logit so far and its class; the first class wins a tie.
struct Top {
  float value = -INFINITY;
  int index = INT32_MAX;

  __device__ void meet(float v, int i) {
    if (v > value || (v == value && i < index)) value = v, index = i;
  }
};

// Sums over rows that one thread has gathered.
struct LossSums {
  double part[kParts] = {}, hits = 0;
};

// Of the losses of all rows this thread block has gathered share `block`, and of that `sums` is one thread's: writes
// what the batch comes to if it is the last of kLossBlocks to arrive, from the shares in the blocks' order. All threads
// call.
template <int kThreads>
__device__ void store_losses(const Losses& losses, const LossSums& sums, const LossWeights& weights, int64_t B,
                             int64_t K, int64_t Ct, double* slots, int block) {
  constexpr int kShare = kParts + 1;
  __shared__ double shares[kLossBlocks][kShare];
  __shared__ bool last;
  double total[kShare];
#pragma unroll
  for (int i = 0; i < kParts; ++i)  // a part without weight must be 0
    total[i] = weights.of_part(i) != 0 ? block_reduce<kThreads>(sums.part[i], slots, Sum{}) : 0;
  total[kParts] = block_reduce<kThreads>(sums.hits, slots, Sum{});  // exact: far below 2^53
  if (threadIdx.x == 0) {
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      unsigned long long bits;
      memcpy(&bits, total + i, sizeof bits);
      atomicExch(losses.shares + block * kShare + i, bits);
    }
    __threadfence();  // the share is there before its block is counted
    last = atomicAdd(losses.arrived, 1) == kLossBlocks - 1;
    __threadfence();
  }
  __syncthreads();
  if (!last) return;
  // By atomic operations like the stores, so that no cache's older value is met.
  if (threadIdx.x < kLossBlocks * kShare) {
    const unsigned long long bits = atomicAdd(losses.shares + threadIdx.x, 0ull);
    memcpy(&shares[threadIdx.x / kShare][threadIdx.x % kShare], &bits, sizeof bits);
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  const auto in_order = [&](int i) {
    double sum = 0;
#pragma unroll
    for (int k = 0; k < kLossBlocks; ++k) sum += shares[k][i];
    return sum;
  };
  double loss = 0;
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    const double mean = in_order(i) / (double(B) * part_terms(i, K, Ct));
    loss += weights.of_part(i) * mean;
    losses.parts[i] = float(mean);
  }
  *losses.loss = float(loss), *losses.top1 = int64_t(in_order(kParts));
}

}  // namespace ijckd
