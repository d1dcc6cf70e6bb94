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

// out [M, N] = a [M, K] b, with b [N, K] or, where the name says "transposed", [K, N]; bf16 unless the name says f16.
struct Tile {
  const char* name;
  int (*run)(const void* a, const void* b, float* out, int M, int N, int K);
};
extern const Tile kTiles[];
extern const int kTileCount;

// The same by Hopper's instructions.
extern const Tile kHopperTiles[];
extern const int kHopperTileCount;

// Kernels and products in clusters, and kernels that run in turn.
extern const Kernel kGroups[];
extern const int kGroupCount;
extern const Tile kRings[];
extern const int kRingCount;

}  // namespace broken
