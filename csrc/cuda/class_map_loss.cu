// Kernels of class_map_loss around the products: any shape, any dtype.
#include "block_reduce.cuh"
#include "class_map.h"
#include "class_map_loss.h"
#include "device.cuh"
#include "position_row.h"
#include "row_loss.cuh"

namespace ijckd {
namespace {

constexpr int kThreads = 256;

// Row `row` of all, without a bias: l, and with it t and diff, class by class.
template <typename T, typename A>
struct TwoRows {
  const T *logits, *delta;
  bool far;

  __device__ TwoRows(const ClassMapRows& r, int64_t row)
      : logits(static_cast<const T*>(r.logits) + row * r.K),
        delta(static_cast<const T*>(r.delta) + row * r.K),
        far(r.far ? r.far[row] != 0 : far_from(r.square[row], r.square_t[row])) {}

  __device__ A l(int64_t k) const { return load<A>(logits, k); }
  __device__ A t(int64_t k) const { return far ? load<A>(delta, k) : l(k) - load<A>(delta, k); }
  __device__ A diff(int64_t k) const { return far ? l(k) - load<A>(delta, k) : load<A>(delta, k); }
};

// The distance of an image's class maps, a thread per class of kThreads, and its gradient; of other rows than theirs 0,
// if no other kernel stores them.
template <typename T, typename A, typename G>
__global__ void __launch_bounds__(kThreads) class_maps_kernel(const ClassMapRows r) {
  __shared__ A slots[kThreads / 32];
  allow_next_launch();
  wait_for_earlier_launches();
  const int64_t b = blockIdx.x, k = int64_t(blockIdx.y) * kThreads + threadIdx.x, K = r.K, of_maps = r.P - r.map;
  const A share = r.share ? static_cast<const A*>(r.share)[b] : A(1);
  const auto put = [&](int64_t p, A v) { store(static_cast<G*>(r.gradient) + (b * r.P + p) * r.stride, k, v); };
  if (r.gradient && k < r.stride && !r.weights.of_rows())
    for (int64_t p = 0; p < (k < K ? of_maps : r.P); ++p) put(p, A(0));
  A distance = 0;
  if (k < K) {
    const auto row = [&](int64_t p) { return TwoRows<T, A>(r, b * r.P + p); };
    ClassMap<A> sums;
    for (int64_t p = of_maps; p < r.P; ++p) sums.add(row(p).l(k), row(p).t(k), row(p).diff(k));
    NormalisedMap<A> map(sums);
    for (int64_t p = of_maps; p < r.P; ++p) map.add(row(p).l(k), row(p).t(k), row(p).diff(k));
    distance = map.distance;
    const A c = share * A(2 * r.weights.cam * double(r.P) / (double(r.map) * double(K)));
    if (r.gradient)
      for (int64_t p = of_maps; p < r.P; ++p) put(p, c * map.grad(row(p).l(k), row(p).t(k), row(p).diff(k)));
  }
  distance = block_reduce<kThreads>(distance, slots, Sum{});
  if (threadIdx.x == 0) static_cast<A*>(r.cam_rows)[b * gridDim.y + blockIdx.y] = share * distance;
}

// One block per row: KL and DKD; their gradient is added to the class maps' where there are any.
template <typename T, typename A, typename G>
__global__ void __launch_bounds__(kThreads, 2) position_rows_kernel(const ClassMapRows r) {
  __shared__ RowTops<A> tops[kThreads / 32];
  __shared__ RowExponentials<A> exponentials[kThreads / 32];
  __shared__ A kl[kThreads / 32];
  allow_next_launch();
  wait_for_earlier_launches();
  const int64_t row = blockIdx.x, b = row / r.P, K = r.K;
  const A* bias = static_cast<const A*>(r.bias);
  const BlockPasses<kThreads, A> passes{K, RowSlots<A>{tops, exponentials, kl}};
  const TwoRows<T, A> own(r, row), whole(r, b * r.P);
  const auto biased = [&](A x, int64_t k) { return bias ? x + bias[k] : x; };
  const auto l = [&](int64_t k) { return biased(own.l(k), k); };
  const auto t = [&](int64_t k) { return biased(own.t(k), k); };
  const int64_t label = r.labels[b];
  const bool valid = label >= 0 && label < K;
  const bool right = passes.first_most(t) == label;
  const bool right_at_all = passes.first_most([&](int64_t k) { return biased(whole.t(k), k); }) == label;
  A factor = r.share ? static_cast<const A*>(r.share)[b] : A(1);
  if (right != right_at_all) factor *= A(2);
  if (!valid) factor = NAN;
  const PositionRow<A> found(r.weights, passes, l, t, K, valid ? label : 0, factor);
  if (r.gradient) {
    G* gradient = static_cast<G*>(r.gradient) + row * r.stride;
    const bool of_maps = r.weights.cam != 0 && row - b * r.P >= r.P - r.map;
    for (int64_t k = threadIdx.x; k < K; k += kThreads)
      store(gradient, k, found.grad(passes, k, l(k), t(k)) + (of_maps ? load<A>(gradient, k) : A(0)));
    for (int64_t k = K + threadIdx.x; k < r.stride; k += kThreads) store(gradient, k, A(0));
  }
  if (threadIdx.x != 0) return;
  for (int part = 0; part < kMapCam; ++part) static_cast<A*>(r.part_rows)[row * kMapCam + part] = found.values[part];
  if (!valid && row == b * r.P) atomicAdd(reinterpret_cast<unsigned long long*>(r.counts + kBadLabels), 1ull);
}

// One block: means by a fixed tree and their weighted sum.
template <typename A>
__global__ void class_map_sum_kernel(const ClassMapSum s, const int64_t cam_parts) {
  __shared__ double slots[kThreads / 32];
  double loss = 0;
  for (int i = 0; i < kMapParts; ++i) {
    const double weight = s.weights.of_part(i);
    double v = 0;
    if (weight != 0) {
      const A* from = i == kMapCam ? static_cast<const A*>(s.cam_rows) : static_cast<const A*>(s.part_rows) + i;
      const int64_t n = i == kMapCam ? s.B * cam_parts : s.B * s.P, apart = i == kMapCam ? 1 : kMapCam;
      for (int64_t j = threadIdx.x; j < n; j += kThreads) v += double(from[j * apart]);
      v = block_reduce<kThreads>(v, slots, Sum{}) /
          (double(s.B) * (i == kMapCam ? double(s.K) * double(s.map) : double(s.P)));
      loss += weight * v;
    }
    if (threadIdx.x == 0) static_cast<A*>(s.parts)[i] = A(v);
  }
  if (threadIdx.x == 0) *static_cast<A*>(s.loss) = A(loss);
}

template <typename T, typename A, typename G>
int start(const ClassMapRows& r, void* stream) {
  if (r.weights.cam != 0) {
    const dim3 grid(static_cast<unsigned>(r.B), static_cast<unsigned>(cam_parts(r.K)));
    if (const int error = launch_dependent(0, class_maps_kernel<T, A, G>, grid, kThreads, stream, r)) return error;
  }
  if (!r.weights.of_rows()) return 0;
  return launch_dependent(0, position_rows_kernel<T, A, G>, r.B * r.P, kThreads, stream, r);
}

}  // namespace

int64_t cam_parts(int64_t K) { return ceil_div(K, kThreads); }

int class_map_rows(const ClassMapRows& r, void* stream) {
  if (r.dtype == DType::f32 && r.gradient_dtype == DType::bf16) return start<float, float, __nv_bfloat16>(r, stream);
  if (r.dtype == DType::f32 && r.gradient_dtype == DType::f16) return start<float, float, __half>(r, stream);
  return dispatch(r.dtype, [&](auto t, auto a) { return start<decltype(t), decltype(a), decltype(t)>(r, stream); });
}

int class_map_sum(const ClassMapSum& s, void* stream) {
  return dispatch(s.dtype, [&](auto, auto a) {
    return launch(class_map_sum_kernel<decltype(a)>, 1, kThreads, stream, s, cam_parts(s.K));
  });
}

}  // namespace ijckd
