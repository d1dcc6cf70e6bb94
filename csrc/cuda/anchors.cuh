#pragma once
// What both makers of classifier_tiles.h:Anchors have in common: anchor_rows, a row at a time, and linear_tiles, a tile
// at a time.

#include "counts.h"
#include "cuda/classifier_tiles.h"
#include "device.cuh"

namespace ijckd {

__device__ __forceinline__ void count_row(int64_t* counts, int what) {
  atomicAdd(reinterpret_cast<unsigned long long*>(counts + what), 1ull);
}

// The labels of row b. Where one lies outside [0, K) both are 0 and the row is not valid.
struct RowLabels {
  int a = 0, b = 0;
  bool valid = false;

  RowLabels() = default;
  __device__ __forceinline__ RowLabels(const Anchors& p, int64_t row) {
    const int64_t first = p.labels[row], second = p.labels_b ? p.labels_b[row] : first;
    valid = first >= 0 && first < p.K && second >= 0 && second < p.K;
    a = valid ? int(first) : 0, b = valid ? int(second) : 0;
  }
};

// What is read of two neighbouring channels of a row. Apart from what becomes of them, so that a kernel can load those
// of many before it stores anything of the first: a load does not pass a store that might be to the same address.
// kLogits: with the labels' rows of W; pooled_t serves where there is one.
template <typename T, bool kLogits>
struct Neighbours {
  typename Together<T, 2>::type w_a, w_b;
  float2 pooled_t;

  // The channels are c and c + 1, at `at` in [B, Ct].
  __device__ __forceinline__ void load(const Anchors& p, const RowLabels& labels, const float* pooled, int64_t at,
                                       int64_t c, int64_t Ct) {
    if constexpr (kLogits) {
      const T* weight = static_cast<const T*>(p.weight) + c;
      w_a = load_together<2>(weight, labels.a * Ct);
      w_b = load_together<2>(weight, labels.b * Ct);
    }
    if (pooled) pooled_t = load_pair(pooled + at);
  }
};

// v as T has it.
template <typename T>
__device__ __forceinline__ float2 rounded_to(float2 v) {
  alignas(4) T pair[2];
  store_pair(pair, v);
  return load_pair(pair);
}

// Sums over some of a row's channels.
struct RowDots {
  float a = 0, b = 0, square = 0, pooled = 0;  // z . w_a and z . w_b of the rounded z, |z - pooled_t|^2, |pooled_t|^2

  __device__ __forceinline__ void add(const RowDots& o) { a += o.a, b += o.b, square += o.square, pooled += o.pooled; }

  // Two neighbouring channels at `at` in [B, Ct], whose z is given: stores what becomes of them. `matched`: there is a
  // pooled_t.
  template <typename T, bool kLogits>
  __device__ __forceinline__ void meet(const Anchors& p, const Neighbours<T, kLogits>& with, float2 z, bool matched,
                                       int64_t at, int64_t B, int64_t Ct) {
    if constexpr (kLogits) {
      const float2 rounded = rounded_to<T>(z);
      float w_a[2], w_b[2];
      take_apart<T, 2>(with.w_a, w_a);
      take_apart<T, 2>(with.w_b, w_b);
      a += rounded.x * w_a[0] + rounded.y * w_a[1];
      b += rounded.x * w_b[0] + rounded.y * w_b[1];
    }
    store_pair(static_cast<T*>(p.z_t) + at, z);
    if (!matched) return;
    const float2 t = with.pooled_t, d{z.x - t.x, z.y - t.y};
    square += d.x * d.x + d.y * d.y;
    pooled += t.x * t.x + t.y * t.y;
    if (p.d_t) store_pair(static_cast<T*>(p.d_t) + at, d);
    if (p.pooled) store_pair(static_cast<T*>(p.pooled) + at, t);
    if (p.d_split) {
      __nv_bfloat16 *high = static_cast<__nv_bfloat16*>(p.d_split) + at, *low = high + B * Ct;
      const float2 h = rounded_to<__nv_bfloat16>(d);
      store_pair(high, d);
      store_pair(low, float2{d.x - h.x, d.y - h.y});
    }
  }

  // These are the row's part `part`.
  __device__ __forceinline__ void store(const Anchors& p, const RowLabels& labels, int part, int64_t row,
                                        int64_t B) const {
    const int64_t at = part * B + row;
    if (p.rows.fm) p.rows.fm[at] = square;
    if (p.rows.pooled) p.rows.pooled[at] = pooled;
    if (!p.rows.anchor) return;
    const bool biased = part == 0 && p.bias;
    p.rows.anchor[at] = labels.valid ? a + (biased ? p.bias[labels.a] : 0) : NAN;
    p.rows.logit_b[at] = b + (biased ? p.bias[labels.b] : 0);
    if (part == 0 && !labels.valid) count_row(p.counts, kBadLabels);
  }
};

// The sum over the parts of a row.
__device__ __forceinline__ float row_total(const float* parts, int n, int64_t B, int64_t b) {
  float sum = 0;
  for (int part = 0; part < n; ++part) sum += parts[part * B + b];
  return sum;
}

}  // namespace ijckd
