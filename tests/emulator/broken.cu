// See broken.h. `sound` is the same without a fault.
#include "broken.h"
#include "cuda/device.cuh"

namespace broken {
namespace {

constexpr int kThreads = 64;

__global__ void sound(const float* in, float* out) {
  __shared__ float slots[kThreads];
  const int i = blockIdx.x * kThreads + threadIdx.x;
  slots[threadIdx.x] = in[i];
  __syncthreads();
  out[i] = slots[kThreads - 1 - threadIdx.x];
}

__global__ void no_barrier(const float* in, float* out) {
  __shared__ float slots[kThreads];
  const int i = blockIdx.x * kThreads + threadIdx.x;
  slots[threadIdx.x] = in[i];
  out[i] = slots[kThreads - 1 - threadIdx.x];
}

// Each thread loads what the next one then overwrites.
__global__ void no_barrier_before_store(const float* in, float* out) {
  __shared__ float slots[kThreads];
  const int i = blockIdx.x * kThreads + threadIdx.x;
  slots[threadIdx.x] = in[i];
  __syncthreads();
  const float v = slots[(threadIdx.x + 1) % kThreads];
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

__global__ void too_much_shared(const float* in, float* out) {
  __shared__ float slots[13][1024];
  const int i = blockIdx.x * kThreads + threadIdx.x;
  slots[0][threadIdx.x] = in[i];
  out[i] = slots[0][threadIdx.x];
}

template <void (*kernel)(const float*, float*), int blocks = 2, int threads = kThreads, int rows = 1>
int run(const float* in, float* out) {
  return ijckd::launch(kernel, dim3(blocks, rows), threads, nullptr, in, out);
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
    {"too_much_shared", run<too_much_shared>},
    {"too_many_threads", run<sound, 2, 1025>},
    {"too_many_rows", run<sound, 2, kThreads, 65536>},
    {"no_blocks", run<sound, 0>},
};
const int kCount = sizeof(kKernels) / sizeof(kKernels[0]);

}  // namespace broken
