#pragma once
// What marks formulas that the CPU loops and the CUDA kernels share. Knows neither torch nor the CUDA runtime.

#if defined(__CUDACC__)
#define IJCKD_HD __host__ __device__ __forceinline__  // a scalar formula
#define IJCKD_PASSES __device__ __forceinline__       // passes over a row
#define IJCKD_ITEM                                    // a lambda that is one of them
#else
#define IJCKD_HD inline
#define IJCKD_PASSES __attribute__((always_inline)) inline  // as vectorise.h says
#define IJCKD_ITEM __attribute__((always_inline))
#endif
