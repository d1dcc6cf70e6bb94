// Kernels for test_instructions.py around the functions of csrc/cuda/hopper_instructions.cuh, one warpgroup each. Every
// launcher waits and returns 0, or a CUDA error code.
#include "device.cuh"
#include "hopper_tile.cuh"

namespace ijckd {
namespace {

constexpr int kWarpgroup = 128;

// out = the box of 16 rows of 64 elements at (row, column), as it lies in shared memory. The barrier's second phase is
// waited for with the first one long over.
__global__ void load_tile_kernel(const __grid_constant__ CUtensorMap map, int row, int column,
                                 uint16_t* out) {  // [2, 16, 64]
  extern __shared__ __align__(1024) unsigned char raw[];
  uint16_t* tile = reinterpret_cast<uint16_t*>(raw);
  uint64_t* landed = reinterpret_cast<uint64_t*>(raw + 2048);
  if (threadIdx.x == 0) {
    barrier_init(landed, 1);
    barrier_init_fence();
  }
  __syncthreads();
  for (int phase = 0; phase < 2; ++phase) {
    if (threadIdx.x == 0) {
      barrier_expect(landed, 2048);
      load_tile(tile, map, landed, column + phase, row);
    }
    __syncwarp();
    barrier_wait(landed, phase);
    for (int i = threadIdx.x; i < 16 * 64; i += kWarpgroup) out[phase * 16 * 64 + i] = tile[i];
    __syncthreads();
  }
}

// d += a b, d [64, 8 kBlocks]; a [64, 64], its transpose with kAByDepth; b [8 kBlocks, 64], or [64, 8 kBlocks] with
// kByDepth.
template <typename T, bool kAByDepth, bool kByDepth, int kBlocks>
__global__ void warpgroup_multiply_kernel(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b,
                                          float* d) {
  extern __shared__ __align__(1024) unsigned char raw[];
  T *stage_a = reinterpret_cast<T*>(raw), *stage_b = stage_a + 64 * 64;
  constexpr int kBytes = (64 + 8 * kBlocks) * 128;
  uint64_t* landed = reinterpret_cast<uint64_t*>(raw + kBytes);
  if (threadIdx.x == 0) {
    barrier_init(landed, 1);
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    barrier_expect(landed, kBytes);
    load_tile(stage_a, a, landed, 0, 0);
    if (kByDepth)
      for (int panel = 0; panel < kBlocks / 8; ++panel) load_tile(stage_b + panel * 64 * 64, b, landed, panel * 64, 0);
    else
      load_tile(stage_b, b, landed, 0, 0);
  }
  __syncwarp();
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
  float sums[kBlocks][4];
  const auto at = [&](int j, int i) -> float& { return d[(row + i / 2 * 8) * 8 * kBlocks + 8 * j + column + i % 2]; };
#pragma unroll
  for (int j = 0; j < kBlocks; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[j][i] = at(j, i);
  barrier_wait(landed, 0);
  warpgroup_fence();
#pragma unroll
  for (int k = 0; k < 64; k += 16)
    multiply_add_64xNx16<T, kByDepth, kAByDepth>(
        sums, kAByDepth ? matrix_descriptor(stage_a + k * 64, 8192, 1024) : matrix_descriptor(stage_a + k, 16, 1024),
        kByDepth ? matrix_descriptor(stage_b + k * 64, 8192, 1024) : matrix_descriptor(stage_b + k, 16, 1024));
  warpgroup_commit();
  warpgroup_wait<0>(sums);
#pragma unroll
  for (int j = 0; j < kBlocks; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) at(j, i) = sums[j][i];
}

int finished(int error) { return error ? error : static_cast<int>(cudaDeviceSynchronize()); }

template <typename T, bool kAByDepth, bool kByDepth, int kBlocks>
int multiply_whole(const T* a, const T* b, float* d) {
  constexpr int kN = 8 * kBlocks;
  CUtensorMap from_a, from_b;
  int error = make_operand(&from_a, Matrix<T>{a, 64, 64, 64}, 64);
  if (!error)
    error = make_operand(&from_b, kByDepth ? Matrix<T>{b, 64, kN, kN} : Matrix<T>{b, kN, 64, 64}, kByDepth ? 64 : kN);
  if (error) return error;
  return finished(launch_sharing((64 + kN) * 128 + 8, warpgroup_multiply_kernel<T, kAByDepth, kByDepth, kBlocks>, 1,
                                 kWarpgroup, nullptr, from_a, from_b, d));
}

template <typename T, bool kAByDepth, int kBlocks>
int multiply_by(const T* a, const T* b, float* d, bool by_depth) {
  return by_depth ? multiply_whole<T, kAByDepth, true, kBlocks>(a, b, d)
                  : multiply_whole<T, kAByDepth, false, kBlocks>(a, b, d);
}

template <typename T>
int multiply_any(const T* a, const T* b, float* d, bool a_by_depth, bool by_depth, int columns) {
  if (columns == 64)
    return a_by_depth ? multiply_by<T, true, 8>(a, b, d, by_depth) : multiply_by<T, false, 8>(a, b, d, by_depth);
  return a_by_depth ? multiply_by<T, true, 16>(a, b, d, by_depth) : multiply_by<T, false, 16>(a, b, d, by_depth);
}

}  // namespace
}  // namespace ijckd

using namespace ijckd;

extern "C" {
int load_box(const __half* x, int rows, int columns, int row, int column, uint16_t* out) {
  CUtensorMap map;
  const int error = make_operand(&map, Matrix<__half>{x, rows, columns, columns}, 16);
  return error ? error
               : finished(launch_sharing(2048 + 8, load_tile_kernel, 1, kWarpgroup, nullptr, map, row, column, out));
}
int warpgroup_multiply_bf16(const __nv_bfloat16* a, const __nv_bfloat16* b, float* d, int a_by_depth, int by_depth,
                            int columns) {
  return multiply_any(a, b, d, a_by_depth != 0, by_depth != 0, columns);
}
int warpgroup_multiply_f16(const __half* a, const __half* b, float* d, int a_by_depth, int by_depth, int columns) {
  return multiply_any(a, b, d, a_by_depth != 0, by_depth != 0, columns);
}
}
