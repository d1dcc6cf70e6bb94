// Kernel of classifier_tiles.h:anchor_rows.
#include "anchors.cuh"
#include "block_reduce.cuh"

namespace ijckd {
namespace {

constexpr int kRowThreads = 128;

// One block per row, two channels per thread and turn.
template <typename T, bool kLogits>
__global__ void __launch_bounds__(kRowThreads) anchor_rows_kernel(const AnchorRows p) {
  __shared__ float slots[kRowThreads / 32];
  allow_next_launch();
  const int64_t b = blockIdx.x;
  RowLabels labels;
  if constexpr (kLogits) labels = RowLabels(p.anchors, b);
  RowDots dots;
  for (int64_t c = 2 * threadIdx.x; c < p.Ct; c += 2 * kRowThreads) {
    const int64_t at = b * p.Ct + c;
    const float2 z = load_pair(p.z + at);
    Neighbours<T, kLogits> with;
    with.load(p.anchors, labels, p.pooled_t, at, c, p.Ct);
    dots.meet(p.anchors, with, z, p.pooled_t, at, p.B, p.Ct);
  }
  const auto sum = [&](float v) { return block_reduce<kRowThreads>(v, slots, Sum{}); };
  if constexpr (kLogits) dots.a = sum(dots.a), dots.b = sum(dots.b);
  dots.square = sum(dots.square);
  if (p.anchors.rows.pooled) dots.pooled = sum(dots.pooled);
  if (threadIdx.x == 0) dots.store(p.anchors, labels, 0, b, p.B);
}

}  // namespace

int anchor_rows(const AnchorRows& a, void* stream) {
  const auto start = [&](auto t) {
    using T = decltype(t);
    return launch(a.anchors.rows.anchor ? anchor_rows_kernel<T, true> : anchor_rows_kernel<T, false>, a.B, kRowThreads,
                  stream, a);
  };
  return a.dtype == DType::bf16 ? start(__nv_bfloat16{}) : start(__half{});
}

}  // namespace ijckd
