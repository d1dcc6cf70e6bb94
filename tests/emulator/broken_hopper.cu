// out = a b in tiles, as Hopper's tensor-core kernels do it: a ring of stages that one thread fills by tile copies,
// barriers that tell when they have landed, multiplications by whole warpgroups; once sound, then with one fault each.
// See broken.h.
#include "broken.h"
#include "broken_map.cuh"
#include "cuda/device.cuh"
#include "hopper_instructions.cuh"

namespace broken {
namespace {

using ijckd::barrier_expect;
using ijckd::barrier_init;
using ijckd::barrier_init_fence;
using ijckd::barrier_wait;
using ijckd::load_tile;
using ijckd::matrix_descriptor;
using ijckd::multiply_add_64xNx16;
using ijckd::warpgroup_commit;
using ijckd::warpgroup_fence;
using ijckd::warpgroup_wait;

enum class Fault {
  none,
  none_told_by_barrier,  // that copies have landed, instead of each thread's own wait
  none_loading,          // from the stages, too
  no_wait,
  wrong_parity,
  one_thread_waits,
  expects_too_little,
  expects_too_much,
  expects_first_only,
  expects_twice,
  one_arrival_too_many,
  never_expects,
  stage_never_filled,
  no_barrier_before_refill,
  refill_before_wait,
  wait_one_too_few,
  no_barrier_after_init,
  no_init,
  init_again,
  no_init_fence,
  init_fence_by_another,
  no_fence,
  no_commit,
  no_final_wait,
  one_warp_waits,
  divergent_lane,
  warp_skips_one,
  warp_commits_sooner,
  descriptors_differ_in_warp,
  descriptors_differ_in_warpgroup,
  seven_warps,
  other_layout,
  past_the_stages,
  misaligned_tile,
  tile_past_shared,
  tile_to_static_shared,
  little_aligned_stages,
  tile_over_barrier,
  barrier_overwritten,
  map_not_encoded,
  map_of_narrow_box,
  map_of_low_box,
  map_of_more_rows,
  map_of_more_columns,
  map_of_misaligned_array,
  map_of_odd_stride,
  map_of_high_box,
  old_driver,
  stores_to_stage,
  stores_before_copy,
  loads_stage_without_wait,
  loads_beside_refill,
  registers_touched,
  results_without_barrier,
  results_before_wait,
  prefetch_past_the_end,
  copy_at_the_end,
  one_of_two_copies_expected,
  one_of_two_copies_expected_and_waited_for,
  multiplication_at_the_end,
  descriptor_step,
  wrong_stride,
  wrong_leading,
  wrong_transposition,
};

constexpr int kTile = 128;           // rows and columns of a block's tile
constexpr int kDepth = 64;           // steps along the sum in a stage: rows of 128 bytes
constexpr int kHopperThreads = 256;  // 2 warpgroups, each with 64 rows of the tile
constexpr int kRing = 3;             // stages
constexpr int kOperandBytes = kTile * kDepth * 2;
constexpr int kStageBytes = 2 * kOperandBytes;
constexpr int kRingBytes = kRing * kStageBytes;
constexpr int kEightRows = 8 * kDepth * 2;  // bytes

struct Maps {
  CUtensorMap a, b;
};

template <Fault kFault>
__device__ unsigned char* ring() {
  if constexpr (kFault == Fault::little_aligned_stages) {
    extern __shared__ __align__(128) unsigned char bytes[];
    return bytes;
  } else {
    extern __shared__ __align__(1024) unsigned char bytes[];
    return bytes;
  }
}

// a [M, K]; b [N, K], or [K, N] if kTransposed; out [M, N].
template <typename T, bool kTransposed, Fault kFault>
__global__ void __launch_bounds__(kHopperThreads)
    hopper_product(const __grid_constant__ Maps maps, float* out, int M, int N, int K) {
  __shared__ uint64_t barriers[kRing];
  unsigned char* stages = ring<kFault>();
  uint64_t* landed = kFault == Fault::tile_over_barrier ? reinterpret_cast<uint64_t*>(stages) : barriers;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, m0 = blockIdx.y * kTile, n0 = blockIdx.x * kTile;
  const int steps = ijckd::ceil_div(K, kDepth);
  if (threadIdx.x == 0 && kFault != Fault::no_init) {
    for (int s = 0; s < kRing; ++s) barrier_init(landed + s, kFault == Fault::one_arrival_too_many ? 2 : 1);
    if (kFault == Fault::init_again) barrier_init(landed, 1);
    if (kFault != Fault::no_init_fence && kFault != Fault::init_fence_by_another) barrier_init_fence();
  }
  if (kFault == Fault::init_fence_by_another && threadIdx.x == 1) barrier_init_fence();
  if (kFault == Fault::stores_before_copy) stages[2 * threadIdx.x] = 0;
  if (kFault != Fault::no_barrier_after_init) __syncthreads();
  if (kFault == Fault::barrier_overwritten && threadIdx.x == 0) landed[1] = 0;

  const auto start = [&](int step) {
    unsigned char *a = stages + step % kRing * kStageBytes, *b = a + kOperandBytes;
    if (kFault == Fault::misaligned_tile) a += 512;
    if (kFault == Fault::tile_past_shared && step % kRing == kRing - 1) b += 1024;
    uint64_t* barrier = landed + step % kRing;
    int bytes = kStageBytes;
    if (kFault == Fault::expects_too_little) bytes -= 16;
    if (kFault == Fault::expects_too_much) bytes += 16;
    if (kFault == Fault::stage_never_filled && step == 1) return barrier_expect(barrier, 0);
    if (kFault != Fault::never_expects && kFault != Fault::expects_first_only) barrier_expect(barrier, bytes);
    if (kFault == Fault::expects_twice) barrier_expect(barrier, 0);
    if (kFault == Fault::tile_to_static_shared)
      load_tile(barriers, maps.a, barrier, step * kDepth, m0);
    else
      load_tile(a, maps.a, barrier, step * kDepth, m0);
    if (kTransposed)
      for (int panel = 0; panel < kTile / 64; ++panel)
        load_tile(b + panel * kDepth * 128, maps.b, barrier, n0 + panel * 64, step * kDepth);
    else
      load_tile(b, maps.b, barrier, step * kDepth, n0);
    if (kFault == Fault::expects_first_only) barrier_expect(barrier, kOperandBytes);
  };
  const auto refill = [&](int step) {
    if (threadIdx.x == 0 && (step + kRing - 1 < steps || kFault == Fault::prefetch_past_the_end))
      start(step + kRing - 1);
  };
  if (threadIdx.x == 0)
    for (int s = 0; s < kRing - 1 && s < steps; ++s) start(s);

  float sum[kTile / 8][4] = {}, loaded = 0;
  for (int step = 0; step < steps; ++step) {
    const uint32_t parity = (step / kRing & 1) ^ (kFault == Fault::wrong_parity);
    constexpr bool kOneWaits = kFault == Fault::one_thread_waits || kFault == Fault::none_told_by_barrier;
    if (kFault != Fault::no_wait && (!kOneWaits || threadIdx.x == 0)) barrier_wait(landed + step % kRing, parity);
    if (kFault == Fault::none_told_by_barrier) __syncthreads();
    unsigned char *a = stages + step % kRing * kStageBytes, *b = a + kOperandBytes;
    if (kFault == Fault::none_loading) loaded += static_cast<float>(reinterpret_cast<const T*>(a)[threadIdx.x]);
    if (kFault == Fault::stores_to_stage) a[2 * threadIdx.x] = 0;
    if (kFault == Fault::past_the_stages) b += kRingBytes;
    const int stride = kFault == Fault::wrong_stride ? kEightRows / 2 : kEightRows;
    int leading = kFault == Fault::wrong_leading ? 0 : kTransposed ? kDepth * 128 : 16;
    int rows = warp / 4 * 64;
    if (kFault == Fault::descriptors_differ_in_warpgroup) rows = warp * 16;
    if (kFault == Fault::descriptors_differ_in_warp) rows = lane % 2 * 64;
    uint64_t descriptor_a = matrix_descriptor(a + rows * 128, 16, stride);
    uint64_t descriptor_b = matrix_descriptor(b, leading, kEightRows);
    if (kFault == Fault::other_layout) descriptor_b ^= uint64_t(3) << 62;
    if (kFault != Fault::no_fence) warpgroup_fence();
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
      constexpr bool kRead = kTransposed != (kFault == Fault::wrong_transposition);
      const uint64_t step_b = kTransposed ? 16 * 128 : 32, step_a = kFault == Fault::descriptor_step ? 16 : 32;
      const uint64_t at_a = descriptor_a + (k * step_a >> 4), at_b = descriptor_b + (k * step_b >> 4);
      if (kFault == Fault::warp_skips_one && warp == 1 && k == 2) continue;
      if (kFault == Fault::warp_commits_sooner && warp == 1 && k == 2) {
        warpgroup_commit();
        warpgroup_fence();
      }
      if (kFault == Fault::divergent_lane && lane == 7)
        multiply_add_64xNx16<T, kRead>(sum, at_a, at_b);
      else
        multiply_add_64xNx16<T, kRead>(sum, at_a, at_b);
      if (kFault == Fault::registers_touched) sum[3][1] += 1;
    }
    if (kFault != Fault::no_commit) warpgroup_commit();
    if (kFault == Fault::refill_before_wait) {
      __syncthreads();
      refill(step);
    }
    if (kFault != Fault::one_warp_waits || warp % 4 == 0) warpgroup_wait<kFault == Fault::wait_one_too_few ? 2 : 1>();
    if (kFault != Fault::no_barrier_before_refill) __syncthreads();
    if (kFault != Fault::refill_before_wait) refill(step);
    if (kFault == Fault::loads_beside_refill && step > 0)
      loaded += stages[(step - 1) % kRing * kStageBytes + threadIdx.x];
  }
  if (kFault == Fault::loads_stage_without_wait && threadIdx.x == 0) start(steps);
  if (kFault != Fault::no_final_wait && kFault != Fault::results_before_wait) warpgroup_wait<0>(sum);

  // The results go through the ring's memory, as those of a kernel that stores whole rows.
  float* results = reinterpret_cast<float*>(stages + kRingBytes) - kTile * kTile;
  if (kFault != Fault::results_without_barrier) __syncthreads();
  if (kFault == Fault::loads_stage_without_wait) loaded += stages[steps % kRing * kStageBytes + threadIdx.x];
  sum[0][0] += 0 * loaded;
  for (int j = 0; j < kTile / 8; ++j)
    for (int h = 0; h < 2; ++h) {
      float* to = results + (warp * 16 + lane / 4 + 8 * h) * kTile + 8 * j + lane % 4 * 2;
      to[0] = sum[j][2 * h], to[1] = sum[j][2 * h + 1];
    }
  if (kFault == Fault::results_before_wait) warpgroup_wait<0>(sum);
  __syncthreads();
  for (int i = threadIdx.x; i < kTile * kTile; i += kHopperThreads) {
    const int row = m0 + i / kTile, col = n0 + i % kTile;
    if (row < M && col < N) out[int64_t(row) * N + col] = results[i];
  }
  if (kFault == Fault::copy_at_the_end && threadIdx.x == 0) start(steps);
  if (kFault == Fault::one_of_two_copies_expected || kFault == Fault::one_of_two_copies_expected_and_waited_for) {
    uint64_t* barrier = landed + steps % kRing;
    if (threadIdx.x == 0) {
      barrier_expect(barrier, kOperandBytes);
      load_tile(stages, maps.a, barrier, 0, m0);
      load_tile(stages + kOperandBytes, maps.a, barrier, 0, m0);
    }
    barrier_wait(barrier, steps / kRing & 1);
    if (kFault == Fault::one_of_two_copies_expected_and_waited_for) barrier_wait(barrier, ~(steps / kRing) & 1);
  }
  if (kFault == Fault::multiplication_at_the_end) {
    const uint64_t first = matrix_descriptor(stages, 16, kEightRows);
    warpgroup_fence();
    multiply_add_64xNx16<T, false>(sum, first, first);
    warpgroup_commit();
  }
}

template <typename T, bool kTransposed, Fault kFault>
int run(const void* a, const void* b, float* out, int M, int N, int K) {
  Maps maps{};
  int rows = M, cols = K, stride = K, box_rows = kTile, box_cols = kDepth;
  if (kFault == Fault::map_of_more_rows) rows += 1;
  if (kFault == Fault::map_of_more_columns) cols += 8, stride += 8;
  if (kFault == Fault::map_of_odd_stride) stride += 1;
  if (kFault == Fault::map_of_misaligned_array) a = static_cast<const T*>(a) + 1, cols -= 1;
  if (kFault == Fault::map_of_narrow_box) box_cols /= 2;
  if (kFault == Fault::map_of_low_box) box_rows /= 2;
  if (kFault == Fault::map_of_high_box) box_rows = 257;
  const unsigned driver = kFault == Fault::old_driver ? 11080 : 12000;
  if (const int error = encode<T>(maps.a, a, rows, cols, stride, box_rows, box_cols, driver)) return error;
  if (const int error = kTransposed ? encode<T>(maps.b, b, K, N, N, kDepth, 64, driver)
                                    : encode<T>(maps.b, b, N, K, K, kTile, kDepth, driver))
    return error;
  if (kFault == Fault::map_not_encoded) maps.b = {};
  const dim3 grid(ijckd::ceil_div(N, kTile), ijckd::ceil_div(M, kTile));
  const int threads = kFault == Fault::seven_warps ? 224 : kHopperThreads;
  return ijckd::launch_sharing(kRingBytes, hopper_product<T, kTransposed, kFault>, grid, threads, nullptr, maps, out, M,
                               N, K);
}

template <Fault kFault, bool kTransposed = false>
constexpr auto broken_run = run<__nv_bfloat16, kTransposed, kFault>;

}  // namespace

const Tile kHopperTiles[] = {
    {"sound bf16", run<__nv_bfloat16, false, Fault::none>},
    {"sound f16", run<__half, false, Fault::none>},
    {"sound bf16 transposed", run<__nv_bfloat16, true, Fault::none>},
    {"sound f16 transposed", run<__half, true, Fault::none>},
    {"sound told by barrier", broken_run<Fault::none_told_by_barrier>},
    {"sound loading", broken_run<Fault::none_loading>},
    {"no_wait", broken_run<Fault::no_wait>},
    {"wrong_parity", broken_run<Fault::wrong_parity>},
    {"one_thread_waits", broken_run<Fault::one_thread_waits>},
    {"expects_too_little", broken_run<Fault::expects_too_little>},
    {"expects_too_much", broken_run<Fault::expects_too_much>},
    {"expects_first_only", broken_run<Fault::expects_first_only>},
    {"expects_twice", broken_run<Fault::expects_twice>},
    {"one_arrival_too_many", broken_run<Fault::one_arrival_too_many>},
    {"never_expects", broken_run<Fault::never_expects>},
    {"stage_never_filled", broken_run<Fault::stage_never_filled>},
    {"no_barrier_before_refill", broken_run<Fault::no_barrier_before_refill>},
    {"refill_before_wait", broken_run<Fault::refill_before_wait>},
    {"wait_one_too_few", broken_run<Fault::wait_one_too_few>},
    {"no_barrier_after_init", broken_run<Fault::no_barrier_after_init>},
    {"no_init", broken_run<Fault::no_init>},
    {"init_again", broken_run<Fault::init_again>},
    {"no_init_fence", broken_run<Fault::no_init_fence>},
    {"init_fence_by_another", broken_run<Fault::init_fence_by_another>},
    {"no_fence", broken_run<Fault::no_fence>},
    {"no_commit", broken_run<Fault::no_commit>},
    {"no_final_wait", broken_run<Fault::no_final_wait>},
    {"one_warp_waits", broken_run<Fault::one_warp_waits>},
    {"divergent_lane", broken_run<Fault::divergent_lane>},
    {"warp_skips_one", broken_run<Fault::warp_skips_one>},
    {"warp_commits_sooner", broken_run<Fault::warp_commits_sooner>},
    {"descriptors_differ_in_warp", broken_run<Fault::descriptors_differ_in_warp>},
    {"descriptors_differ_in_warpgroup", broken_run<Fault::descriptors_differ_in_warpgroup>},
    {"seven_warps", broken_run<Fault::seven_warps>},
    {"other_layout", broken_run<Fault::other_layout>},
    {"past_the_stages", broken_run<Fault::past_the_stages>},
    {"misaligned_tile", broken_run<Fault::misaligned_tile>},
    {"tile_past_shared", broken_run<Fault::tile_past_shared>},
    {"tile_to_static_shared", broken_run<Fault::tile_to_static_shared>},
    {"little_aligned_stages", broken_run<Fault::little_aligned_stages>},
    {"tile_over_barrier", broken_run<Fault::tile_over_barrier>},
    {"barrier_overwritten", broken_run<Fault::barrier_overwritten>},
    {"map_not_encoded", broken_run<Fault::map_not_encoded>},
    {"map_of_narrow_box", broken_run<Fault::map_of_narrow_box>},
    {"map_of_low_box", broken_run<Fault::map_of_low_box>},
    {"map_of_more_rows", broken_run<Fault::map_of_more_rows>},
    {"map_of_more_columns", broken_run<Fault::map_of_more_columns>},
    {"map_of_misaligned_array", broken_run<Fault::map_of_misaligned_array>},
    {"map_of_odd_stride", broken_run<Fault::map_of_odd_stride>},
    {"map_of_high_box", broken_run<Fault::map_of_high_box>},
    {"old_driver", broken_run<Fault::old_driver>},
    {"stores_to_stage", broken_run<Fault::stores_to_stage>},
    {"stores_before_copy", broken_run<Fault::stores_before_copy>},
    {"loads_stage_without_wait", broken_run<Fault::loads_stage_without_wait>},
    {"loads_beside_refill", broken_run<Fault::loads_beside_refill>},
    {"registers_touched", broken_run<Fault::registers_touched>},
    {"results_without_barrier", broken_run<Fault::results_without_barrier>},
    {"results_before_wait", broken_run<Fault::results_before_wait>},
    {"prefetch_past_the_end", broken_run<Fault::prefetch_past_the_end>},
    {"copy_at_the_end", broken_run<Fault::copy_at_the_end>},
    {"one_of_two_copies_expected", broken_run<Fault::one_of_two_copies_expected>},
    {"one_of_two_copies_expected_and_waited_for", broken_run<Fault::one_of_two_copies_expected_and_waited_for>},
    {"multiplication_at_the_end", broken_run<Fault::multiplication_at_the_end>},
    {"descriptor_step", broken_run<Fault::descriptor_step>},
    {"wrong_stride", broken_run<Fault::wrong_stride>},
    {"wrong_transposition", broken_run<Fault::wrong_transposition>},
    {"wrong_leading transposed", broken_run<Fault::wrong_leading, true>},
};
const int kHopperTileCount = sizeof(kHopperTiles) / sizeof(kHopperTiles[0]);

}  // namespace broken
