#pragma once
// What the CPU loops of both ops need: dtype dispatch and torch's thread pool.

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>

#include <cstdint>
#include <stdexcept>
#include <type_traits>

#include "dtype.h"

namespace ijckd {

// Runs `body(T{}, A{})` for the element type and its accumulator.
template <typename F>
void dispatch(DType t, const F& body) {
  switch (t) {
    case DType::f32:
      return body(float{}, float{});
    case DType::f64:
      return body(double{}, double{});
    case DType::bf16:
      return body(c10::BFloat16{}, float{});
    case DType::f16:
      break;
  }
  throw std::runtime_error("ijckd_fast: float16 is for the GPU; on the CPU use bfloat16, float32 or float64");
}

// The same for functions that cannot be templates because they are cloned per instruction set (vectorise.h).
template <typename F32, typename F64, typename BF16>
void by_dtype(DType t, const F32& f32, const F64& f64, const BF16& bf16) {
  dispatch(t, [&]<typename T>(T, auto) {
    if constexpr (std::is_same_v<T, float>)
      f32();
    else if constexpr (std::is_same_v<T, double>)
      f64();
    else
      bf16();
  });
}

// Rows of n elements in a task that is worth waking another thread for: some 10 us where an element takes a nanosecond
// or two.
inline int64_t row_grain(int64_t n, int64_t elements) { return elements / (n > 0 ? n : 1) + 1; }

// One task per `grain` items. Results never depend on the number of threads: what is summed across items is summed in
// index order.
template <typename F>
void parallel_for(int64_t n, int64_t grain, const F& body) {
  if (n <= grain)  // one task needs no pool
    body(int64_t(0), n);
  else
    torch::stable::parallel_for(0, n, grain, body);
}

}  // namespace ijckd
