#pragma once
// One function per machine instruction that C++ has no name for, and nothing else: sm_80 and newer.
// tests/emulator/include has a header of the same name with the same functions in plain C++, so what is here must stay
// too small to be wrong; tests/gpu/test_instructions.py compares the two on a GPU.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

// Older GPUs, for which the plain kernels of the same library are compiled, have some of these not: no kernel with them
// is launched there.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define IJCKD_ASM(...) __trap()
#else
#define IJCKD_ASM(...) asm volatile(__VA_ARGS__)
#endif

namespace ijckd {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// The value of lane (own lane ^ mask). All 32 lanes call it together.
__device__ __forceinline__ float shuffle_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
__device__ __forceinline__ int shuffle_xor(int v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }

// Starts a copy of `bytes` (0 to 16) bytes from global to 16 bytes of shared memory, both 16-byte aligned; the rest
// becomes 0. `from` must point into an array even where bytes is 0.
__device__ __forceinline__ void copy_async16(void* to, const void* from, int bytes) {
  IJCKD_ASM("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)), "l"(from),
            "r"(bytes) : "memory");
}

// Closes the calling thread's group of copies started since the last call; a group may be empty.
__device__ __forceinline__ void copy_async_commit() { IJCKD_ASM("cp.async.commit_group;\n" :: : "memory"); }

// Waits until at most kPending of the calling thread's latest groups are under way. Other threads see the bytes after a
// barrier.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  IJCKD_ASM("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements from shared memory; lane l gives the address of row l % 8 of matrix l / 8,
// 16-byte aligned. r[i] receives of matrix i elements (lane / 4, 2 (lane % 4)) and the next; transposed: (2 (lane % 4),
// lane / 4) and the one below. All 32 lanes call it together.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&r)[4], const void* row) {
  IJCKD_ASM("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]),
            "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  IJCKD_ASM("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n" : "=r"(r[0]), "=r"(r[1]),
            "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

// d [16, 8] += a [16, 16] b [16, 8], a and b of type T, d in float. With g = lane / 4 and t = 2 (lane % 4), a lane
// holds
//   a: (g, t) (g, t+1) | (g+8, t) (g+8, t+1) | (g, t+8) (g, t+9) | (g+8, t+8) (g+8, t+9)
//   b: (t, g) (t+1, g) | (t+8, g) (t+9, g)
//   d: (g, t) | (g, t+1) | (g+8, t) | (g+8, t+1)
// All 32 lanes call it together.
template <typename T>
__device__ __forceinline__ void multiply_add_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void multiply_add_16x8x16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                                    const uint32_t (&b)[2]) {
  IJCKD_ASM(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n" : "+f"(d[0]),
      "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void multiply_add_16x8x16<__half>(float (&d)[4], const uint32_t (&a)[4],
                                                             const uint32_t (&b)[2]) {
  IJCKD_ASM(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n" : "+f"(d[0]),
      "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Lets the blocks of a dependent launch behind this one (launch.cuh) start, once every block has called it or ended.
// Calling it again changes nothing.
__device__ __forceinline__ void allow_next_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the launch before a dependent one has ended and its stores can be seen; at once in any other launch.
// Other threads may rely on it after a barrier. Every block calls: a launch behind this one takes this one's end for
// that of all before it.
__device__ __forceinline__ void wait_for_earlier_launches() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace ijckd

#undef IJCKD_ASM
