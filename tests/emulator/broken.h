#pragma once
// Kernels with one fault each, to show that the emulator finds it.

namespace broken {

// All run over 2 blocks of 64 threads, with in [128] and out [128].
struct Kernel {
  const char* name;
  int (*run)(const float* in, float* out);
};
extern const Kernel kKernels[];
extern const int kCount;

}  // namespace broken
