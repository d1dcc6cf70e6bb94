// out = a b in tiles, as the tensor-core kernels do it: copies ahead into a ring of stages, XOR swizzle, load_matrix,
// multiply_add; once sound, then with one fault each. See broken.h.
#include "broken.h"
#include "cuda/device.cuh"
#include "instructions.cuh"

namespace broken {
namespace {

using ijckd::copy_async16;
using ijckd::copy_async_commit;
using ijckd::copy_async_wait;
using ijckd::load_matrix_x4;
using ijckd::load_matrix_x4_transposed;
using ijckd::multiply_add_16x8x16;

enum class Fault {
  none,
  no_wait,
  wait_one_too_few,
  wait_without_commit,
  no_barrier_after_wait,
  prefetch_before_barrier,
  prefetch_past_the_end,
  rows_unchecked,
  columns_unchecked,
  stage_never_filled,
  divergent_load_matrix,
  misaligned_row,
  past_the_last_stage,
  too_little_shared,
  large_shared_not_asked_for,
  no_swizzle,
};

constexpr int kTile = 64;          // rows and columns of a block's tile, and its steps along the sum
constexpr int kChunk = 8;          // elements in 16 bytes
constexpr int kTileThreads = 128;  // 4 warps, each with 32 x 32 of the tile
constexpr int kStages = 4;
constexpr int kTileElements = kTile * kTile;
constexpr int kStageElements = 2 * kTileElements;
constexpr int kSharedBytes = kStages * kStageElements * 2;

// Where 16 bytes of a tile lie: rows of 128 bytes, so that the same chunk of 8 rows lies in 8 different banks.
template <Fault kFault>
__device__ int swizzle(int row, int chunk) {
  return row * kTile + (kFault == Fault::no_swizzle ? chunk : chunk ^ (row & 7)) * kChunk;
}

template <Fault kFault, typename T>
__device__ void load_tile(T* tile, const T* from, int row0, int col0, int rows, int cols) {
#pragma unroll
  for (int i = threadIdx.x; i < kTile * kTile / kChunk; i += kTileThreads) {
    const int r = i / (kTile / kChunk), c = i % (kTile / kChunk), row = row0 + r, col = col0 + c * kChunk;
    const bool inside =
        (kFault == Fault::rows_unchecked || row < rows) && (kFault == Fault::columns_unchecked || col < cols);
    copy_async16(tile + swizzle<kFault>(r, c), inside ? from + int64_t(row) * cols + col : from, inside ? 16 : 0);
  }
}

// a [M, K]; b [N, K], or [K, N] if kRowsOfK; out [M, N]. K and N are multiples of 8.
template <typename T, bool kRowsOfK, Fault kFault>
__global__ void __launch_bounds__(kTileThreads) tile_product(const T* a, const T* b, float* out, int M, int N, int K) {
  extern __shared__ __align__(128) unsigned char raw[];
  T* stages = reinterpret_cast<T*>(raw);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, m0 = blockIdx.y * kTile, n0 = blockIdx.x * kTile;
  const int m1 = warp / 2 * 32, n1 = warp % 2 * 32;  // of the warp in the tile
  const int steps = ijckd::ceil_div(K, kTile);
  float sum[2][4][4] = {};
  const auto prefetch = [&](int step) {
    if (step < steps || kFault == Fault::prefetch_past_the_end) {
      T* stage = stages + step % kStages * kStageElements;
      load_tile<kFault>(stage, a, m0, step * kTile, M, K);
      if (kRowsOfK)
        load_tile<kFault>(stage + kTileElements, b, step * kTile, n0, K, N);
      else
        load_tile<kFault>(stage + kTileElements, b, n0, step * kTile, N, K);
    }
    if (kFault != Fault::wait_without_commit) copy_async_commit();
  };
  for (int s = 0; s < kStages - 1; ++s) prefetch(s);
  for (int step = 0; step < steps; ++step) {
    if (kFault == Fault::wait_one_too_few)
      copy_async_wait<kStages - 1>();
    else if (kFault != Fault::no_wait)
      copy_async_wait<kStages - 2>();
    if (kFault == Fault::prefetch_before_barrier) prefetch(step + kStages - 1);
    if (kFault != Fault::no_barrier_after_wait) __syncthreads();
    if (kFault != Fault::prefetch_before_barrier) prefetch(step + kStages - 1);
    int slot = step % kStages;
    if (kFault == Fault::stage_never_filled) slot = kStages - 1;
    if (kFault == Fault::past_the_last_stage) slot += step == steps - 1 ? kStages : 0;
    const T* tile_a = stages + slot * kStageElements;
    const T* tile_b = tile_a + kTileElements;
#pragma unroll
    for (int k = 0; k < kTile; k += 16) {
      uint32_t fa[2][4], fb[4][2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const T* row = tile_a + swizzle<kFault>(m1 + 16 * i + lane % 16, k / kChunk + lane / 16);
        if (kFault == Fault::misaligned_row) row += 4;
        if (kFault == Fault::divergent_load_matrix && lane == 7)
          load_matrix_x4(fa[i], row);
        else
          load_matrix_x4(fa[i], row);
      }
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        uint32_t r[4];
        if (kRowsOfK)
          load_matrix_x4_transposed(r, tile_b + swizzle<kFault>(k + lane % 16, n1 / kChunk + j + lane / 16));
        else
          load_matrix_x4(r, tile_b + swizzle<kFault>(n1 + 8 * j + lane % 8 + lane / 16 * 8, k / kChunk + lane / 8 % 2));
        fb[j][0] = r[0], fb[j][1] = r[1], fb[j + 1][0] = r[2], fb[j + 1][1] = r[3];
      }
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) multiply_add_16x8x16<T>(sum[i][j], fa[i], fb[j]);
    }
  }
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 4; ++j)
      for (int h = 0; h < 2; ++h) {
        const int row = m0 + m1 + 16 * i + lane / 4 + 8 * h, col = n0 + n1 + 8 * j + lane % 4 * 2;
        if (row < M && col < N)
          *reinterpret_cast<float2*>(out + int64_t(row) * N + col) =
              make_float2(sum[i][j][2 * h], sum[i][j][2 * h + 1]);
      }
}

template <typename T, bool kRowsOfK, Fault kFault>
int run(const void* a, const void* b, float* out, int M, int N, int K) {
  const auto kernel = tile_product<T, kRowsOfK, kFault>;
  if (kFault != Fault::large_shared_not_asked_for)
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  const size_t bytes = kFault == Fault::too_little_shared ? kSharedBytes - 16 : kSharedBytes;
  const cudaLaunchConfig_t config{
      dim3(ijckd::ceil_div(N, kTile), ijckd::ceil_div(M, kTile)), kTileThreads, bytes, nullptr, nullptr, 0};
  return cudaLaunchKernelEx(&config, kernel, static_cast<const T*>(a), static_cast<const T*>(b), out, M, N, K);
}

template <Fault kFault>
constexpr auto broken_run = run<__nv_bfloat16, false, kFault>;

}  // namespace

const Tile kTiles[] = {
    {"sound bf16", run<__nv_bfloat16, false, Fault::none>},
    {"sound f16", run<__half, false, Fault::none>},
    {"sound bf16 transposed", run<__nv_bfloat16, true, Fault::none>},
    {"sound f16 transposed", run<__half, true, Fault::none>},
    {"no_wait", broken_run<Fault::no_wait>},
    {"wait_one_too_few", broken_run<Fault::wait_one_too_few>},
    {"wait_without_commit", broken_run<Fault::wait_without_commit>},
    {"no_barrier_after_wait", broken_run<Fault::no_barrier_after_wait>},
    {"prefetch_before_barrier", broken_run<Fault::prefetch_before_barrier>},
    {"prefetch_past_the_end", broken_run<Fault::prefetch_past_the_end>},
    {"rows_unchecked", broken_run<Fault::rows_unchecked>},
    {"columns_unchecked", broken_run<Fault::columns_unchecked>},
    {"stage_never_filled", broken_run<Fault::stage_never_filled>},
    {"divergent_load_matrix", broken_run<Fault::divergent_load_matrix>},
    {"misaligned_row", broken_run<Fault::misaligned_row>},
    {"past_the_last_stage", broken_run<Fault::past_the_last_stage>},
    {"too_little_shared", broken_run<Fault::too_little_shared>},
    {"large_shared_not_asked_for", broken_run<Fault::large_shared_not_asked_for>},
    {"no_swizzle", broken_run<Fault::no_swizzle>},
};
const int kTileCount = sizeof(kTiles) / sizeof(kTiles[0]);

}  // namespace broken
