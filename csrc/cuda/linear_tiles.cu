// Kernels of linear_tiles.h.
#include "cuda/linear_tiles.h"
#include "device.cuh"
#include "hopper_tile.cuh"

namespace ijckd {
namespace {

// What the tiles of linear_tiles multiply.
template <typename T, typename Shape>
struct LinearOperands {
  using Operand = typename Shape::template Operand<T>;
  Operand u;       // [B, Cs]
  Operand weight;  // [Ct, Cs]
};

// Blocks go through the channels' tiles first: those in flight together share their rows of u.
template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 2)
    linear_tile_kernel(const LinearTiles p, const __grid_constant__ LinearOperands<T, Shape> from) {
  extern __shared__ __align__(1024) unsigned char stages[];
  const int tiles_n = ceil_div(p.Ct, Shape::kN), m0 = blockIdx.x / tiles_n * Shape::kM, n0 = blockIdx.x % tiles_n * Shape::kN;
  typename Shape::Accumulators acc = {};
  multiply<Shape, B::kByColumn>(acc, reinterpret_cast<T*>(stages), ceil_div(p.Cs, kDepth), [&](const auto& stage, int step) {
    copy_a<Shape>(stage, from.u, m0, step * kDepth);
    copy_b<Shape, B::kByColumn>(stage, from.weight, n0, step * kDepth);
  });

  float square = 0;
#pragma unroll
  for (int i = 0; i < Shape::kBlocksM; ++i)
#pragma unroll
    for (int j = 0; j < Shape::kBlocksN; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t b = m0 + tile_row<Shape>(i, half);
        const int c = n0 + tile_column<Shape>(j);
        if (b >= p.B || c >= p.Ct) continue;
        const float2 bias = p.bias ? load_pair(p.bias + c) : float2{0, 0};
        const float2 z{acc[i][j][2 * half] + bias.x, acc[i][j][2 * half + 1] + bias.y};
        store_pair(p.z + b * p.Ct + c, z);
        if (!p.pooled_t) continue;
        const float2 t = load_pair(p.pooled_t + b * p.Ct + c);
        square += (z.x - t.x) * (z.x - t.x) + (z.y - t.y) * (z.y - t.y);
      }
  if (p.pooled_t) {
    __syncthreads();  // the last stage has been read: its memory now holds the threads' sums
    square = block_reduce<Shape::kThreads>(square, reinterpret_cast<float*>(stages), Sum{});
    if (threadIdx.x == 0) p.squares[blockIdx.x] = square;
  } else if (blockIdx.x == 0 && threadIdx.x == 0) {
    *p.fm = 0;
  }
}

// --------------------------------------------------------------------------------------------------------------------
// linear_grad_tiles

// Small tiles whatever the sizes, of many threads: those share a window of dz, whose loads are in registers while the tile before
// it is multiplied.
using GradTile = Tile<64, 64, 32, 16, 3>;
static_assert(GradTile::kM == kDepth && GradTile::kN == kDepth, "a window of dz is one panel either way");

template <typename T>
__device__ __forceinline__ uint32_t pair_bits(float x, float y) {
  alignas(4) T pair[2];
  store_pair(pair, float2{x, y});
  uint32_t bits;
  memcpy(&bits, pair, sizeof bits);
  return bits;
}

// What dz's rows [row, row + 64), columns [col, col + 64) are made of: every thread of the block holds kChunk neighbours, those
// of chunk threadIdx.x % 8, in each of kRows rows. Nothing is computed before it is asked for, so that nobody waits for the loads
// sooner. What lies outside dz is 0.
template <bool kPooled>
struct Window {
  static constexpr int kRows = kDepth * kDepth / (GradTile::kThreads * kChunk), kMatched = kPooled ? kRows : 1;
  float grad_z[kRows][kChunk], z[kMatched][kChunk], pooled_t[kMatched][kChunk];
  float c;  // of z - pooled_t in dz

  __device__ __forceinline__ explicit Window(const LinearGradTiles& p)
      : c(kPooled ? 2 * *p.grad_fm / float(double(p.B) * double(p.Ct)) : 0) {}

  static __device__ __forceinline__ int row_of(int i) { return (i * GradTile::kThreads + threadIdx.x) / 8; }

  __device__ __forceinline__ void load(const LinearGradTiles& p, int row, int col) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int b = row + row_of(i), first = col + threadIdx.x % 8 * kChunk;
      const bool inside = b < p.B && first < p.Ct;
      const auto load_chunk = [&](float (&to)[kChunk], const float* from) {
#pragma unroll
        for (int k = 0; k < kChunk; k += 4) {
          float4 v{0, 0, 0, 0};
          if (inside) v = *reinterpret_cast<const float4*>(from + int64_t(b) * p.Ct + first + k);
          to[k] = v.x, to[k + 1] = v.y, to[k + 2] = v.z, to[k + 3] = v.w;
        }
      };
      load_chunk(grad_z[i], p.grad_z);
      if constexpr (kPooled) {
        load_chunk(z[i], p.z);
        load_chunk(pooled_t[i], p.pooled_t);
      }
    }
  }

  __device__ __forceinline__ float dz(int i, int k) const {
    if constexpr (kPooled)
      return grad_z[i][k] + c * (z[i][k] - pooled_t[i][k]);
    else
      return grad_z[i][k];
  }

  template <typename T>
  __device__ __forceinline__ void store(T* panel) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const auto pair = [&](int k) { return pair_bits<T>(dz(i, k), dz(i, k + 1)); };
      *reinterpret_cast<uint4*>(panel + swizzled(row_of(i), threadIdx.x % 8)) = {pair(0), pair(2), pair(4), pair(6)};
    }
  }
};

// One tile of out [rows, Cs] = a b, where a [rows, depth] is dz as it lies (A::kByRow) or transposed and b [depth, Cs].
template <A kLayout, bool kPooled, typename T>
__device__ __forceinline__ void product_tile(const LinearGradTiles& p, T* shared, int tile, const void* b_data, void* out,
                                             int64_t rows, int64_t depth) {
  using Shape = GradTile;
  const Matrix<T> b{static_cast<const T*>(b_data), int(depth), int(p.Cs), p.Cs};
  const int tiles_n = ceil_div(p.Cs, Shape::kN), m0 = tile / tiles_n * Shape::kM, n0 = tile % tiles_n * Shape::kN;
  Window<kPooled> window(p);
  const auto copy = [&](const Stage<T>& stage, int step) {
    copy_b<Shape, B::kByDepth>(stage, b, n0, step * kDepth);
    if constexpr (kLayout == A::kByRow)
      window.load(p, m0, step * kDepth);
    else
      window.load(p, step * kDepth, m0);
  };
  typename Shape::Accumulators acc = {};
  multiply<Shape, B::kByDepth, kLayout>(acc, shared, ceil_div(depth, kDepth), copy, Nothing{},
                                        [&](T* stage_a) { window.store(stage_a); });
#pragma unroll
  for (int i = 0; i < Shape::kBlocksM; ++i)
#pragma unroll
    for (int j = 0; j < Shape::kBlocksN; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = m0 + tile_row<Shape>(i, half);
        const int col = n0 + tile_column<Shape>(j);
        if (row < rows && col < p.Cs)
          store_pair(static_cast<T*>(out) + row * p.Cs + col, float2{acc[i][j][2 * half], acc[i][j][2 * half + 1]});
      }
}

// dbias of channels [col, col + 64), from dz before its rounding. warps [kThreads / 32, 64].
template <bool kPooled>
__device__ __forceinline__ void bias_columns(const LinearGradTiles& p, float* warps, int col) {
  Window<kPooled> window(p);
  float sums[kChunk] = {};
  for (int row = 0; row < p.B; row += kDepth) {
    window.load(p, row, col);
#pragma unroll
    for (int i = 0; i < Window<kPooled>::kRows; ++i)
#pragma unroll
      for (int k = 0; k < kChunk; ++k) sums[k] += window.dz(i, k);
  }
#pragma unroll
  for (int k = 0; k < kChunk; ++k) {
#pragma unroll
    for (int mask = 8; mask < 32; mask *= 2) sums[k] += shuffle_xor(sums[k], mask);
    if (threadIdx.x % 32 < 8) warps[threadIdx.x / 32 * kDepth + threadIdx.x % 8 * kChunk + k] = sums[k];
  }
  __syncthreads();
  const int n = threadIdx.x;
  if (n >= kDepth || col + n >= p.Ct) return;
  float sum = 0;
  for (int warp = 0; warp < GradTile::kThreads / 32; ++warp) sum += warps[warp * kDepth + n];
  p.dbias[col + n] = sum;
}

// A block per tile of du, whose sums are the longest, then of dweight, then per 64 channels of dbias.
template <typename T, bool kPooled>
__global__ void __launch_bounds__(GradTile::kThreads, 2)
    linear_grad_tile_kernel(const LinearGradTiles p, int du_tiles, int dweight_tiles) {
  extern __shared__ __align__(1024) unsigned char stages[];
  T* shared = reinterpret_cast<T*>(stages);
  const int block = blockIdx.x;
  if (block < du_tiles)
    product_tile<A::kByRow, kPooled>(p, shared, block, p.weight, p.du, p.B, p.Ct);
  else if (block < du_tiles + dweight_tiles)
    product_tile<A::kByDepth, kPooled>(p, shared, block - du_tiles, p.u, p.dweight, p.Ct, p.B);
  else
    bias_columns<kPooled>(p, reinterpret_cast<float*>(stages), (block - du_tiles - dweight_tiles) * kDepth);
}

template <typename T>
int start_linear(const LinearTiles& p, void* stream) {
  return with_tile(p.stage, p.B, p.Ct, [&](auto shape) {
    using Shape = decltype(shape);
    LinearOperands<T, Shape> from{};
    const int Cs = int(p.Cs);
    int error = make_operand(&from.u, Matrix<T>{static_cast<const T*>(p.u), int(p.B), Cs, Cs}, Shape::kM);
    if (!error) error = make_operand(&from.weight, Matrix<T>{static_cast<const T*>(p.weight), int(p.Ct), Cs, Cs}, Shape::kN);
    if (error) return error;
    const int blocks = ceil_div(p.B, Shape::kM) * ceil_div(p.Ct, Shape::kN);
    return launch_sharing(Shape::kSharedBytes, linear_tile_kernel<T, Shape>, blocks, Shape::kThreads, stream, p, from);
  });
}

}  // namespace

int64_t linear_blocks(int stage, int64_t B, int64_t Ct) {
  return with_tile(stage, B, Ct, [&](auto shape) {
    using Shape = decltype(shape);
    return int64_t(ceil_div(B, Shape::kM)) * ceil_div(Ct, Shape::kN);
  });
}

int linear_tiles(const LinearTiles& p, void* stream) {
  return p.dtype == DType::bf16 ? start_linear<__nv_bfloat16>(p, stream) : start_linear<__half>(p, stream);
}

int linear_grad_tiles(const LinearGradTiles& p, void* stream) {
  const int tiles_n = ceil_div(p.Cs, GradTile::kN);
  const int du_tiles = p.du ? ceil_div(p.B, GradTile::kM) * tiles_n : 0;
  const int dweight_tiles = p.dweight ? ceil_div(p.Ct, GradTile::kM) * tiles_n : 0;
  const int blocks = du_tiles + dweight_tiles + (p.dbias ? ceil_div(p.Ct, kDepth) : 0);
  const auto start = [&](auto kernel) {
    return launch_sharing(GradTile::kSharedBytes, kernel, blocks, GradTile::kThreads, stream, p, du_tiles, dweight_tiles);
  };
  const auto start_as = [&](auto t) {
    using T = decltype(t);
    return p.pooled_t ? start(linear_grad_tile_kernel<T, true>) : start(linear_grad_tile_kernel<T, false>);
  };
  return p.dtype == DType::bf16 ? start_as(__nv_bfloat16{}) : start_as(__half{});
}

}  // namespace ijckd
