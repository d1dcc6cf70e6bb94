// Blocks that share memory in clusters of two, and launches that start before the one before them has ended; once
// sound, then with one fault each. See broken.h; those whose names begin with `sound` reverse each block's 64 elements.
#include "broken.h"
#include "broken_map.cuh"
#include "cuda/device.cuh"
#include "hopper_instructions.cuh"
#include "instructions.cuh"

namespace broken {
namespace {

using namespace ijckd;

constexpr int kThreads = 64;
constexpr int kBytes = 4096;  // of dynamic shared memory

// --------------------------------------------------------------------------------------------------------------------
// Another block's shared memory

enum class Fault {
  none,
  none_fours,  // four elements at a time
  none_stores,
  none_third_round,
  no_barrier,
  no_last_barrier,
  no_last_barrier_after_store,
  block_barrier,
  access_between_halves,
  store_after_load,
  store_seen_without_barrier,
  both_store,
  block_skips_barrier,
  no_wait,
  no_arrival,
  two_arrivals,
  divergent_arrival,
  rank_past_cluster,
  static_shared,
  past_shared,
  misaligned,
  misaligned_four,
  never_stored,
};

__device__ void cluster_barrier() {
  cluster_arrive();
  cluster_wait();
}

// Every block keeps the other's elements for it, or stores them there.
template <Fault kFault>
__global__ void reverse(const float* in, float* out) {
  extern __shared__ __align__(16) float slots[];
  __shared__ float own[kThreads];
  constexpr bool kStores = kFault == Fault::none_stores || kFault == Fault::store_seen_without_barrier ||
                           kFault == Fault::both_store || kFault == Fault::no_last_barrier_after_store;
  const int t = threadIdx.x, rank = cluster_rank(), other = rank ^ 1;
  if (kFault == Fault::static_shared) own[t] = 0;
  if (!kStores && kFault != Fault::never_stored) slots[t] = in[other * kThreads + t];
  if (kFault == Fault::block_barrier) {
    __syncthreads();
  } else if (kFault == Fault::no_wait) {
    cluster_arrive();
  } else if (kFault == Fault::no_arrival) {
    cluster_wait();
  } else if (kFault == Fault::two_arrivals) {
    cluster_arrive();
    cluster_arrive();
  } else if (kFault == Fault::divergent_arrival) {
    if (t % 2) cluster_arrive();
  } else if (kFault != Fault::no_barrier && (kFault != Fault::block_skips_barrier || rank == 0)) {
    cluster_barrier();
  }

  const auto of_other = [&](int i) { return address_in_block(slots + i, other); };
  float v = 0;
  if (kFault == Fault::access_between_halves) {
    slots[t] = in[other * kThreads + t];
    cluster_arrive();
    v = load_from_block(of_other(kThreads - 1 - t));
    cluster_wait();
  } else if (kFault == Fault::none_fours) {
    const float4 four = load_four_from_block(of_other(kThreads - 4 - t / 4 * 4));
    const float all[4] = {four.w, four.z, four.y, four.x};
    v = all[t % 4];
  } else if (kStores) {
    if (kFault == Fault::both_store) slots[kThreads - 1 - t] = 0;
    const float mine = in[other * kThreads + t];
    if (t % 4 == 0 && kFault == Fault::none_stores) {
      const float* x = in + other * kThreads + t;
      store_four_to_block(of_other(t), float4{x[0], x[1], x[2], x[3]});
    } else if (kFault != Fault::none_stores) {
      store_to_block(of_other(t), mine);
    }
    if (kFault != Fault::store_seen_without_barrier && kFault != Fault::no_last_barrier_after_store) cluster_barrier();
    if (kFault != Fault::no_last_barrier_after_store) v = slots[kThreads - 1 - t];
  } else if (kFault == Fault::rank_past_cluster) {
    v = load_from_block(address_in_block(slots + t, 2));
  } else if (kFault == Fault::static_shared) {
    v = load_from_block(address_in_block(own + t, other));
  } else if (kFault == Fault::past_shared) {
    v = load_from_block(of_other(0) + kBytes);
  } else if (kFault == Fault::misaligned) {
    v = load_from_block(of_other(t) + 2);
  } else if (kFault == Fault::misaligned_four) {
    v = load_four_from_block(of_other(1)).x;
  } else {
    v = load_from_block(of_other(kThreads - 1 - t));
  }
  if (kFault == Fault::store_after_load) slots[t] = 0;
  if (kFault == Fault::none_third_round) {
    cluster_barrier();
    slots[kThreads - 1 - t] = v;
    cluster_barrier();
    v = load_from_block(address_in_block(slots + kThreads - 1 - t, rank));
  }
  if (kFault != Fault::no_last_barrier && !kStores) cluster_barrier();
  out[rank * kThreads + t] = v;
}

// --------------------------------------------------------------------------------------------------------------------
// A tile for both blocks

enum class TileFault {
  none,
  expects_own_only,
  expects_too_much,
  no_barrier_after_init,
  block_barrier_after_init,
  no_init_fence,
  no_init,
  third_block,
  no_block,
  no_wait,
  to_shared_loaded_before,
  to_shared_stored_before,
};

// Each block copies the 64 elements of the other for both; it reads its own.
template <TileFault kFault>
__global__ void share(const __grid_constant__ CUtensorMap map, float* out) {
  extern __shared__ __align__(1024) unsigned char tiles[];
  constexpr int kTileBytes = kThreads * 4;
  const int t = threadIdx.x, rank = cluster_rank(), other = rank ^ 1;
  uint64_t* landed = reinterpret_cast<uint64_t*>(tiles + 2048);
  float* loaded = reinterpret_cast<float*>(tiles);
  if (t == 0 && kFault != TileFault::no_init) {
    barrier_init(landed, 1);
    if (kFault != TileFault::no_init_fence) barrier_init_fence();
  }
  if (kFault == TileFault::to_shared_stored_before) loaded[other * 256 + t] = 0;
  if (kFault == TileFault::block_barrier_after_init)
    __syncthreads();
  else if (kFault != TileFault::no_barrier_after_init)
    cluster_barrier();
  if (kFault == TileFault::to_shared_loaded_before) load_from_block(address_in_block(loaded + other * 256 + t, rank));
  if (t == 0) {
    int bytes = 2 * kTileBytes;
    if (kFault == TileFault::expects_own_only) bytes = kTileBytes;
    if (kFault == TileFault::expects_too_much) bytes += 16;
    const uint16_t blocks = kFault == TileFault::third_block ? 7 : kFault == TileFault::no_block ? 0 : 3;
    barrier_expect(landed, bytes);
    load_tile_to_blocks(tiles + other * 1024, map, landed, 0, 2 * other, blocks);
  }
  __syncwarp();
  if (kFault != TileFault::no_wait) barrier_wait(landed, 0);
  const int i = kThreads - 1 - t, row = i / 32, chunk = i % 32 / 4;
  out[rank * kThreads + t] = loaded[rank * 256 + row * 32 + (chunk ^ row) * 4 + i % 4];
  cluster_barrier();
}

// --------------------------------------------------------------------------------------------------------------------
// A product whose blocks share a's rows

enum class RingFault {
  none,
  arrives_before_wait,
  arrives_at_own_only,
  one_warp_arrives,
  never_waits_for_readers,
  no_last_barrier,
  expects_half,
};

constexpr int kTile = 64, kRing = 3, kRingThreads = 128;
constexpr int kOperand = kTile * 128, kStageBytes = 2 * kOperand, kRingBytes = kRing * kStageBytes;

struct Maps {
  CUtensorMap a, b;
};

// a [M, K], b [N, K], out [M, N]; two blocks along N, each of which copies half of their rows of a to both.
template <RingFault kFault>
__global__ void ring_product(const __grid_constant__ Maps maps, float* out, int M, int N, int K) {
  extern __shared__ __align__(1024) unsigned char stages[];
  uint64_t *landed = reinterpret_cast<uint64_t*>(stages + kRingBytes), *free = landed + kRing;
  const int rank = cluster_rank(), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int m0 = blockIdx.y * kTile, n0 = blockIdx.x * kTile, steps = ceil_div(K, 64);
  if (threadIdx.x == 0) {
    for (int s = 0; s < kRing; ++s) {
      barrier_init(landed + s, 1);
      barrier_init(free + s, kFault == RingFault::one_warp_arrives ? 2 : 8);  // warps of both blocks
    }
    barrier_init_fence();
  }
  cluster_barrier();
  const auto start = [&](int step) {
    if (threadIdx.x == 0 && step < steps) {
      const int slot = step % kRing;
      if (step >= kRing && kFault != RingFault::never_waits_for_readers)
        barrier_wait(free + slot, (step / kRing - 1) % 2);
      unsigned char* stage = stages + slot * kStageBytes;
      barrier_expect(landed + slot, kFault == RingFault::expects_half ? kStageBytes - kOperand / 2 : kStageBytes);
      load_tile_to_blocks(stage + rank * kOperand / 2, maps.a, landed + slot, step * 64, m0 + rank * kTile / 2, 3);
      load_tile(stage + kOperand, maps.b, landed + slot, step * 64, n0);
    }
    __syncwarp();
  };
  const auto release = [&](int step) {
    if (lane != 0 || (kFault == RingFault::one_warp_arrives && warp != 3)) return;
    for (int block = 0; block < 2; ++block)
      if (block == rank)
        barrier_arrive(free + step % kRing);
      else if (kFault != RingFault::arrives_at_own_only)
        barrier_arrive_in_block(address_in_block(free + step % kRing, block));
  };
  for (int s = 0; s < kRing - 1; ++s) start(s);
  float sums[kTile / 8][4] = {};
  for (int step = 0; step < steps; ++step) {
    const int slot = step % kRing;
    barrier_wait(landed + slot, step / kRing % 2);
    const __nv_bfloat16* a = reinterpret_cast<const __nv_bfloat16*>(stages + slot * kStageBytes);
    const __nv_bfloat16* b = a + kTile * 64;
    warpgroup_fence();
    for (int k = 0; k < 64; k += 16)
      multiply_add_64xNx16<__nv_bfloat16, false>(sums, matrix_descriptor(a + k, 16, 1024),
                                                 matrix_descriptor(b + k, 16, 1024));
    warpgroup_commit();
    if (kFault == RingFault::arrives_before_wait && step > 0) release(step - 1);
    __syncwarp();
    warpgroup_wait<1>();
    if (kFault != RingFault::arrives_before_wait && step > 0) release(step - 1);
    __syncwarp();
    start(step + kRing - 1);
  }
  warpgroup_wait<0>(sums);
  for (int j = 0; j < kTile / 8; ++j)
    for (int i = 0; i < 4; ++i) {
      const int row = m0 + warp * 16 + lane / 4 + i / 2 * 8, column = n0 + 8 * j + lane % 4 * 2 + i % 2;
      if (row < M && column < N) out[int64_t(row) * N + column] = sums[j][i];
    }
  if (kFault != RingFault::no_last_barrier) cluster_barrier();
}

// --------------------------------------------------------------------------------------------------------------------
// Dependent launches

enum class Order { only_allows, allows_and_waits, waits_and_allows, neither };

template <Order kOrder>
__device__ void begin() {
  if (kOrder == Order::allows_and_waits || kOrder == Order::only_allows) allow_next_launch();
  if (kOrder == Order::allows_and_waits || kOrder == Order::waits_and_allows) wait_for_earlier_launches();
  if (kOrder == Order::waits_and_allows) allow_next_launch();
}

template <Order kOrder>
__global__ void copy(const float* in, float* out) {
  begin<kOrder>();
  const int i = blockIdx.x * kThreads + threadIdx.x;
  out[i] = in[i];
}

// Reverses out's elements in place.
enum class Waits { all, one_and_barrier, one, after_load, after_store, none, store_only };

template <Waits kWaits>
__global__ void reverse_there(const float*, float* out) {
  __shared__ float slots[kThreads];
  float* own = out + blockIdx.x * kThreads;
  const int t = threadIdx.x;
  if (kWaits == Waits::store_only) {
    own[t] = 0;
    return;
  }
  if (kWaits == Waits::all) wait_for_earlier_launches();
  if ((kWaits == Waits::one || kWaits == Waits::one_and_barrier) && t == 0) wait_for_earlier_launches();
  if (kWaits == Waits::one_and_barrier) __syncthreads();
  if (kWaits == Waits::after_store) own[t] = 0;
  slots[kThreads - 1 - t] = own[t];
  if (kWaits == Waits::after_load || kWaits == Waits::after_store) wait_for_earlier_launches();
  __syncthreads();
  own[t] = slots[t];
}

// Reads all of out and leaves it as it is.
template <Order kOrder>
__global__ void read(const float*, float* out) {
  begin<kOrder>();
  __shared__ float slots[kThreads];
  slots[threadIdx.x] = out[blockIdx.x * kThreads + threadIdx.x];
}

// Touches nothing.
template <Order kOrder>
__global__ void pass(const float*, float*) {
  begin<kOrder>();
}

// --------------------------------------------------------------------------------------------------------------------

using Body = void (*)(const float*, float*);

template <Fault kFault, int kBlocks = 2, int kCluster = 2>
int run(const float* in, float* out) {
  Start start{kBlocks, kThreads, kBytes};
  start.cluster = kCluster;
  return launch_as(start, reverse<kFault>, nullptr, in, out);
}

template <TileFault kFault>
int run_share(const float* in, float* out) {
  CUtensorMap map;
  if (const int error = encode<__nv_bfloat16>(map, in, 4, 64, 64, 2, 64, 12000)) return error;
  Start start{2, kThreads, kBytes};
  start.cluster = 2;
  return launch_as(start, share<kFault>, nullptr, map, out);
}

// One after the other; all but the first are dependent, or it too.
template <bool kFirst, Body... kKernels>
int run_in_turn(const float* in, float* out) {
  int error = 0;
  bool dependent = kFirst;
  const auto start = [&](Body kernel) {
    Start how{2, kThreads, 0, dependent};
    if (!error) error = launch_as(how, kernel, nullptr, in, out);
    dependent = true;
  };
  (start(kKernels), ...);
  return error;
}

template <RingFault kFault>
int run_ring(const void* a, const void* b, float* out, int M, int N, int K) {
  Maps maps{};
  int error = encode<__nv_bfloat16>(maps.a, a, M, K, K, kTile / 2, 64, 12000);
  if (!error) error = encode<__nv_bfloat16>(maps.b, b, N, K, K, kTile, 64, 12000);
  if (error) return error;
  Start start{dim3(ceil_div(N, 2 * kTile) * 2, ceil_div(M, kTile)), kRingThreads, kRingBytes + 2 * kRing * 8};
  start.cluster = 2;
  return launch_as(start, ring_product<kFault>, nullptr, maps, out, M, N, K);
}

constexpr Body kCopies = copy<Order::only_allows>, kReverses = reverse_there<Waits::all>;

}  // namespace

const Kernel kGroups[] = {
    {"sound", run<Fault::none>},
    {"sound fours", run<Fault::none_fours>},
    {"sound stores", run<Fault::none_stores>},
    {"sound third round", run<Fault::none_third_round>},
    {"no_barrier", run<Fault::no_barrier>},
    {"no_last_barrier", run<Fault::no_last_barrier>},
    {"no_last_barrier_after_store", run<Fault::no_last_barrier_after_store>},
    {"block_barrier", run<Fault::block_barrier>},
    {"access_between_halves", run<Fault::access_between_halves>},
    {"store_after_load", run<Fault::store_after_load>},
    {"store_seen_without_barrier", run<Fault::store_seen_without_barrier>},
    {"both_store", run<Fault::both_store>},
    {"block_skips_barrier", run<Fault::block_skips_barrier>},
    {"no_wait", run<Fault::no_wait>},
    {"no_arrival", run<Fault::no_arrival>},
    {"two_arrivals", run<Fault::two_arrivals>},
    {"divergent_arrival", run<Fault::divergent_arrival>},
    {"rank_past_cluster", run<Fault::rank_past_cluster>},
    {"static_shared", run<Fault::static_shared>},
    {"past_shared", run<Fault::past_shared>},
    {"misaligned", run<Fault::misaligned>},
    {"misaligned_four", run<Fault::misaligned_four>},
    {"never_stored", run<Fault::never_stored>},
    {"not_whole_clusters", run<Fault::none, 3>},
    {"no_cluster", run<Fault::none, 2, 1>},
    {"sound tile", run_share<TileFault::none>},
    {"tile_expects_own_only", run_share<TileFault::expects_own_only>},
    {"tile_expects_too_much", run_share<TileFault::expects_too_much>},
    {"tile_no_barrier_after_init", run_share<TileFault::no_barrier_after_init>},
    {"tile_block_barrier_after_init", run_share<TileFault::block_barrier_after_init>},
    {"tile_no_init_fence", run_share<TileFault::no_init_fence>},
    {"tile_no_init", run_share<TileFault::no_init>},
    {"tile_third_block", run_share<TileFault::third_block>},
    {"tile_no_block", run_share<TileFault::no_block>},
    {"tile_no_wait", run_share<TileFault::no_wait>},
    {"tile_to_shared_loaded_before", run_share<TileFault::to_shared_loaded_before>},
    {"tile_to_shared_stored_before", run_share<TileFault::to_shared_stored_before>},
    {"sound launches", run_in_turn<false, kCopies, kReverses>},
    {"sound launches, one thread waits", run_in_turn<false, kCopies, reverse_there<Waits::one_and_barrier>>},
    {"sound launches, waits through", run_in_turn<false, kCopies, pass<Order::allows_and_waits>, kReverses>},
    {"sound launches, next let go after the wait",
     run_in_turn<false, kCopies, pass<Order::waits_and_allows>, reverse_there<Waits::none>>},
    {"sound launches, next let go by ending", run_in_turn<false, kCopies, kReverses, kReverses, kReverses>},
    {"one_thread_waits", run_in_turn<false, kCopies, reverse_there<Waits::one>>},
    {"loads_before_wait", run_in_turn<false, kCopies, reverse_there<Waits::after_load>>},
    {"stores_before_wait", run_in_turn<false, kCopies, reverse_there<Waits::after_store>>},
    {"stores_what_is_read",
     run_in_turn<false, kCopies, read<Order::allows_and_waits>, reverse_there<Waits::store_only>>},
    {"between_waits_late", run_in_turn<false, kCopies, pass<Order::allows_and_waits>, reverse_there<Waits::none>>},
    {"between_never_waits", run_in_turn<false, kCopies, pass<Order::only_allows>, kReverses>},
    {"between_ends_without_wait", run_in_turn<false, kCopies, pass<Order::neither>, kReverses>},
    {"first_never_waits", run_in_turn<true, kCopies>},
};
const int kGroupCount = sizeof(kGroups) / sizeof(kGroups[0]);

const Tile kRings[] = {
    {"sound", run_ring<RingFault::none>},
    {"arrives_before_wait", run_ring<RingFault::arrives_before_wait>},
    {"arrives_at_own_only", run_ring<RingFault::arrives_at_own_only>},
    {"one_warp_arrives", run_ring<RingFault::one_warp_arrives>},
    {"never_waits_for_readers", run_ring<RingFault::never_waits_for_readers>},
    {"no_last_barrier", run_ring<RingFault::no_last_barrier>},
    {"expects_half", run_ring<RingFault::expects_half>},
};
const int kRingCount = sizeof(kRings) / sizeof(kRings[0]);

}  // namespace broken
