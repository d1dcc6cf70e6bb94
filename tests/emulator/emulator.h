#pragma once
// Runs CUDA kernels on the CPU from their own source and watches every memory access they make.
//
// Each CUDA thread is a fiber; the threads of a block take turns in the order of a Schedule and change over at barriers
// and warp-wide instructions only; blocks run one after another, those of a cooperative launch from one of the grid's
// barriers to the next, those of a cluster in turns. The kernels are compiled with -fsanitize=thread but linked without
// its library: the calls that the compiler puts before each load and store arrive in emulator.cpp, which checks them as
// compute-sanitizer would on a GPU:
//   memcheck   an address that is neither the thread's own stack, nor live shared memory, nor one of the call's arrays;
//              a store to an array that the call only reads; an address not aligned to what is read or written there
//   racecheck  two threads, at least one of them storing, at one element of shared or global memory with no barrier
//              between (within a warp __syncwarp is one; an atomic operation is a store, but no two of them conflict);
//              an element of shared memory into which an asynchronous copy is under way
//   initcheck  a load of a shared or output element that nobody has stored to
//   synccheck  threads of a block at different barriers, lanes of a warp at different warp-wide instructions, either at
//              one that others have left by returning; a thread that returns with copies under way
// Shared memory is filled with NaN before every block. The first violation ends the launch with a std::runtime_error.
//
// Of Hopper's instructions (hopper_instructions.cuh) it checks besides:
//   memcheck   a tile copied to an address not aligned to 1024 bytes, to outside dynamic shared memory or over a
//              barrier, by a map that the driver has not encoded, or from outside the call's arrays; an operand outside
//              dynamic shared memory
//   racecheck  a barrier used without its initialisation's fence; a multiplication of bytes whose copy each of its
//              threads has not itself waited for; a copy or store into bytes that a multiplication may still read: each
//              of its warps must have waited, with a __syncthreads after that for other warps; a copy over, or a
//              multiplication of, bytes that threads have stored: there is no fence for that; registers touched while a
//              multiplication adds to them
//   initcheck  a barrier not initialised, a multiplication of bytes never copied
//   synccheck  warps of a warpgroup that issue other multiplications; a group without a fence before it; more bytes or
//              arrivals than a barrier expects; a block whose threads all wait, which names what for; a thread that
//              returns without having waited for its multiplications, a block that ends with tile copies nobody has
//              waited for
// An mbarrier's arrivals tell those who wait for it of copies that have landed and of multiplications that have been
// waited for; that one thread's wait orders other loads and stores of others is known of a __syncthreads only.
//
// Of clusters, and of launches that start before the one before them has ended:
//   memcheck   an address in a block that is not of the cluster, outside its dynamic shared memory, or not aligned
//   racecheck  another block's shared memory reached for before a barrier of the cluster, after the block has ended, or
//              with no barrier of the cluster behind it that keeps the block from ending; two blocks at one element, at
//              least one of them storing, with no barrier of the cluster between; a copy or an arrival for another
//              block's barrier with none since that was initialised; global memory that an unfinished launch stores to,
//              or loads what this one stores, before wait_for_earlier_launches: of the launch before, or of an earlier
//              one for which that did not wait
//   synccheck  arrivals and waits at the cluster's barrier that do not alternate, or diverge in a warp
// Launches run one after another all the same: what each did to a word of global memory says whether another order
// would have given another result. Of a call's first launch, if it is dependent, the launches before are not known: it
// must wait before it touches any array but the frozen ones.
//
// What it cannot see: memory fences other than those, whether a map is a __grid_constant__ parameter, register
// pressure, the GPU's own exp and log, in which order tensor cores add, speed.

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace emulator {

// The order in which threads that could run do run. Greedy: one warp goes as far as it can before another starts.
enum class Schedule { forward, reverse, greedy, greedy_reverse, random };

void set_schedule(Schedule schedule, unsigned seed);

// When an asynchronous copy's bytes move: as late as they may, in the wait for it, or as early, at its start. A tile
// copy's late is when no thread of the block can run without it; a multiplication by a warpgroup runs in the wait for
// it, or at its commit.
enum class Async { lazy, eager };

void set_async(Async async);

// The current device for what the host asks of it: 0 is of capability 9.0, what the emulated instructions need, 1
// of 8.6; there is no other.
void set_device(int device);
int device();

// The driver refuses launches with one of these attributes, bits of their cudaLaunchAttributeIDs, or with all of them
// `together`; the launchers do not know yet.
void refuse(int attributes, bool together);
// Ways to start kernels without which the launchers do by now, as launch.cuh:Feature's bits: every launch asked for in
// such a way should have been served.
int refused();

// What the host leaves behind on its thread: CUDA's codes.
int capture_mode();
int last_error();

// What kernels have done since the last clear_counts().
struct Counts {
  int64_t launches = 0;
  int64_t questions = 0;        // of the host to the runtime: attributes of kernels and devices, blocks that fit
  int64_t maps = 0;             // encoded
  uint64_t copies = 0;          // asynchronous
  uint64_t load_matrix = 0;     // warp-wide instructions
  uint64_t multiply_add = 0;    // warp-wide instructions
  uint64_t bank_conflicts = 0;  // of load_matrix: accesses beyond one for each 8 rows of 16 bytes
  uint64_t tile_copies = 0;
  uint64_t warpgroup_multiply_add = 0;
};

const Counts& counts();
void clear_counts();

// From now on launches are recorded, as a GPU of `multiprocessors` would be given them: of each only a few blocks run,
// enough to find where the grid's blocks change their work, and products are not computed, so that sizes may be real
// ones. For scripts/kernel_model.py; values mean nothing.
void record_launches(int multiprocessors);

// The arrays that one call of a launcher may touch: copies of the caller's, far from one another, so that what lies
// before or after one is never another; outputs go back at the end. While none is named (the whole-op tests, where
// torch owns the memory), accesses to global memory are checked for nothing.
// frozen: an input to which no launch of an op stores, so that a dependent launch may load it before it waits.
enum class Access { in, out, inout, frozen };
class Arrays {
 public:
  Arrays() = default;
  Arrays(const Arrays&) = delete;
  ~Arrays();
  void* add(const char* name, const void* data, size_t bytes, size_t element, Access access);  // the copy

 private:
  struct Copy {
    void* block;
    void* data;
    void* to;  // null: of an input
    size_t bytes;
  };
  std::vector<Copy> copies_;
};

// Of an instruction in the kernel's source.
struct Place {
  const char* file;
  int line;
};

uint3 thread_index();
uint3 block_index();
dim3 block_dim();
dim3 grid_dim();
void barrier(Place place);
void grid_barrier(Place place);

// Runs `body(started)` as every thread of `kernel`; `started` holds the kernel's parameters. What the CUDA runtime
// refuses is refused with its error code.
cudaError_t remembered(cudaError_t error);  // it, which cudaGetLastError then gives too
cudaError_t find_symbol();                  // as the runtime would, which may have to load code first
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*body)(void*), void* started,
                   size_t started_bytes);

// The launch's dynamic shared memory, for a kernel that declares it aligned to `align`.
void* dynamic_shared(size_t align);

// The block's array declared at one place of a kernel.
void* shared(const void* site, size_t bytes, size_t element, size_t align);

template <typename Array, typename Site>
Array& shared(Site) {
  using Element = std::remove_all_extents_t<Array>;
  static const char site = 0;  // its address: one per place and per instantiation of the kernel around it
  return *static_cast<Array*>(shared(&site, sizeof(Array), sizeof(Element), alignof(Array)));
}

// What instructions.cuh and __syncwarp do; all but the copies are warp-wide.
enum class Half { bf16, f16 };

uint32_t shared_address(const void* p);
void sync_warp(Place place);
uint32_t shuffle_xor(uint32_t bits, int mask, Place place);
void load_matrix_x4(uint32_t* r, const void* row, bool transposed, Place place);
void multiply_add_16x8x16(float* d, const uint32_t* a, const uint32_t* b, Half type, Place place);
void copy_async16(void* to, const void* from, int bytes, Place place);
void copy_async_commit();
void copy_async_wait(int pending);
void allow_next_launch();
void wait_for_earlier_launches();

// What hopper_instructions.cuh does; those whose names begin with warpgroup or multiply are for whole warps of a
// warpgroup.
void barrier_init(uint64_t* barrier, int arrivals, Place place);
void barrier_init_fence();
void barrier_expect(uint64_t* barrier, int bytes, Place place);
void barrier_arrive(uint64_t* barrier, Place place);
void barrier_wait(uint64_t* barrier, uint32_t parity, Place place);
void load_tile(void* to, const CUtensorMap& map, uint64_t* barrier, int column, int row, Place place);
void load_tile_to_blocks(void* to, const CUtensorMap& map, uint64_t* barrier, int column, int row, uint16_t blocks,
                         Place place);
void prefetch_map(const CUtensorMap& map, Place place);
int cluster_rank();
void cluster_arrive(Place place);
void cluster_wait(Place place);
uint32_t address_in_block(const void* p, int rank, Place place);
void load_from_block(void* to, uint32_t address, size_t bytes, Place place);
void store_to_block(uint32_t address, const void* from, size_t bytes, Place place);
void barrier_arrive_in_block(uint32_t barrier, Place place);
uint64_t matrix_descriptor(const void* p, int leading_bytes, int stride_bytes, Place place);
void warpgroup_fence(Place place);
void multiply_add_64xNx16(float* d, int blocks, uint64_t a, uint64_t b, Half type, bool transposed, bool a_transposed,
                          Place place);
void warpgroup_commit(Place place);
void warpgroup_wait(int pending, Place place);

}  // namespace emulator
