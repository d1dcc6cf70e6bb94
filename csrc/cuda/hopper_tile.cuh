#pragma once
// tile.cuh's tiles as a Hopper GPU makes them best (stage 2, sm_90a): the tensor memory accelerator fills the stages,
// warpgroups multiply from shared memory. Sizes, the swizzle, what a thread holds of the output and how kernels are
// written are the same, so that one kernel serves both.

#include <cuda_runtime.h>

#include "hopper_instructions.cuh"
#include "launch.cuh"
#include "tile.cuh"

namespace ijckd {

// A warpgroup multiplies 64 rows.
template <int kM_, int kN_, int kStages_>
struct HopperTile {
  static constexpr bool kHopper = true;
  static constexpr int kM = kM_, kN = kN_, kStages = kStages_;
  static constexpr int kWarpsM = kM / 16, kWarpsN = 1, kThreads = kWarpsM * 32;
  static constexpr int kBlocksM = 1, kBlocksN = kN / 8;  // 16 x 8 accumulators of a warp
  static constexpr int kStageA = kM * kDepth, kStage = (kM + kN) * kDepth;
  static constexpr int kSharedBytes = kStages * (kStage * 2 + 8);  // and a barrier
  // Blocks that share a multiprocessor of 227 KiB, with up to 6 KiB of what kernels keep besides.
  static constexpr int kResident = 2 * (kSharedBytes + (6 << 10)) <= 227 << 10 ? 2 : 1;
  using Accumulators = float[kBlocksM][kBlocksN][4];
  template <typename T>
  using Operand = CUtensorMap;

  static_assert(kM % 64 == 0 && kN % 64 == 0);
};

// Two of either fit a multiprocessor, so that one multiplies while the other writes its results. A small one's product
// takes a sixth of the time in which memory answers: with six stages five are on their way.
using SmallHopperTile = HopperTile<64, 64, 6>;
using LargeHopperTile = HopperTile<128, 128, 3>;
// For kernels that seldom have more large tiles than a GPU has multiprocessors.
using DeepHopperTile = HopperTile<128, 128, 6>;

// Small tiles fill the GPU where there are few of them; large ones read memory half as often.
#ifdef IJCKD_SMALL_SIZES  // tests/emulator, as in tiled_loss.cpp
constexpr int kEnoughTiles = 6;
#else
constexpr int kEnoughTiles = 128;
#endif

// Runs `body(Shape{})` for the shape that suits an output of [rows, columns] at that stage (stage.h).
template <typename Large = LargeHopperTile, typename F>
auto with_tile(int stage, int64_t rows, int64_t columns, const F& body) {
  const auto up = [](int64_t n, int64_t d) { return (n + d - 1) / d; };
  const bool large = up(rows, LargeTile::kM) * up(columns, LargeTile::kN) >= kEnoughTiles;
  if (stage >= 2) return large ? body(Large{}) : body(SmallHopperTile{});
  return large ? body(LargeTile{}) : body(SmallTile{});
}

// The driver's function, without linking against the driver; null if there is none.
inline auto tensor_map_encoder() {
  static void* const encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const auto error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? function : nullptr;
  }();
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(encode);
}

// The operand of a kernel whose tiles copy `tile_rows` rows at a time: the driver's description of the array and of
// that box, kept by all that it says. Returns 0 or an error code.
template <typename T>
int make_operand(CUtensorMap* to, const Matrix<T>& from, int tile_rows) {
  const auto type = std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  thread_local Kept<5, CUtensorMap, 16> kept;
  const auto both = [](int high, int low) { return uint64_t(uint32_t(high)) << 32 | uint32_t(low); };
  const std::array<uint64_t, 5> key{key_of(from.data), both(from.rows, from.cols), uint64_t(from.stride),
                                    uint64_t(tile_rows), uint64_t(type)};
  if (const CUtensorMap* found = kept.find(key)) return *to = *found, 0;
  const auto encode = tensor_map_encoder();
  if (!encode) return static_cast<int>(cudaErrorNotSupported);
  const cuuint64_t size[2] = {static_cast<cuuint64_t>(from.cols), static_cast<cuuint64_t>(from.rows)};
  const cuuint64_t stride[1] = {static_cast<cuuint64_t>(from.stride) * sizeof(T)};
  const cuuint32_t box[2] = {kDepth, static_cast<cuuint32_t>(tile_rows)}, every[2] = {1, 1};
  const CUresult result =
      encode(to, type, 2, const_cast<T*>(from.data), size, stride, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) kept.put(key, *to);
  return static_cast<int>(result);  // the driver's codes are the runtime's
}

// Both operands of a product, as a kernel takes them.
template <typename T, typename Shape>
struct Operands {
  typename Shape::template Operand<T> a, b;
};

// Rows of `cols` elements, one after the other.
template <typename T>
__host__ __device__ Matrix<T> matrix(const void* data, int64_t rows, int64_t cols) {
  return {static_cast<const T*>(data), static_cast<int>(rows), static_cast<int>(cols), cols};
}

// Returns 0 or an error code.
template <B kLayout, A kLayoutA = A::kByRow, typename T, typename Shape>
int make_operands(Operands<T, Shape>* to, const Matrix<T>& a, const Matrix<T>& b) {
  const int error = make_operand(&to->a, a, kLayoutA == A::kByRow ? Shape::kM : kDepth);
  return error ? error : make_operand(&to->b, b, kLayout == B::kByColumn ? Shape::kN : kDepth);
}

// What a copy functor of `multiply` fills, and the barrier that sees it land.
template <typename T>
struct LandingStage {
  T *a, *b;
  uint64_t* landed;
};

// Starts the copies of one stage, as for the other tiles; one thread calls.
template <typename Shape, A kLayout = A::kByRow, typename T>
__device__ __forceinline__ void copy_a(const LandingStage<T>& stage, const CUtensorMap& a, int m, int depth) {
  if constexpr (kLayout == A::kByRow) {
    load_tile(stage.a, a, stage.landed, depth, m);
  } else {
#pragma unroll
    for (int panel = 0; panel < Shape::kM / kDepth; ++panel)
      load_tile(stage.a + panel * kDepth * kDepth, a, stage.landed, m + panel * kDepth, depth);
  }
}
template <typename Shape, B kLayout, typename T>
__device__ __forceinline__ void copy_b(const LandingStage<T>& stage, const CUtensorMap& b, int n, int depth) {
  if constexpr (kLayout == B::kByColumn) {
    load_tile(stage.b, b, stage.landed, depth, n);
  } else {
#pragma unroll
    for (int panel = 0; panel < Shape::kN / kDepth; ++panel)
      load_tile(stage.b + panel * kDepth * kDepth, b, stage.landed, n + panel * kDepth, depth);
  }
}

// The copy functor for the output's tile at row m0, column n0.
template <B kLayout, A kLayoutA = A::kByRow, typename T, typename Shape>
__device__ __forceinline__ auto tile_at(const Operands<T, Shape>& from, int m0, int n0) {
  return [&from, m0, n0](const auto& stage, int step) {
    copy_a<Shape, kLayoutA>(stage, from.a, m0, step * kDepth);
    copy_b<Shape, kLayout>(stage, from.b, n0, step * kDepth);
  };
}

// Starts acc += a b of one stage; `a` has the stage's operands one after the other. The threads of all warpgroups call.
template <typename Shape, B kLayout, A kLayoutA, typename T>
__device__ __forceinline__ void multiply_stage(typename Shape::Accumulators& acc, const T* stage) {
  constexpr int kRow = kDepth * 2, kEightRows = 8 * kRow, kPanel = kDepth * kRow;  // bytes
  const T *a = stage + threadIdx.x / 128 * 64 * kDepth, *b = stage + Shape::kStageA;
  warpgroup_fence();
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    constexpr bool kRowsA = kLayoutA == A::kByRow, kColumnsB = kLayout == B::kByColumn;
    const auto described = [&](const T* panels, bool by_output) {
      return by_output ? matrix_descriptor(panels + k, 16, kEightRows)
                       : matrix_descriptor(panels + k * kDepth, kPanel, kEightRows);
    };
    multiply_add_64xNx16<T, !kColumnsB, !kRowsA>(acc[0], described(a, kRowsA), described(b, kColumnsB));
  }
  warpgroup_commit();
}

// acc += a b over `steps` stages. `copy(LandingStage, step)` starts the copies of all of one stage, in one thread.
// Every thread of the block calls; `shared` has kSharedBytes, at a multiple of 1024. A barrier must follow before
// `shared` is used again. A kernel that calls again, with nothing else in `shared` since, says how many steps there
// were before: its barriers go on. `meanwhile` as for the other tiles.
template <typename Shape, B kLayout, A kLayoutA = A::kByRow, typename T, typename Copy, typename Meanwhile = Nothing>
__device__ __forceinline__ std::enable_if_t<Shape::kHopper> multiply(typename Shape::Accumulators& acc, T* shared,
                                                                     int steps, const Copy& copy, int before = 0,
                                                                     const Meanwhile& meanwhile = {}) {
  constexpr int kStages = Shape::kStages;
  uint64_t* landed = reinterpret_cast<uint64_t*>(shared + kStages * Shape::kStage);  // [kStages]
  if (before == 0) {
    if (threadIdx.x == 0) {
      for (int s = 0; s < kStages; ++s) barrier_init(landed + s, 1);
      barrier_init_fence();
    }
    __syncthreads();
  }
  const auto start = [&](int step) {
    if (threadIdx.x == 0 && step < steps) {
      const int slot = (before + step) % kStages;
      T* stage = shared + slot * Shape::kStage;
      barrier_expect(landed + slot, Shape::kStage * 2);
      copy(LandingStage<T>{stage, stage + Shape::kStageA, landed + slot}, step);
    }
    __syncwarp();  // a warpgroup's instructions take whole warps
  };
  for (int s = 0; s < kStages - 1; ++s) start(s);
  meanwhile();
  for (int step = 0; step < steps; ++step) {
    const int slot = (before + step) % kStages;
    barrier_wait(landed + slot, (before + step) / kStages % 2);
    multiply_stage<Shape, kLayout, kLayoutA>(acc, shared + slot * Shape::kStage);
    warpgroup_wait<1>();  // the step before has been read by this warpgroup,
    __syncthreads();      // and by the others: while this one's products are made its stage is filled again
    start(step + kStages - 1);
  }
  warpgroup_wait<0>(acc[0]);
}

// For kernels that serve both kinds of tiles: multiply with `meanwhile`.
template <typename Shape, B kLayout, typename T, typename Copy, typename Meanwhile>
__device__ __forceinline__ void multiply_while(typename Shape::Accumulators& acc, T* shared, int steps,
                                               const Copy& copy, const Meanwhile& meanwhile) {
  if constexpr (Shape::kHopper)
    multiply<Shape, kLayout>(acc, shared, steps, copy, 0, meanwhile);
  else
    multiply<Shape, kLayout>(acc, shared, steps, copy, Nothing{}, Nothing{}, meanwhile);
}

// What multiply_paired needs of shared memory, and the operands as it copies them.
template <typename Shape>
constexpr int kPairedBytes = Shape::kSharedBytes + Shape::kStages * 8;

template <B kLayout = B::kByColumn, typename T, typename Shape>
int make_paired_operands(Operands<T, Shape>* to, const Matrix<T>& a, const Matrix<T>& b) {
  static_assert(Shape::kN / 2 == kDepth, "half of the columns are a panel of either layout");
  const int error = make_operand(&to->a, a, Shape::kM);
  return error ? error : make_operand(&to->b, b, kDepth);
}

// acc += a b for the two blocks of a cluster, whose tiles at m0 and n0 have the same columns: each
// copies its rows of a, and half of the columns of b into both, so that a stage costs the L2 three quarters. Every
// thread of both calls, with as many steps. `meanwhile` as for `multiply`.
template <typename Shape, B kLayout = B::kByColumn, typename T, typename Meanwhile = Nothing>
__device__ __forceinline__ void multiply_paired(typename Shape::Accumulators& acc, T* shared, int steps,
                                                const Operands<T, Shape>& from, int m0, int n0,
                                                const Meanwhile& meanwhile = {}) {
  constexpr int kStages = Shape::kStages;
  uint64_t* landed = reinterpret_cast<uint64_t*>(shared + kStages * Shape::kStage);  // [kStages]
  uint64_t* read = landed + kStages;                                                 // [kStages]: by both blocks
  const int rank = cluster_rank();
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) barrier_init(landed + s, 1), barrier_init(read + s, 2);
    barrier_init_fence();
  }
  cluster_arrive();
  cluster_wait();  // the other block's barriers are made as well
  const auto start = [&](int step) {
    if (threadIdx.x == 0 && step < steps) {
      const int slot = step % kStages;
      if (step >= kStages) {  // this block has read the stage's last content; the other one may not
        barrier_arrive(read + slot);
        barrier_arrive_in_block(address_in_block(read + slot, 1 - rank));
        barrier_wait(read + slot, (step / kStages - 1) % 2);
      }
      T* stage = shared + slot * Shape::kStage;
      barrier_expect(landed + slot, Shape::kStage * 2);
      load_tile(stage, from.a, landed + slot, step * kDepth, m0);
      T* half = stage + Shape::kStageA + rank * kDepth * kDepth;
      const int column = n0 + rank * kDepth, depth = step * kDepth;
      if constexpr (kLayout == B::kByColumn)
        load_tile_to_blocks(half, from.b, landed + slot, depth, column, 3);
      else
        load_tile_to_blocks(half, from.b, landed + slot, column, depth, 3);
    }
    __syncwarp();  // a warpgroup's instructions take whole warps
  };
  for (int s = 0; s < kStages - 1; ++s) start(s);
  meanwhile();
  for (int step = 0; step < steps; ++step) {
    barrier_wait(landed + step % kStages, step / kStages % 2);
    multiply_stage<Shape, kLayout, A::kByRow>(acc, shared + step % kStages * Shape::kStage);
    warpgroup_wait<1>();  // as in `multiply`
    __syncthreads();
    start(step + kStages - 1);
  }
  warpgroup_wait<0>(acc[0]);
  cluster_arrive();
  cluster_wait();  // neither block ends, or uses `shared` otherwise, while the other one may reach it
}

}  // namespace ijckd
