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
  int64_t a, b;
  bool valid;

  __device__ __forceinline__ RowLabels(const Anchors& p, int64_t row)
      : a(p.labels[row]), b(p.labels_b ? p.labels_b[row] : a), valid(a >= 0 && a < p.K && b >= 0 && b < p.K) {
    if (!valid) a = b = 0;
  }
};

// Sums over some of a row's channels.
struct RowDots {
  float a = 0, b = 0, square = 0, pooled = 0;  // z . w_a and z . w_b of the rounded z, |z - pooled_t|^2, |pooled_t|^2

  __device__ __forceinline__ void add(const RowDots& o) { a += o.a, b += o.b, square += o.square, pooled += o.pooled; }

  // Two neighbouring channels, from c, of row `row`: stores what becomes of them.
  template <typename T>
  __device__ __forceinline__ void meet(const Anchors& p, const RowLabels& labels, float2 z, const float* pooled_t,
                                       int64_t row, int64_t c, int64_t B, int64_t Ct) {
    const auto weight_pair = [&](int64_t k) { return load_pair(static_cast<const T*>(p.weight) + k * Ct + c); };
    const int64_t at = row * Ct + c;
    T* z_t = static_cast<T*>(p.z_t) + at;
    store_pair(z_t, z);
    const float2 rounded = load_pair(z_t), w_a = weight_pair(labels.a), w_b = weight_pair(labels.b);
    a += rounded.x * w_a.x + rounded.y * w_a.y;
    b += rounded.x * w_b.x + rounded.y * w_b.y;
    if (!pooled_t) return;
    const float2 t = load_pair(pooled_t + at), d{z.x - t.x, z.y - t.y};
    square += d.x * d.x + d.y * d.y;
    pooled += t.x * t.x + t.y * t.y;
    if (p.d_t) store_pair(static_cast<T*>(p.d_t) + at, d);
    if (p.pooled) store_pair(static_cast<T*>(p.pooled) + at, t);
    if (p.d_split) {
      __nv_bfloat16 *high = static_cast<__nv_bfloat16*>(p.d_split) + at, *low = high + B * Ct;
      store_pair(high, d);
      const float2 h = load_pair(high);
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
