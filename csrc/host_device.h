#pragma once
// What marks a scalar formula that the CPU loops and the CUDA kernels share. Knows neither torch nor the CUDA runtime.

#if defined(__CUDACC__)
#define IJCKD_HD __host__ __device__ __forceinline__
#else
#define IJCKD_HD inline
#endif
