#pragma once
// Included before each host file of csrc when it is compiled as for the GPU (IJCKD_CUDA) and yet shall take CPU
// tensors, whose memory the emulated kernels can reach: the CPU's dispatch key, no device guard, no stream. Torch's own
// headers come first, so that the names below mean only what csrc says.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace torch::stable::emulated {

struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};

inline int32_t current_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

}  // namespace torch::stable::emulated

#define CUDA CPU
#define is_cuda is_cpu
#define accelerator emulated
#define dlopen(name, flags) (dlopen)(nullptr, flags)
#define dlsym(library, name) reinterpret_cast<void*>(&torch::stable::emulated::current_stream)
