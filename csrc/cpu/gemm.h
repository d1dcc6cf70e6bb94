#pragma once
// Library GEMM into memory that is already there: chunk after chunk reuses one buffer.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <array>

#include "op.h"

// torch's own compiler calls this for matrix products; null in a torch that does not offer it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_cpu_mm_out(AtenTensorHandle out, AtenTensorHandle a,
                                                                      AtenTensorHandle b);

namespace ijckd {

constexpr int64_t kDirectWork = 1 << 18;  // multiplications of a product that takes some microseconds

// out [M, N] = a [M, L] b [L, N], all of one dtype. Autocast leaves this overload alone, so float32 stays float32 under
// it. Of small operands past the dispatcher, where torch lets us: the way through it costs more than the product.
inline void matmul_out(const Tensor& a, const Tensor& b, const Tensor& out) {
  if (aoti_torch_cpu_mm_out && a.size(0) * a.size(1) * b.size(1) <= kDirectWork) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
    return;
  }
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes the returned reference to `out` off the stack
}

}  // namespace ijckd
