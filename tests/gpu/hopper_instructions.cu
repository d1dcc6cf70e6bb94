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

constexpr int kExchanged = 4;  // blocks

// A cluster's blocks in a ring: each loads what the next one keeps for it, one element and four at a time, and stores
// to the one after that.
__global__ void exchange_kernel(const float* x, float* out) {  // [4, 128], [4, 4, 128]
  __shared__ __align__(16) float kept[kWarpgroup];
  __shared__ __align__(16) float stored[2][kWarpgroup];
  const int t = threadIdx.x, rank = cluster_rank();
  const int next = (rank + 1) % kExchanged, after = (rank + 2) % kExchanged;
  kept[t] = x[rank * kWarpgroup + t];
  cluster_arrive();
  cluster_wait();
  float* to = out + rank * 4 * kWarpgroup;
  to[t] = load_from_block(address_in_block(kept + t, next));
  store_to_block(address_in_block(stored[0] + t, after), kept[t]);
  if (t % 4 == 0) {
    const float4 four = load_four_from_block(address_in_block(kept + t, next));
    *reinterpret_cast<float4*>(to + kWarpgroup + t) = four;
    store_four_to_block(address_in_block(stored[1] + t, after), float4{four.w, four.z, four.y, four.x});
  }
  cluster_arrive();
  cluster_wait();
  for (int i = 0; i < 2; ++i) to[(2 + i) * kWarpgroup + t] = stored[i][t];
}

// Each of two blocks copies 16 of the array's 32 rows for both; then they tell each other that they have read them, and
// do it again with the other's rows.
__global__ void load_tile_to_blocks_kernel(const __grid_constant__ CUtensorMap map, uint16_t* out) {  // [2, 2, 32, 64]
  extern __shared__ __align__(1024) unsigned char raw[];
  uint16_t* tile = reinterpret_cast<uint16_t*>(raw);
  uint64_t *landed = reinterpret_cast<uint64_t*>(raw + 4096), *read = landed + 1;
  const int rank = cluster_rank();
  if (threadIdx.x == 0) {
    prefetch_map(map);
    barrier_init(landed, 1);
    barrier_init(read, 2);
    barrier_init_fence();
  }
  cluster_arrive();
  cluster_wait();
  for (int phase = 0; phase < 2; ++phase) {
    if (threadIdx.x == 0) {
      const int half = rank ^ phase;
      barrier_expect(landed, 4096);
      load_tile_to_blocks(raw + half * 2048, map, landed, 0, half * 16, 3);
    }
    __syncwarp();
    barrier_wait(landed, phase);
    for (int i = threadIdx.x; i < 32 * 64; i += kWarpgroup) out[(phase * 2 + rank) * 32 * 64 + i] = tile[i];
    __syncthreads();
    if (threadIdx.x == 0) {
      barrier_arrive(read);
      barrier_arrive_in_block(address_in_block(read, rank ^ 1));
    }
    __syncwarp();
    barrier_wait(read, phase);
  }
  cluster_arrive();
  cluster_wait();
}

// out = 2 x + 1, stored late: a launch behind it that does not wait would see what was there before.
__global__ void late_kernel(const float* x, float* out) {
  allow_next_launch();
  wait_for_earlier_launches();
  const int i = blockIdx.x * kWarpgroup + threadIdx.x;
  const float v = x[i];
  const long long began = clock64();
  while (clock64() - began < 20000) {
  }
  out[i] = 2 * v + 1;
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
int exchange(const float* x, float* out) {
  Start start{kExchanged, kWarpgroup};
  start.cluster = kExchanged;
  return finished(launch_as(start, exchange_kernel, nullptr, x, out));
}
int load_box_to_blocks(const __half* x, uint16_t* out) {
  CUtensorMap map;
  Start start{2, kWarpgroup, 4096 + 16};
  start.cluster = 2;
  const int error = make_operand(&map, Matrix<__half>{x, 32, 64, 64}, 16);
  return error ? error : finished(launch_as(start, load_tile_to_blocks_kernel, nullptr, map, out));
}
// rows [launches + 1, n]: each row from the one before by a launch of its own.
int in_turn(int n, int launches, float* rows) {
  int error = 0;
  for (int i = 0; i < launches && !error; ++i)
    error = launch_as({n / kWarpgroup, kWarpgroup, 0, i > 0}, late_kernel, nullptr, rows + i * n, rows + (i + 1) * n);
  return finished(error);
}
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
