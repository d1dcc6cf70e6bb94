#pragma once
// Stands in for csrc/cuda/hopper_instructions.cuh: the same functions, run by the emulator.

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace ijckd {

#define EMULATED_PLACE emulator::Place place = {__builtin_FILE(), __builtin_LINE()}

inline void barrier_init(uint64_t* barrier, int arrivals, EMULATED_PLACE) {
  emulator::barrier_init(barrier, arrivals, place);
}
inline void barrier_init_fence() { emulator::barrier_init_fence(); }
inline void barrier_expect(uint64_t* barrier, int bytes, EMULATED_PLACE) {
  emulator::barrier_expect(barrier, bytes, place);
}
inline void barrier_arrive(uint64_t* barrier, EMULATED_PLACE) { emulator::barrier_arrive(barrier, place); }
inline void barrier_wait(uint64_t* barrier, uint32_t parity, EMULATED_PLACE) {
  emulator::barrier_wait(barrier, parity, place);
}

inline void load_tile(void* to, const CUtensorMap& map, uint64_t* barrier, int column, int row, EMULATED_PLACE) {
  emulator::load_tile(to, map, barrier, column, row, place);
}

inline void load_tile_to_blocks(void* to, const CUtensorMap& map, uint64_t* barrier, int column, int row,
                                uint16_t blocks, EMULATED_PLACE) {
  emulator::load_tile_to_blocks(to, map, barrier, column, row, blocks, place);
}
inline void prefetch_map(const CUtensorMap& map, EMULATED_PLACE) { emulator::prefetch_map(map, place); }

inline int cluster_rank() { return emulator::cluster_rank(); }
inline void cluster_arrive(EMULATED_PLACE) { emulator::cluster_arrive(place); }
inline void cluster_wait(EMULATED_PLACE) { emulator::cluster_wait(place); }
inline uint32_t address_in_block(const void* p, int rank, EMULATED_PLACE) {
  return emulator::address_in_block(p, rank, place);
}
inline float load_from_block(uint32_t address, EMULATED_PLACE) {
  float v;
  emulator::load_from_block(&v, address, sizeof v, place);
  return v;
}
inline float4 load_four_from_block(uint32_t address, EMULATED_PLACE) {
  float4 v;
  emulator::load_from_block(&v, address, sizeof v, place);
  return v;
}
inline void store_to_block(uint32_t address, float v, EMULATED_PLACE) {
  emulator::store_to_block(address, &v, sizeof v, place);
}
inline void store_four_to_block(uint32_t address, float4 v, EMULATED_PLACE) {
  emulator::store_to_block(address, &v, sizeof v, place);
}
inline void barrier_arrive_in_block(uint32_t barrier, EMULATED_PLACE) {
  emulator::barrier_arrive_in_block(barrier, place);
}

inline uint64_t matrix_descriptor(const void* p, int leading_bytes, int stride_bytes, EMULATED_PLACE) {
  return emulator::matrix_descriptor(p, leading_bytes, stride_bytes, place);
}

inline void warpgroup_fence(EMULATED_PLACE) { emulator::warpgroup_fence(place); }
inline void warpgroup_commit(EMULATED_PLACE) { emulator::warpgroup_commit(place); }

template <int kPending>
inline void warpgroup_wait(EMULATED_PLACE) {
  static_assert(kPending > 0);
  emulator::warpgroup_wait(kPending, place);
}
template <int kPending, int kBlocks>
inline void warpgroup_wait(float (&)[kBlocks][4], EMULATED_PLACE) {
  static_assert(kPending == 0);
  emulator::warpgroup_wait(kPending, place);
}

template <typename T, bool kTransposed, bool kATransposed = false, int kBlocks>
inline void multiply_add_64xNx16(float (&d)[kBlocks][4], uint64_t a, uint64_t b, EMULATED_PLACE) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  static_assert(kBlocks >= 1 && kBlocks <= 32);
  const auto type = std::is_same_v<T, __half> ? emulator::Half::f16 : emulator::Half::bf16;
  emulator::multiply_add_64xNx16(d[0], kBlocks, a, b, type, kTransposed, kATransposed, place);
}

#undef EMULATED_PLACE

}  // namespace ijckd
