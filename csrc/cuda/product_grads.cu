// Kernel of product_grads.h.
#include <algorithm>

#include "bias_columns.cuh"
#include "cuda/product_grads.h"
#include "device.cuh"
#include "hopper_tile.cuh"

namespace ijckd {
namespace {

constexpr int kMostSplit = 8;  // blocks of a cluster on any GPU that has clusters

// How a product's tiles are made. `split` neighbouring blocks of a cluster share a tile: each takes its part of the
// contraction, then sums some of the tile's rows over all of them.
struct Product {
  int split, blocks;  // blocks: those of all tiles, and idle ones up to whole clusters
};

// Between the rows of a tile's sums in shared memory, in floats: the pairs of eight rows fall on different banks.
template <typename Shape>
constexpr int kSumStride = Shape::kN + 8;

template <typename Out>
__device__ __forceinline__ void store_four(Out* to, float4 v) {
  store_pair(to, float2{v.x, v.y});
  store_pair(to + 2, float2{v.z, v.w});
}

// Stores a block's share of the tile at m0, n0 of out [rows, Cs]: scale times the sum of acc over the `split` blocks of
// which this is number `part`, in their order.
template <typename Out, typename Shape>
__device__ __forceinline__ void store_sums(const typename Shape::Accumulators& acc, float* sums, int part, int split,
                                           float scale, Out* out, int m0, int n0, int64_t rows, int64_t Cs) {
  for_pairs<Shape>(acc, 0, 0, Shape::kM, Shape::kN,
                   [&](int64_t m, int n, float2 v) { store_pair(sums + m * kSumStride<Shape> + n, v); });
  cluster_arrive();
  cluster_wait();
  constexpr int kFours = Shape::kN / 4;
  const int first_rank = cluster_rank() - part, own_rows = Shape::kM / split;
  for (int i = threadIdx.x; i < own_rows * kFours; i += Shape::kThreads) {
    const int m = part * own_rows + i / kFours, n = i % kFours * 4;
    float4 of[kMostSplit] = {};
#pragma unroll
    for (int k = 0; k < kMostSplit; ++k)
      if (k < split) of[k] = load_four_from_block(address_in_block(sums + m * kSumStride<Shape> + n, first_rank + k));
    float4 v = of[0];
#pragma unroll
    for (int k = 1; k < kMostSplit; ++k) v.x += of[k].x, v.y += of[k].y, v.z += of[k].z, v.w += of[k].w;
    if (m0 + m < rows && n0 + n < Cs)
      store_four(out + (m0 + m) * Cs + n0 + n, {scale * v.x, scale * v.y, scale * v.z, scale * v.w});
  }
  cluster_arrive();
  cluster_wait();  // nobody reads this block's sums any more
}

// Block `block` of those of out [rows, Cs] = scale a b, where a [rows, depth] is dy as it lies (A::kByRow) or
// transposed and b [depth, Cs].
template <A kLayout, typename Out, typename T, typename Shape>
__device__ __forceinline__ void product_tile(const ProductGrads& p, const Operands<T, Shape>& from,
                                             unsigned char* stages, int block, int split, void* out, int64_t rows,
                                             int64_t depth) {
  const float scale = p.scale ? *p.scale : 1;
  const int tiles_n = ceil_div(p.Cs, Shape::kN), tile = block / split, part = block % split;
  const int m0 = tile / tiles_n * Shape::kM, n0 = tile % tiles_n * Shape::kN;
  const int steps = ceil_div(depth, kDepth), share = ceil_div(steps, split), first = part * share, left = steps - first;
  const auto copy = tile_at<B::kByDepth, kLayout>(from, m0, n0);
  typename Shape::Accumulators acc = {};
  multiply<Shape, B::kByDepth, kLayout>(acc, reinterpret_cast<T*>(stages), left < share ? left : share,
                                        [&](const auto& stage, int step) { copy(stage, first + step); });
  if constexpr (Shape::kHopper)
    if (split > 1) {
      __syncthreads();  // the last stage has been read: its memory now holds the sums
      return store_sums<Out, Shape>(acc, reinterpret_cast<float*>(stages), part, split, scale, static_cast<Out*>(out),
                                    m0, n0, rows, p.Cs);
    }
  for_pairs<Shape>(acc, m0, n0, rows, p.Cs, [&](int64_t row, int col, float2 v) {
    store_pair(static_cast<Out*>(out) + row * p.Cs + col, float2{scale * v.x, scale * v.y});
  });
}

// Blocks of du, then of dweight, then one per 64 channels of dbias.
template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 2)
    product_grad_tile_kernel(const ProductGrads p, const __grid_constant__ Operands<T, Shape> du,
                             const __grid_constant__ Operands<T, Shape> dweight, const Product of_du,
                             const Product of_dweight) {
  extern __shared__ __align__(1024) unsigned char stages[];
  int block = blockIdx.x;
  if (block < of_du.blocks) return product_tile<A::kByRow, T>(p, du, stages, block, of_du.split, p.du, p.N, p.Ct);
  block -= of_du.blocks;
  if (block < of_dweight.blocks) {
    if (p.float_dweight)
      return product_tile<A::kByDepth, float>(p, dweight, stages, block, of_dweight.split, p.dweight, p.Ct, p.N);
    return product_tile<A::kByDepth, T>(p, dweight, stages, block, of_dweight.split, p.dweight, p.Ct, p.N);
  }
  block -= of_dweight.blocks;
  const float scale = p.scale ? *p.scale : 1;
  bias_columns<Shape::kThreads>(
      reinterpret_cast<double*>(stages), p.dbias, p.N, p.Ct, block * kDepth,
      [&](int64_t row, int c) { return *reinterpret_cast<const float4*>(p.float_dy + row * p.Ct + c); },
      [&](const float4& v, int k) { return scale * element(v, k); });
}

template <typename Shape>
int tiles_of(int64_t rows, int64_t columns) {
  return ceil_div(rows, Shape::kM) * ceil_div(columns, Shape::kN);
}

// Into how many blocks a tile is split so that the GPU is full, each with two steps of the contraction at least.
int split_of(int tiles, int64_t depth) {
  int split = 1;
  while (split < kMostSplit && 2 * split * tiles <= kEnoughTiles && 4 * split <= ceil_div(depth, kDepth)) split *= 2;
  return split;
}

template <typename T, typename Shape>
int start(const ProductGrads& p, bool clusters, void* stream) {
  const auto dy = matrix<T>(p.dy, p.N, p.Ct);
  Operands<T, Shape> du{}, dweight{};
  int error = 0;
  if (p.du) error = make_operands<B::kByDepth>(&du, dy, matrix<T>(p.weight, p.Ct, p.Cs));
  if (p.dweight && !error) error = make_operands<B::kByDepth, A::kByDepth>(&dweight, dy, matrix<T>(p.u, p.N, p.Cs));
  if (error) return error;
  const int du_tiles = p.du ? tiles_of<Shape>(p.N, p.Cs) : 0,
            dweight_tiles = p.dweight ? tiles_of<Shape>(p.Ct, p.Cs) : 0;
  Product of_du{clusters ? split_of(du_tiles, p.Ct) : 1, 0}, of_dweight{clusters ? split_of(dweight_tiles, p.N) : 1, 0};
  const int cluster = std::max(of_du.split, of_dweight.split);
  const auto whole = [&](int blocks) { return ceil_div(blocks, cluster) * cluster; };
  of_du.blocks = whole(du_tiles * of_du.split), of_dweight.blocks = whole(dweight_tiles * of_dweight.split);
  const int blocks = of_du.blocks + of_dweight.blocks + whole(p.dbias ? ceil_div(p.Ct, kDepth) : 0);
  Start how{blocks, Shape::kThreads, Shape::kSharedBytes};
  how.cluster = cluster;
  return launch_as(how, product_grad_tile_kernel<T, Shape>, stream, p, du, dweight, of_du, of_dweight);
}

template <typename T>
int start_as(const ProductGrads& p, void* stream) {
  if (p.stage < 2) return start<T, SmallTile>(p, false, stream);
  const bool large =
      std::max(tiles_of<LargeHopperTile>(p.N, p.Cs), tiles_of<LargeHopperTile>(p.Ct, p.Cs)) >= kEnoughTiles;
  return either(
      kClusters,
      [&] { return large ? start<T, LargeHopperTile>(p, true, stream) : start<T, SmallHopperTile>(p, true, stream); },
      [&] { return start<T, SmallHopperTile>(p, false, stream); });
}

}  // namespace

int product_grads(const ProductGrads& p, void* stream) {
  return p.dtype == DType::bf16 ? start_as<__nv_bfloat16>(p, stream) : start_as<__half>(p, stream);
}

}  // namespace ijckd
