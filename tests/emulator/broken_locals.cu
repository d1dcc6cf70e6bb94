// Faults that the emulator does not see and the compiler's sanitizers do, chosen by number; 0 is none. For ctypes.
#include "cuda/device.cuh"

namespace {

__global__ void locals(int fault, int thirty_two, int largest) {
  int values[4] = {1, 2, 3, 4};
  for (int i = 0; i < 4; ++i) values[i] += static_cast<int>(threadIdx.x);
  if (fault == 1) values[thirty_two / 8] = 5;
  int* volatile hidden = values;  // its size, from all but the AddressSanitizer
  if (fault == 2) values[0] = hidden[thirty_two / 8];
  if (fault == 3) values[0] = largest + values[0];
  if (fault == 4) values[0] <<= thirty_two;
  __shared__ int slots[32];
  slots[threadIdx.x] = values[0];
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int broken_locals(int fault) {
  return ijckd::launch(locals, dim3(1), 32, nullptr, fault, 32, INT32_MAX);
}
