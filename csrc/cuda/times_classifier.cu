// Kernel of classifier_tiles.h:times_classifier.
#include "classifier_rows.cuh"
#include "split_tile.cuh"

namespace ijckd {
namespace {

// The losses of this block's rows, of all of which kLossBlocks have a fixed share: the first threads of RowPairs take
// what logit_rows has made of them, both the feature match in its parts.
template <int kThreads>
__device__ void mean_rows(const TimesClassifier& p, double* slots, int block) {
  constexpr int kRows = kThreads / 2;
  const LossWeights& w = p.weights;
  LossSums sums;
  for (int64_t first = block * kRows; first < p.B; first += kLossBlocks * kRows) {
    const int64_t row = first + RowPair::row(), b = row < p.B ? row : p.B - 1;
    const auto part = [&](int i, double weight) { return weight != 0 ? p.part_rows[i * p.B + b] : 0; };
    const float ce = part(kPartCe, w.ce), sr = part(kPartSr, w.sr), kl = part(kPartKl, w.kl);
    const int64_t hits = p.top1_rows[b];
    const float fm = w.fm != 0 ? RowPair::total(p.rows.fm, p.rows.parts, p.B, b) : 0;
    float soft[kParts - kPartHard];
#pragma unroll
    for (int i = kPartHard; i < kParts; ++i) soft[i - kPartHard] = part(i, w.of_part(i));
    if (row >= p.B || RowPair::half() != 0) continue;
    sums.hits += double(hits);
    sums.part[kPartCe] += ce, sums.part[kPartSr] += sr, sums.part[kPartKl] += kl, sums.part[kPartFm] += fm;
#pragma unroll
    for (int i = kPartHard; i < kParts; ++i) sums.part[i] += soft[i - kPartHard];
  }
  store_losses<kThreads>(p.losses, sums, w, p.B, p.K, p.Ct, slots, block);
}

__host__ __device__ __forceinline__ int loss_blocks(const TimesClassifier& p) {
  return p.losses.loss ? kLossBlocks : 0;
}

// The last blocks take the losses, the others a tile of dz each: with the first ones for them registers did
// not suffice.
template <typename T, typename Shape, Cluster kCluster>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kResident)
    times_classifier_tile_kernel(const TimesClassifier p, const __grid_constant__ Operands<T, Shape> from) {
  extern __shared__ __align__(1024) unsigned char stages[];
  wait_for_earlier_launches();
  constexpr int kBlocks = kCluster == Cluster::steps ? kSplit : 1;  // to a tile
  using Own = std::conditional_t<kBlocks == 1, Shape, ColumnsOf<Shape, kBlocks>>;
  const int loss_block = int(blockIdx.x) - int(gridDim.x - loss_blocks(p)), tile = blockIdx.x / kBlocks;
  if (loss_block >= 0) return mean_rows<Shape::kThreads>(p, reinterpret_cast<double*>(stages), loss_block);
  const int tiles_m = ceil_div(p.B, Shape::kM), m0 = tile % tiles_m * Shape::kM, steps = ceil_div(p.K, kDepth);
  int n0 = tile / tiles_m * Shape::kN;
  typename Own::Accumulators acc = {};
  const auto copy = tile_at<B::kByDepth>(from, m0, n0);
  if constexpr (kCluster == Cluster::none) {
    multiply<Shape, B::kByDepth>(acc, reinterpret_cast<T*>(stages), steps, copy);
  } else {
    const StepsOf own(steps, cluster_rank(), kBlocks);
    typename Shape::Accumulators part = {};
    multiply<Shape, B::kByDepth>(part, reinterpret_cast<T*>(stages), own.count, steps_from(own.first, copy));
    __syncthreads();  // the last stage has been read
    join<Shape, kBlocks>(acc, part, stages);
    n0 += cluster_rank() * Own::kN;
  }
  const float share = 1 / float(p.batch), c = float(2 * p.weights.fm / (double(p.batch) * double(p.Ct)));
  const auto load = [&](auto& x, int64_t b, const Columns& columns) {
    for (TwoPairs& none : x) none = {};
    if (c != 0) load_two(p.z, p.pooled_t, p.Ct)(x, b, columns);
  };
  for_pairs<TwoPairs, Own>(acc, m0, n0, p.B, p.Ct, load, [&](int64_t b, int n, float2 product, const TwoPairs& of) {
    const int64_t at = b * p.Ct + n;
    const float2 v{share * product.x + c * (of.a.x - of.b.x), share * product.y + c * (of.a.y - of.b.y)};
    store_pair(p.dz + at, v);
    if (p.dz_t) store_pair(static_cast<T*>(p.dz_t) + at, v);
  });
  if constexpr (kBlocks > 1) join_end();
}

template <typename T>
int start_times_classifier(const TimesClassifier& t, void* stream) {
  return with_tile<DeepHopperTile>(t.stage, t.B, t.Ct, [&](auto shape) {
    using Shape = decltype(shape);
    Operands<T, Shape> from{};
    if (t.grad)
      if (const int error =
              make_operands<B::kByDepth>(&from, matrix<T>(t.gradient, t.B, t.stride), matrix<T>(t.weight, t.K, t.Ct)))
        return error;
    const int tiles = t.grad ? ceil_div(t.B, Shape::kM) * ceil_div(t.Ct, Shape::kN) : 0;
    const auto start_split = [&](auto kernel, int split) {
      Start start{loss_blocks(t) + tiles * split, Shape::kThreads, Shape::kSharedBytes};
      start.dependent = true;
      start.cluster = split;
      return launch_as(start, kernel, stream, t, from);
    };
    const auto whole = [&] { return start_split(times_classifier_tile_kernel<T, Shape, Cluster::none>, 1); };
    if constexpr (Shape::kHopper && Shape::kM == 64)
      if (t.grad && worth_splitting(tiles, ceil_div(t.K, kDepth)))
        return either(
            kClusters, [&] { return start_split(times_classifier_tile_kernel<T, Shape, Cluster::steps>, kSplit); },
            whole);
    return whole();
  });
}

}  // namespace

int times_classifier(const TimesClassifier& t, void* stream) {
  return t.dtype == DType::bf16 ? start_times_classifier<__nv_bfloat16>(t, stream)
                                : start_times_classifier<__half>(t, stream);
}

}  // namespace ijckd
