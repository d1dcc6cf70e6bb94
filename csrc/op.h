#pragma once
// What the host side of every op needs: checks whose text names op, argument, expected and found; dtypes; the current
// stream; library GEMMs. Knows no op.
//
// Each host file is compiled twice: into _C for the CPU, and with IJCKD_CUDA defined into _C_cuda. Only torch's stable
// ABI is used (target 2.10), so that one wheel serves every torch >= 2.10.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "dtype.h"

#ifdef IJCKD_CUDA
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace ijckd {

using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;
using torch::headeronly::ScalarType;

template <typename... Args>
[[noreturn]] void fail(const Args&... args) {
  std::ostringstream text;
  (text << ... << args);
  throw std::runtime_error(text.str());
}

template <typename... Args>
void check(bool ok, const Args&... args) {
  if (!ok) fail(args...);
}

// Of a tensor, in a text: written where the text is, since a check that holds needs none.
struct Shape {
  const Tensor& of;
};

inline Shape shape(const Tensor& t) { return {t}; }

inline std::ostream& operator<<(std::ostream& to, const Shape& s) {
  to << "[";
  for (int64_t i = 0; i < s.of.dim(); ++i) to << (i ? ", " : "") << s.of.size(i);
  return to << "]";
}

inline const char* name(ScalarType t) {
  switch (t) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    default:
      return "another dtype";
  }
}

inline DType dtype(ScalarType t, const char* op, const char* arg) {
  switch (t) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      fail(op, ": ", arg, " must be a floating-point tensor (float64, float32, bfloat16, or float16 on a GPU), got ",
           name(t));
  }
}

inline DType dtype(const Tensor& t, const char* op, const char* arg) { return dtype(t.scalar_type(), op, arg); }

// Of an argument whose own dtype is no matter, as long as it is one of those: no integer or complex number is converted
// on the quiet.
inline void check_floating(const OptTensor& t, const char* op, const char* arg) {
  if (t) dtype(*t, op, arg);
}

inline ScalarType scalar(DType t) {
  switch (t) {
    case DType::f64:
      return ScalarType::Double;
    case DType::bf16:
      return ScalarType::BFloat16;
    case DType::f16:
      return ScalarType::Half;
    case DType::f32:
      break;
  }
  return ScalarType::Float;
}

// Itself where it is contiguous; asked here, because a call through torch's dispatcher costs a microsecond.
inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// `t` in dtype `to`, contiguous; itself where it already is.
inline Tensor as(const Tensor& t, DType to) {
  const ScalarType type = scalar(to);
  return dense(t.scalar_type() == type ? t : torch::stable::to(t, type));
}

inline OptTensor as(const OptTensor& t, DType to) { return t ? OptTensor(as(*t, to)) : OptTensor(); }

inline const void* data(const OptTensor& t) { return t ? t->const_data_ptr() : nullptr; }

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// Uninitialised, on like's device; past the dispatcher too.
inline Tensor empty(const Tensor& like, Sizes size, ScalarType t) {
  std::array<int64_t, 8> strides;
  strides.fill(1);
  for (size_t i = size.size(); i > 1; --i) strides[i - 2] = strides[i - 1] * std::max<int64_t>(size[i - 1], 1);
  int32_t device_type = 0, device_index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle out = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(size.size()), size.data(), strides.data(),
                                                         static_cast<int32_t>(t), device_type, device_index, &out));
  return Tensor(out);
}

inline Tensor empty(const Tensor& like, Sizes size, DType t) { return empty(like, size, scalar(t)); }

// A view of these sizes and strides that begins `offset` elements after t; past the dispatcher as well.
inline Tensor strided(const Tensor& t, Sizes size, Sizes strides, int64_t offset = 0) {
  AtenTensorHandle out = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(t.get(), int64_t(size.size()), size.data(), strides.data(), offset, &out));
  return Tensor(out);
}

// Rows [first, first + n) of t, a view.
inline Tensor rows_of(const Tensor& t, int64_t first, int64_t n) {
  std::vector<int64_t> size(t.sizes().begin(), t.sizes().end());
  size[0] = n;
  return strided(t, size, t.strides(), first * t.stride(0));
}

// Vectors [B, C] as rows [B, 1, C], a view; itself where it is rows already.
inline Tensor vectors_as_rows(const Tensor& x) {
  return x.dim() == 2 ? strided(x, {x.size(0), 1, x.size(1)}, {x.stride(0), x.stride(0), x.stride(1)}) : x;
}

// x [M, N] transposed, a view.
inline Tensor transposed(const Tensor& x) { return strided(x, {x.size(1), x.size(0)}, {x.stride(1), x.stride(0)}); }

// a [M, K] times b [N, K] transposed: [M, N]. The library's GEMM, so every dtype and shape works.
inline Tensor matmul_nt(const Tensor& a, const Tensor& b) { return torch::stable::matmul(a, transposed(b)); }

#ifdef IJCKD_CUDA
constexpr const char* kDevice = "cuda";

inline bool on_device(const Tensor& t) { return t.is_cuda(); }

// The dtype in which products of operands of dtype t are taken.
inline DType product_type(DType t) { return t; }

// libtorch_cuda's C shim is looked up at run time, so that this library compiles, links and loads beside a CPU-only
// torch too.
class Launch {
 public:
  explicit Launch(const Tensor& t) : guard_(t.get_device_index()) {
    using Fn = int32_t (*)(int32_t, void**);
    static const Fn current_stream = [] {
      void* lib = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
      return lib ? reinterpret_cast<Fn>(dlsym(lib, "aoti_torch_get_current_cuda_stream")) : nullptr;
    }();
    check(current_stream != nullptr,
          "ijckd_fast: this torch has no CUDA; install a CUDA build of torch to use tensors on a GPU");
    check(current_stream(t.get_device_index(), &stream) == 0, "ijckd_fast: torch gave no current CUDA stream");
  }

  void* stream = nullptr;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};
#else
constexpr const char* kDevice = "cpu";

inline bool on_device(const Tensor& t) { return t.is_cpu(); }

// Whether the processor has the AVX-512 that oneDNN, torch's library for convolutions and bfloat16, is at its best
// with.
inline bool has_avx512() {
#ifdef __x86_64__
  static const bool has =
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return has;
#else
  return false;
#endif
}

// The dtype in which products of operands of dtype t are taken: float32 for bfloat16 on an x86-64 processor where torch
// has no oneDNN for it, but a plain loop many times slower than a product of floats. The results change by less than
// bfloat16's rounding.
inline DType product_type(DType t) {
#ifdef __x86_64__
  if (t == DType::bf16 && !has_avx512()) return DType::f32;
#endif
  return t;
}

struct Launch {
  explicit Launch(const Tensor&) {}
  void* stream = nullptr;
};
#endif

const char* launch_error(int code);  // cuda/rows.cu; the CPU loops never return an error

inline void launched(int code, const char* what) {
#ifdef IJCKD_CUDA
  check(code == 0, "ijckd_fast: launching ", what, " failed: ", launch_error(code));
#else
  check(code == 0, "ijckd_fast: ", what, " failed with code ", code);
#endif
}

inline void check_device(const OptTensor& t, const char* op, const char* arg) {
  check(!t || on_device(*t), op, ": ", arg, " must be on ", kDevice, " like the first argument");
}

inline void check_shape(const OptTensor& t, std::initializer_list<int64_t> expected, const char* op, const char* arg,
                        const char* symbols) {
  if (!t) return;
  bool same = t->dim() == static_cast<int64_t>(expected.size());
  int64_t i = 0;
  for (const int64_t n : expected) same = same && t->size(i++) == n;
  if (same) return;
  std::ostringstream list;
  for (const int64_t n : expected) list << (list.tellp() > 0 ? ", " : "") << n;
  fail(op, ": ", arg, " must be ", symbols, " = [", list.str(), "], got ", shape(*t));
}

}  // namespace ijckd
