#pragma once
// The element types that cross the line between the torch-aware host code and the torch-free loops and kernels.

namespace ijckd {

enum class DType { f32, f64, bf16, f16 };

// Half types accumulate, and keep statistics and losses, in float; float and double in themselves.
constexpr DType accumulator(DType t) { return t == DType::f64 ? DType::f64 : DType::f32; }

}  // namespace ijckd
