#pragma once
// Included before each host file of csrc when it is compiled as for the GPU (IJCKD_CUDA) and yet shall take CPU
// tensors, whose memory the emulated kernels can reach: the CPU's dispatch key, no stream, and a device guard under
// which the emulated GPU 0 is current, whatever was before. Torch's own headers come first, so that the names below
// mean only what csrc says.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace emulator {

void set_device(int device);
int device();

}  // namespace emulator

namespace torch::stable::emulated {

class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t) : before_(emulator::device()) { emulator::set_device(0); }
  ~DeviceGuard() { emulator::set_device(before_); }

 private:
  int before_;
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
