// See broken.h. Those whose names begin with `sound` have no fault; they reverse each block's 64 elements.
#include <cooperative_groups.h>

#include "broken.h"
#include "cuda/device.cuh"
#include "instructions.cuh"

namespace broken {
namespace {

using ijckd::copy_async16;
using ijckd::copy_async_commit;
using ijckd::copy_async_wait;
using ijckd::load_matrix_x4;
using ijckd::shuffle_xor;

constexpr int kThreads = 64;
constexpr int kCopies = kThreads / 4;  // of 4 elements each

__global__ void sound(const float* in, float* out) {
  __shared__ float slots[kThreads];
  __shared__ int arrived;
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (threadIdx.x == 0) arrived = 0;
  __syncthreads();
  slots[threadIdx.x] = in[i];
  atomicAdd(&arrived, 1);
  __syncthreads();
  if (arrived == kThreads) out[i] = slots[kThreads - 1 - threadIdx.x];
}

__global__ void no_barrier(const float* in, float* out) {
  __shared__ float slots[kThreads];
  const int i = blockIdx.x * kThreads + threadIdx.x;
  slots[threadIdx.x] = in[i];
  out[i] = slots[kThreads - 1 - threadIdx.x];
}

// Each thread loads what the next one, having loaded it too, then overwrites.
__global__ void no_barrier_before_store(const float* in, float* out) {
  __shared__ float slots[kThreads];
  const int i = blockIdx.x * kThreads + threadIdx.x;
  slots[threadIdx.x] = in[i];
  __syncthreads();
  const float v = slots[(threadIdx.x + 1) % kThreads] + slots[threadIdx.x];
  slots[threadIdx.x] = 0;
  out[i] = v;
}

__global__ void same_output_twice(const float* in, float* out) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  out[i / 2] = in[i];
}

__global__ void blocks_share_an_output(const float* in, float* out) { out[threadIdx.x] = in[threadIdx.x]; }

__global__ void load_past_shared(const float*, float* out) {
  __shared__ float slots[kThreads];
  const int i = blockIdx.x * kThreads + threadIdx.x;
  slots[threadIdx.x] = 1;
  __syncthreads();
  out[i] = slots[threadIdx.x + 1];
}

__global__ void load_past_input(const float* in, float* out) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  out[i] = in[i + 1];
}

__global__ void store_past_output(const float* in, float* out) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  out[i + 1] = in[i];
}

__global__ void store_to_input(const float* in, float*) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  const_cast<float*>(in)[i] = 0;
}

__global__ void misaligned(const float* in, float* out) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  out[i] = static_cast<float>(*reinterpret_cast<const double*>(in + (i < 126 ? i : 126)));
}

__global__ void null_pointer(const float* in, float*) {
  float* nowhere = nullptr;
  nowhere[threadIdx.x] = in[0];
}

__global__ void load_unwritten_shared(const float* in, float* out) {
  __shared__ float slots[kThreads];
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (threadIdx.x) slots[threadIdx.x] = in[i];
  __syncthreads();
  out[i] = slots[threadIdx.x];
}

__global__ void load_unwritten_output(const float* in, float* out) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  out[i] += in[i];
}

__global__ void two_barriers(const float* in, float* out) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
  out[i] = in[i];
}

__global__ void return_before_barrier(const float* in, float* out) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (threadIdx.x == 40) return;
  __syncthreads();
  out[i] = in[i];
}

__global__ void atomic_past_output(const float*, float* out) {
  if (threadIdx.x == 0) atomicAdd(reinterpret_cast<int*>(out + 2 * kThreads), 1);
}

__global__ void atomic_on_unwritten_output(const float*, float* out) { atomicAdd(reinterpret_cast<int*>(out), 1); }

__global__ void atomic_beside_store(const float* in, float* out) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  out[i] = in[i];
  __syncthreads();
  if (threadIdx.x % 2 == 0)
    out[i] = 0;
  else
    atomicAdd(reinterpret_cast<int*>(out + i - 1), 1);
}

// The thread that loads may be the last to add, or not.
__global__ void load_beside_atomic(const float*, float* out) {
  __shared__ int slot;
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (threadIdx.x == 0) slot = 0;
  __syncthreads();
  atomicAdd(&slot, 1);
  if (threadIdx.x == 62) out[i] = slot;
}

__global__ void too_much_shared(const float* in, float* out) {
  __shared__ float slots[13][1024];
  const int i = blockIdx.x * kThreads + threadIdx.x;
  slots[0][threadIdx.x] = in[i];
  out[i] = slots[0][threadIdx.x];
}

// ---- within a warp

__global__ void sound_shuffle(const float* in, float* out) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  float v = in[i];
  int from = i;
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    v = shuffle_xor(v, mask);
    from = shuffle_xor(from, mask);
  }
  const bool right = from == (i ^ 31);
  out[i ^ 63] = shuffle_xor(right ? v : NAN, 31);
}

__global__ void sound_syncwarp(const float* in, float* out) {
  __shared__ float slots[kThreads];
  const int i = blockIdx.x * kThreads + threadIdx.x;
  for (int turn = 0; turn < 3; ++turn) {
    slots[threadIdx.x] = in[i] + turn;
    __syncwarp();
    const float v = slots[threadIdx.x ^ 31] + slots[threadIdx.x ^ 30] - slots[threadIdx.x ^ 30];
    __syncwarp();
    if (turn == 2) out[i ^ 32] = v - 2;
  }
}

__global__ void no_syncwarp(const float* in, float* out) {
  __shared__ float slots[kThreads];
  const int i = blockIdx.x * kThreads + threadIdx.x;
  slots[threadIdx.x] = in[i];
  out[i] = slots[threadIdx.x ^ 1];
}

__global__ void no_syncwarp_before_store(const float* in, float* out) {
  __shared__ float slots[kThreads];
  const int i = blockIdx.x * kThreads + threadIdx.x;
  slots[threadIdx.x] = in[i];
  __syncwarp();
  const float v = slots[threadIdx.x ^ 1] + slots[threadIdx.x];
  slots[threadIdx.x] = 0;
  out[i] = v;
}

// The second warp overwrites what the first one loads.
__global__ void syncwarp_in_one_warp(const float* in, float* out) {
  __shared__ float slots[kThreads];
  const int i = blockIdx.x * kThreads + threadIdx.x;
  slots[threadIdx.x] = in[i];
  __syncthreads();
  if (threadIdx.x >= 32) __syncwarp();
  const float v = slots[threadIdx.x ^ 32] + slots[threadIdx.x];
  if (threadIdx.x >= 32) slots[threadIdx.x] = 0;
  out[i] = v;
}

__global__ void syncwarp_between_warps(const float* in, float* out) {
  __shared__ float slots[kThreads];
  const int i = blockIdx.x * kThreads + threadIdx.x;
  slots[threadIdx.x] = in[i];
  __syncwarp();
  out[i] = slots[threadIdx.x ^ 32];
}

// A shuffle orders no memory.
__global__ void shuffle_for_syncwarp(const float* in, float* out) {
  __shared__ float slots[kThreads];
  const int i = blockIdx.x * kThreads + threadIdx.x;
  slots[threadIdx.x] = in[i];
  const float v = shuffle_xor(in[i], 1);
  out[i] = v + slots[threadIdx.x ^ 1];
}

__global__ void divergent_shuffle(const float* in, float* out) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (threadIdx.x % 32 < 16)
    out[i] = shuffle_xor(in[i], 1);
  else
    out[i] = shuffle_xor(in[i], 1);
}

__global__ void shuffle_with_two_masks(const float* in, float* out) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  out[i] = shuffle_xor(in[i], 1 + threadIdx.x / 16 % 2);
}

__global__ void shuffle_mask_too_large(const float* in, float* out) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  out[i] = shuffle_xor(in[i], 32);
}

__global__ void shuffle_after_return(const float* in, float* out) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (threadIdx.x == 63) return;
  out[i] = shuffle_xor(in[i], 1);
}

__global__ void shuffle_or_barrier(const float* in, float* out) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  float v = in[i];
  if (threadIdx.x % 32 < 16) v = shuffle_xor(v, 1);
  __syncthreads();
  out[i] = v;
}

__global__ void shuffle_in_part_of_a_warp(const float* in, float* out) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  out[i] = shuffle_xor(in[i], 1);
}

__global__ void load_matrix_from_global(const float* in, float* out) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  uint32_t r[4];
  load_matrix_x4(r, in + 4 * (threadIdx.x % 16));
  out[i] = r[0];
}

// ---- copies

__global__ void sound_copy(const float* in, float* out) {
  __shared__ __align__(16) float slots[3][kThreads];
  const int block = blockIdx.x * kThreads, t = threadIdx.x;
  for (int turn = 0; turn < 3; ++turn) {
    if (t < kCopies)
      copy_async16(&slots[turn][4 * t], in + block + (turn == 2 ? 4 * t : 0), turn == 0 ? 8 : turn == 1 ? 0 : 16);
    copy_async_commit();
  }
  copy_async_wait<1>();
  __syncthreads();
  float zero = slots[0][t / 4 * 4 + 2 + t % 2] + slots[1][t];
  zero += (slots[0][t / 4 * 4 + t % 2] != in[block + t % 2]);
  copy_async_wait<0>();
  __syncthreads();
  out[block + t] = slots[2][kThreads - 1 - t] + zero;
}

__global__ void copy_seen_by_others_without_barrier(const float* in, float* out) {
  __shared__ __align__(16) float slots[kThreads];
  const int block = blockIdx.x * kThreads, t = threadIdx.x;
  if (t < kCopies) copy_async16(slots + 4 * t, in + block + 4 * t, 16);
  copy_async_commit();
  copy_async_wait<0>();
  out[block + t] = slots[t];
}

__global__ void copy_waited_for_by_another(const float* in, float* out) {
  __shared__ __align__(16) float slots[kThreads];
  const int block = blockIdx.x * kThreads, t = threadIdx.x;
  if (t < kCopies) copy_async16(slots + 4 * t, in + block + 4 * t, 16);
  copy_async_commit();
  if (t >= kCopies) copy_async_wait<0>();
  __syncthreads();
  out[block + t] = slots[t];
}

__global__ void load_under_way(const float* in, float* out) {
  __shared__ __align__(16) float slots[4 * kThreads];
  const int i = blockIdx.x * kThreads + threadIdx.x;
  copy_async16(slots + 4 * threadIdx.x, in, 16);
  copy_async_commit();
  out[i] = slots[4 * threadIdx.x];
  copy_async_wait<0>();
}

__global__ void store_under_way(const float* in, float* out) {
  __shared__ __align__(16) float slots[4 * kThreads];
  const int i = blockIdx.x * kThreads + threadIdx.x;
  copy_async16(slots + 4 * threadIdx.x, in, 16);
  copy_async_commit();
  slots[4 * threadIdx.x + 3] = 0;
  copy_async_wait<0>();
  out[i] = slots[4 * threadIdx.x];
}

__global__ void copy_twice_into_one_place(const float* in, float* out) {
  __shared__ __align__(16) float slots[4 * kThreads];
  const int i = blockIdx.x * kThreads + threadIdx.x;
  copy_async16(slots + 4 * threadIdx.x, in, 0);
  copy_async16(slots + 4 * threadIdx.x, in, 16);
  copy_async_commit();
  copy_async_wait<0>();
  out[i] = slots[4 * threadIdx.x];
}

__global__ void return_with_copies_under_way(const float* in, float* out) {
  __shared__ __align__(16) float slots[4 * kThreads];
  const int i = blockIdx.x * kThreads + threadIdx.x;
  copy_async16(slots + 4 * threadIdx.x, in, 16);
  copy_async_commit();
  out[i] = in[i];
}

// Whatever `to` and `from` are off by; all else is right.
template <int to, int from, int bytes>
__global__ void one_copy(const float* in, float* out) {
  __shared__ __align__(16) float slots[4 * kThreads];
  const int i = blockIdx.x * kThreads + threadIdx.x;
  copy_async16(slots + 4 * threadIdx.x + to, in + 4 * (threadIdx.x % kCopies) + from, bytes);
  copy_async_commit();
  copy_async_wait<0>();
  out[i] = slots[4 * threadIdx.x + to];
}

__global__ void copy_to_global(const float* in, float* out) {
  copy_async16(out + 4 * (threadIdx.x % kCopies), in, 16);
  copy_async_commit();
  copy_async_wait<0>();
}

__global__ void copy_from_shared(const float* in, float* out) {
  __shared__ __align__(16) float slots[8 * kThreads];
  const int i = blockIdx.x * kThreads + threadIdx.x;
  slots[4 * threadIdx.x] = in[i];
  copy_async16(slots + 4 * (kThreads + threadIdx.x), slots + 4 * threadIdx.x, 4);
  copy_async_commit();
  copy_async_wait<0>();
  out[i] = slots[4 * (kThreads + threadIdx.x)];
}

// Its own thread overwrites what a copy has yet to read: other bits when that comes late.
__global__ void source_overwritten(const float* in, float* out) {
  __shared__ __align__(16) float slots[kThreads];
  const int first = blockIdx.x * kThreads + 4 * threadIdx.x;
  if (threadIdx.x >= kCopies) return;
  for (int i = first; i < first + 4; ++i) out[i] = in[i];
  copy_async16(slots + 4 * threadIdx.x, out + first, 16);
  copy_async_commit();
  out[first] = -1;
  copy_async_wait<0>();
  out[first] = slots[4 * threadIdx.x];
}

// ---- vectors, dynamic shared memory

__global__ void __launch_bounds__(kThreads) sound_intrinsics(const __grid_constant__ float* const in, float* out) {
  extern __shared__ __align__(128) unsigned char raw[];
  const int block = blockIdx.x * kThreads, t = threadIdx.x;
  float4* slots = reinterpret_cast<float4*>(raw);
  if (t < kCopies) slots[t] = __ldg(reinterpret_cast<const float4*>(in + block) + t);
  __syncthreads();
  const float2 v = reinterpret_cast<const float2*>(raw)[(kThreads - 1 - t) / 2];
  float x = t % 2 ? v.x : v.y;
  const float2 b = __bfloat1622float2(__floats2bfloat162_rn(0.5f, -2.0f)),
               h = __half22float2(__floats2half2_rn(0.5f, -2.0f));
  const uint4 bits = *reinterpret_cast<const uint4*>(slots);
  x += b.x * h.y + exp2f(0.0f) + log1pf(0.0f) + fminf(0.0f, 1.0f) + (__uint_as_float(bits.y) != slots[0].y) +
       (__float_as_uint(slots[0].z) != bits.z);
  out[block + t] = x;
}

__global__ void past_dynamic_shared(const float* in, float* out) {
  extern __shared__ __align__(128) unsigned char raw[];
  float* slots = reinterpret_cast<float*>(raw);
  const int i = blockIdx.x * kThreads + threadIdx.x;
  slots[threadIdx.x + 1] = in[i];
  out[i] = slots[threadIdx.x + 1];
}

__global__ void static_and_dynamic(const float* in, float* out) {
  extern __shared__ __align__(128) unsigned char raw[];
  __shared__ float slots[kThreads];
  const int i = blockIdx.x * kThreads + threadIdx.x;
  slots[threadIdx.x] = in[i];
  raw[threadIdx.x] = 0;
  out[i] = slots[threadIdx.x];
}

__global__ void misaligned_vector(const float* in, float* out) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  out[i] = reinterpret_cast<const float4*>(in + 2)->x;
}

__global__ void misaligned_shared_vector(const float* in, float* out) {
  extern __shared__ __align__(128) unsigned char raw[];
  const int i = blockIdx.x * kThreads + threadIdx.x;
  float* slots = reinterpret_cast<float*>(raw);
  *reinterpret_cast<float2*>(slots + threadIdx.x) = make_float2(in[i], 0);
  out[i] = slots[threadIdx.x];
}

using cooperative_groups::this_grid;

// Each block makes what the other one, having seen all of it, then turns round.
__global__ void sound_grid(const float* in, float* out) {
  __shared__ float slots[kThreads];
  const int i = blockIdx.x * kThreads + threadIdx.x, other = (1 - blockIdx.x) * kThreads + threadIdx.x;
  slots[threadIdx.x] = in[i];
  out[other] = in[other];
  this_grid().sync();
  const bool seen = out[i] == slots[threadIdx.x];
  this_grid().sync();
  if (seen) out[i] = slots[kThreads - 1 - threadIdx.x];
}

__global__ void no_grid_barrier(const float* in, float* out) {
  const int i = blockIdx.x * kThreads + threadIdx.x, other = (1 - blockIdx.x) * kThreads + threadIdx.x;
  out[other] = in[other];
  __syncthreads();
  out[i] += 1;
}

__global__ void no_grid_barrier_before_store(const float* in, float* out) {
  const int i = blockIdx.x * kThreads + threadIdx.x, other = (1 - blockIdx.x) * kThreads + threadIdx.x;
  out[i] = in[i];
  this_grid().sync();
  out[i] = out[other];
}

__global__ void block_leaves_grid(const float* in, float* out) {
  if (blockIdx.x == 0) this_grid().sync();
  out[blockIdx.x * kThreads + threadIdx.x] = in[threadIdx.x];
}

__global__ void threads_leave_grid(const float*, float*) {
  if (threadIdx.x != 40) this_grid().sync();
}

__global__ void grid_or_block_barrier(const float*, float*) {
  if (threadIdx.x < 32)
    this_grid().sync();
  else
    __syncthreads();
}

__global__ void two_grid_barriers(const float*, float*) {
  if (threadIdx.x < 32)
    this_grid().sync();
  else
    this_grid().sync();
}

__global__ void grid_barrier_or_shuffle(const float* in, float* out) {
  if (threadIdx.x % 32 < 16)
    this_grid().sync();
  else
    out[threadIdx.x] = shuffle_xor(in[threadIdx.x], 1);
}

template <void (*kernel)(const float*, float*), int blocks = 2, int threads = kThreads, int rows = 1>
int run(const float* in, float* out) {
  return ijckd::launch(kernel, dim3(blocks, rows), threads, nullptr, in, out);
}

// Like run, with dynamic shared memory; `asked` is the limit set before, if any.
template <auto kernel, int bytes, int asked = 0>
int run_dynamic(const float* in, float* out) {
  if (asked) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, asked);
    if (error != cudaSuccess) return error;
  }
  const cudaLaunchConfig_t config{2, kThreads, bytes, nullptr, nullptr, 0};
  return cudaLaunchKernelEx(&config, kernel, in, out);
}

template <void (*kernel)(const float*, float*), int blocks = 2>
int run_together(const float* in, float* out) {
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  const cudaLaunchConfig_t config{blocks, kThreads, 0, nullptr, &together, 1};
  return cudaLaunchKernelEx(&config, kernel, in, out);
}

}  // namespace

const Kernel kKernels[] = {
    {"sound", run<sound>},
    {"no_barrier", run<no_barrier>},
    {"no_barrier_before_store", run<no_barrier_before_store>},
    {"same_output_twice", run<same_output_twice>},
    {"blocks_share_an_output", run<blocks_share_an_output>},
    {"load_past_shared", run<load_past_shared>},
    {"load_past_input", run<load_past_input>},
    {"store_past_output", run<store_past_output>},
    {"store_to_input", run<store_to_input>},
    {"misaligned", run<misaligned>},
    {"null_pointer", run<null_pointer>},
    {"load_unwritten_shared", run<load_unwritten_shared>},
    {"load_unwritten_output", run<load_unwritten_output>},
    {"two_barriers", run<two_barriers>},
    {"return_before_barrier", run<return_before_barrier>},
    {"atomic_past_output", run<atomic_past_output>},
    {"atomic_on_unwritten_output", run<atomic_on_unwritten_output>},
    {"atomic_beside_store", run<atomic_beside_store>},
    {"load_beside_atomic", run<load_beside_atomic>},
    {"too_much_shared", run<too_much_shared>},
    {"too_many_threads", run<sound, 2, 1025>},
    {"too_many_rows", run<sound, 2, kThreads, 65536>},
    {"no_blocks", run<sound, 0>},
    {"sound_shuffle", run<sound_shuffle>},
    {"sound_syncwarp", run<sound_syncwarp>},
    {"no_syncwarp", run<no_syncwarp>},
    {"no_syncwarp_before_store", run<no_syncwarp_before_store>},
    {"syncwarp_in_one_warp", run<syncwarp_in_one_warp>},
    {"syncwarp_between_warps", run<syncwarp_between_warps>},
    {"shuffle_for_syncwarp", run<shuffle_for_syncwarp>},
    {"divergent_shuffle", run<divergent_shuffle>},
    {"shuffle_with_two_masks", run<shuffle_with_two_masks>},
    {"shuffle_mask_too_large", run<shuffle_mask_too_large>},
    {"shuffle_after_return", run<shuffle_after_return>},
    {"shuffle_or_barrier", run<shuffle_or_barrier>},
    {"shuffle_in_part_of_a_warp", run<shuffle_in_part_of_a_warp, 2, 48>},
    {"load_matrix_from_global", run<load_matrix_from_global>},
    {"sound_copy", run<sound_copy>},
    {"copy_seen_by_others_without_barrier", run<copy_seen_by_others_without_barrier>},
    {"copy_waited_for_by_another", run<copy_waited_for_by_another>},
    {"load_under_way", run<load_under_way>},
    {"store_under_way", run<store_under_way>},
    {"copy_twice_into_one_place", run<copy_twice_into_one_place>},
    {"return_with_copies_under_way", run<return_with_copies_under_way>},
    {"copy_to_misaligned", run<one_copy<1, 0, 16>>},
    {"copy_from_misaligned", run<one_copy<0, 2, 16>>},
    {"copy_of_20_bytes", run<one_copy<0, 0, 20>>},
    {"copy_of_minus_1_bytes", run<one_copy<0, 0, -1>>},
    {"copy_past_shared", run<one_copy<4, 0, 16>>},
    {"copy_past_input", run<one_copy<0, 2 * kThreads - 4, 16>>},
    {"copy_of_nothing_from_nowhere", run<one_copy<0, 2 * kThreads, 0>>},
    {"copy_to_global", run<copy_to_global>},
    {"copy_from_shared", run<copy_from_shared>},
    {"source_overwritten", run<source_overwritten>},
    {"sound_intrinsics", run_dynamic<sound_intrinsics, kThreads * 4>},
    {"past_dynamic_shared", run_dynamic<past_dynamic_shared, kThreads * 4>},
    {"no_dynamic_shared", run<past_dynamic_shared>},
    {"misaligned_vector", run<misaligned_vector>},
    {"misaligned_shared_vector", run_dynamic<misaligned_shared_vector, kThreads * 8>},
    {"more_than_48_KiB_not_asked_for", run_dynamic<sound_intrinsics, 49 << 10>},
    {"more_than_asked_for", run_dynamic<static_and_dynamic, 65 << 10, 64 << 10>},
    {"more_than_there_is", run_dynamic<static_and_dynamic, 228 << 10, 228 << 10>},
    {"sound_grid", run_together<sound_grid>},
    {"no_grid_barrier", run_together<no_grid_barrier>},
    {"no_grid_barrier_before_store", run_together<no_grid_barrier_before_store>},
    {"block_leaves_grid", run_together<block_leaves_grid>},
    {"threads_leave_grid", run_together<threads_leave_grid>},
    {"grid_or_block_barrier", run_together<grid_or_block_barrier>},
    {"two_grid_barriers", run_together<two_grid_barriers>},
    {"grid_barrier_or_shuffle", run_together<grid_barrier_or_shuffle>},
    {"grid_not_together", run<sound_grid>},
    {"more_blocks_than_fit", run_together<sound_grid, 4>},
    {"static_and_dynamic_more_than_there_is", run_dynamic<static_and_dynamic, 227 << 10, 227 << 10>},
};
const int kCount = sizeof(kKernels) / sizeof(kKernels[0]);

}  // namespace broken
