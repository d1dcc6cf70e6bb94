// The counters of counts.h and the kernel that reads them.
#include "counts.h"
#include "device.cuh"

namespace ijckd {
namespace {

// A variable of the library, not memory from an allocator: every device has it, zeroed, before any stream can want it,
// so its first use may be in the capture of a graph.
__device__ unsigned long long counters[kCounts];

__global__ void take_counts_kernel(TakeCounts t) {
  // an exchange, so that what another stream adds meanwhile is in this answer or in the next one
  const int i = threadIdx.x;
  t.out[i] = static_cast<int64_t>(atomicExch(reinterpret_cast<unsigned long long*>(t.counts + i), 0ull));
}

}  // namespace

int device_counts(int64_t** counts) {
  // The first call on a device may load code there, which beside a capture is allowed in this mode only.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  void* address = nullptr;
  const cudaError_t error = cudaGetSymbolAddress(&address, counters);
  cudaThreadExchangeStreamCaptureMode(&mode);
  cudaGetLastError();  // the caller gets it from here
  *counts = static_cast<int64_t*>(address);
  return static_cast<int>(error);
}

int take_counts(const TakeCounts& t, void* stream) { return launch(take_counts_kernel, 1, int(kCounts), stream, t); }

}  // namespace ijckd
