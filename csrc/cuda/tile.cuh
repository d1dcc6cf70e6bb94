#pragma once
// One block's tile of a matrix product on tensor cores: a [M, L] times b over a ring of shared-memory stages, half-type
// operands, float accumulators in registers. Here the tiles of stage 1 (sm_80 and newer), which threads fill and warps
// multiply; hopper_tile.cuh has the others, of the same sizes and use.
//
// A stage holds kDepth steps of the contraction. Rows of 64 elements (128 bytes) lie in panels; the 16-byte chunk c of
// row r is kept at chunk c ^ (r % 8), so that the 8 rows of a matrix that ldmatrix reads at a time fall on 8 different
// groups of banks.

#include <type_traits>

#include "device.cuh"
#include "instructions.cuh"

namespace ijckd {

constexpr int kDepth = 64;  // contraction steps per stage, and elements in a panel's row
constexpr int kChunk = 8;   // elements that one asynchronous copy moves

// Where chunk `chunk` of row `row` lies in a panel, in elements.
__host__ __device__ constexpr int swizzled(int row, int chunk) { return row * kDepth + ((chunk ^ (row % 8)) * kChunk); }

// Rows in global memory, `stride` elements apart. cols and stride are multiples of kChunk and data is aligned to 16
// bytes; whatever lies outside [0, rows) x [0, cols) counts as 0.
template <typename T>
struct Matrix {
  const T* data;
  int rows, cols;
  int64_t stride;
};

// How b lies in its stage: as rows of the output's columns (b [N, L], one panel), or as rows of the contraction (b [L,
// N], a panel per 64 columns).
enum class B { kByColumn, kByDepth };

// How a does: as rows of the output's rows (a [M, L], one panel), or as rows of the contraction (a [L, M], a panel per
// 64 of them).
enum class A { kByRow, kByDepth };

// What a copy functor of `multiply` fills.
template <typename T>
struct Stage {
  T *a, *b;
};

template <int kM_, int kN_, int kWarpM, int kWarpN, int kStages_>
struct Tile {
  static constexpr bool kHopper = false;
  static constexpr int kM = kM_, kN = kN_, kStages = kStages_;
  static constexpr int kWarpsM = kM / kWarpM, kWarpsN = kN / kWarpN, kThreads = kWarpsM * kWarpsN * 32;
  static constexpr int kBlocksM = kWarpM / 16, kBlocksN = kWarpN / 8;  // 16 x 8 accumulators of a warp
  static constexpr int kStageA = kM * kDepth, kStage = (kM + kN) * kDepth;
  static constexpr int kSharedBytes = kStages * kStage * 2;
  // Blocks that share a multiprocessor: two large ones' stages do not fit, nor do their registers.
  static constexpr int kResident = kThreads < 256 ? 2 : 1;
  using Accumulators = float[kBlocksM][kBlocksN][4];
  template <typename T>
  using Operand = Matrix<T>;

  static_assert(kM % kWarpM == 0 && kN % kWarpN == 0 && kWarpM % 16 == 0 && kWarpN % 16 == 0);
  static_assert(kM * kDepth % (kThreads * kChunk) == 0 && kN * kDepth % (kThreads * kChunk) == 0,
                "threads share the copies evenly");
};

// With three stages the large one fits the 99 KiB that a block has on the smaller GPUs of these generations.
using SmallTile = Tile<64, 64, 32, 32, 4>;
using LargeTile = Tile<128, 128, 64, 32, 3>;

// The operand of a kernel whose tiles copy `rows` of its rows at a time.
template <typename T>
int make_operand(Matrix<T>* to, const Matrix<T>& from, int /*tile_rows*/) {
  *to = from;
  return 0;
}

// Starts the copies of m's rows [row, row + kRows), columns [col, col + kDepth) into a panel.
template <int kRows, int kThreads, typename T>
__device__ __forceinline__ void copy_panel(T* panel, const Matrix<T>& m, int row, int col) {
#pragma unroll
  for (int i = 0; i < kRows * kDepth / (kThreads * kChunk); ++i) {
    const int at = i * kThreads + threadIdx.x, r = at / 8, chunk = at % 8;
    const bool inside = row + r < m.rows && col + chunk * kChunk < m.cols;
    const T* from = inside ? m.data + (row + r) * m.stride + col + chunk * kChunk : m.data;
    copy_async16(panel + swizzled(r, chunk), from, inside ? 16 : 0);
  }
}

template <typename T>
constexpr uint32_t kTwoOnes = 0;
template <>
constexpr uint32_t kTwoOnes<__nv_bfloat16> = 0x3f803f80;
template <>
constexpr uint32_t kTwoOnes<__half> = 0x3c003c00;

// Starts the copies of one stage: of a's rows from `m`, of b's columns from `n`, contraction steps from `depth`.
template <typename Shape, A kLayout = A::kByRow, typename T>
__device__ __forceinline__ void copy_a(const Stage<T>& stage, const Matrix<T>& a, int m, int depth) {
  if constexpr (kLayout == A::kByRow) {
    copy_panel<Shape::kM, Shape::kThreads>(stage.a, a, m, depth);
  } else {
#pragma unroll
    for (int panel = 0; panel < Shape::kM / kDepth; ++panel)
      copy_panel<kDepth, Shape::kThreads>(stage.a + panel * kDepth * kDepth, a, depth, m + panel * kDepth);
  }
}
template <typename Shape, B kLayout, typename T>
__device__ __forceinline__ void copy_b(const Stage<T>& stage, const Matrix<T>& b, int n, int depth) {
  if constexpr (kLayout == B::kByColumn) {
    copy_panel<Shape::kN, Shape::kThreads>(stage.b, b, n, depth);
  } else {
#pragma unroll
    for (int panel = 0; panel < Shape::kN / kDepth; ++panel)
      copy_panel<kDepth, Shape::kThreads>(stage.b + panel * kDepth * kDepth, b, depth, n + panel * kDepth);
  }
}

// Adds to every row of `sums` the columns' sums of one step's fragments of b: a product with a matrix of ones.
template <typename T, int kBlocksN>
__device__ __forceinline__ void add_columns(float (&sums)[kBlocksN][4], const uint32_t (&fragments)[kBlocksN][2]) {
  const uint32_t ones[4] = {kTwoOnes<T>, kTwoOnes<T>, kTwoOnes<T>, kTwoOnes<T>};
#pragma unroll
  for (int j = 0; j < kBlocksN; ++j) multiply_add_16x8x16<T>(sums[j], ones, fragments[j]);
}

struct Nothing {
  template <typename... Args>
  __device__ void operator()(const Args&...) const {}
};

// acc += a b over `steps` stages. `copy(Stage, step)` starts the copies of one stage; `also(fragments of b)` sees every
// 16 steps of the contraction as they pass; `finish(stage of a)` may store there what `copy` has only begun to load,
// and comes after products that run meanwhile. All threads call `meanwhile()` once, while the first copies are under
// way. Every thread of the block calls; a barrier must follow before `shared` is used again.
template <typename Shape, B kLayout, A kLayoutA = A::kByRow, typename T, typename Copy, typename Also = Nothing,
          typename Finish = Nothing, typename Meanwhile = Nothing>
__device__ __forceinline__ std::enable_if_t<!Shape::kHopper> multiply(typename Shape::Accumulators& acc, T* shared,
                                                                      int steps, const Copy& copy,
                                                                      const Also& also = {}, const Finish& finish = {},
                                                                      const Meanwhile& meanwhile = {}) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_m = warp / Shape::kWarpsN * Shape::kBlocksM * 16, warp_n = warp % Shape::kWarpsN * Shape::kBlocksN * 8;
  const auto start = [&](int step) {
    T* stage = shared + step % Shape::kStages * Shape::kStage;
    if (step < steps) copy(Stage<T>{stage, stage + Shape::kStageA}, step);
    copy_async_commit();  // empty past the end, so that the waits below may count
  };
  const auto end = [&](int step) {
    if (step < steps) finish(shared + step % Shape::kStages * Shape::kStage);
  };
#pragma unroll
  for (int s = 0; s < Shape::kStages - 1; ++s) {
    start(s);
    end(s);
  }
  meanwhile();
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<Shape::kStages - 2>();  // this step's copies have landed,
    __syncthreads();                        // everyone's; and everyone is done with the stage that is filled next
    start(step + Shape::kStages - 1);
    const T* a = shared + step % Shape::kStages * Shape::kStage;
    const T* b = a + Shape::kStageA;
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
      uint32_t fa[Shape::kBlocksM][4], fb[Shape::kBlocksN][2];
#pragma unroll
      for (int i = 0; i < Shape::kBlocksM; ++i) {
        if constexpr (kLayoutA == A::kByRow) {
          load_matrix_x4(fa[i], a + swizzled(warp_m + i * 16 + lane % 16, k * 2 + lane / 16));
        } else {
          const int m = warp_m + i * 16 + lane / 8 % 2 * 8;
          load_matrix_x4_transposed(
              fa[i], a + m / kDepth * kDepth * kDepth + swizzled(k * 16 + lane % 8 + lane / 16 * 8, m % kDepth / 8));
        }
      }
#pragma unroll
      for (int j = 0; j < Shape::kBlocksN; j += 2) {
        uint32_t r[4];
        if constexpr (kLayout == B::kByColumn) {
          load_matrix_x4(r, b + swizzled(warp_n + j * 8 + lane % 8 + lane / 16 * 8, k * 2 + lane / 8 % 2));
        } else {
          const int n = warp_n + j * 8 + lane / 16 * 8;
          load_matrix_x4_transposed(r, b + n / kDepth * kDepth * kDepth + swizzled(k * 16 + lane % 16, n % kDepth / 8));
        }
        fb[j][0] = r[0], fb[j][1] = r[1], fb[j + 1][0] = r[2], fb[j + 1][1] = r[3];
      }
#pragma unroll
      for (int i = 0; i < Shape::kBlocksM; ++i)
#pragma unroll
        for (int j = 0; j < Shape::kBlocksN; ++j) multiply_add_16x8x16<T>(acc[i][j], fa[i], fb[j]);
      also(fb);
    }
    end(step + Shape::kStages - 1);
  }
}

// Row and column in the tile of accumulator pair (i, j, half): values [2 half] and [2 half + 1], at `column` and the
// next.
template <typename Shape>
__device__ __forceinline__ int tile_row(int i, int half) {
  return threadIdx.x / 32 / Shape::kWarpsN * Shape::kBlocksM * 16 + i * 16 + threadIdx.x % 32 / 4 + half * 8;
}
template <typename Shape>
__device__ __forceinline__ int tile_column(int j) {
  return threadIdx.x / 32 % Shape::kWarpsN * Shape::kBlocksN * 8 + j * 8 + threadIdx.x % 4 * 2;
}

// How many pairs' loads a thread has under way at a time, as its registers allow beside the accumulators.
template <typename Shape>
constexpr int kPairsAtOnce = Shape::kBlocksN < 4    ? Shape::kBlocksN
                             : Shape::kBlocksN == 8 ? 8
                                                    : 4;

// The columns of kPairsAtOnce neighbouring accumulator pairs of a thread, the first at `first`.
struct Columns {
  int first;
  int64_t cols;

  __device__ __forceinline__ int at(int k) const { return first + 8 * k; }
  __device__ __forceinline__ bool has(int k) const { return at(k) < cols; }
  // The last pair's where there is none: loads that need not be asked for are not parted by branches.
  __device__ __forceinline__ int any(int k) const { return has(k) ? at(k) : int(cols) - 2; }
};

// For the accumulator pairs (i, half) that the calling thread has of a row of the tile at m0, n0, where they lie in [0,
// rows) x [0, cols): load(x, row, columns) of kPairsAtOnce of them, then use(row, column, pair, x[k]) of each. So loads
// do not wait for what `use` stores.
template <typename X, typename Shape, typename Load, typename Use>
__device__ __forceinline__ void for_row(const typename Shape::Accumulators& acc, int i, int half, int m0, int n0,
                                        int64_t rows, int64_t cols, const Load& load, const Use& use) {
  constexpr int kAtOnce = kPairsAtOnce<Shape>;
  static_assert(Shape::kBlocksN % kAtOnce == 0);
  const int64_t row = m0 + tile_row<Shape>(i, half);
  if (row >= rows) return;
#pragma unroll
  for (int first = 0; first < Shape::kBlocksN; first += kAtOnce) {
    const Columns columns{n0 + tile_column<Shape>(first), cols};
    X x[kAtOnce];
    load(x, row, columns);
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k)
      if (columns.has(k))
        use(row, columns.at(k), float2{acc[i][first + k][2 * half], acc[i][first + k][2 * half + 1]}, x[k]);
  }
}

// for_row of all rows of the tile.
template <typename X, typename Shape, typename Load, typename Use>
__device__ __forceinline__ void for_pairs(const typename Shape::Accumulators& acc, int m0, int n0, int64_t rows,
                                          int64_t cols, const Load& load, const Use& use) {
#pragma unroll
  for (int i = 0; i < Shape::kBlocksM; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) for_row<X, Shape>(acc, i, half, m0, n0, rows, cols, load, use);
}

// Likewise use(row, column, pair), which needs no loads.
template <typename Shape, typename Use>
__device__ __forceinline__ void for_pairs(const typename Shape::Accumulators& acc, int m0, int n0, int64_t rows,
                                          int64_t cols, const Use& use) {
  for_pairs<Nothing, Shape>(acc, m0, n0, rows, cols, Nothing{},
                            [&](int64_t row, int column, float2 pair, Nothing) { use(row, column, pair); });
}

// A pair of each of two arrays, and for_row's load of them.
struct TwoPairs {
  float2 a, b;
};

__device__ __forceinline__ auto load_two(const float* a, const float* b, int64_t stride) {
  return [=](auto& x, int64_t row, const Columns& columns) {
#pragma unroll
    for (int k = 0; k < int(sizeof x / sizeof x[0]); ++k) x[k].a = load_pair(a + row * stride + columns.any(k));
#pragma unroll
    for (int k = 0; k < int(sizeof x / sizeof x[0]); ++k) x[k].b = load_pair(b + row * stride + columns.any(k));
  };
}

}  // namespace ijckd
