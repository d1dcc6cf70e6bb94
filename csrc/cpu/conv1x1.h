#pragma once
// Rows times a float32 weight through torch's convolution, as a 1 x 1 kernel on a map one pixel wide: oneDNN's kernels,
// made for the processor at hand, where torch's matrix product takes the BLAS library that it was built with. With
// AVX-512 they gain (results/op.csv); elsewhere the products stay with that library, and with one thread torch itself
// goes back to it. Not for an active autocast, which would round the operands.

#include <array>
#include <vector>

#include "op.h"

namespace ijckd {

constexpr int64_t kConvRows = 64;  // with fewer rows a convolution's own preparations cost more than it gains

inline bool by_convolution(const Tensor& rows) {
  return rows.scalar_type() == ScalarType::Float && rows.size(0) >= kConvRows && has_avx512();
}

namespace conv1x1 {

using torch::stable::detail::from;

inline Tensor as_map(
    const Tensor& rows) {  // [N, C] -> [1, C, N, 1], a view; channels last in the strides of its 1s too
  Tensor map = torch::stable::view(rows, {1, rows.size(0), 1, rows.size(1)});
  map = torch::stable::transpose(map, 1, 3);
  return torch::stable::transpose(map, 2, 3);
}

inline Tensor as_rows(Tensor map) {  // the way back
  map = torch::stable::transpose(map, 2, 3);
  return torch::stable::view(torch::stable::contiguous(torch::stable::transpose(map, 1, 3)),
                             {map.size(3), map.size(1)});
}

inline Tensor as_kernel(const Tensor& weight) {
  return torch::stable::view(weight, {weight.size(0), weight.size(1), 1, 1});
}

}  // namespace conv1x1

// rows [N, Cs], weight [Ct, Cs], both contiguous -> [N, Ct]
inline Tensor conv_rows(const Tensor& rows, const Tensor& weight) {
  using namespace conv1x1;
  const std::vector<int64_t> ones{1, 1}, zeros{0, 0};
  std::array<StableIValue, 9> stack{
      from(as_map(rows)), from(as_kernel(weight)), from(OptTensor()), from(ones), from(zeros), from(ones), from(false),
      from(zeros),        from(int64_t(1))};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::convolution", "", stack.data(), TORCH_ABI_VERSION));
  return as_rows(torch::stable::detail::to<Tensor>(stack[0]));
}

// d_out [N, Ct], rows [N, Cs], weight [Ct, Cs], all contiguous -> (d_rows [N, Cs] if need_rows, d_weight [Ct, Cs] if
// need_weight)
inline std::array<OptTensor, 2> conv_rows_backward(const Tensor& d_out, const Tensor& rows, const Tensor& weight,
                                                   bool need_rows, bool need_weight) {
  using namespace conv1x1;
  using Sizes = std::optional<std::vector<int64_t>>;
  const std::vector<int64_t> ones{1, 1}, zeros{0, 0};
  const std::array<bool, 3> needed{need_rows, need_weight, false};
  std::array<StableIValue, 11> stack{from(as_map(d_out)),
                                     from(as_map(rows)),
                                     from(as_kernel(weight)),
                                     from(Sizes()),
                                     from(ones),
                                     from(zeros),
                                     from(ones),
                                     from(false),
                                     from(zeros),
                                     from(int64_t(1)),
                                     from(torch::headeronly::HeaderOnlyArrayRef<bool>(needed))};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
  std::array<OptTensor, 2> out;
  const Tensor d_map = torch::stable::detail::to<Tensor>(stack[0]),
               d_kernel = torch::stable::detail::to<Tensor>(stack[1]);
  torch::stable::detail::to<Tensor>(stack[2]);  // takes the undefined gradient of the bias off the stack
  if (need_rows) out[0] = as_rows(d_map);
  if (need_weight) out[1] = torch::stable::view(torch::stable::contiguous(d_kernel), {weight.size(0), weight.size(1)});
  return out;
}

}  // namespace ijckd
