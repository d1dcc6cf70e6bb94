// Kernel of classifier_tiles.h:logits_exp.
#include "classifier_rows.cuh"
#include "hopper_tile.cuh"

namespace ijckd {
namespace {

using bf16 = __nv_bfloat16;

constexpr float kLog2e = 1.44269504f;

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
template <typename Shape, bool kPaired>
__device__ void exp_tile(const LogitsExp& p, const Operands<bf16, Shape>& from, bf16* shared, int tile_m, int tile_n) {
  __shared__ InTile anchors[Shape::kM];
  __shared__ float biases[Shape::kN];
  static_assert(Shape::kThreads == 2 * Shape::kM && Shape::kN <= Shape::kThreads, "a RowPair to each row");
  const int m0 = tile_m * Shape::kM, n0 = tile_n * Shape::kN, lane = threadIdx.x % 32;
  typename Shape::Accumulators acc = {};
  const auto anchor_rows = [&] {
    const int m = RowPair::row(), n = threadIdx.x;
    const int64_t b = m0 + m < p.B ? m0 + m : p.B - 1;
    const RowAnchor anchor = row_anchor(p.rows, p.labels_b, p.B, b);
    const int64_t from_n0 = (anchor.second ? p.labels_b : p.labels)[b] - p.first_class - n0;
    if (RowPair::half() == 0) anchors[m] = {anchor.logit, from_n0 >= 0 && from_n0 < Shape::kN ? int(from_n0) : -1};
    if (n < Shape::kN) biases[n] = p.bias && n0 + n < p.classes ? p.bias[p.first_class + n0 + n] : 0;
  };
  const int steps = ceil_div(p.Ct, kDepth);
  if constexpr (kPaired)
    multiply_paired<Shape>(acc, shared, steps, from, m0, n0, anchor_rows);
  else
    multiply_while<Shape, B::kByColumn>(acc, shared, steps, tile_at<B::kByColumn>(from, m0, n0), anchor_rows);

  __syncthreads();  // the last stage has been read: its memory now holds the rows' sums
  RowSums* rows = reinterpret_cast<RowSums*>(shared);  // [kM, kWarpsN]
#pragma unroll
  for (int i = 0; i < Shape::kBlocksM; ++i) {
    RowSums sums[2];
    const InTile anchor[2] = {anchors[tile_row<Shape>(i, 0)], anchors[tile_row<Shape>(i, 1)]};
#pragma unroll
    for (int j = 0; j < Shape::kBlocksN; ++j) {
      const int in_tile = tile_column<Shape>(j), k = n0 + in_tile;
      const bool real[2] = {k < p.classes, k + 1 < p.classes};
      const float2 bias = load_pair(biases + in_tile);
      const float add[2] = {bias.x, bias.y};
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
  const auto load = load_two(p.z, p.pooled_t, p.Ct);
#pragma unroll
  for (int i = 0; i < Shape::kBlocksM; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float square = 0;
      for_row<TwoPairs, Shape>(acc, i, half, m0, n0, p.B, p.Ct, load,
                               [&](int64_t b, int c, float2 gd, const TwoPairs& of) {
                                 square += gd.x * (of.a.x - of.b.x) + gd.y * (of.a.y - of.b.y);
                                 store_pair(p.gram_d + b * p.Ct + c, gd);
                               });
      square += shuffle_xor(square, 1);
      square += shuffle_xor(square, 2);
      if (lane % 4 == 0) rows[tile_row<Shape>(i, half) * Shape::kWarpsN + threadIdx.x / 32 % Shape::kWarpsN] = square;
    }
  __syncthreads();
  for (int m = threadIdx.x; m < Shape::kM && m0 + m < p.B; m += Shape::kThreads) {
    float square = 0;
    for (int n = 0; n < Shape::kWarpsN; ++n) square += rows[m * Shape::kWarpsN + n];
    p.sums.square[tile_n * p.B + m0 + m] = square;
  }
}

// Blocks go through the rows' tiles first, so that those in flight together share their classes and W is read once from
// memory. kPaired: two neighbours, a cluster, copy their classes' rows once.
template <typename Shape, bool kPaired>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kResident)
    logits_exp_tile_kernel(const LogitsExp p, const __grid_constant__ Operands<bf16, Shape> logits,
                           const __grid_constant__ Operands<bf16, Shape> gram) {
  extern __shared__ __align__(1024) unsigned char stages[];
  wait_for_earlier_launches();
  allow_next_launch();
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.arrived = 0;
  bf16* shared = reinterpret_cast<bf16*>(stages);
  const int tiles_m = ceil_div(p.B, Shape::kM), tile_m = blockIdx.x % tiles_m, tile_n = blockIdx.x / tiles_m;
  const int gram_tiles = p.gram ? ceil_div(p.Ct, Shape::kN) : 0;  // the first: their sums are three times as long
  if (tile_n < gram_tiles)
    gram_tile<Shape>(p, gram, shared, tile_m, tile_n);
  else
    exp_tile<Shape, kPaired>(p, logits, shared, tile_m, tile_n - gram_tiles);
}

}  // namespace

int class_tile(int stage, int64_t B, int64_t classes) {
  return with_tile(stage, B, classes, [](auto shape) { return decltype(shape)::kN; });
}

int logits_exp(const LogitsExp& l, void* stream) {
  return with_tile(l.stage, l.B, l.classes, [&](auto shape) {
    using Shape = decltype(shape);
    const bf16* rows_of_w = static_cast<const bf16*>(l.weight) + l.first_class * l.Ct;
    const auto z_t = matrix<bf16>(l.z_t, l.B, l.Ct), weight = matrix<bf16>(rows_of_w, l.classes, l.Ct);
    const int tiles_m = ceil_div(l.B, Shape::kM),
              tiles_n = ceil_div(l.classes, Shape::kN) + (l.gram ? ceil_div(l.Ct, Shape::kN) : 0);
    Operands<bf16, Shape> logits{}, gram{};
    const auto start = [&](auto kernel, int error, int cluster, int shared_bytes) {
      if (!error && l.gram)
        error = make_operands<B::kByColumn>(&gram, matrix<bf16>(l.d_split, 2 * l.B, l.Ct),
                                            matrix<bf16>(l.gram, 2 * l.Ct, l.Ct));
      if (error) return error;
      Start how{tiles_m * tiles_n, Shape::kThreads, shared_bytes};
      how.dependent = true;
      how.cluster = cluster;
      return launch_as(how, kernel, stream, l, logits, gram);
    };
    const auto alone = [&] {
      return start(logits_exp_tile_kernel<Shape, false>, make_operands<B::kByColumn>(&logits, z_t, weight), 1,
                   Shape::kSharedBytes);
    };
    if constexpr (std::is_same_v<Shape, LargeHopperTile>)
      if (tiles_m % 2 == 0)
        return either(
            kClusters,
            [&] {
              return start(logits_exp_tile_kernel<Shape, true>, make_paired_operands(&logits, z_t, weight), 2,
                           kPairedBytes<Shape>);
            },
            alone);
    return alone();
  });
}

}  // namespace ijckd
