#pragma once
// instructions.cuh's continuation for sm_90a alone: copies of whole tiles (TMA), the barriers they report to, and
// products of a whole warpgroup (4 warps, the first of which is a multiple of 4) whose operands stay in shared memory
// (wgmma). tests/emulator/include has a header of the same name with the same functions in plain C++;
// tests/gpu/test_instructions.py compares the two on a GPU.

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "instructions.cuh"

// No kernel with them is launched on another GPU.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define IJCKD_ASM(...) asm volatile(__VA_ARGS__)
#else
#define IJCKD_ASM(...) __trap()
#endif

namespace ijckd {

// A barrier in shared memory, 8-byte aligned. Its phases are numbered from 0; one ends when `arrivals` threads have
// arrived and as many bytes have landed as they have announced. One thread calls; barrier_init_fence and __syncthreads
// must follow before any use.
__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
  IJCKD_ASM("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Shows the calling thread's new barriers to copies.
__device__ __forceinline__ void barrier_init_fence() {
  IJCKD_ASM("fence.mbarrier_init.release.cluster;" :: : "memory");
}

// Arrives, and announces `bytes` bytes of copies.
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, int bytes) {
  IJCKD_ASM("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
            "r"(bytes) : "memory");
}

// Arrives at a barrier of the own block.
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  IJCKD_ASM("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Waits for the end of the phase under way, or returns at once if that is no longer the one whose number has this
// parity.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done = 0;
  while (!done)
    IJCKD_ASM(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n" : "=r"(done) : "r"(
            shared_address(barrier)),
        "r"(parity) : "memory");
}

// Starts the copy of map's box whose first element is (row, column) to shared memory, where it has rows of 128 bytes
// and begins at a multiple of 1024 bytes: the 16-byte chunk c of row r lands at chunk c ^ (r % 8). What lies outside
// the array is 0. One thread calls; the bytes are reported to `barrier`.
__device__ __forceinline__ void load_tile(void* to, const CUtensorMap& map, uint64_t* barrier, int column, int row) {
  IJCKD_ASM(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];\n" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(column), "r"(row) : "memory");
}

// The same into every block of the cluster whose rank is a bit of `blocks`, to the address that `to` has in the calling
// block; the bytes are reported to each one's own barrier at the address of `barrier`, which its block must have
// initialised before a barrier of the cluster.
__device__ __forceinline__ void load_tile_to_blocks(void* to, const CUtensorMap& map, uint64_t* barrier, int column,
                                                    int row, uint16_t blocks) {
  IJCKD_ASM(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%4, %5}], [%2], %3;\n" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "h"(blocks), "r"(column), "r"(row) : "memory");
}

// The driver's description of an array is on its way to where copies look for it.
__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  IJCKD_ASM("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// The calling block's number in its cluster, whose blocks are neighbours along x; 0 of a launch without clusters.
__device__ __forceinline__ int cluster_rank() {
  uint32_t rank = 0;
  IJCKD_ASM("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// The cluster's barrier in two halves, which all threads of all its blocks call in turn: what any of them did before it
// arrived all see after they have waited. Only then has every block of a cluster started; and a block must not end
// before a barrier that the others reach after their last access to its shared memory.
__device__ __forceinline__ void cluster_arrive() { IJCKD_ASM("barrier.cluster.arrive.release.aligned;" :: : "memory"); }
__device__ __forceinline__ void cluster_wait() { IJCKD_ASM("barrier.cluster.wait.acquire.aligned;" :: : "memory"); }

// Where block `rank` of the cluster has what the calling block has at p in its shared memory.
__device__ __forceinline__ uint32_t address_in_block(const void* p, int rank) {
  uint32_t address = 0;
  IJCKD_ASM("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(p)), "r"(rank));
  return address;
}

// Loads and stores at such addresses, which are multiples of what is moved.
__device__ __forceinline__ float load_from_block(uint32_t address) {
  float v = 0;
  IJCKD_ASM("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
  return v;
}
__device__ __forceinline__ float4 load_four_from_block(uint32_t address) {
  float4 v{};
  IJCKD_ASM("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z),
            "=f"(v.w) : "r"(address) : "memory");
  return v;
}
__device__ __forceinline__ void store_to_block(uint32_t address, float v) {
  IJCKD_ASM("st.shared::cluster.f32 [%0], %1;" ::"r"(address), "f"(v) : "memory");
}
__device__ __forceinline__ void store_four_to_block(uint32_t address, float4 v) {
  IJCKD_ASM("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(v.x), "f"(v.y), "f"(v.z),
            "f"(v.w) : "memory");
}

// Arrives at another block's barrier, by its address there.
__device__ __forceinline__ void barrier_arrive_in_block(uint32_t barrier) {
  IJCKD_ASM("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Names an operand of multiply_add_64xNx16 in tiles that load_tile has filled, p its first element. Rows r of the
// output and steps k of the contraction lie at
//   rows of the output (64 steps to 128 bytes):        r / 8 * stride_bytes + r % 8 * 128 + 2 k
//   rows of the contraction (64 columns to 128 bytes):
//     r / 64 * leading_bytes + r % 64 * 2 + k / 8 * stride_bytes + k % 8 * 128
// before the chunks are swizzled. Offsets are multiples of 16; leading_bytes is not used in the first case.
__device__ __forceinline__ uint64_t matrix_descriptor(const void* p, int leading_bytes, int stride_bytes) {
  const auto field = [](uint32_t bytes) { return static_cast<uint64_t>((bytes & 0x3FFFF) >> 4); };
  return field(shared_address(p)) | field(leading_bytes) << 16 | field(stride_bytes) << 32 | uint64_t(1) << 62;
}

// Before a thread's first multiply_add_64xNx16 and after any other use of its accumulators.
__device__ __forceinline__ void warpgroup_fence() { IJCKD_ASM("wgmma.fence.sync.aligned;" :: : "memory"); }

// Closes the warpgroup's group of products started since the last call.
__device__ __forceinline__ void warpgroup_commit() { IJCKD_ASM("wgmma.commit_group.sync.aligned;" :: : "memory"); }

// Waits until at most kPending, not 0, of the warpgroup's latest groups are under way: the others have read their
// operands.
template <int kPending>
__device__ __forceinline__ void warpgroup_wait() {
  static_assert(kPending > 0, "with none left name the accumulators");
  IJCKD_ASM("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

#define IJCKD_WGMMA_64(type)                                                                                         \
  "{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"                                                                         \
  "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                                                        \
  " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  " %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, %34, %35;\n}\n"
#define IJCKD_WGMMA_128(type)                                                                                        \
  "{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"                                                                         \
  "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                                                       \
  " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  " %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, "  \
  " %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, p, 1, 1, "  \
  "%66, "                                                                                                            \
  "%67;\n}\n"
#define IJCKD_SUMS(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define IJCKD_SUMS_8(j)                                                                                         \
  IJCKD_SUMS(j), IJCKD_SUMS(j + 1), IJCKD_SUMS(j + 2), IJCKD_SUMS(j + 3), IJCKD_SUMS(j + 4), IJCKD_SUMS(j + 5), \
      IJCKD_SUMS(j + 6), IJCKD_SUMS(j + 7)

// d [64, 8 kBlocks] += a [64, 16] b [16, 8 kBlocks], a and b of type T by their descriptors, d in float: d[j] holds of
// the 16 rows of the calling warp and the columns from 8 j what multiply_add_16x8x16's d holds. Both have rows
// of the output, or rows of the contraction: b with kByDepth, a with kAByDepth. Starts only: no access to d until
// warpgroup_wait. The 128 threads of a warpgroup call it together.
template <typename T, bool kByDepth, bool kAByDepth = false, int kBlocks>
__device__ __forceinline__ void multiply_add_64xNx16(float (&d)[kBlocks][4], uint64_t a, uint64_t b) {
  static_assert(kBlocks == 8 || kBlocks == 16);
  constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
  static_assert(kBf16 || std::is_same_v<T, __half>);
  if constexpr (kBlocks == 8 && kBf16)
    IJCKD_ASM(IJCKD_WGMMA_64("bf16") : IJCKD_SUMS_8(0) : "l"(a), "l"(b), "n"(int(kAByDepth)), "n"(int(kByDepth)));
  else if constexpr (kBlocks == 8)
    IJCKD_ASM(IJCKD_WGMMA_64("f16") : IJCKD_SUMS_8(0) : "l"(a), "l"(b), "n"(int(kAByDepth)), "n"(int(kByDepth)));
  else if constexpr (kBf16)
    IJCKD_ASM(IJCKD_WGMMA_128("bf16") : IJCKD_SUMS_8(0), IJCKD_SUMS_8(8) : "l"(a), "l"(b), "n"(int(kAByDepth)),
              "n"(int(kByDepth)));
  else
    IJCKD_ASM(IJCKD_WGMMA_128("f16") : IJCKD_SUMS_8(0), IJCKD_SUMS_8(8) : "l"(a), "l"(b), "n"(int(kAByDepth)),
              "n"(int(kByDepth)));
}

// Waits for all of the warpgroup's groups: the calling thread may use its accumulators, which are named here so that
// the compiler keeps their uses behind the wait.
template <int kPending, int kBlocks>
__device__ __forceinline__ void warpgroup_wait(float (&d)[kBlocks][4]) {
  static_assert(kPending == 0 && (kBlocks == 8 || kBlocks == 16));
  if constexpr (kBlocks == 8)
    IJCKD_ASM("wgmma.wait_group.sync.aligned 0;" : IJCKD_SUMS_8(0) : : "memory");
  else
    IJCKD_ASM("wgmma.wait_group.sync.aligned 0;" : IJCKD_SUMS_8(0), IJCKD_SUMS_8(8) : : "memory");
}

}  // namespace ijckd

#undef IJCKD_SUMS_8
#undef IJCKD_SUMS
#undef IJCKD_WGMMA_128
#undef IJCKD_WGMMA_64
#undef IJCKD_ASM
