// One kernel of one warp per function of csrc/cuda/instructions.cuh, for test_instructions.py. Every launcher waits and
// returns 0, or a CUDA error code.
#include "device.cuh"
#include "instructions.cuh"

namespace ijckd {
namespace {

constexpr int kLanes = 32;

// out[mask, lane] = x[lane ^ mask]
template <typename T>
__global__ void shuffle_xor_kernel(const T* x, T* out) {
  const T v = x[threadIdx.x];
  for (int mask = 0; mask < kLanes; ++mask) out[mask * kLanes + threadIdx.x] = shuffle_xor(v, mask);
}

// Each lane copies two times 16 bytes of which bytes[copy, lane] are wanted, as two groups, and reads the other
// half-warp's.
__global__ void copy_async_kernel(const uint4* x,    // [2, 32]
                                  const int* bytes,  // [2, 32]
                                  uint4* out) {      // [2, 32]
  __shared__ uint4 landed[2][kLanes];
  const unsigned lane = threadIdx.x, other = lane ^ 16;
  for (int i = 0; i < 2; ++i) landed[i][lane] = {~0u, ~0u, ~0u, ~0u};
  __syncthreads();
  for (int i = 0; i < 2; ++i) {
    copy_async16(&landed[i][lane], x + i * kLanes + lane, bytes[i * kLanes + lane]);
    copy_async_commit();
  }
  copy_async_wait<1>();
  __syncthreads();
  out[other] = landed[0][other];
  copy_async_wait<0>();
  __syncthreads();
  out[kLanes + other] = landed[1][other];
}

template <bool kTransposed>
__global__ void load_matrix_kernel(const uint4* rows,  // [32] of eight 16-bit elements
                                   const int* order,   // [32] row whose address a lane gives
                                   uint32_t* out) {    // [32, 4]
  __shared__ uint4 shared_rows[kLanes];
  shared_rows[threadIdx.x] = rows[threadIdx.x];
  __syncthreads();
  uint32_t r[4];
  if constexpr (kTransposed)
    load_matrix_x4_transposed(r, &shared_rows[order[threadIdx.x]]);
  else
    load_matrix_x4(r, &shared_rows[order[threadIdx.x]]);
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = r[i];
}

__device__ uint32_t word(uint16_t low, uint16_t high) { return low | uint32_t(high) << 16; }

// d += a b
template <typename T>
__global__ void multiply_add_kernel(const uint16_t* a,  // [16, 16] T's bits
                                    const uint16_t* b,  // [16, 8] T's bits
                                    float* d) {         // [16, 8]
  const int g = threadIdx.x / 4, t = 2 * (threadIdx.x % 4);
  uint32_t a_words[4], b_words[2];
  for (int i = 0; i < 4; ++i) {
    const uint16_t* at = a + (g + i % 2 * 8) * 16 + t + i / 2 * 8;
    a_words[i] = word(at[0], at[1]);
  }
  for (int i = 0; i < 2; ++i) b_words[i] = word(b[(t + i * 8) * 8 + g], b[(t + i * 8 + 1) * 8 + g]);
  float* const top = d + g * 8 + t;
  float* const bottom = top + 8 * 8;
  float sums[4] = {top[0], top[1], bottom[0], bottom[1]};
  multiply_add_16x8x16<T>(sums, a_words, b_words);
  top[0] = sums[0], top[1] = sums[1], bottom[0] = sums[2], bottom[1] = sums[3];
}

template <typename... Params>
int run(void (*kernel)(Params...), Params... params) {
  const int error = launch(kernel, 1, kLanes, nullptr, params...);
  return error ? error : static_cast<int>(cudaDeviceSynchronize());
}

}  // namespace
}  // namespace ijckd

using namespace ijckd;

extern "C" {
int shuffle_xor_float(const float* x, float* out) { return run(shuffle_xor_kernel<float>, x, out); }
int shuffle_xor_int(const int* x, int* out) { return run(shuffle_xor_kernel<int>, x, out); }
int copy_async(const uint4* x, const int* bytes, uint4* out) { return run(copy_async_kernel, x, bytes, out); }
int load_matrix(const uint4* rows, const int* order, uint32_t* out) {
  return run(load_matrix_kernel<false>, rows, order, out);
}
int load_matrix_transposed(const uint4* rows, const int* order, uint32_t* out) {
  return run(load_matrix_kernel<true>, rows, order, out);
}
int multiply_add_bf16(const uint16_t* a, const uint16_t* b, float* d) {
  return run(multiply_add_kernel<__nv_bfloat16>, a, b, d);
}
int multiply_add_f16(const uint16_t* a, const uint16_t* b, float* d) {
  return run(multiply_add_kernel<__half>, a, b, d);
}
}
