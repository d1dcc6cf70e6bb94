// Kernels of classifier_loss around the library's GEMMs: any shape, any dtype; the GPU's oracle for faster ones.
#include "block_reduce.cuh"
#include "classifier_loss.h"
#include "device.cuh"
#include "row_loss.cuh"

namespace ijckd {
namespace {

constexpr int kThreads = 256;

// One block per sample. kSoft: row_loss.cuh's; a kernel of its own, so that its registers are not the others'.
template <typename T, typename A, bool kSoft>
__global__ void row_loss_kernel(RowLoss r) {
  __shared__ RowTops<A> tops[kThreads / 32];
  __shared__ RowExponentials<A> exponentials[kThreads / 32];
  __shared__ A kl[kThreads / 32];
  __shared__ int64_t soft[kSoft ? ceil_div(sizeof(SoftRow<A>), sizeof(int64_t)) : 1];
  const int64_t b = blockIdx.x;
  row_loss_by_block<kThreads, kSoft>(r, b, row_of_matrix<T>(r.logits, b, r.K), row_of_matrix<T>(r.delta, b, r.K),
                                     r.far && r.far[b], static_cast<T*>(r.logits), r.K,
                                     RowSlots<A>{tops, exponentials, kl, reinterpret_cast<SoftRow<A>*>(soft)});
}

// One block per row.
template <typename T, typename A>
__global__ void stack_rows_kernel(const StackRows s) {
  __shared__ A slots[kThreads / 32];
  const int64_t b = blockIdx.x, at = b * s.Ct;
  const A *z = static_cast<const A*>(s.z) + at, *from = static_cast<const A*>(s.d) + at;
  if (s.pooled_t) {
    const A* pooled_t = static_cast<const A*>(s.pooled_t) + at;
    const auto square = [&](const A* v) {
      A sum = 0;
      for (int64_t c = threadIdx.x; c < s.Ct; c += kThreads) sum += v[c] * v[c];
      return block_reduce<kThreads>(sum, slots, Sum{});
    };
    const A square_d = square(from);
    const bool far = far_from(square_d, square(pooled_t));
    if (threadIdx.x == 0) s.far[b] = far;
    if (far) from = pooled_t;
  }
  T *to = static_cast<T*>(s.stack) + at, *beneath = to + s.B * s.Ct;
  for (int64_t c = threadIdx.x; c < s.Ct; c += kThreads) {
    store(to, c, z[c]);
    store(beneath, c, from[c]);
  }
}

// One block: means over B by a fixed tree, the weighted sum, the hits.
template <typename A>
__global__ void loss_sum_kernel(LossSum s) {
  __shared__ double slots[kThreads / 32];
  const A* rows = static_cast<const A*>(s.part_rows);
  double loss = 0;
  for (int i = 0; i < kParts; ++i) {
    double v = 0;
    const double weight = s.weights.of_part(i), scale = 1 / part_terms(i, s.K, s.Ct);
    if (weight != 0) {
      for (int64_t b = threadIdx.x; b < s.B; b += kThreads) v += double(rows[i * s.B + b]);
      v = block_reduce<kThreads>(v, slots, Sum{}) * scale / double(s.B);
      loss += weight * v;
    }
    if (threadIdx.x == 0) static_cast<A*>(s.parts)[i] = A(v);
  }
  double hits = 0;  // exact: far below 2^53
  for (int64_t b = threadIdx.x; b < s.B; b += kThreads) hits += double(s.top1_rows[b]);
  hits = block_reduce<kThreads>(hits, slots, Sum{});
  if (threadIdx.x == 0) {
    *static_cast<A*>(s.loss) = A(loss);
    *s.top1 = static_cast<int64_t>(hits);
  }
}

// One thread per element: dz = share dz_w + c d.
template <typename T, typename A>
__global__ void feature_grad_kernel(const T* dz_w,  // [B, Ct]
                                    const A* d,     // [B, Ct] or null
                                    A* dz,          // [B, Ct] out
                                    int64_t n, A share, A c) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < n) dz[i] = share * load<A>(dz_w, i) + (d ? c * d[i] : A(0));
}

}  // namespace

int row_loss(const RowLoss& r, void* stream) {
  return dispatch(r.dtype, [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    const auto kernel = r.weights.soft() ? row_loss_kernel<T, A, true> : row_loss_kernel<T, A, false>;
    return launch(kernel, r.B, kThreads, stream, r);
  });
}

int stack_rows(const StackRows& s, void* stream) {
  return dispatch(s.dtype, [&](auto t, auto a) {
    return launch(stack_rows_kernel<decltype(t), decltype(a)>, s.B, kThreads, stream, s);
  });
}

int loss_sum(const LossSum& s, void* stream) {
  return dispatch(s.dtype, [&](auto, auto a) { return launch(loss_sum_kernel<decltype(a)>, 1, kThreads, stream, s); });
}

int feature_grad(const FeatureGrad& f, void* stream) {
  return dispatch(f.dtype, [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    const int64_t n = f.B * f.Ct;
    return launch(feature_grad_kernel<T, A>, ceil_div(n, kThreads), kThreads, stream, static_cast<const T*>(f.dz_w),
                  static_cast<const A*>(f.d), static_cast<A*>(f.dz), n, A(1 / double(f.batch)),
                  A(2 * f.fm / (double(f.batch) * double(f.Ct))));
  });
}

}  // namespace ijckd
