// Kernels of connector_match around the library's GEMMs: any shape, any dtype; the GPU's oracle for faster ones.
// Maps are [N, Ct] with channels contiguous, so a warp's 32 threads take 32 neighbouring channels and every access is coalesced.
#include "connector_match.h"
#include "device.cuh"

namespace ijckd {
namespace {

constexpr int kChannels = 32;  // channels a block owns: one warp's width
constexpr int kRows = 8;       // row lanes per channel in the statistics
constexpr int kThreads = 128;  // one thread per channel elsewhere

// Biased mean and variance of one channel per threadIdx.x; grid = Ct / 32. Two passes over y (the second from L2 where it fits):
// the sum of squares minus the square of the sum would cancel. Row lanes are added in index order: deterministic.
template <typename T, typename A>
__global__ void channel_stats_kernel(const T* y,  // [N, Ct]
                                     A* mean,     // [Ct] out
                                     A* var,      // [Ct] out
                                     int64_t N, int64_t Ct) {
  __shared__ A slots[kRows][kChannels];
  const int lane = threadIdx.y;
  const int64_t c = int64_t(blockIdx.x) * kChannels + threadIdx.x;
  const bool inside = c < Ct;

  A s = 0;
  if (inside)
    for (int64_t r = lane; r < N; r += kRows) s += load<A>(y, r * Ct + c);
  slots[lane][threadIdx.x] = s;
  __syncthreads();
  A m = 0;
  for (int i = 0; i < kRows; ++i) m += slots[i][threadIdx.x];
  m /= A(N);
  __syncthreads();  // every lane has read the sums before the squares overwrite them

  s = 0;
  if (inside)
    for (int64_t r = lane; r < N; r += kRows) {
      const A d = load<A>(y, r * Ct + c) - m;
      s += d * d;
    }
  slots[lane][threadIdx.x] = s;
  __syncthreads();
  if (inside && lane == 0) {
    A v = 0;
    for (int i = 0; i < kRows; ++i) v += slots[i][threadIdx.x];
    mean[c] = m;
    var[c] = v / A(N);
  }
}

// The image and channel of a thread that owns one channel of one image; c >= Ct for the last threads of an image. Blocks go
// through the channels of an image, then to the next image, in one dimension: a grid's second one ends at 65,535.
struct Place {
  int64_t b, c;
};

__device__ Place place(int64_t Ct) {
  const unsigned per_image = ceil_div(Ct, kThreads);
  return {blockIdx.x / per_image, int64_t(blockIdx.x % per_image) * kThreads + threadIdx.x};
}

unsigned places(int64_t B, int64_t Ct) { return static_cast<unsigned>(B * ceil_div(Ct, kThreads)); }  // blocks

// One thread per (image, channel): reads y and map_t once, keeps row_math.h:Pooled in registers.
template <typename T, typename A>
__global__ void match_forward_kernel(const T* y,      // [B, P, Ct]
                                     const T* map_t,  // [B, P, Ct] or null
                                     Affine affine,   // [Ct] each
                                     A* z,            // [B, Ct] out, as all below
                                     A* count, A* yhat, A* square, A* res, A* res_yhat, int64_t P, int64_t Ct, bool relu) {
  const auto [b, c] = place(Ct);
  if (c >= Ct) return;
  const Channel<A> ch = channel<A>(affine, c);
  Pooled<A> sum;
  for (int64_t p = 0; p < P; ++p) {
    const int64_t i = (b * P + p) * Ct + c;
    if (map_t)
      sum.add_matched(ch, load<A>(y, i), relu, load<A>(map_t, i));
    else
      sum.add(ch, load<A>(y, i), relu);
  }
  const int64_t o = b * Ct + c;
  z[o] = sum.out / A(P);
  count[o] = sum.count;
  yhat[o] = sum.yhat;
  if (map_t) {
    square[o] = sum.square;
    res[o] = sum.res;
    res_yhat[o] = sum.res_yhat;
  }
}

// One thread per channel; images in index order. grad_fm is read from device memory: no host synchronisation.
template <typename A>
__global__ void channel_grads_kernel(ChannelGrads g) {
  const int64_t c = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= g.Ct) return;
  const A *grad_z = static_cast<const A*>(g.grad_z), *z = static_cast<const A*>(g.z),
          *pooled_t = static_cast<const A*>(g.pooled_t);
  const A *count = static_cast<const A*>(g.count), *yhat = static_cast<const A*>(g.yhat);
  const A grad_fm = *static_cast<const A*>(g.grad_fm);
  const A c_map = A(2) * grad_fm / A(double(g.B) * double(g.P) * double(g.Ct));
  const A c_pooled = A(2) * grad_fm / A(double(g.B) * double(g.Ct));
  A d_beta = g.res ? c_map * static_cast<const A*>(g.res)[c] : A(0);
  A d_gamma = g.res ? c_map * static_cast<const A*>(g.res_yhat)[c] : A(0);
  for (int64_t b = 0; b < g.B; ++b) {
    const int64_t i = b * g.Ct + c;
    const A v = grad_z[i] + (pooled_t ? c_pooled * (z[i] - pooled_t[i]) : A(0));
    static_cast<A*>(g.grad_out)[i] = v;
    d_beta += v / A(g.P) * count[i];
    d_gamma += v / A(g.P) * yhat[i];
  }
  static_cast<A*>(g.d_beta)[c] = d_beta;
  static_cast<A*>(g.d_gamma)[c] = d_gamma;
}

// One thread per (image, channel), positions in a loop: dL/dy, row_math.h:position_grad.
template <typename T, typename A>
__global__ void match_backward_kernel(MatchBackward m) {
  const auto [b, c] = place(m.Ct);
  if (c >= m.Ct) return;
  const T *y = static_cast<const T*>(m.y), *map_t = static_cast<const T*>(m.map_t);
  const Channel<A> ch = channel<A>(m.affine, c);
  const A g_pos = static_cast<const A*>(m.grad_z)[b * m.Ct + c] / A(m.P);
  const A c_fm = map_t ? A(2) * *static_cast<const A*>(m.grad_fm) / A(double(m.B) * double(m.P) * double(m.Ct)) : A(0);
  const A shift = m.d_beta ? static_cast<const A*>(m.d_beta)[c] / A(m.n_stats) : A(0);
  const A slope = m.d_gamma ? static_cast<const A*>(m.d_gamma)[c] / A(m.n_stats) : A(0);
  for (int64_t p = 0; p < m.P; ++p) {
    const int64_t i = (b * m.P + p) * m.Ct + c;
    const A target = map_t ? load<A>(map_t, i) : A(0);
    store(static_cast<T*>(m.dy), i, position_grad(ch, load<A>(y, i), m.relu, g_pos, c_fm, target, shift, slope));
  }
}

}  // namespace

int channel_stats(const ChannelStats& s, void* stream) {
  return dispatch(s.dtype, [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    return launch(channel_stats_kernel<T, A>, ceil_div(s.Ct, kChannels), dim3(kChannels, kRows), stream,
                  static_cast<const T*>(s.y), static_cast<A*>(s.mean), static_cast<A*>(s.var), s.N, s.Ct);
  });
}

int match_forward(const MatchForward& m, void* stream) {
  return dispatch(m.dtype, [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    return launch(match_forward_kernel<T, A>, places(m.B, m.Ct), kThreads, stream, static_cast<const T*>(m.y),
                  static_cast<const T*>(m.map_t), m.affine, static_cast<A*>(m.z), static_cast<A*>(m.count),
                  static_cast<A*>(m.yhat), static_cast<A*>(m.square), static_cast<A*>(m.res), static_cast<A*>(m.res_yhat), m.P,
                  m.Ct, m.relu);
  });
}

int channel_grads(const ChannelGrads& g, void* stream) {
  return dispatch(g.dtype, [&](auto, auto a) {
    return launch(channel_grads_kernel<decltype(a)>, ceil_div(g.Ct, kThreads), kThreads, stream, g);
  });
}

int match_backward(const MatchBackward& m, void* stream) {
  return dispatch(m.dtype, [&](auto t, auto a) {
    return launch(match_backward_kernel<decltype(t), decltype(a)>, places(m.B, m.Ct), kThreads, stream, m);
  });
}

}  // namespace ijckd
