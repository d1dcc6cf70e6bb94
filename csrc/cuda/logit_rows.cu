// Kernel of classifier_tiles.h:logit_rows and logit_products.
#include <cooperative_groups.h>

#include "anchors.cuh"
#include "cuda/classifier_tiles.h"
#include "hopper_tile.cuh"
#include "row_loss.cuh"

namespace ijckd {
namespace {

// Whether W pooled_t serves row b instead of W d.
__device__ __forceinline__ bool far_row(const LogitRows& p, int64_t b) {
  const RowParts& s = p.squares;
  if (!s.pooled) return false;
  return far_from(row_total(s.fm, s.parts, p.rows.B, b), row_total(s.pooled, s.parts, p.rows.B, b));
}

// Which row of logits, with delta beneath them, is row `row` of the stack's product; -1: none.
__device__ __forceinline__ int64_t row_of(const LogitRows& p, int64_t row) {
  const int64_t B = p.rows.B;
  if (row < B || !p.squares.pooled) return row;
  const bool of_pooled = row >= 2 * B;
  if (far_row(p, row - (of_pooled ? 2 * B : B)) != of_pooled) return -1;
  return of_pooled ? row - B : row;
}

// at [kRows] = row_of the rows from m0; whether any serves. All warps come to the same answer, each by itself; at is
// there after the next barrier.
template <int kRows>
__device__ __forceinline__ bool find_rows(const LogitRows& p, int m0, int64_t stacked, int* at) {
  int found = 0;
  for (int m = threadIdx.x % 32; m < kRows; m += 32) {
    const int row = m0 + m < stacked ? int(row_of(p, m0 + m)) : -1;
    if (threadIdx.x < 32) at[m] = row;
    if (row >= 0) found = 1;
  }
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) found += shuffle_xor(found, mask);
  return found != 0;
}

__host__ __device__ inline int64_t stacked_rows(const LogitRows& p) {
  return p.rows.B * (p.squares.pooled ? 3 : p.rows.delta ? 2 : 1);
}

// Shared memory for a row's sums, then for what soft_row.h keeps of it, before the row itself.
constexpr int kSlotBytes = 1024, kSumBytes = 512;
static_assert(kSumBytes >= 8 * sizeof(RowTops<float>) && kSumBytes >= 8 * sizeof(RowExponentials<float>) &&
              kSlotBytes >= kSumBytes + sizeof(SoftRow<float>));

// kept [K] = row: the passes over it then wait for shared memory only, once the loads of eight elements per thread have
// been under way together.
template <int kThreads>
__device__ __forceinline__ void keep_row(float* kept, const float* row, int K) {
  constexpr int kAtOnce = 8;
  for (int first = threadIdx.x; first < K; first += kAtOnce * kThreads) {
    float x[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) x[i] = row[first + i * kThreads < K ? first + i * kThreads : K - 1];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (first + i * kThreads < K) kept[first + i * kThreads] = x[i];
  }
}

// What a launch does: all; or one half of it, where the driver refuses launches whose blocks wait for one another, or
// where the other half is not wanted.
enum class Part { both, products, rows };

// Blocks go through the rows' tiles first, so that those in flight together share their classes; then, all together,
// each takes rows of its own. One with nothing to multiply helps with the rows. A tile of which no row serves is left
// out: where all rows are far, or none is, the third part of the stack costs nothing. kSoft: row_loss.cuh's.
template <typename T, typename Shape, bool kSoft>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kResident)
    logit_rows_tile_kernel(const LogitRows p, const __grid_constant__ Operands<T, Shape> from, const Part part) {
  extern __shared__ __align__(1024) unsigned char stages[];
  __shared__ int at[Shape::kM];  // where the tile's rows go
  allow_next_launch();
  wait_for_earlier_launches();
  if (blockIdx.x == 0 && threadIdx.x == 0 && p.arrived) *p.arrived = 0;
  // Few registers are left beside a large tile's: sizes in 32 bits, addresses when they are needed.
  const int rows = int(p.rows.B), K = int(p.rows.K), stacked = int(stacked_rows(p));
  const int tiles_m = ceil_div(stacked, Shape::kM), tiles = part == Part::rows ? 0 : tiles_m * ceil_div(K, Shape::kN),
            steps = ceil_div(p.Ct, kDepth);
  for (int tile = blockIdx.x, before = 0; tile < tiles; tile += gridDim.x) {
    const int m0 = tile % tiles_m * Shape::kM, n0 = tile / tiles_m * Shape::kN;
    if (!find_rows<Shape::kM>(p, m0, stacked, at)) continue;
    typename Shape::Accumulators acc = {};
    T* shared = reinterpret_cast<T*>(stages);
    if constexpr (Shape::kHopper)
      multiply<Shape, B::kByColumn>(acc, shared, steps, tile_at<B::kByColumn>(from, m0, n0), before);
    else
      multiply<Shape, B::kByColumn>(acc, shared, steps, tile_at<B::kByColumn>(from, m0, n0));
    before += steps;
    for_pairs<Shape>(acc, m0, n0, stacked, K, [&](int64_t row, int k, float2 v) {
      const int to_row = at[row - m0];
      if (to_row < 0) return;
      // rows of an odd number of floats are not aligned to pairs
      float* to = static_cast<float*>(p.rows.logits) + to_row * p.rows.K + k;
      to[0] = v.x;
      if (k + 1 < K) to[1] = v.y;
    });
    __syncthreads();  // the last stage has been read, and `at`
  }
  if (part == Part::products) return;
  if (part == Part::both) cooperative_groups::this_grid().sync();

  const RowSlots<float> slots{reinterpret_cast<RowTops<float>*>(stages),
                              reinterpret_cast<RowExponentials<float>*>(stages), reinterpret_cast<float*>(stages),
                              reinterpret_cast<SoftRow<float>*>(stages + kSumBytes)};
  float* kept = reinterpret_cast<float*>(stages + kSlotBytes);  // [2, K]: the row's logits and delta, if they fit
  const int arrays = p.rows.delta ? 2 : 1;
  const bool keep = int64_t(arrays) * K * 4 <= Shape::kSharedBytes - kSlotBytes;
  for (int64_t b = blockIdx.x; b < rows; b += gridDim.x) {
    const float* logits = row_of_matrix<float>(p.rows.logits, b, K);
    const float* delta = row_of_matrix<float>(p.rows.delta, b, K);
    if (keep) {
      keep_row<Shape::kThreads>(kept, logits, K);
      if (delta) keep_row<Shape::kThreads>(kept + K, delta, K);
      __syncthreads();
      logits = kept;
      if (delta) delta = kept + K;
    }
    row_loss_by_block<Shape::kThreads, kSoft>(p.rows, b, logits, delta, far_row(p, b), static_cast<T*>(p.gradient),
                                              p.stride, slots);
  }
}

template <typename T>
int start(const LogitRows& l, Part wanted, void* stream) {
  const int64_t rows = l.rows.B, K = l.rows.K, stacked = stacked_rows(l);
  return with_tile(l.stage, stacked, K, [&](auto shape) {
    using Shape = decltype(shape);
    Operands<T, Shape> from{};
    if (const int error =
            make_operands<B::kByColumn>(&from, matrix<T>(l.stack, stacked, l.Ct), matrix<T>(l.weight, K, l.Ct)))
      return error;
    const int64_t tiles = int64_t(ceil_div(stacked, Shape::kM)) * ceil_div(K, Shape::kN);
    const auto kernel =
        l.rows.weights.soft() ? logit_rows_tile_kernel<T, Shape, true> : logit_rows_tile_kernel<T, Shape, false>;
    const auto part = [&](int64_t blocks, Part which) {
      return launch_dependent(Shape::kSharedBytes, kernel, dim3(unsigned(blocks)), Shape::kThreads, stream, l, from,
                              which);
    };
    if (wanted == Part::products) return part(tiles, wanted);
    const auto together = [&] {
      const int blocks = int(tiles > rows ? tiles : rows);
      return launch_resident(Shape::kSharedBytes, kernel, blocks, Shape::kThreads, stream, l, from, Part::both);
    };
    return either(kCooperative, together, [&] {
      const int error = part(tiles, Part::products);
      return error ? error : part(rows, Part::rows);
    });
  });
}

}  // namespace

int logit_rows(const LogitRows& l, void* stream) {
  return l.dtype == DType::bf16 ? start<__nv_bfloat16>(l, Part::both, stream) : start<__half>(l, Part::both, stream);
}

int logit_products(const LogitProducts& l, void* stream) {
  LogitRows products{};
  products.stage = l.stage, products.stack = l.stack, products.weight = l.weight, products.squares = l.squares;
  products.rows.logits = l.logits, products.rows.delta = l.logits + l.B * l.K;
  products.rows.B = l.B, products.rows.K = l.K, products.Ct = l.Ct;
  return l.dtype == DType::bf16 ? start<__nv_bfloat16>(products, Part::products, stream)
                                : start<__half>(products, Part::products, stream);
}

}  // namespace ijckd
