// Kernels of classifier_tiles.h. Blocks never wait for one another: what is summed over tiles is summed by the next
// launch, in tile order, so equal inputs give equal bits.
#include "anchors.cuh"
#include "block_reduce.cuh"
#include "hopper_tile.cuh"

namespace ijckd {

namespace {

using bf16 = __nv_bfloat16;

constexpr int kRowThreads = 128;
constexpr float kLog2e = 1.44269504f;

// --------------------------------------------------------------------------------------------------------------------
// anchor_rows

// One block per row, two channels per thread and turn.
template <typename T, bool kLogits>
__global__ void __launch_bounds__(kRowThreads) anchor_rows_kernel(const AnchorRows p) {
  __shared__ float slots[kRowThreads / 32];
  const int64_t b = blockIdx.x;
  const RowLabels labels(p.anchors, b);
  RowDots dots;
  for (int64_t c = 2 * threadIdx.x; c < p.Ct; c += 2 * kRowThreads) {
    const int64_t at = b * p.Ct + c;
    const float2 z = load_pair(p.z + at);
    Neighbours<T, kLogits> with;
    with.load(p.anchors, labels, p.pooled_t, at, c, p.Ct);
    dots.meet(p.anchors, with, z, p.pooled_t, at, p.B, p.Ct);
  }
  const auto sum = [&](float v) { return block_reduce<kRowThreads>(v, slots, Sum{}); };
  if constexpr (kLogits) dots.a = sum(dots.a), dots.b = sum(dots.b);
  dots.square = sum(dots.square);
  if (p.anchors.rows.pooled) dots.pooled = sum(dots.pooled);
  if (threadIdx.x == 0) dots.store(p.anchors, labels, 0, b, p.B);
}

// Sums over rows that one thread has gathered.
struct LossSums {
  double part[kParts] = {}, hits = 0;
};

// Of all threads of the block: the means, their weighted sum, the hits. A part without weight must be 0.
template <int kThreads>
__device__ void store_losses(const Losses& losses, LossSums sums, const LossWeights& weights, int64_t B, int64_t K,
                             int64_t Ct, double* slots) {
  const double terms[kParts] = {1, double(K), double(Ct), 1};  // of a row's part
  const double weight[kParts] = {weights.ce, weights.sr, weights.fm, weights.kl};
  double loss = 0;
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    const double mean = block_reduce<kThreads>(sums.part[i], slots, Sum{}) / (double(B) * terms[i]);
    loss += weight[i] * mean;
    if (threadIdx.x == 0) losses.parts[i] = float(mean);
  }
  const double hits = block_reduce<kThreads>(sums.hits, slots, Sum{});  // exact: far below 2^53
  if (threadIdx.x == 0) *losses.loss = float(loss), *losses.top1 = int64_t(hits);
}

// Of row b's labels the one with the larger logit, the first if they are equal, anchors its exponentials.
struct RowAnchor {
  float logit;  // NaN where it is not finite: it would hide itself, every other exponential 0 and the loss that of a
                // perfect sample
  float other;  // labels_b's logit, or that of `labels` where labels_b anchors
  bool second;  // whether labels_b does
};

__device__ RowAnchor row_anchor(const RowParts& rows, bool two_labels, int64_t B, int64_t b) {
  const float logit_a = row_total(rows.anchor, rows.parts, B, b);
  const float logit_b = two_labels ? row_total(rows.logit_b, rows.parts, B, b) : logit_a;
  const bool second = logit_b > logit_a;
  const float logit = second ? logit_b : logit_a;
  return {fabsf(logit) < INFINITY ? logit : NAN, second ? logit_a : logit_b, second};
}

// --------------------------------------------------------------------------------------------------------------------
// logits_exp

// Largest logit so far and its class; the first class wins a tie.
struct Top {
  float value = -INFINITY;
  int index = INT32_MAX;

  __device__ void meet(float v, int i) {
    if (v > value || (v == value && i < index)) value = v, index = i;
  }
};

// What a row has gathered in one tile: summed over the 4 lanes that share the row, then, through shared memory, over
// warps.
struct RowSums {
  float others = 0, logits = 0;  // logits: above the anchor
  Top top;

  __device__ void add(const RowSums& o) {
    others += o.others;
    logits += o.logits;
    top.meet(o.top.value, o.top.index);
  }
};

// A row's anchor, and its label where that lies in the tile, else -1.
struct InTile {
  float logit;
  int label;
};

// e_k and the sums of one tile of classes.
template <typename Shape>
__device__ void exp_tile(const LogitsExp& p, const Operands<bf16, Shape>& from, bf16* shared, int tile_m, int tile_n) {
  const int m0 = tile_m * Shape::kM, n0 = tile_n * Shape::kN, lane = threadIdx.x % 32;
  typename Shape::Accumulators acc = {};
  multiply<Shape, B::kByColumn>(acc, shared, ceil_div(p.Ct, kDepth), tile_at<B::kByColumn>(from, m0, n0));

  __syncthreads();  // the last stage has been read: its memory now holds the rows' sums
  RowSums* rows = reinterpret_cast<RowSums*>(shared);                              // [kM, kWarpsN]
  InTile* anchors = reinterpret_cast<InTile*>(rows + Shape::kM * Shape::kWarpsN);  // [kM]
  for (int m = threadIdx.x; m < Shape::kM; m += Shape::kThreads) {
    const int64_t b = m0 + m;
    anchors[m] = {0, -1};
    if (b >= p.B) continue;
    const RowAnchor anchor = row_anchor(p.rows, p.labels_b, p.B, b);
    const int64_t from_n0 = (anchor.second ? p.labels_b : p.labels)[b] - p.first_class - n0;
    anchors[m] = {anchor.logit, from_n0 >= 0 && from_n0 < Shape::kN ? int(from_n0) : -1};
  }
  __syncthreads();
  const float* bias = p.bias ? p.bias + p.first_class : nullptr;
#pragma unroll
  for (int i = 0; i < Shape::kBlocksM; ++i) {
    RowSums sums[2];
    const InTile anchor[2] = {anchors[tile_row<Shape>(i, 0)], anchors[tile_row<Shape>(i, 1)]};
#pragma unroll
    for (int j = 0; j < Shape::kBlocksN; ++j) {
      const int in_tile = tile_column<Shape>(j), k = n0 + in_tile;
      const bool real[2] = {k < p.classes, k + 1 < p.classes};
      const float add[2] = {bias && real[0] ? bias[k] : 0, bias && real[1] ? bias[k + 1] : 0};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        RowSums& row = sums[half];
        float e[2];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const float x = acc[i][j][2 * half + n] + add[n];
          float above = x - anchor[half].logit;
          if (real[n]) row.logits += above, row.top.meet(x, k + n);
          if (above > kSaturation) above = kSaturation;  // NaN goes through
          e[n] = real[n] && in_tile + n != anchor[half].label ? exp2f(above * kLog2e) : 0;
          row.others += e[n];
        }
        const int64_t b = m0 + tile_row<Shape>(i, half);
        if (p.e && b < p.B && k < p.stride_e)
          store_pair(static_cast<bf16*>(p.e) + b * p.stride_e + k, float2{e[0], e[1]});
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      RowSums& row = sums[half];
#pragma unroll
      for (int mask = 1; mask < 4; mask *= 2) {
        RowSums other;
        other.others = shuffle_xor(row.others, mask);
        other.logits = shuffle_xor(row.logits, mask);
        other.top.value = shuffle_xor(row.top.value, mask);
        other.top.index = shuffle_xor(row.top.index, mask);
        row.add(other);
      }
      if (lane % 4 == 0) rows[tile_row<Shape>(i, half) * Shape::kWarpsN + threadIdx.x / 32 % Shape::kWarpsN] = row;
    }
  }
  __syncthreads();
  for (int m = threadIdx.x; m < Shape::kM && m0 + m < p.B; m += Shape::kThreads) {
    RowSums row = rows[m * Shape::kWarpsN];
    for (int n = 1; n < Shape::kWarpsN; ++n) row.add(rows[m * Shape::kWarpsN + n]);
    const int64_t at = (p.first_tile + tile_n) * p.B + m0 + m;
    p.sums.others[at] = row.others;
    if (p.sums.logits) p.sums.logits[at] = row.logits;
    p.sums.best[at] = row.top.value;
    p.sums.best_class[at] = row.top.index == INT32_MAX ? -1 : int(p.first_class) + row.top.index;
  }
}

// G d of one tile of channels, and d . (G d) over them.
template <typename Shape>
__device__ void gram_tile(const LogitsExp& p, const Operands<bf16, Shape>& from, bf16* shared, int tile_m, int tile_n) {
  const int m0 = tile_m * Shape::kM, n0 = tile_n * Shape::kN, steps = ceil_div(p.Ct, kDepth), lane = threadIdx.x % 32;
  typename Shape::Accumulators acc = {};
  multiply<Shape, B::kByColumn>(acc, shared, 3 * steps, [&](const auto& stage, int step) {
    // low high, high low, high high: the small ones first
    const int product = step / steps, depth = step % steps * kDepth;
    copy_a<Shape>(stage, from.a, m0 + (product == 0 ? int(p.B) : 0), depth);
    copy_b<Shape, B::kByColumn>(stage, from.b, n0 + (product == 1 ? int(p.Ct) : 0), depth);
  });

  __syncthreads();                                 // as in exp_tile
  float* rows = reinterpret_cast<float*>(shared);  // [kM, kWarpsN]
#pragma unroll
  for (int i = 0; i < Shape::kBlocksM; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int m = tile_row<Shape>(i, half), b = m0 + m;
      float square = 0;
#pragma unroll
      for (int j = 0; j < Shape::kBlocksN; ++j) {
        const int c = n0 + tile_column<Shape>(j);
        if (b >= p.B || c >= p.Ct) continue;
        const int64_t at = b * p.Ct + c;
        const float2 gd{acc[i][j][2 * half], acc[i][j][2 * half + 1]};
        const float2 z = load_pair(p.z + at), t = load_pair(p.pooled_t + at);
        square += gd.x * (z.x - t.x) + gd.y * (z.y - t.y);
        store_pair(p.gram_d + at, gd);
      }
      square += shuffle_xor(square, 1);
      square += shuffle_xor(square, 2);
      if (lane % 4 == 0) rows[m * Shape::kWarpsN + threadIdx.x / 32 % Shape::kWarpsN] = square;
    }
  __syncthreads();
  for (int m = threadIdx.x; m < Shape::kM && m0 + m < p.B; m += Shape::kThreads) {
    float square = 0;
    for (int n = 0; n < Shape::kWarpsN; ++n) square += rows[m * Shape::kWarpsN + n];
    p.sums.square[tile_n * p.B + m0 + m] = square;
  }
}

// Blocks go through the rows' tiles first, so that those in flight together share their classes and W is read once from
// memory.
template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 2)
    logits_exp_tile_kernel(const LogitsExp p, const __grid_constant__ Operands<bf16, Shape> logits,
                           const __grid_constant__ Operands<bf16, Shape> gram) {
  extern __shared__ __align__(1024) unsigned char stages[];
  bf16* shared = reinterpret_cast<bf16*>(stages);
  const int tiles_m = ceil_div(p.B, Shape::kM), tile_m = blockIdx.x % tiles_m, tile_n = blockIdx.x / tiles_m;
  const int class_tiles = ceil_div(p.classes, Shape::kN);
  if (tile_n < class_tiles)
    exp_tile<Shape>(p, logits, shared, tile_m, tile_n);
  else
    gram_tile<Shape>(p, gram, shared, tile_m, tile_n - class_tiles);
}

// --------------------------------------------------------------------------------------------------------------------
// grad_rows

// The largest logit of row b over all tiles.
__device__ Top row_top(const GradRows& p, int64_t b) {
  Top top;
  for (int t = 0; t < p.sums.class_tiles; ++t)
    if (p.sums.best_class[t * p.B + b] >= 0) top.meet(p.sums.best[t * p.B + b], p.sums.best_class[t * p.B + b]);
  return top;
}

// Whether exponentials of a row did not fit their format; not where the anchor is NaN.
__device__ bool saturated(Top top, float anchor) { return top.value - anchor > kSaturation; }

// s of row b; NaN where its anchor is, which a row of one class would not notice.
__device__ float row_others(const GradRows& p, int64_t b, float anchor) {
  const float s = row_total(p.sums.others, p.sums.class_tiles, p.B, b);
  return anchor == anchor ? s : NAN;
}

// What the target gives to the label that anchors, and to the other.
struct LabelShares {
  float anchor, other;
};

__device__ LabelShares label_shares(const GradRows& p, int64_t b, const RowAnchor& anchor) {
  if (!p.labels_b) return {1, 0};
  const float a = p.mix[b], rest = 1 - a;
  return anchor.second ? LabelShares{rest, a} : LabelShares{a, rest};
}

// The losses of all rows and their means, by one block; rows are shared out in a fixed way.
template <int kThreads>
__device__ void mean_losses(const GradRows& p, double* slots) {
  const LossWeights& w = p.weights;
  const float eps = float(w.label_smoothing);
  LossSums sums;
  for (int64_t b = threadIdx.x; b < p.B; b += kThreads) {
    const Top top = row_top(p, b);
    sums.hits += top.index == p.labels[b];
    if (w.ce != 0) {
      const RowAnchor anchor = row_anchor(p.rows, p.labels_b, p.B, b);
      float row = log1pf(row_others(p, b, anchor.logit));
      // Of each tile only its largest logit: off by less than log K, of more than kSaturation.
      if (saturated(top, anchor.logit)) {
        float sum = 0;
        for (int t = 0; t < p.sums.class_tiles; ++t) sum += expf(p.sums.best[t * p.B + b] - top.value);
        row = top.value - anchor.logit + logf(sum);
        count_row(p.counts, kSaturated);
      }
      if (p.labels_b) row += (1 - eps) * label_shares(p, b, anchor).other * (anchor.logit - anchor.other);
      if (p.sums.logits) row -= eps * (row_total(p.sums.logits, p.sums.class_tiles, p.B, b) / float(p.K));
      sums.part[kPartCe] += row;
    }
    if (w.sr != 0) {
      const float square = row_total(p.sums.square, p.sums.gram_tiles, p.B, b);
      sums.part[kPartSr] += square < 0 ? 0 : square;  // |W d|^2 is not below 0; NaN stays NaN
    }
    if (w.fm != 0) sums.part[kPartFm] += row_total(p.rows.fm, p.rows.parts, p.B, b);
  }
  store_losses<kThreads>(p.losses, sums, w, p.B, p.K, p.Ct, slots);
}

// Coefficients of a row's gradient: of (e W), w_a and w_b.
struct RowScale {
  float e, a, b;
  bool saturated;  // e is 0 then: exact_row adds its part
};

__device__ RowScale row_scale(const GradRows& p, int64_t b) {
  if (p.weights.ce == 0) return {};
  const RowAnchor anchor = row_anchor(p.rows, p.labels_b, p.B, b);
  const LabelShares share = label_shares(p, b, anchor);
  const float s = row_others(p, b, anchor.logit), total = 1 + s, c = float(p.weights.ce / double(p.B)),
              eps = float(p.weights.label_smoothing), other = -c * (1 - eps) * share.other;
  RowScale scale{0, -c * (1 - eps) * share.anchor, other, saturated(row_top(p, b), anchor.logit)};
  // p - q of the label that anchors = (1 - its share of the target) - s / total: a confident sample's gradient keeps
  // its digits
  if (!scale.saturated) scale.e = c / total, scale.a = c * ((eps + (1 - eps) * share.other) - s / total);
  if (anchor.second) scale.b = scale.a, scale.a = other;
  return scale;
}

// Shared memory of exact_row: for each warp its columns, its largest logit, its sum.
template <typename Shape>
constexpr int kExactFloats = Shape::kThreads / 32 * (Shape::kN + 2);

// dz of row b, columns [n0, n0 + kN), += ce / B sum of p_k w_k, with logits computed again: a warp takes every
// kWarps-th class and keeps its softmax relative to the largest logit it has met. Every thread of the block calls.
template <typename Shape>
__device__ void exact_row(const GradRows& p, int64_t b, int n0, float* shared) {
  constexpr int kWarps = Shape::kThreads / 32, kColumns = Shape::kN / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bf16 *z = static_cast<const bf16*>(p.z_t) + b * p.Ct, *weight = static_cast<const bf16*>(p.weight);
  float top = -INFINITY, sum = 0, acc[kColumns] = {};
  for (int64_t k = warp; k < p.K; k += kWarps) {
    const bf16* w = weight + k * p.Ct;
    float logit = 0;
    for (int c = 2 * lane; c < p.Ct; c += 64) {
      const float2 x = load_pair(z + c), y = load_pair(w + c);
      logit += x.x * y.x + x.y * y.y;
    }
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) logit += shuffle_xor(logit, mask);
    if (p.bias) logit += p.bias[k];
    const float before = logit > top ? expf(top - logit) : 1;
    top = logit > top ? logit : top;
    const float e = logit == -INFINITY ? 0 : expf(logit - top);  // a masked class, perhaps before any other
    sum = before * sum + e;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const int c = n0 + lane + 32 * j;
      if (c < p.Ct) acc[j] = before * acc[j] + e * load<float>(w, c);
    }
  }
  float* of_warp = shared + warp * (Shape::kN + 2);
  __syncthreads();  // every reader of `shared` is done
#pragma unroll
  for (int j = 0; j < kColumns; ++j) of_warp[lane + 32 * j] = acc[j];
  if (lane == 0) of_warp[Shape::kN] = top, of_warp[Shape::kN + 1] = sum;
  __syncthreads();
  for (int n = threadIdx.x; n < Shape::kN && n0 + n < p.Ct; n += Shape::kThreads) {
    float best = -INFINITY, total = 0, v = 0;
    for (int i = 0; i < kWarps; ++i) best = fmaxf(best, shared[i * (Shape::kN + 2) + Shape::kN]);
    for (int i = 0; i < kWarps; ++i) {
      const float* from = shared + i * (Shape::kN + 2);
      const float scale = expf(from[Shape::kN] - best);
      total += scale * from[Shape::kN + 1];
      v += scale * from[n];
    }
    const int64_t at = b * p.Ct + n0 + n;
    const float dz = p.dz[at] + float(p.weights.ce / double(p.B)) * v / total;
    p.dz[at] = dz;
    if (p.dz_t) store(static_cast<bf16*>(p.dz_t), at, dz);
  }
}

// With the last classes block 0 takes the losses, the others a tile of dz each. The columns' sums take registers that
// leave room for one large block to a multiprocessor only.
template <typename Shape, bool kSums>
__global__ void __launch_bounds__(Shape::kThreads, kSums ? 1 : 2)
    grad_rows_tile_kernel(const GradRows p, const __grid_constant__ Operands<bf16, Shape> from) {
  extern __shared__ __align__(1024) unsigned char stages[];
  if (p.last && blockIdx.x == 0) return mean_losses<Shape::kThreads>(p, reinterpret_cast<double*>(stages));
  bf16* shared = reinterpret_cast<bf16*>(stages);
  const int block = blockIdx.x - (p.last ? 1 : 0), tiles_m = ceil_div(p.B, Shape::kM);
  const int m0 = block % tiles_m * Shape::kM, n0 = block / tiles_m * Shape::kN;
  const bf16* weight = static_cast<const bf16*>(p.weight);
  typename Shape::Accumulators acc = {};
  float sums[Shape::kBlocksN][4] = {};
  const int steps = p.weights.ce != 0 ? ceil_div(p.classes, kDepth) : 0;
  const auto copy = tile_at<B::kByDepth>(from, m0, n0);
  if constexpr (kSums)
    multiply<Shape, B::kByDepth>(acc, shared, steps, copy, [&](const uint32_t (&fragments)[Shape::kBlocksN][2]) {
      if (threadIdx.x / 32 < Shape::kWarpsN) add_columns<bf16>(sums, fragments);
    });
  else
    multiply<Shape, B::kByDepth>(acc, shared, steps, copy);
  __syncthreads();  // the last stage has been read: its memory now holds the rows' scales and the columns' sums

  float* exact = reinterpret_cast<float*>(stages);                                             // exact_row's
  RowScale* rows = reinterpret_cast<RowScale*>(stages + kExactFloats<Shape> * sizeof(float));  // [kM]
  float* columns = reinterpret_cast<float*>(rows + Shape::kM);                                 // [kN]
  if (p.last)
    for (int m = threadIdx.x; m < Shape::kM; m += Shape::kThreads)
      rows[m] = m0 + m < p.B ? row_scale(p, m0 + m) : RowScale{};
  if constexpr (kSums)
    // Every row of `sums` is the same: the first will do.
    if (threadIdx.x < Shape::kWarpsN * 32 && threadIdx.x % 32 < 4)
#pragma unroll
      for (int j = 0; j < Shape::kBlocksN; ++j) {
        const int n = tile_column<Shape>(j);
        float2 sum{sums[j][0], sums[j][1]};
        if (n0 + n < p.Ct) {
          if (p.weight_sums_in) {
            const float2 before = load_pair(p.weight_sums_in + n0 + n);
            sum.x += before.x, sum.y += before.y;
          }
          if (p.weight_sums_out && m0 == 0) store_pair(p.weight_sums_out + n0 + n, sum);
        }
        store_pair(columns + n, sum);
      }
  __syncthreads();

  const LossWeights& lw = p.weights;
  const float c_sr = p.gram_d ? float(2 * lw.sr / (double(p.B) * double(p.K))) : 0;
  const float c_fm = lw.fm != 0 ? float(2 * lw.fm / (double(p.B) * double(p.Ct))) : 0;
  const float c_sum = float(-lw.ce * lw.label_smoothing / (double(p.B) * double(p.K)));
#pragma unroll
  for (int i = 0; i < Shape::kBlocksM; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int m = tile_row<Shape>(i, half), b = m0 + m;
      if (b >= p.B) continue;
      const RowScale scale = p.last ? rows[m] : RowScale{};
      // Of a label outside [0, K) any row: the scale is NaN.
      const auto class_row = [&](int64_t k) { return weight + (k >= 0 && k < p.K ? k : 0) * p.Ct; };
      const bf16* w_a = p.last ? class_row(p.labels[b]) : nullptr;
      const bf16* w_b = p.last && p.labels_b ? class_row(p.labels_b[b]) : nullptr;
#pragma unroll
      for (int j = 0; j < Shape::kBlocksN; ++j) {
        const int n = tile_column<Shape>(j), c = n0 + n;
        if (c >= p.Ct) continue;
        const int64_t at = b * p.Ct + c;
        float2 v{acc[i][j][2 * half], acc[i][j][2 * half + 1]};
        const auto add = [&](float factor, float2 x) { v.x += factor * x.x, v.y += factor * x.y; };
        if (!p.first) add(1, load_pair(p.dz + at));
        if (p.last) {
          v = scale.saturated ? float2{0, 0} : float2{v.x * scale.e, v.y * scale.e};
          if (lw.ce != 0) add(scale.a, load_pair(w_a + c));
          if (lw.ce != 0 && w_b) add(scale.b, load_pair(w_b + c));
          if constexpr (kSums) add(c_sum, load_pair(columns + n));
          if (c_sr != 0) add(c_sr, load_pair(p.gram_d + at));
          if (c_fm != 0) {
            const float2 z = load_pair(p.z + at), t = load_pair(p.pooled_t + at);
            add(c_fm, float2{z.x - t.x, z.y - t.y});
          }
          if (p.dz_t) store_pair(static_cast<bf16*>(p.dz_t) + at, v);
        }
        store_pair(p.dz + at, v);
      }
    }
  if (!p.last) return;
  for (int m = 0; m < Shape::kM; ++m)
    if (rows[m].saturated) exact_row<Shape>(p, m0 + m, n0, exact);
}

// --------------------------------------------------------------------------------------------------------------------
// times_classifier

// By one block, as mean_losses.
template <int kThreads>
__device__ void mean_rows(const TimesClassifier& p, double* slots) {
  const LossWeights& w = p.weights;
  LossSums sums;
  for (int64_t b = threadIdx.x; b < p.B; b += kThreads) {
    sums.hits += double(p.top1_rows[b]);
    if (w.ce != 0) sums.part[kPartCe] += p.part_rows[kPartCe * p.B + b];
    if (w.sr != 0) sums.part[kPartSr] += p.part_rows[kPartSr * p.B + b];
    if (w.kl != 0) sums.part[kPartKl] += p.part_rows[kPartKl * p.B + b];
    if (w.fm != 0) sums.part[kPartFm] += row_total(p.rows.fm, p.rows.parts, p.B, b);
  }
  store_losses<kThreads>(p.losses, sums, w, p.B, p.K, p.Ct, slots);
}

// The last block takes the losses, the others a tile of dz each: with the first one for them registers did not suffice.
template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 2)
    times_classifier_tile_kernel(const TimesClassifier p, const __grid_constant__ Operands<T, Shape> from) {
  extern __shared__ __align__(1024) unsigned char stages[];
  if (blockIdx.x == gridDim.x - 1) return mean_rows<Shape::kThreads>(p, reinterpret_cast<double*>(stages));
  const int tiles_m = ceil_div(p.B, Shape::kM), m0 = blockIdx.x % tiles_m * Shape::kM,
            n0 = blockIdx.x / tiles_m * Shape::kN;
  typename Shape::Accumulators acc = {};
  multiply<Shape, B::kByDepth>(acc, reinterpret_cast<T*>(stages), ceil_div(p.K, kDepth),
                               tile_at<B::kByDepth>(from, m0, n0));
  const float share = 1 / float(p.B), c = float(2 * p.weights.fm / (double(p.B) * double(p.Ct)));
  for_pairs<Shape>(acc, m0, n0, p.B, p.Ct, [&](int64_t b, int n, float2 product) {
    const int64_t at = b * p.Ct + n;
    float2 v{share * product.x, share * product.y};
    if (c != 0) {
      const float2 z = load_pair(p.z + at), t = load_pair(p.pooled_t + at);
      v.x += c * (z.x - t.x), v.y += c * (z.y - t.y);
    }
    store_pair(p.dz + at, v);
    if (p.dz_t) store_pair(static_cast<T*>(p.dz_t) + at, v);
  });
}

}  // namespace

int class_tile(int stage, int64_t B, int64_t classes) {
  return with_tile(stage, B, classes, [](auto shape) { return decltype(shape)::kN; });
}

int anchor_rows(const AnchorRows& a, void* stream) {
  const auto start = [&](auto t) {
    using T = decltype(t);
    return launch(a.anchors.rows.anchor ? anchor_rows_kernel<T, true> : anchor_rows_kernel<T, false>, a.B, kRowThreads,
                  stream, a);
  };
  return a.dtype == DType::bf16 ? start(__nv_bfloat16{}) : start(__half{});
}

int logits_exp(const LogitsExp& l, void* stream) {
  return with_tile(l.stage, l.B, l.classes, [&](auto shape) {
    using Shape = decltype(shape);
    Operands<bf16, Shape> logits{}, gram{};
    const bf16* weight = static_cast<const bf16*>(l.weight) + l.first_class * l.Ct;
    int error =
        make_operands<B::kByColumn>(&logits, matrix<bf16>(l.z_t, l.B, l.Ct), matrix<bf16>(weight, l.classes, l.Ct));
    if (!error && l.gram)
      error = make_operands<B::kByColumn>(&gram, matrix<bf16>(l.d_split, 2 * l.B, l.Ct),
                                          matrix<bf16>(l.gram, 2 * l.Ct, l.Ct));
    if (error) return error;
    const int tiles = ceil_div(l.classes, Shape::kN) + (l.gram ? ceil_div(l.Ct, Shape::kN) : 0);
    return launch_sharing(Shape::kSharedBytes, logits_exp_tile_kernel<Shape>, tiles * ceil_div(l.B, Shape::kM),
                          Shape::kThreads, stream, l, logits, gram);
  });
}

int grad_rows(const GradRows& g, void* stream) {
  const bool sums = g.weights.ce != 0 && g.weights.label_smoothing != 0;
  const int stage = sums ? 1 : g.stage;  // the columns' sums are taken from what warps have in registers
  return with_tile(stage, g.B, g.Ct, [&](auto shape) {
    using Shape = decltype(shape);
    Operands<bf16, Shape> from{};
    if (g.grad) {
      const bf16* weight = static_cast<const bf16*>(g.weight) + g.first_class * g.Ct;
      if (const int error = make_operands<B::kByDepth>(&from, matrix<bf16>(g.e, g.B, g.stride_e),
                                                       matrix<bf16>(weight, g.classes, g.Ct)))
        return error;
    }
    const int blocks = (g.grad ? ceil_div(g.B, Shape::kM) * ceil_div(g.Ct, Shape::kN) : 0) + (g.last ? 1 : 0);
    const auto start = [&](auto kernel) {
      return launch_sharing(Shape::kSharedBytes, kernel, blocks, Shape::kThreads, stream, g, from);
    };
    if constexpr (!Shape::kHopper)
      if (sums) return start(grad_rows_tile_kernel<Shape, true>);
    return start(grad_rows_tile_kernel<Shape, false>);
  });
}

namespace {

template <typename T>
int start_times_classifier(const TimesClassifier& t, void* stream) {
  return with_tile(t.stage, t.B, t.Ct, [&](auto shape) {
    using Shape = decltype(shape);
    Operands<T, Shape> from{};
    if (t.grad)
      if (const int error =
              make_operands<B::kByDepth>(&from, matrix<T>(t.gradient, t.B, t.stride), matrix<T>(t.weight, t.K, t.Ct)))
        return error;
    const int blocks = 1 + (t.grad ? ceil_div(t.B, Shape::kM) * ceil_div(t.Ct, Shape::kN) : 0);
    return launch_sharing(Shape::kSharedBytes, times_classifier_tile_kernel<T, Shape>, blocks, Shape::kThreads, stream,
                          t, from);
  });
}

}  // namespace

int times_classifier(const TimesClassifier& t, void* stream) {
  return t.dtype == DType::bf16 ? start_times_classifier<__nv_bfloat16>(t, stream)
                                : start_times_classifier<__half>(t, stream);
}

}  // namespace ijckd
