// Kernel of connector_tiles.h.
#include "cuda/connector_tiles.h"
#include "device.cuh"
#include "hopper_tile.cuh"

namespace ijckd {
namespace {

// Sum over a tile's rows of value(i, j, half, n), accumulators of which column tile_column(j) + n is meant, for every
// column: over the thread's rows, the lanes that share its columns, then, through `warps` [kWarpsM, kN], the warps.
// Every thread of the block calls; afterwards warps[0] holds the sums for all of them.
template <typename Shape, typename Value>
__device__ __forceinline__ void column_sums(float* warps, const Value& value) {
#pragma unroll
  for (int j = 0; j < Shape::kBlocksN; ++j)
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      float s = 0;
#pragma unroll
      for (int i = 0; i < Shape::kBlocksM; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) s += value(i, j, half, n);
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2) s += shuffle_xor(s, mask);
      if (threadIdx.x % 32 < 4) warps[threadIdx.x / 32 / Shape::kWarpsN * Shape::kN + tile_column<Shape>(j) + n] = s;
    }
  __syncthreads();
  for (int n = threadIdx.x; n < Shape::kN; n += Shape::kThreads)
    for (int m = 1; m < Shape::kWarpsM; ++m) warps[n] += warps[m * Shape::kN + n];
  __syncthreads();
}

// Blocks go through the channels' tiles first: those in flight together share their rows of u. kPaired: two neighbours,
// a cluster, take the same channels of neighbouring parts.
template <typename T, typename Shape, bool kPaired>
__global__ void __launch_bounds__(Shape::kThreads, 2)
    project_tile_kernel(const ProjectTiles p, const __grid_constant__ Operands<T, Shape> from) {
  extern __shared__ __align__(1024) unsigned char stages[];
  allow_next_launch();
  constexpr int kParts = kPaired ? 2 : 1;
  const int tiles_n = ceil_div(p.Ct, Shape::kN), tile = blockIdx.x / kParts;
  const int part = tile / tiles_n * kParts + blockIdx.x % kParts;
  const int m0 = part * Shape::kM, n0 = tile % tiles_n * Shape::kN;
  typename Shape::Accumulators acc = {};
  T* shared = reinterpret_cast<T*>(stages);
  if constexpr (kPaired) {
    multiply_paired<Shape>(acc, shared, ceil_div(p.Cs, kDepth), from, m0, n0);
    if (m0 >= p.N) return;  // of an odd number of parts
  } else {
    multiply<Shape, B::kByColumn>(acc, shared, ceil_div(p.Cs, kDepth), tile_at<B::kByColumn>(from, m0, n0));
  }

  for_pairs<Shape>(acc, m0, n0, p.N, p.Ct,
                   [&](int64_t row, int c, float2 v) { store_pair(static_cast<T*>(p.y) + row * p.Ct + c, v); });
  if (!p.mean) return;

  __syncthreads();  // the last stage has been read: its memory now holds the columns' sums
  float* warps = reinterpret_cast<float*>(stages);  // [kWarpsM, kN]
  const int left = int(p.N) - m0, rows = left < Shape::kM ? left : Shape::kM;
  const auto stored = [&](int i, int j, int half, int n) {
    T v;
    store(&v, 0, acc[i][j][2 * half + n]);
    return load<float>(&v, 0);
  };
  column_sums<Shape>(warps, stored);  // rows past the end are 0
  float mean[Shape::kBlocksN][2];
#pragma unroll
  for (int j = 0; j < Shape::kBlocksN; ++j)
#pragma unroll
    for (int n = 0; n < 2; ++n) mean[j][n] = warps[tile_column<Shape>(j) + n] / float(rows);
  const auto channel_of = [&](int n) { return int64_t(part) * p.Ct + n0 + n; };
  for (int n = threadIdx.x; n < Shape::kN && n0 + n < p.Ct; n += Shape::kThreads)
    p.mean[channel_of(n)] = warps[n] / float(rows);
  __syncthreads();  // everyone has read the sums
  column_sums<Shape>(warps, [&](int i, int j, int half, int n) {
    const float d = stored(i, j, half, n) - mean[j][n];
    return tile_row<Shape>(i, half) < rows ? d * d : 0;
  });
  for (int n = threadIdx.x; n < Shape::kN && n0 + n < p.Ct; n += Shape::kThreads) p.m2[channel_of(n)] = warps[n];
}

template <typename T>
int start_project(const ProjectTiles& p, void* stream) {
  return with_tile(p.stage, p.N, p.Ct, [&](auto shape) {
    using Shape = decltype(shape);
    const auto u = matrix<T>(p.u, p.N, p.Cs), weight = matrix<T>(p.weight, p.Ct, p.Cs);
    const int parts = ceil_div(p.N, Shape::kM), tiles_n = ceil_div(p.Ct, Shape::kN);
    const auto alone = [&] {
      Operands<T, Shape> from{};
      if (const int error = make_operands<B::kByColumn>(&from, u, weight)) return error;
      return launch_sharing(Shape::kSharedBytes, project_tile_kernel<T, Shape, false>, parts * tiles_n, Shape::kThreads,
                            stream, p, from);
    };
    if constexpr (std::is_same_v<Shape, LargeHopperTile>)
      return either(
          kClusters,
          [&] {
            Operands<T, Shape> from{};
            if (const int error = make_paired_operands(&from, u, weight)) return error;
            Start how{(parts + 1) / 2 * 2 * tiles_n, Shape::kThreads, kPairedBytes<Shape>};
            how.cluster = 2;
            return launch_as(how, project_tile_kernel<T, Shape, true>, stream, p, from);
          },
          alone);
    else
      return alone();
  });
}

}  // namespace

int64_t project_rows(int stage, int64_t N, int64_t Ct) {
  return with_tile(stage, N, Ct, [](auto shape) { return int64_t(decltype(shape)::kM); });
}

int project_tiles(const ProjectTiles& p, void* stream) {
  return p.dtype == DType::bf16 ? start_project<__nv_bfloat16>(p, stream) : start_project<__half>(p, stream);
}

}  // namespace ijckd
