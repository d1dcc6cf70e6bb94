// Kernel of classifier_tiles.h:grad_rows.
#include "classifier_rows.cuh"
#include "cuda/classifier_tiles.h"
#include "split_tile.cuh"

namespace ijckd {
namespace {

using bf16 = __nv_bfloat16;

// Row b's sums over all tiles of classes.
struct ClassSums {
  float others = 0;  // NaN where the anchor is, which a row of one class would not notice
  Top top;

  // Whether exponentials did not fit their format; not where the anchor is NaN.
  __device__ bool saturated(const RowAnchor& anchor) const { return top.value - anchor.logit > kSaturation; }
};

// Both threads of a RowPair call.
__device__ ClassSums class_sums(const GradRows& p, int64_t b, const RowAnchor& anchor) {
  struct OfTile {
    float others, best;
    int best_class;
  };
  ClassSums sums;
  RowPair::share(
      p.sums.class_tiles,
      [&](int tile) {
        const int64_t at = tile * p.B + b;
        return OfTile{p.sums.others[at], p.sums.best[at], p.sums.best_class[at]};
      },
      [&](const OfTile& tile) {
        sums.others += tile.others;
        if (tile.best_class >= 0) sums.top.meet(tile.best, tile.best_class);
      });
  sums.others += shuffle_xor(sums.others, RowPair::kLane);
  const float best = shuffle_xor(sums.top.value, RowPair::kLane);
  sums.top.meet(best, shuffle_xor(sums.top.index, RowPair::kLane));
  if (anchor.logit != anchor.logit) sums.others = NAN;
  return sums;
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

// The losses of this block's rows, of all of which kLossBlocks have a fixed share.
template <int kThreads>
__device__ void mean_losses(const GradRows& p, double* slots) {
  constexpr int kRows = kThreads / 2;
  const LossWeights& w = p.weights;
  const float eps = float(w.label_smoothing);
  LossSums sums;
  for (int64_t first = blockIdx.x * kRows; first < p.B; first += kLossBlocks * kRows) {
    const int64_t row = first + RowPair::row(), b = row < p.B ? row : p.B - 1;
    const bool own = row < p.B && RowPair::half() == 0;
    const RowAnchor anchor = row_anchor(p.rows, p.labels_b, p.B, b);
    const ClassSums of_row = class_sums(p, b, anchor);
    const float logits = p.sums.logits ? RowPair::total(p.sums.logits, p.sums.class_tiles, p.B, b) : 0;
    const float square = w.sr != 0 ? RowPair::total(p.sums.square, p.sums.gram_tiles, p.B, b) : 0;
    const float fm = w.fm != 0 ? RowPair::total(p.rows.fm, p.rows.parts, p.B, b) : 0;
    if (!own) continue;
    sums.hits += of_row.top.index == p.labels[b];
    if (w.ce != 0) {
      float loss = log1pf(of_row.others);
      // Of each tile only its largest logit: off by less than log K, of more than kSaturation.
      if (of_row.saturated(anchor)) {
        float sum = 0;
        for (int t = 0; t < p.sums.class_tiles; ++t) sum += expf(p.sums.best[t * p.B + b] - of_row.top.value);
        loss = of_row.top.value - anchor.logit + logf(sum);
        count_row(p.counts, kSaturated);
      }
      if (p.labels_b) loss += (1 - eps) * label_shares(p, b, anchor).other * (anchor.logit - anchor.other);
      loss -= eps * (logits / float(p.K));
      sums.part[kPartCe] += loss;
    }
    sums.part[kPartSr] += square < 0 ? 0 : square;  // |W d|^2 is not below 0; NaN stays NaN
    sums.part[kPartFm] += fm;
  }
  store_losses<kThreads>(p.losses, sums, w, p.B, p.K, p.Ct, slots, blockIdx.x);
}

// Coefficients of a row's gradient: of (e W), w_a and w_b; and which rows of W those are.
struct RowScale {
  float e, a, b;
  int class_a, class_b;
  bool saturated;  // e is 0 then: exact_row adds its part
};

// Both threads of a RowPair call.
__device__ RowScale row_scale(const GradRows& p, int64_t b) {
  if (p.weights.ce == 0) return {};
  // Of a label outside [0, K) any row: the scale is NaN.
  const auto class_row = [&](const int64_t* labels) {
    const int64_t k = labels ? labels[b] : 0;
    return k >= 0 && k < p.K ? int(k) : 0;
  };
  const RowAnchor anchor = row_anchor(p.rows, p.labels_b, p.B, b);
  const ClassSums sums = class_sums(p, b, anchor);
  const LabelShares share = label_shares(p, b, anchor);
  const float s = sums.others, total = 1 + s, c = float(p.weights.ce / double(p.B)),
              eps = float(p.weights.label_smoothing), other = -c * (1 - eps) * share.other;
  RowScale scale{
      0, -c * (1 - eps) * share.anchor, other, class_row(p.labels), class_row(p.labels_b), sums.saturated(anchor)};
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
  constexpr int kWarps = Shape::kThreads / 32, kColumns = (Shape::kN + 31) / 32;
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
      if (lane + 32 * j < Shape::kN && c < p.Ct) acc[j] = before * acc[j] + e * load<float>(w, c);
    }
  }
  float* of_warp = shared + warp * (Shape::kN + 2);
  __syncthreads();  // every reader of `shared` is done
#pragma unroll
  for (int j = 0; j < kColumns; ++j)
    if (lane + 32 * j < Shape::kN) of_warp[lane + 32 * j] = acc[j];
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

// What is added to a pair of products: as much as is wanted of it, else 0. Rows of W stay as they are stored until
// then.
struct Terms {
  float2 before, gram_d;
  TwoPairs z;
  uint32_t w_a, w_b;
};

__device__ __forceinline__ float2 pair_of(uint32_t word) {
  float x[2];
  take_apart<bf16, 2>(word, x);
  return {x[0], x[1]};
}

// With the last classes the first kLossBlocks take the losses, the others a tile of dz each. The columns' sums take
// registers that leave room for one large block to a multiprocessor only.
template <typename Shape, bool kSums, Cluster kCluster>
__global__ void __launch_bounds__(Shape::kThreads, kSums ? 1 : Shape::kResident)
    grad_rows_tile_kernel(const GradRows p, const __grid_constant__ Operands<bf16, Shape> from) {
  extern __shared__ __align__(1024) unsigned char stages[];
  wait_for_earlier_launches();
  __shared__ RowScale rows[Shape::kM];
  constexpr int kBlocks = kCluster == Cluster::steps ? kSplit : 1;  // to a tile
  using Own = std::conditional_t<kBlocks == 1, Shape, ColumnsOf<Shape, kBlocks>>;
  static_assert(Shape::kThreads == 2 * Shape::kM, "a RowPair to each row");
  static_assert(kLossBlocks % kBlocks == 0, "a cluster has tiles or losses");
  const int loss_blocks = p.last ? kLossBlocks : 0, block = int(blockIdx.x) - loss_blocks;
  if (block < 0) return mean_losses<Shape::kThreads>(p, reinterpret_cast<double*>(stages));
  bf16* shared = reinterpret_cast<bf16*>(stages);
  const int tile = block / kBlocks, tiles_m = ceil_div(p.B, Shape::kM), m0 = tile % tiles_m * Shape::kM;
  int n0 = tile / tiles_m * Shape::kN;
  typename Own::Accumulators acc = {};
  float sums[Shape::kBlocksN][4] = {};
  const int steps = p.weights.ce != 0 ? ceil_div(p.classes, kDepth) : 0;
  const auto copy = tile_at<B::kByDepth>(from, m0, n0);
  const auto scale_rows = [&] {
    if (!p.last) return;
    const int64_t b = m0 + RowPair::row();
    const RowScale scale = row_scale(p, b < p.B ? b : p.B - 1);
    if (RowPair::half() == 0) rows[RowPair::row()] = scale;
  };
  if constexpr (kCluster == Cluster::pair) {
    multiply_paired<Shape, B::kByDepth>(acc, shared, steps, from, m0, n0, scale_rows);
  } else if constexpr (kCluster == Cluster::steps) {
    const StepsOf own(steps, cluster_rank(), kBlocks);
    typename Shape::Accumulators part = {};
    multiply_while<Shape, B::kByDepth>(part, shared, own.count, steps_from(own.first, copy), scale_rows);
    __syncthreads();  // the last stage has been read
    join<Shape, kBlocks>(acc, part, stages);
    n0 += cluster_rank() * Own::kN;
  } else if constexpr (kSums) {
    multiply<Shape, B::kByDepth>(
        acc, shared, steps, copy,
        [&](const uint32_t (&fragments)[Shape::kBlocksN][2]) {
          if (threadIdx.x / 32 < Shape::kWarpsN) add_columns<bf16>(sums, fragments);
        },
        Nothing{}, scale_rows);
  } else {
    multiply_while<Shape, B::kByDepth>(acc, shared, steps, copy, scale_rows);
  }
  __syncthreads();  // the last stage has been read: its memory now holds the columns' sums, and what exact_row keeps

  float* exact = reinterpret_cast<float*>(stages);
  float* columns = exact + kExactFloats<Shape>;  // [kN]
  if constexpr (kSums) {
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
  }

  const LossWeights& lw = p.weights;
  const bf16* weight = static_cast<const bf16*>(p.weight);
  const float c_sr = p.gram_d ? float(2 * lw.sr / (double(p.B) * double(p.K))) : 0;
  const float c_fm = lw.fm != 0 ? float(2 * lw.fm / (double(p.B) * double(p.Ct))) : 0;
  const float c_sum = float(-lw.ce * lw.label_smoothing / (double(p.B) * double(p.K)));
  const auto load = [&](auto& x, int64_t b, const Columns& columns) {
    const RowScale& row = rows[b - m0];
    const auto each = [&](const auto& use) {
#pragma unroll
      for (int k = 0; k < kPairsAtOnce<Own>; ++k) use(x[k], columns.any(k));
    };
    each([](Terms& of, int) { of = {}; });
    if (!p.first)
#pragma unroll
      for (int k = 0; k < kPairsAtOnce<Own>; ++k)
        if (columns.has(k)) x[k].before = load_pair(p.dz + b * p.Ct + columns.at(k));  // others store theirs
    if (!p.last) return;
    if (lw.ce != 0) each([&](Terms& of, int c) { of.w_a = load_together<2>(weight, row.class_a * p.Ct + c); });
    if (lw.ce != 0 && p.labels_b)
      each([&](Terms& of, int c) { of.w_b = load_together<2>(weight, row.class_b * p.Ct + c); });
    if (c_sr != 0) each([&](Terms& of, int c) { of.gram_d = load_pair(p.gram_d + b * p.Ct + c); });
    if (c_fm != 0) {
      each([&](Terms& of, int c) { of.z.a = load_pair(p.z + b * p.Ct + c); });
      each([&](Terms& of, int c) { of.z.b = load_pair(p.pooled_t + b * p.Ct + c); });
    }
  };
  for_pairs<Terms, Own>(acc, m0, n0, p.B, p.Ct, load, [&](int64_t b, int c, float2 v, const Terms& x) {
    const int64_t at = b * p.Ct + c;
    const auto add = [&](float factor, float2 y) { v.x += factor * y.x, v.y += factor * y.y; };
    add(1, x.before);
    if (p.last) {
      const RowScale& row = rows[b - m0];
      v = row.saturated ? float2{0, 0} : float2{v.x * row.e, v.y * row.e};
      add(row.a, pair_of(x.w_a));
      add(row.b, pair_of(x.w_b));
      if constexpr (kSums) add(c_sum, load_pair(columns + c - n0));
      add(c_sr, x.gram_d);
      add(c_fm, float2{x.z.a.x - x.z.b.x, x.z.a.y - x.z.b.y});
      if (p.dz_t) store_pair(static_cast<bf16*>(p.dz_t) + at, v);
    }
    store_pair(p.dz + at, v);
  });
  if constexpr (kBlocks > 1) join_end();
  if (!p.last) return;
  for (int m = 0; m < Shape::kM && m0 + m < p.B; ++m)
    if (rows[m].saturated) exact_row<Own>(p, m0 + m, n0, exact);
}

}  // namespace

int grad_rows(const GradRows& g, void* stream) {
  const bool sums = g.weights.ce != 0 && g.weights.label_smoothing != 0;
  const int stage = sums ? 1 : g.stage;  // the columns' sums are taken from what warps have in registers
  return with_tile<DeepHopperTile>(stage, g.B, g.Ct, [&](auto shape) {
    using Shape = decltype(shape);
    Operands<bf16, Shape> from{};
    const int tiles_m = ceil_div(g.B, Shape::kM), tiles = g.grad ? tiles_m * ceil_div(g.Ct, Shape::kN) : 0;
    const auto e = matrix<bf16>(g.e, g.B, g.stride_e),
               weight = matrix<bf16>(static_cast<const bf16*>(g.weight) + g.first_class * g.Ct, g.classes, g.Ct);
    const auto start_as = [&](auto kernel, int error, int blocks, int cluster, int shared_bytes) {
      if (error) return error;
      Start how{blocks + (g.last ? kLossBlocks : 0), Shape::kThreads, shared_bytes};
      how.dependent = true;
      how.cluster = cluster;
      return launch_as(how, kernel, stream, g, from);
    };
    const auto alone = [&](auto kernel) {
      const int error = g.grad ? make_operands<B::kByDepth>(&from, e, weight) : 0;
      return start_as(kernel, error, tiles, 1, Shape::kSharedBytes);
    };
    const auto whole = [&] { return alone(grad_rows_tile_kernel<Shape, false, Cluster::none>); };
    const bool products = g.grad && g.weights.ce != 0;
    if constexpr (!Shape::kHopper) {
      if (sums) return alone(grad_rows_tile_kernel<Shape, true, Cluster::none>);
    } else if constexpr (Shape::kM == 64) {
      if (products && worth_splitting(tiles, ceil_div(g.classes, kDepth)))
        return either(
            kClusters,
            [&] {
              return start_as(grad_rows_tile_kernel<Shape, false, Cluster::steps>,
                              make_operands<B::kByDepth>(&from, e, weight), tiles * kSplit, kSplit,
                              Shape::kSharedBytes);
            },
            whole);
    } else if (products && tiles_m % 2 == 0) {
      return either(
          kClusters,
          [&] {
            return start_as(grad_rows_tile_kernel<Shape, false, Cluster::pair>,
                            make_paired_operands<B::kByDepth>(&from, e, weight), tiles, 2, kPairedBytes<Shape>);
          },
          whole);
    }
    return whole();
  });
}

}  // namespace ijckd
