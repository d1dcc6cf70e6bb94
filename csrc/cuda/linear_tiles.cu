// Kernels of linear_tiles.h.
#include "anchors.cuh"
#include "bias_columns.cuh"
#include "block_reduce.cuh"
#include "cuda/linear_tiles.h"
#include "hopper_tile.cuh"

namespace ijckd {
namespace {

// Accumulator columns j of both rows of a thread that the epilogues take at once: they load what belongs to all of
// them, then store. A latency each time, and registers for what is on its way, of which large tiles have few to spare.
template <typename Shape, bool kLogits>
constexpr int kAtOnce = Shape::kM == 64  ? Shape::kBlocksN
                        : !kLogits       ? 4
                        : Shape::kHopper ? 2
                                         : 1;

// Calls use(half, n, row, column) for the pairs (i, first + n, half), n < kSome, of the tile at m0, n0 that lie in
// [0, rows) x [0, cols).
template <typename Shape, int kSome, typename Use>
__device__ __forceinline__ void for_some_pairs(int i, int first, int m0, int n0, int64_t rows, int64_t cols,
                                               const Use& use) {
#pragma unroll
  for (int n = 0; n < kSome; ++n)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = m0 + tile_row<Shape>(i, half);
      const int column = n0 + tile_column<Shape>(first + n);
      if (row < rows && column < cols) use(half, n, row, column);
    }
}

// Those columns of the bias.
template <typename Shape, int kSome>
struct BiasPairs {
  float2 at[kSome] = {};

  __device__ __forceinline__ BiasPairs(const LinearTiles& p, int n0, int first) {
#pragma unroll
    for (int n = 0; n < kSome; ++n)
      if (const int c = n0 + tile_column<Shape>(first + n); p.bias && c < p.Ct) at[n] = load_pair(p.bias + c);
  }
};

// What becomes of a tile of z where classifier_loss follows. `rows` [kM, kWarpsN]. kLogits: the labels' logits too.
template <typename T, typename Shape, bool kLogits>
__device__ __forceinline__ void store_anchors(const LinearTiles& p, const typename Shape::Accumulators& acc,
                                              RowDots* rows, int m0, int n0) {
  constexpr int kSome = kAtOnce<Shape, kLogits>;
#pragma unroll
  for (int i = 0; i < Shape::kBlocksM; ++i) {
    const auto labels_of = [&](int half) {
      const int64_t b = m0 + tile_row<Shape>(i, half);
      return RowLabels(p.anchors, b < p.B ? b : 0);
    };
    const RowLabels labels[2] = {labels_of(0), labels_of(1)};
    RowDots dots[2];
#pragma unroll
    for (int first = 0; first < Shape::kBlocksN; first += kSome) {
      const BiasPairs<Shape, kSome> bias(p, n0, first);
      Neighbours<T, kLogits> with[2][kSome];
      for_some_pairs<Shape, kSome>(i, first, m0, n0, p.B, p.Ct, [&](int half, int n, int64_t b, int c) {
        with[half][n].load(p.anchors, labels[half], p.pooled_t, b * p.Ct + c, c, p.Ct);
      });
      for_some_pairs<Shape, kSome>(i, first, m0, n0, p.B, p.Ct, [&](int half, int n, int64_t b, int c) {
        const float* product = acc[i][first + n] + 2 * half;
        const float2 z{product[0] + bias.at[n].x, product[1] + bias.at[n].y};
        store_pair(p.z + b * p.Ct + c, z);
        dots[half].meet(p.anchors, with[half][n], z, p.pooled_t, b * p.Ct + c, p.B, p.Ct);
      });
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int mask = 1; mask < 4; mask *= 2) {
        RowDots other;
        other.a = shuffle_xor(dots[half].a, mask);
        other.b = shuffle_xor(dots[half].b, mask);
        other.square = shuffle_xor(dots[half].square, mask);
        other.pooled = shuffle_xor(dots[half].pooled, mask);
        dots[half].add(other);
      }
      if (threadIdx.x % 4 == 0)
        rows[tile_row<Shape>(i, half) * Shape::kWarpsN + threadIdx.x / 32 % Shape::kWarpsN] = dots[half];
    }
  }
  __syncthreads();
  for (int m = threadIdx.x; m < Shape::kM && m0 + m < p.B; m += Shape::kThreads) {
    RowDots dots = rows[m * Shape::kWarpsN];
    for (int n = 1; n < Shape::kWarpsN; ++n) dots.add(rows[m * Shape::kWarpsN + n]);
    dots.store(p.anchors, RowLabels(p.anchors, m0 + m), n0 / Shape::kN, m0 + m, p.B);
  }
}

enum class Follows { kNothing, kRounding, kLogits };  // classifier_loss: not, without the labels' logits, with them

// Blocks go through the channels' tiles first: those in flight together share their rows of u. kPaired: two neighbours,
// a cluster, have the same channels and copy their rows of the weight once.
template <typename T, typename Shape, Follows kFollows, bool kPaired>
__global__ void __launch_bounds__(Shape::kThreads, 2)
    linear_tile_kernel(const LinearTiles p, const __grid_constant__ Operands<T, Shape> from) {
  extern __shared__ __align__(1024) unsigned char stages[];
  allow_next_launch();
  constexpr int kParts = kPaired ? 2 : 1;
  const int tiles_n = ceil_div(p.Ct, Shape::kN), tile = blockIdx.x / kParts;
  const int part = tile / tiles_n * kParts + blockIdx.x % kParts;
  const int m0 = part * Shape::kM, n0 = tile % tiles_n * Shape::kN;
  typename Shape::Accumulators acc = {};
  T* shared = reinterpret_cast<T*>(stages);
  if constexpr (kPaired)
    multiply_paired<Shape>(acc, shared, ceil_div(p.Cs, kDepth), from, m0, n0);
  else
    multiply<Shape, B::kByColumn>(acc, shared, ceil_div(p.Cs, kDepth), tile_at<B::kByColumn>(from, m0, n0));
  if constexpr (kFollows != Follows::kNothing) {
    __syncthreads();  // the last stage has been read: its memory now holds the rows' sums
    return store_anchors<T, Shape, kFollows == Follows::kLogits>(p, acc, reinterpret_cast<RowDots*>(stages), m0, n0);
  }

  constexpr int kSome = kAtOnce<Shape, false>;
  float square = 0;
#pragma unroll
  for (int i = 0; i < Shape::kBlocksM; ++i)
#pragma unroll
    for (int first = 0; first < Shape::kBlocksN; first += kSome) {
      const BiasPairs<Shape, kSome> bias(p, n0, first);
      float2 pooled_t[2][kSome];
      if (p.pooled_t)
        for_some_pairs<Shape, kSome>(i, first, m0, n0, p.B, p.Ct, [&](int half, int n, int64_t b, int c) {
          pooled_t[half][n] = load_pair(p.pooled_t + b * p.Ct + c);
        });
      for_some_pairs<Shape, kSome>(i, first, m0, n0, p.B, p.Ct, [&](int half, int n, int64_t b, int c) {
        const float* product = acc[i][first + n] + 2 * half;
        const float2 z{product[0] + bias.at[n].x, product[1] + bias.at[n].y}, t = pooled_t[half][n];
        store_pair(p.z + b * p.Ct + c, z);
        if (p.pooled_t) square += (z.x - t.x) * (z.x - t.x) + (z.y - t.y) * (z.y - t.y);
      });
    }
  if (p.pooled_t) {
    __syncthreads();  // likewise the threads' sums
    square = block_reduce<Shape::kThreads>(square, reinterpret_cast<float*>(stages), Sum{});
    if (threadIdx.x == 0) p.squares[part * tiles_n + tile % tiles_n] = square;
  } else if (blockIdx.x == 0 && threadIdx.x == 0) {
    *p.fm = 0;
  }
}

// --------------------------------------------------------------------------------------------------------------------
// linear_grad_tiles

// Small tiles whatever the sizes, of many threads: those share a window of dz, whose loads are in registers while the
// tile before it is multiplied.
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

// What dz is made of, by number.
template <bool kPooled>
struct DzScale {
  float scale, c;  // of grad_z and of z - pooled_t

  __device__ __forceinline__ explicit DzScale(const LinearGradTiles& p)
      : scale(p.scale ? *p.scale : 1), c(kPooled ? 2 * *p.grad_fm / float(double(p.B) * double(p.Ct)) : 0) {}

  __device__ __forceinline__ float dz(float grad_z, float z, float pooled_t) const {
    if constexpr (kPooled)
      return scale * grad_z + c * (z - pooled_t);
    else
      return scale * grad_z;
  }
};

// What dz's rows [row, row + 64), columns [col, col + 64) are made of: every thread of the block holds kChunk
// neighbours, those of chunk threadIdx.x % 8, in each of kRows rows. Nothing is computed before it is asked for, so
// that no thread waits for the loads sooner. What lies outside dz is 0.
template <bool kPooled>
struct Window {
  static constexpr int kRows = kDepth * kDepth / (GradTile::kThreads * kChunk), kMatched = kPooled ? kRows : 1;
  float grad_z[kRows][kChunk], z[kMatched][kChunk], pooled_t[kMatched][kChunk];
  DzScale<kPooled> scale;

  __device__ __forceinline__ explicit Window(const LinearGradTiles& p) : scale(p) {}

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
    return scale.dz(grad_z[i][k], z[kPooled ? i : 0][k], pooled_t[kPooled ? i : 0][k]);
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

// Two neighbours of du (A::kByRow) or of dweight, at `at`.
template <A kLayout, typename T>
__device__ __forceinline__ void store_product(const LinearGradTiles& p, int64_t at, float2 v) {
  if constexpr (kLayout == A::kByRow)
    store_pair(static_cast<T*>(p.du) + at, v);
  else if (p.float_dweight)
    store_pair(static_cast<float*>(p.dweight) + at, v);
  else
    store_pair(static_cast<T*>(p.dweight) + at, v);
}

// One tile of du or dweight [rows, Cs] = a b, where a [rows, depth] is dz as it lies (A::kByRow) or transposed and b
// [depth, Cs].
template <A kLayout, bool kPooled, typename T>
__device__ __forceinline__ void product_tile(const LinearGradTiles& p, T* shared, int tile, const void* b_data,
                                             int64_t rows, int64_t depth) {
  using Shape = GradTile;
  const Matrix<T> b = matrix<T>(b_data, depth, p.Cs);
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
  for_pairs<Shape>(acc, m0, n0, rows, p.Cs,
                   [&](int64_t row, int col, float2 v) { store_product<kLayout, T>(p, row * p.Cs + col, v); });
}

// What dz's four neighbours at one place are made of.
template <bool kPooled>
struct Four {
  float4 grad_z, z, pooled_t;
};

template <bool kPooled>
__device__ __forceinline__ void dbias_columns(const LinearGradTiles& p, double* lanes, int col) {
  const DzScale<kPooled> scale(p);
  const auto load = [&](int64_t row, int c) {
    const auto at = [&](const float* x) { return *reinterpret_cast<const float4*>(x + row * p.Ct + c); };
    Four<kPooled> four{at(p.grad_z), {}, {}};
    if constexpr (kPooled) four.z = at(p.z), four.pooled_t = at(p.pooled_t);
    return four;
  };
  bias_columns<GradTile::kThreads>(lanes, p.dbias, p.B, p.Ct, col, load, [&](const Four<kPooled>& four, int k) {
    return scale.dz(element(four.grad_z, k), element(four.z, k), element(four.pooled_t, k));
  });
}

// A block per tile of du, whose sums are the longest, then of dweight, then per 64 channels of dbias. With pooled_t a
// thread has both of its windows' operands in flight, more registers than two blocks to a multiprocessor leave.
template <typename T, bool kPooled>
__global__ void __launch_bounds__(GradTile::kThreads, kPooled ? 1 : 2)
    linear_grad_tile_kernel(const LinearGradTiles p, int du_tiles, int dweight_tiles) {
  extern __shared__ __align__(1024) unsigned char stages[];
  T* shared = reinterpret_cast<T*>(stages);
  const int block = blockIdx.x;
  if (block < du_tiles)
    product_tile<A::kByRow, kPooled>(p, shared, block, p.weight, p.B, p.Ct);
  else if (block < du_tiles + dweight_tiles)
    product_tile<A::kByDepth, kPooled>(p, shared, block - du_tiles, p.u, p.Ct, p.B);
  else
    dbias_columns<kPooled>(p, reinterpret_cast<double*>(stages), (block - du_tiles - dweight_tiles) * kDepth);
}

template <typename T>
int start_linear(const LinearTiles& p, void* stream) {
  return with_tile(p.stage, p.B, p.Ct, [&](auto shape) {
    using Shape = decltype(shape);
    const auto u = matrix<T>(p.u, p.B, p.Cs), weight = matrix<T>(p.weight, p.Ct, p.Cs);
    const int parts = ceil_div(p.B, Shape::kM);
    Operands<T, Shape> from{};
    const auto start = [&](auto paired, int error, int shared_bytes) {
      constexpr bool kPaired = decltype(paired)::value;
      if (error) return error;
      Start how{parts * ceil_div(p.Ct, Shape::kN), Shape::kThreads, shared_bytes};
      how.cluster = kPaired ? 2 : 1;
      if (!p.anchors.z_t)
        return launch_as(how, linear_tile_kernel<T, Shape, Follows::kNothing, kPaired>, stream, p, from);
      return p.anchors.rows.anchor
                 ? launch_as(how, linear_tile_kernel<T, Shape, Follows::kLogits, kPaired>, stream, p, from)
                 : launch_as(how, linear_tile_kernel<T, Shape, Follows::kRounding, kPaired>, stream, p, from);
    };
    const auto alone = [&] {
      return start(std::false_type{}, make_operands<B::kByColumn>(&from, u, weight), Shape::kSharedBytes);
    };
    if constexpr (std::is_same_v<Shape, LargeHopperTile>)
      if (parts % 2 == 0)
        return either(
            kClusters,
            [&] { return start(std::true_type{}, make_paired_operands(&from, u, weight), kPairedBytes<Shape>); },
            alone);
    return alone();
  });
}

}  // namespace

int64_t linear_blocks(int stage, int64_t B, int64_t Ct) {
  return with_tile(stage, B, Ct, [&](auto shape) { return int64_t(ceil_div(B, decltype(shape)::kM)); }) *
         linear_parts(stage, B, Ct);
}

int64_t linear_parts(int stage, int64_t B, int64_t Ct) {
  return with_tile(stage, B, Ct, [&](auto shape) { return int64_t(ceil_div(Ct, decltype(shape)::kN)); });
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
    return launch_sharing(GradTile::kSharedBytes, kernel, blocks, GradTile::kThreads, stream, p, du_tiles,
                          dweight_tiles);
  };
  const auto start_as = [&](auto t) {
    using T = decltype(t);
    return p.pooled_t ? start(linear_grad_tile_kernel<T, true>) : start(linear_grad_tile_kernel<T, false>);
  };
  return p.dtype == DType::bf16 ? start_as(__nv_bfloat16{}) : start_as(__half{});
}

}  // namespace ijckd
