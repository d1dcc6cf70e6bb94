#pragma once
// Stands in for csrc/cuda/instructions.cuh: the same functions, run by the emulator.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace ijckd {

using EmulatedPlace = emulator::Place;
#define EMULATED_PLACE EmulatedPlace place = {__builtin_FILE(), __builtin_LINE()}

inline uint32_t shared_address(const void* p) { return emulator::shared_address(p); }

inline float shuffle_xor(float v, int mask, EMULATED_PLACE) {
  uint32_t bits;
  memcpy(&bits, &v, sizeof bits);
  bits = emulator::shuffle_xor(bits, mask, place);
  memcpy(&v, &bits, sizeof bits);
  return v;
}
inline int shuffle_xor(int v, int mask, EMULATED_PLACE) {
  return static_cast<int>(emulator::shuffle_xor(static_cast<uint32_t>(v), mask, place));
}

inline void copy_async16(void* to, const void* from, int bytes, EMULATED_PLACE) {
  emulator::copy_async16(to, from, bytes, place);
}

inline void copy_async_commit() { emulator::copy_async_commit(); }

template <int kPending>
inline void copy_async_wait() {
  static_assert(kPending >= 0);
  emulator::copy_async_wait(kPending);
}

inline void load_matrix_x4(uint32_t (&r)[4], const void* row, EMULATED_PLACE) {
  emulator::load_matrix_x4(r, row, false, place);
}
inline void load_matrix_x4_transposed(uint32_t (&r)[4], const void* row, EMULATED_PLACE) {
  emulator::load_matrix_x4(r, row, true, place);
}

template <typename T>
inline void multiply_add_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], EMULATED_PLACE) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  const auto type = std::is_same_v<T, __half> ? emulator::Half::f16 : emulator::Half::bf16;
  emulator::multiply_add_16x8x16(d, a, b, type, place);
}

inline void allow_next_launch() { emulator::allow_next_launch(); }
inline void wait_for_earlier_launches() { emulator::wait_for_earlier_launches(); }

#undef EMULATED_PLACE

}  // namespace ijckd
