// Kernels of classifier_loss around the library's GEMMs: any shape, any dtype; the GPU's oracle for faster ones.
#include "classifier_loss.h"
#include "cuda/classifier_tiles.h"
#include "device.cuh"
#include "row_math.h"

namespace ijckd {
namespace {

constexpr int kThreads = 256;

template <typename A>
struct Best {  // largest logit so far and its class; the first class wins a tie
  A value;
  long long index;
};

struct Better {
  template <typename A>
  __device__ Best<A> operator()(Best<A> a, Best<A> b) const {
    if (b.value > a.value || (b.value == a.value && b.index < a.index)) return b;
    return a;
  }
};

// One block per sample: up to four passes over the row (maximum; sums; teacher's sums and KL; gradient in place), which stays in
// L2. fp32 accumulation for half types; block trees in fixed order: deterministic. A label outside [0, K) gives a NaN loss
// and is counted.
// The gradient's rows, of type G, are `stride` apart and 0 past the classes.
template <typename T, typename A, typename G>
__global__ void row_loss_kernel(RowLoss r, G* gradient, int64_t stride) {
  __shared__ A slots[kThreads];
  __shared__ Best<A> best_slots[kThreads];
  const int64_t b = blockIdx.x, K = r.K;
  const T* logits = static_cast<const T*>(r.logits) + b * K;
  const A* bias = static_cast<const A*>(r.bias);
  const T* delta = r.delta ? static_cast<const T*>(r.delta) + b * K : nullptr;
  const T* logits_t = r.logits_t ? static_cast<const T*>(r.logits_t) + b * K : nullptr;
  const LossWeights& w = r.weights;
  const A temp = A(w.temperature), ninf = -INFINITY;

  const auto logit = [&](int64_t k) { return load<A>(logits, k) + (bias ? bias[k] : A(0)); };
  const auto diff = [&](int64_t k) { return delta ? load<A>(delta, k) : logit(k) - load<A>(logits_t, k); };
  const auto sum = [&](A v) { return block_reduce<kThreads>(v, slots, Sum{}); };

  Best<A> best{ninf, K};
  for (int64_t k = threadIdx.x; k < K; k += kThreads) best = Better{}(best, Best<A>{logit(k), k});
  best = block_reduce<kThreads>(best, best_slots, Better{});

  const long long label_a = r.labels[b], label_b = r.labels_b ? r.labels_b[b] : label_a;
  const bool valid = label_a >= 0 && label_a < K && label_b >= 0 && label_b < K;
  const A smoothing = A(w.label_smoothing);
  const Target<A> q{label_a, label_b, r.labels_b ? static_cast<const A*>(r.mix)[b] : A(1), smoothing, smoothing / A(K)};

  A ce = 0, lse = 0, sr = 0, kl = 0, lse_s = 0, lse_t = 0;
  if (w.ce != 0) {
    A s = 0, total = 0;
    for (int64_t k = threadIdx.x; k < K; k += kThreads) {
      s += exp(logit(k) - best.value);
      total += logit(k);
    }
    lse = best.value + log(sum(s));
    const A mean = sum(total) / A(K);
    if (valid)
      ce = (A(1) - smoothing) * (q.mix * (lse - logit(label_a)) + (A(1) - q.mix) * (lse - logit(label_b))) +
           (smoothing != 0 ? smoothing * (lse - mean) : A(0));
    else
      ce = NAN;
  }
  if (w.sr != 0) {
    A s = 0;
    for (int64_t k = threadIdx.x; k < K; k += kThreads) s += diff(k) * diff(k);
    sr = sum(s);
  }
  if (w.kl != 0) {
    Best<A> top_t{ninf, K};
    for (int64_t k = threadIdx.x; k < K; k += kThreads) top_t = Better{}(top_t, Best<A>{logit(k) - diff(k), k});
    top_t = block_reduce<kThreads>(top_t, best_slots, Better{});
    A s = 0, s_t = 0;
    for (int64_t k = threadIdx.x; k < K; k += kThreads) {
      s += exp((logit(k) - best.value) / temp);
      s_t += exp((logit(k) - diff(k) - top_t.value) / temp);
    }
    lse_s = best.value / temp + log(sum(s));
    lse_t = top_t.value / temp + log(sum(s_t));
    s = 0;
    for (int64_t k = threadIdx.x; k < K; k += kThreads)
      s += exp((logit(k) - diff(k)) / temp - lse_t) * ((lse_s - lse_t) - diff(k) / temp);
    kl = temp * temp * sum(s);
  }
  if (threadIdx.x == 0) {
    A* rows = static_cast<A*>(r.part_rows);
    rows[kPartCe * r.B + b] = ce;
    rows[kPartSr * r.B + b] = sr;
    rows[kPartKl * r.B + b] = kl;
    r.top1_rows[b] = best.index == label_a;
    if (!valid) atomicAdd(reinterpret_cast<unsigned long long*>(r.counts + kBadLabels), 1ull);
  }
  if (!r.grad) return;
  __syncthreads();  // thread 0 may read the labels' logits in `ce` until here: below they are overwritten
  const A c_sr = A(2 * w.sr) / A(K), c_kl = A(w.kl) * temp;
  for (int64_t k = threadIdx.x; k < K; k += kThreads) {
    const A l = logit(k), d = w.sr != 0 || w.kl != 0 ? diff(k) : A(0);
    A g = 0;
    if (w.ce != 0) g += A(w.ce) * (valid ? exp(l - lse) - q.prob(k) : ce);
    if (w.sr != 0) g += c_sr * d;
    if (w.kl != 0) g += c_kl * (exp(l / temp - lse_s) - exp((l - d) / temp - lse_t));
    store(gradient + b * stride, k, g);
  }
  for (int64_t k = K + threadIdx.x; k < stride; k += kThreads) store(gradient + b * stride, k, A(0));
}

// One block: means over B by a fixed tree, the weighted sum, the hits.
template <typename A>
__global__ void loss_sum_kernel(LossSum s) {
  __shared__ double slots[kThreads];
  const double scale[kParts] = {1, 1 / double(s.K), 1 / double(s.Ct), 1};
  const double weight[kParts] = {s.weights.ce, s.weights.sr, s.weights.fm, s.weights.kl};
  const A* rows = static_cast<const A*>(s.part_rows);
  double loss = 0;
  for (int i = 0; i < kParts; ++i) {
    double v = 0;
    if (weight[i] != 0) {
      for (int64_t b = threadIdx.x; b < s.B; b += kThreads) v += double(rows[i * s.B + b]);
      v = block_reduce<kThreads>(v, slots, Sum{}) * scale[i] / double(s.B);
      loss += weight[i] * v;
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
    return launch(row_loss_kernel<T, decltype(a), T>, r.B, kThreads, stream, r, static_cast<T*>(r.logits), r.K);
  });
}

int row_loss_apart(const RowLossApart& r, void* stream) {
  return dispatch(r.dtype, [&](auto t, auto) {
    using T = decltype(t);
    if constexpr (sizeof(T) == 2)
      return launch(row_loss_kernel<float, float, T>, r.rows.B, kThreads, stream, r.rows, static_cast<T*>(r.gradient), r.stride);
    else
      return static_cast<int>(cudaErrorInvalidValue);  // in place, by row_loss
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
