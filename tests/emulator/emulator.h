#pragma once
// Runs CUDA kernels on the CPU from their own source and watches every memory access they make.
//
// Each CUDA thread is a fiber; the threads of a block take turns in the order of a Schedule and change over at barriers only;
// blocks run one after another. The kernels are compiled with -fsanitize=thread but linked without its library: the calls that
// the compiler puts before each load and store arrive in emulator.cpp, which checks them as compute-sanitizer would on a GPU:
//   memcheck   an address that is neither the thread's own stack, nor a live __shared__ array, nor one of the call's arrays;
//              a store to an array that the call only reads; an address that its access's size does not divide
//   racecheck  two threads, at least one of them storing, at one element of shared or global memory with no barrier between
//   initcheck  a load of a __shared__ or output element that nobody has stored to
//   synccheck  threads of a block at different barriers, or at a barrier that others have left by returning
// Shared memory is filled with NaN before every block. The first violation ends the launch with a std::runtime_error.
//
// What it cannot see: memory fences, register pressure, the GPU's own exp and log, speed.
//
// To add warp-wide instructions (shuffles, ldmatrix, mma.sync): a Meeting over the lanes of the mask, as `barrier` is one over
// the block. To add cp.async: a queue per Thread, landed at the wait or, to be nasty, at once.

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace emulator {

// The order in which threads that could run do run. Greedy: one warp goes as far as it can before another starts.
enum class Schedule { forward, reverse, greedy, greedy_reverse, random };

void set_schedule(Schedule schedule, unsigned seed);

// The arrays that one call of a launcher may touch. While none is named (the whole-op tests, where torch owns the memory),
// accesses to global memory are checked for nothing.
enum class Access { in, out, inout };
class Arrays {
 public:
  Arrays() = default;
  Arrays(const Arrays&) = delete;
  ~Arrays();
  void add(const char* name, const void* data, size_t bytes, size_t element, Access access);
};

uint3 thread_index();
uint3 block_index();
dim3 block_dim();
dim3 grid_dim();
void barrier(const char* file, int line);

// Runs `body(started)` as every thread; `started` holds the kernel's parameters. What the CUDA runtime refuses is refused with
// its error code.
cudaError_t launch(const cudaLaunchConfig_t& config, void (*body)(void*), void* started, size_t started_bytes);

// The block's array declared at one place of a kernel.
void* shared(const void* site, size_t bytes, size_t element, size_t align);

template <typename Array, typename Site>
Array& shared(Site) {
  using Element = std::remove_all_extents_t<Array>;
  static const char site = 0;  // its address: one per place and per instantiation of the kernel around it
  return *static_cast<Array*>(shared(&site, sizeof(Array), sizeof(Element), alignof(Array)));
}

}  // namespace emulator
