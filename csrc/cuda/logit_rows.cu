// Kernel of classifier_tiles.h:logit_rows.
#include <cooperative_groups.h>

#include "cuda/classifier_tiles.h"
#include "hopper_tile.cuh"
#include "row_loss.cuh"

namespace ijckd {
namespace {

// Blocks go through the rows' tiles first, so that those in flight together share their classes; then, all together,
// each takes rows of its own. One with nothing to multiply helps with the rows.
template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 2)
    logit_rows_tile_kernel(const LogitRows p, const __grid_constant__ Operands<T, Shape> from) {
  extern __shared__ __align__(1024) unsigned char stages[];
  const int64_t rows = p.rows.B, K = p.rows.K, stacked = p.rows.delta ? 2 * rows : rows;
  const int tiles_m = ceil_div(stacked, Shape::kM), tiles = tiles_m * ceil_div(K, Shape::kN),
            steps = ceil_div(p.Ct, kDepth);
  float* logits = static_cast<float*>(p.rows.logits);
  for (int tile = blockIdx.x, before = 0; tile < tiles; tile += gridDim.x, before += steps) {
    const int m0 = tile % tiles_m * Shape::kM, n0 = tile / tiles_m * Shape::kN;
    typename Shape::Accumulators acc = {};
    T* shared = reinterpret_cast<T*>(stages);
    if constexpr (Shape::kHopper)
      multiply<Shape, B::kByColumn>(acc, shared, steps, tile_at<B::kByColumn>(from, m0, n0), before);
    else
      multiply<Shape, B::kByColumn>(acc, shared, steps, tile_at<B::kByColumn>(from, m0, n0));
    for_pairs<Shape>(acc, m0, n0, stacked, K, [&](int64_t row, int k, float2 v) {
      float* to = logits + row * K + k;  // rows of an odd number of floats are not aligned to pairs
      to[0] = v.x;
      if (k + 1 < K) to[1] = v.y;
    });
    __syncthreads();  // the last stage has been read
  }
  cooperative_groups::this_grid().sync();

  const RowSlots<float> slots{reinterpret_cast<RowTops<float>*>(stages),
                              reinterpret_cast<RowExponentials<float>*>(stages), reinterpret_cast<float*>(stages)};
  for (int64_t b = blockIdx.x; b < rows; b += gridDim.x)
    row_loss_by_block<Shape::kThreads, float>(p.rows, b, static_cast<T*>(p.gradient), p.stride, slots);
}

template <typename T>
int start(const LogitRows& l, void* stream) {
  const int64_t rows = l.rows.B, K = l.rows.K, stacked = l.rows.delta ? 2 * rows : rows;
  return with_tile(l.stage, stacked, K, [&](auto shape) {
    using Shape = decltype(shape);
    Operands<T, Shape> from{};
    if (const int error =
            make_operands<B::kByColumn>(&from, matrix<T>(l.stack, stacked, l.Ct), matrix<T>(l.weight, K, l.Ct)))
      return error;
    const int64_t tiles = int64_t(ceil_div(stacked, Shape::kM)) * ceil_div(K, Shape::kN);
    return launch_resident(Shape::kSharedBytes, logit_rows_tile_kernel<T, Shape>, tiles > rows ? tiles : rows,
                           Shape::kThreads, stream, l, from);
  });
}

}  // namespace

int logit_rows(const LogitRows& l, void* stream) {
  return l.dtype == DType::bf16 ? start<__nv_bfloat16>(l, stream) : start<__half>(l, stream);
}

}  // namespace ijckd
