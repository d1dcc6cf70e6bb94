#pragma once
// What the CPU loops of both ops need: dtype dispatch and torch's thread pool.

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>

#include <cstdint>
#include <stdexcept>

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

// One task per `grain` items. Results never depend on the number of threads: what is summed across items is summed in index
// order.
template <typename F>
void parallel_for(int64_t n, int64_t grain, const F& body) {
  torch::stable::parallel_for(0, n, grain, body);
}

}  // namespace ijckd
