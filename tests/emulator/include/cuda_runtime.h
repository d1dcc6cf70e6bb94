#pragma once
// Stands in for the toolkit's cuda_runtime.h when g++ compiles csrc/cuda/*.cu for the CPU: the real types, and in place
// of the language extensions and the launch those of the emulator. `__shared__` declarations are rewritten by build.py.
#include <cuda_runtime_api.h>
#include <vector_functions.h>

#include <cmath>
#include <cstring>
#include <tuple>
#include <utility>

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

#include "emulator.h"

#define threadIdx (emulator::thread_index())
#define blockIdx (emulator::block_index())
#define blockDim (emulator::block_dim())
#define gridDim (emulator::grid_dim())

inline void __syncthreads(emulator::Place place = {__builtin_FILE(), __builtin_LINE()}) { emulator::barrier(place); }
inline void __syncwarp(emulator::Place place = {__builtin_FILE(), __builtin_LINE()}) { emulator::sync_warp(place); }

// Threads see one another's stores at once.
inline void __threadfence() {}

inline float __uint_as_float(unsigned bits) {
  float v;
  memcpy(&v, &bits, sizeof v);
  return v;
}
inline unsigned __float_as_uint(float v) {
  unsigned bits;
  memcpy(&bits, &v, sizeof bits);
  return bits;
}

template <typename T>
T __ldg(const T* p) {
  return *p;
}

template <typename T>
cudaError_t cudaFuncSetAttribute(T* kernel, cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

template <typename T>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, T* kernel, int threads, size_t shared_bytes) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, reinterpret_cast<const void*>(kernel), threads,
                                                       shared_bytes);
}

// Defined in emulator.cpp, where the compiler adds no checks of its own.
int atomicAdd(int* p, int v);
unsigned long long atomicAdd(unsigned long long* p, unsigned long long v);
unsigned long long atomicExch(unsigned long long* p, unsigned long long v);

template <typename T>
cudaError_t cudaGetSymbolAddress(void** address, const T& symbol) {
  const cudaError_t error = emulator::find_symbol();
  if (error == cudaSuccess) *address = const_cast<T*>(&symbol);
  return error;
}

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  struct Started {
    void (*kernel)(Params...);
    std::tuple<Params...> params;
  } started{kernel, {std::forward<Args>(args)...}};
  const auto thread = [](void* s) { std::apply(static_cast<Started*>(s)->kernel, static_cast<Started*>(s)->params); };
  return emulator::remembered(
      emulator::launch(*config, reinterpret_cast<const void*>(kernel), thread, &started, sizeof started));
}
