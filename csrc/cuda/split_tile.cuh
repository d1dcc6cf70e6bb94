#pragma once
// A Hopper tile whose contraction is shared out over the blocks of a cluster, for products with few tiles: each block
// multiplies some of the steps, then takes some of the columns, whose sums it joins through the cluster's shared
// memory.

#include "hopper_tile.cuh"

namespace ijckd {

// What the blocks of a cluster have to do with one another: nothing, or there is none; parts of a tile's steps (kSplit
// blocks); or neighbouring tiles of the same columns, whose operand is copied once (hopper_tile.cuh:multiply_paired).
enum class Cluster { none, steps, pair };

// What one of kBlocks blocks has of a tile's columns, in the same threads.
template <typename Shape, int kBlocks>
struct ColumnsOf {
  static constexpr int kM = Shape::kM, kN = Shape::kN / kBlocks, kThreads = Shape::kThreads;
  static constexpr int kWarpsM = Shape::kWarpsM, kWarpsN = Shape::kWarpsN;
  static constexpr int kBlocksM = Shape::kBlocksM, kBlocksN = Shape::kBlocksN / kBlocks;
  using Accumulators = float[kBlocksM][kBlocksN][4];

  static_assert(kBlocksM == 1 && kWarpsN == 1 && Shape::kBlocksN % kBlocks == 0);
};

// The steps of `steps` that are block `rank`'s.
struct StepsOf {
  int first, count;

  __device__ StepsOf(int steps, int rank, int blocks)
      : first(rank * steps / blocks), count((rank + 1) * steps / blocks - first) {}
};

// sums = the cluster's blocks' acc, added in the blocks' order, of the calling block's columns. `shared` is the stages'
// memory, read to the end. Every thread of the cluster calls; join_end must follow before a block ends or uses `shared`
// again.
template <typename Shape, int kBlocks>
__device__ __forceinline__ void join(typename ColumnsOf<Shape, kBlocks>::Accumulators& sums,
                                     const typename Shape::Accumulators& acc, void* shared) {
  constexpr int kOwn = ColumnsOf<Shape, kBlocks>::kBlocksN;
  float4* slots = static_cast<float4*>(shared) + threadIdx.x;  // [kBlocksN, kThreads]
#pragma unroll
  for (int j = 0; j < Shape::kBlocksN; ++j)
    slots[j * Shape::kThreads] = {acc[0][j][0], acc[0][j][1], acc[0][j][2], acc[0][j][3]};
  cluster_arrive();
  cluster_wait();
  float4 of[kBlocks][kOwn];
#pragma unroll
  for (int block = 0; block < kBlocks; ++block)
#pragma unroll
    for (int j = 0; j < kOwn; ++j)
      of[block][j] =
          load_four_from_block(address_in_block(slots + (cluster_rank() * kOwn + j) * Shape::kThreads, block));
#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
    const float4& first = of[0][j];
    sums[0][j][0] = first.x, sums[0][j][1] = first.y, sums[0][j][2] = first.z, sums[0][j][3] = first.w;
#pragma unroll
    for (int block = 1; block < kBlocks; ++block) {
      const float4& v = of[block][j];
      sums[0][j][0] += v.x, sums[0][j][1] += v.y, sums[0][j][2] += v.z, sums[0][j][3] += v.w;
    }
  }
  cluster_arrive();
}
__device__ __forceinline__ void join_end() {
  __syncwarp();  // the cluster's barrier takes whole warps
  cluster_wait();
}

// The copy functor for part of a product's steps, from `first`.
template <typename Copy>
__device__ __forceinline__ auto steps_from(int first, const Copy& copy) {
  return [&copy, first](const auto& stage, int step) { copy(stage, first + step); };
}

// Over how many blocks to share out a product of so many tiles and steps: four where they leave most of the GPU idle.
constexpr int kSplit = 4;
#ifdef IJCKD_SMALL_SIZES  // tests/emulator, as in hopper_tile.cuh
constexpr int kFewTiles = 4, kManySteps = 2;
#else
constexpr int kFewTiles = 32, kManySteps = 8;
#endif
inline bool worth_splitting(int tiles, int steps) { return tiles <= kFewTiles && steps >= kManySteps; }

}  // namespace ijckd
