#pragma once
// Rows of classifier_loss that could not be served as asked, counted where they are found: to raise an error the host
// would have to wait for the device. Loops in cpu/counts.cpp, kernels in cuda/counts.cu. Every function returns 0, or a
// CUDA error code.

#include <cstdint>

namespace ijckd {

enum {
  kBadLabels = 0,  // rows with a label outside [0, K)
  kSaturated,      // rows whose softmax left the range of its format
  kCounts
};

// The current device's counters [kCounts]: 0 when the library is loaded, never freed, raised by atomicAdd of integers,
// so that equal calls count alike. Null on the CPU, which checks labels first and never saturates.
int device_counts(int64_t** counts);

// out [kCounts] = counts, which begin again at 0.
struct TakeCounts {
  int64_t* counts;
  int64_t* out;
};
int take_counts(const TakeCounts& t, void* stream);

}  // namespace ijckd
