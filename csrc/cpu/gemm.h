#pragma once
// Library GEMM into memory that is already there: chunk after chunk reuses one buffer.

#include <array>

#include "op.h"

namespace ijckd {

// out [M, N] = a [M, L] b [L, N], all of one dtype. Autocast leaves this overload alone, so float32 stays float32 under
// it.
inline void matmul_out(const Tensor& a, const Tensor& b, const Tensor& out) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes the returned reference to `out` off the stack
}

}  // namespace ijckd
