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
inline void barrier_wait(uint64_t* barrier, uint32_t parity, EMULATED_PLACE) {
  emulator::barrier_wait(barrier, parity, place);
}

inline void load_tile(void* to, const CUtensorMap& map, uint64_t* barrier, int column, int row, EMULATED_PLACE) {
  emulator::load_tile(to, map, barrier, column, row, place);
}

inline uint64_t matrix_descriptor(const void* p, int leading_bytes, int stride_bytes, EMULATED_PLACE) {
  return emulator::matrix_descriptor(p, leading_bytes, stride_bytes, place);
}

inline void warpgroup_fence(EMULATED_PLACE) { emulator::warpgroup_fence(place); }
inline void warpgroup_commit(EMULATED_PLACE) { emulator::warpgroup_commit(place); }

template <int kPending>
inline void warpgroup_wait(EMULATED_PLACE) {
  static_assert(kPending >= 0);
  emulator::warpgroup_wait(kPending, place);
}

template <typename T, bool kTransposed, int kBlocks>
inline void multiply_add_64xNx16(float (&d)[kBlocks][4], uint64_t a, uint64_t b, EMULATED_PLACE) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  static_assert(kBlocks >= 1 && kBlocks <= 32);
  const auto type = std::is_same_v<T, __half> ? emulator::Half::f16 : emulator::Half::bf16;
  emulator::multiply_add_64xNx16(d[0], kBlocks, a, b, type, kTransposed, place);
}

#undef EMULATED_PLACE

}  // namespace ijckd
