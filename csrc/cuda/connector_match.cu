// Kernels of connector_match around the library's GEMMs: any shape, any dtype; the GPU's oracle for faster ones.
// Maps are [N, Ct] with channels contiguous, so a warp's 32 threads take neighbouring channels and every access is
// coalesced: two channels each of a half type, where Ct and the pointers allow it, else one. What matters is bytes
// under way: every pass over a map loads several rows per thread before it uses the first.
#include <type_traits>

#include "block_reduce.cuh"
#include "connector_match.h"
#include "device.cuh"
#include "instructions.cuh"

namespace ijckd {
namespace {

constexpr int kThreads = 128;  // passes over maps
constexpr int kBatch = 7;      // positions that a thread loads at once: 7 x 7 is the usual map
constexpr int kStatLanes = 8;  // row lanes of a part
constexpr int kRun = 64;       // positions of a map that are added up one after the other in A
constexpr int kSumLanes = 16;  // image or part lanes of sums over [B, Ct] or [parts, Ct]
constexpr int kStatThreads = kColumns * kStatLanes, kSumThreads = kColumns * kSumLanes;

// Calls `run` with the number of channels a thread takes: two of a half type if `pairs`, else one.
template <typename T, typename F>
int by_width(bool pairs, const F& run) {
  if constexpr (sizeof(T) == 2)
    if (pairs) return run(std::integral_constant<int, 2>{});
  return run(std::integral_constant<int, 1>{});
}

// One part of V channels per thread column; blocks go through the channels of a part, then to the next part. A thread
// keeps its rows in registers, so that the second pass, over the distances from the mean, reads nothing. Both passes
// take the rows relative to the part's first: beside a large mean the sum of the rows would keep few digits.
template <typename T, typename A, int V>
__global__ void __launch_bounds__(kStatThreads) channel_stats_kernel(ChannelStats s) {
  constexpr int kRows = kStatRows / kStatLanes;  // of a thread
  __shared__ A slots[V][kStatLanes][kColumns];
  allow_next_launch();
  const unsigned per_part = ceil_div(s.Ct, kColumns * V);
  const int64_t part = blockIdx.x / per_part, c = (int64_t(blockIdx.x % per_part) * kColumns + threadIdx.x) * V;
  const int64_t left = s.N - part * kStatRows, rows = left < kStatRows ? left : kStatRows;
  const bool inside = c < s.Ct;
  const T* y = static_cast<const T*>(s.y) + (part * kStatRows + threadIdx.y) * s.Ct + c;

  typename Together<T, V>::type loaded[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i)
    if (inside && int(threadIdx.y) + i * kStatLanes < rows) loaded[i] = load_together<V>(y, i * kStatLanes * s.Ct);
  A origin[V] = {};  // the part's first row
  if (inside) take_apart<T, V>(load_together<V>(y, -int64_t(threadIdx.y) * s.Ct), origin);
  const auto for_rows = [&](const auto& use) {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      if (inside && int(threadIdx.y) + i * kStatLanes < rows) {
        A x[V];
        take_apart<T, V>(loaded[i], x);
        for (int v = 0; v < V; ++v) use(v, x[v] - origin[v]);
      }
  };

  A mean[V] = {}, m2[V] = {};
  for_rows([&](int v, A x) { mean[v] += x; });
  sum_lanes(mean, slots);
  for (int v = 0; v < V; ++v) mean[v] /= A(rows);
  for_rows([&](int v, A x) { m2[v] += (x - mean[v]) * (x - mean[v]); });
  sum_lanes(m2, slots);
  if (!inside || threadIdx.y != 0) return;
  for (int v = 0; v < V; ++v) {
    static_cast<A*>(s.part_mean)[part * s.Ct + c + v] = origin[v] + mean[v];
    static_cast<A*>(s.part_m2)[part * s.Ct + c + v] = m2[v];
  }
}

// A block per kColumns channels. With all parts at hand, Chan's formula for two of them becomes: the mean of the means,
// then the sum of m2 and of the means' squared distances from it; nothing cancels, and lanes work side by side. In
// double: a lane adds many parts one after the other.
template <typename A>
__global__ void __launch_bounds__(kSumThreads) combine_stats_kernel(CombineStats s) {
  __shared__ double slots[1][kSumLanes][kColumns];
  allow_next_launch();
  wait_for_earlier_launches();
  const A *part_mean = static_cast<const A*>(s.part_mean), *part_m2 = static_cast<const A*>(s.part_m2);
  const int64_t c = int64_t(blockIdx.x) * kColumns + threadIdx.x, parts = stat_parts(s.N, s.rows_per_part);
  const bool inside = c < s.Ct;
  const auto rows = [&](int64_t i) {
    const int64_t left = s.N - i * s.rows_per_part;
    return double(left < s.rows_per_part ? left : s.rows_per_part);
  };
  struct Part {
    A mean, m2;
  };
  const auto load = [&](int64_t i) { return Part{part_mean[i * s.Ct + c], part_m2[i * s.Ct + c]}; };
  double mean[1] = {0}, m2[1] = {0};
  for_lane<kSumLanes, 8>(inside ? parts : 0, load,
                         [&](int64_t i, const Part& part) { mean[0] += rows(i) * part.mean; });
  sum_lanes(mean, slots);
  mean[0] /= double(s.N);
  for_lane<kSumLanes, 8>(inside ? parts : 0, load, [&](int64_t i, const Part& part) {
    m2[0] += part.m2 + rows(i) * (part.mean - mean[0]) * (part.mean - mean[0]);
  });
  sum_lanes(m2, slots);
  if (!inside || threadIdx.y != 0) return;
  static_cast<A*>(s.mean)[c] = A(mean[0]);
  static_cast<A*>(s.var)[c] = A(m2[0] / double(s.N));
}

// A thread per channel.
template <typename A>
__global__ void __launch_bounds__(kThreads) follow_stats_kernel(RunningStats s) {
  const int64_t c = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (c == 0 && s.batches) ++*s.batches;
  if (c >= s.Ct) return;
  A &mean = static_cast<A*>(s.running_mean)[c], &var = static_cast<A*>(s.running_var)[c];
  mean = followed(mean, static_cast<const A*>(s.mean)[c], A(s.share));
  var = followed(var, A(s.unbiased) * static_cast<const A*>(s.var)[c], A(s.share));
}

// The image and the first channel of a thread that owns V channels of one image; b >= B for threads past the end. In
// one dimension: a grid's second one ends at 65,535.
struct Place {
  int64_t b, c;
};

template <int V>
__device__ Place place(int64_t Ct) {
  const int64_t per_image = Ct / V, i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  return {i / per_image, i % per_image * V};
}

int places(int64_t B, int64_t Ct, int V) { return ceil_div(B * (Ct / V), kThreads); }  // blocks

// kBatch positions of one image in V channels, as loaded.
template <typename T, int V, bool kMatched>
struct Batch {
  typename Together<T, V>::type y[kBatch], target[kMatched ? kBatch : 1];

  // The next n of them; moves both pointers on.
  __device__ __forceinline__ void load(const T*& y_row, const T*& target_row, int64_t Ct, int n) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (i < n) {
        y[i] = load_together<V>(y_row, 0);
        y_row += Ct;
        if constexpr (kMatched) {
          target[i] = load_together<V>(target_row, 0);
          target_row += Ct;
        }
      }
  }
};

// Calls use(p, y, target) for every position p, in index order. The next batch is on its way while one is used: the
// compiler would otherwise load each position just before its use, and wait for every one.
template <typename T, typename A, int V, bool kMatched, typename F>
__device__ __forceinline__ void for_positions(const T* y, const T* map_t, int64_t Ct, int P, const F& use) {
  Batch<T, V, kMatched> now{}, next{};
  now.load(y, map_t, Ct, P);
  for (int p = 0; p < P; p += kBatch) {
    const int left = P - p;
    if (left >= 2 * kBatch)
      next.load(y, map_t, Ct, kBatch);
    else
      next.load(y, map_t, Ct, left - kBatch);
    const auto use_first = [&](int n) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        if (i < n) {
          A y_p[V], target[V] = {};
          take_apart<T, V>(now.y[i], y_p);
          if constexpr (kMatched) take_apart<T, V>(now.target[i], target);
          use(p + i, y_p, target);
        }
    };
    if (left >= kBatch)
      use_first(kBatch);
    else
      use_first(left);
    now = next;
  }
}

// A thread per image and V channels: reads y and map_t once, keeps row_math.h:Pooled in registers. kLong: of a map of
// more than kRun positions, whose runs are added up in double.
template <typename T, typename A, int V, bool kMatched, bool kLong>
__global__ void __launch_bounds__(kThreads) match_forward_kernel(MatchForward m) {
  allow_next_launch();
  wait_for_earlier_launches();
  if (kMatched && blockIdx.x == 0 && threadIdx.x == 0) *m.arrived = 0;
  const Place at = place<V>(m.Ct);
  if (at.b >= m.B) return;
  Channel<A> ch[V];
  Pooled<std::conditional_t<kLong, double, A>> sum[V];
  for (int v = 0; v < V; ++v) ch[v] = channel<A>(m.affine, at.c + v);
  const int64_t first = at.b * m.P * m.Ct + at.c;
  const T *y = static_cast<const T*>(m.y) + first, *map_t = static_cast<const T*>(m.map_t);
  if constexpr (kMatched) map_t += first;
  const auto add_positions = [&](Pooled<A>(&to)[V], int P) {
    for_positions<T, A, V, kMatched>(y, map_t, m.Ct, P, [&](int, const A(&y_p)[V], const A(&target)[V]) {
      for (int v = 0; v < V; ++v) {
        if constexpr (kMatched)
          to[v].add_matched(ch[v], y_p[v], m.relu, target[v]);
        else
          to[v].add(ch[v], y_p[v], m.relu);
      }
    });
  };
  if constexpr (kLong) {
    for (int left = int(m.P); left > 0; left -= kRun) {
      Pooled<A> run[V];
      add_positions(run, left < kRun ? left : kRun);
      for (int v = 0; v < V; ++v) sum[v].add(run[v]);
      y += kRun * m.Ct;
      if constexpr (kMatched) map_t += kRun * m.Ct;
    }
  } else {
    add_positions(sum, int(m.P));
  }
  const auto out = [&](void* to, auto value) {
    A x[V];
    for (int v = 0; v < V; ++v) x[v] = A(value(sum[v]));
    store_together(static_cast<A*>(to), at.b * m.Ct + at.c, x);
  };
  out(m.z, [&](const auto& s) { return s.out / A(m.P); });
  out(m.count, [](const auto& s) { return s.count; });
  out(m.yhat, [](const auto& s) { return s.yhat; });
  if constexpr (kMatched) {
    out(m.square, [](const auto& s) { return s.square; });
    out(m.res, [](const auto& s) { return s.res; });
    out(m.res_yhat, [](const auto& s) { return s.res_yhat; });
  }
}

// The lanes' values in a warp's order of pairs.
__device__ double warp_sum(double v) {
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) v += shuffle_xor(v, mask);
  return v;
}

// fm of what the blocks' warps have of `square`, by the last one of `blocks` to arrive, in the blocks' order. Shares go
// by atomic operations, so that no cache's older value is met. One warp of each block calls.
template <typename A>
__device__ void sum_shares(const MatchSums& s, double share, int block, int blocks) {
  auto* shares = reinterpret_cast<unsigned long long*>(s.shares);
  const int lane = threadIdx.x;
  int last = 0;
  if (lane == 0) {
    unsigned long long bits;
    memcpy(&bits, &share, sizeof bits);
    atomicExch(shares + block, bits);
    __threadfence();  // the share is there before its block is counted
    last = atomicAdd(s.arrived, 1) == blocks - 1;
    __threadfence();
  }
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) last |= shuffle_xor(last, mask);
  if (!last) return;
  double sum = 0;
  for (int i = lane; i < blocks; i += 32) {
    const unsigned long long bits = atomicAdd(shares + i, 0ull);
    double of_block;
    memcpy(&of_block, &bits, sizeof bits);
    sum += of_block;
  }
  sum = warp_sum(sum);
  if (lane == 0) *static_cast<A*>(s.fm) = A(s.scale * sum);
}

// A block per kColumns channels of one of the three arrays.
template <typename A>
__global__ void __launch_bounds__(kSumThreads) match_sums_kernel(MatchSums s) {
  __shared__ double slots[1][kSumLanes][kColumns];
  wait_for_earlier_launches();
  const int64_t c = int64_t(blockIdx.x) * kColumns + threadIdx.x;
  const void* x = blockIdx.y == 0 ? s.square : blockIdx.y == 1 ? s.res : s.res_yhat;
  const A total = column_total(static_cast<const A*>(x), s.B, s.Ct, c, slots);  // 0 past the last channel
  if (threadIdx.y != 0) return;
  if (blockIdx.y == 0) return sum_shares<A>(s, warp_sum(total), blockIdx.x, gridDim.x);
  if (c < s.Ct) static_cast<A*>(blockIdx.y == 1 ? s.res_sum : s.res_yhat_sum)[c] = total;
}

// A block per kColumns channels, its lanes through the images, many for each: their sums are in double. grad_fm is read
// from device memory: no host synchronisation. kPooled: with pooled_t; kMap: with count and yhat.
template <typename A, bool kPooled, bool kMap>
__global__ void __launch_bounds__(kSumThreads) channel_grads_kernel(ChannelGrads g) {
  __shared__ double slots[2][kSumLanes][kColumns];
  allow_next_launch();
  const int64_t c = int64_t(blockIdx.x) * kColumns + threadIdx.x;
  const bool inside = c < g.Ct;
  const A *grad_z = static_cast<const A*>(g.grad_z), *z = static_cast<const A*>(g.z);
  const A* pooled_t = static_cast<const A*>(g.pooled_t);
  const A *count = static_cast<const A*>(g.count), *yhat = static_cast<const A*>(g.yhat);
  const A scale = g.scale ? *static_cast<const A*>(g.scale) : A(1);
  const A grad_fm = g.grad_fm ? *static_cast<const A*>(g.grad_fm) : A(0);
  const A c_pooled = A(2) * grad_fm / A(double(g.B) * double(g.Ct));
  struct Image {
    A grad_z, z, pooled_t, count, yhat;
  };
  const auto load = [&](int64_t b) {
    const int64_t i = b * g.Ct + c;
    Image image{grad_z[i], 0, 0, A(g.P), 0};
    if constexpr (kPooled) image.z = z[i], image.pooled_t = pooled_t[i];
    if constexpr (kMap) image.count = count[i], image.yhat = yhat[i];
    return image;
  };
  double sums[2] = {0, 0};                         // of v * count, v * yhat
  constexpr int kAtOnce = sizeof(A) == 8 ? 4 : 8;  // of five doubles each, eight would not fit the registers
  for_lane<kSumLanes, kAtOnce>(inside ? g.B : 0, load, [&](int64_t b, const Image& image) {
    A v = scale * image.grad_z;
    if constexpr (kPooled) v += c_pooled * (image.z - image.pooled_t);
    static_cast<A*>(g.grad_out)[b * g.Ct + c] = v;
    sums[0] += v * image.count;
    sums[1] += v * image.yhat;
  });
  sum_lanes(sums, slots);
  if (!inside || threadIdx.y != 0) return;
  const A c_map = A(2) * grad_fm / A(double(g.B) * double(g.P) * double(g.Ct));
  static_cast<A*>(g.d_beta)[c] = A(sums[0] / A(g.P)) + (g.res ? c_map * static_cast<const A*>(g.res)[c] : A(0));
  if constexpr (kMap)
    static_cast<A*>(g.d_gamma)[c] = A(sums[1] / A(g.P)) + (g.res ? c_map * static_cast<const A*>(g.res_yhat)[c] : A(0));
}

// A thread per image and V channels, positions in a loop: dL/dy, row_math.h:position_grad.
template <typename T, typename A, int V, bool kMatched>
__global__ void __launch_bounds__(kThreads) match_backward_kernel(MatchBackward m) {
  wait_for_earlier_launches();
  const Place at = place<V>(m.Ct);
  if (at.b >= m.B) return;
  Channel<A> ch[V];
  A g_pos[V], shift[V], slope[V], c_fm = 0;
  for (int v = 0; v < V; ++v) {
    ch[v] = channel<A>(m.affine, at.c + v);
    g_pos[v] = static_cast<const A*>(m.grad_z)[at.b * m.Ct + at.c + v] / A(m.P);
    shift[v] = m.d_beta ? static_cast<const A*>(m.d_beta)[at.c + v] / A(m.n_stats) : A(0);
    slope[v] = m.d_gamma ? static_cast<const A*>(m.d_gamma)[at.c + v] / A(m.n_stats) : A(0);
  }
  const int64_t first = at.b * m.P * m.Ct + at.c;
  const T *y = static_cast<const T*>(m.y) + first, *map_t = static_cast<const T*>(m.map_t);
  T* dy = static_cast<T*>(m.dy) + first;
  if constexpr (kMatched) {
    map_t += first;
    c_fm = A(2) * *static_cast<const A*>(m.grad_fm) / A(double(m.B) * double(m.P) * double(m.Ct));
  }
  for_positions<T, A, V, kMatched>(y, map_t, m.Ct, int(m.P), [&](int p, const A(&y_p)[V], const A(&target)[V]) {
    A d[V];
    for (int v = 0; v < V; ++v)
      d[v] = position_grad(ch[v], y_p[v], m.relu, g_pos[v], c_fm, target[v], shift[v], slope[v]);
    store_together(dy, p * m.Ct, d);
  });
}

}  // namespace

int channel_stats(const ChannelStats& s, void* stream) {
  return dispatch(s.dtype, [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    return by_width<T>(s.Ct % 2 == 0 && aligned(2 * sizeof(T), {s.y}), [&](auto width) {
      constexpr int V = decltype(width)::value;
      const int64_t blocks = stat_parts(s.N, kStatRows) * ceil_div(s.Ct, kColumns * V);
      return launch(channel_stats_kernel<T, A, V>, static_cast<unsigned>(blocks), dim3(kColumns, kStatLanes), stream,
                    s);
    });
  });
}

int combine_stats(const CombineStats& s, void* stream) {
  return dispatch(s.dtype, [&](auto, auto a) {
    return launch_dependent(0, combine_stats_kernel<decltype(a)>, ceil_div(s.Ct, kColumns), dim3(kColumns, kSumLanes),
                            stream, s);
  });
}

int follow_stats(const RunningStats& s, void* stream) {
  return dispatch(s.dtype, [&](auto, auto a) {
    return launch(follow_stats_kernel<decltype(a)>, ceil_div(s.Ct, kThreads), kThreads, stream, s);
  });
}

int match_forward(const MatchForward& m, void* stream) {
  return dispatch(m.dtype, [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    const bool pairs = m.Ct % 2 == 0 && aligned(2 * sizeof(T), {m.y, m.map_t}) &&
                       aligned(2 * sizeof(A), {m.z, m.count, m.yhat, m.square, m.res, m.res_yhat});
    return by_width<T>(pairs, [&](auto width) {
      constexpr int V = decltype(width)::value;
      const auto start = [&](auto kernel) {
        return launch_dependent(0, kernel, places(m.B, m.Ct, V), kThreads, stream, m);
      };
      if (m.P > kRun)
        return start(m.map_t ? match_forward_kernel<T, A, V, true, true> : match_forward_kernel<T, A, V, false, true>);
      return start(m.map_t ? match_forward_kernel<T, A, V, true, false> : match_forward_kernel<T, A, V, false, false>);
    });
  });
}

int match_sums(const MatchSums& s, void* stream) {
  return dispatch(s.dtype, [&](auto, auto a) {
    return launch_dependent(0, match_sums_kernel<decltype(a)>, dim3(ceil_div(s.Ct, kColumns), 3),
                            dim3(kColumns, kSumLanes), stream, s);
  });
}

int channel_grads(const ChannelGrads& g, void* stream) {
  return dispatch(g.dtype, [&](auto, auto a) {
    using A = decltype(a);
    const auto start = [&](auto kernel) {
      return launch(kernel, ceil_div(g.Ct, kColumns), dim3(kColumns, kSumLanes), stream, g);
    };
    if (g.yhat) return start(g.pooled_t ? channel_grads_kernel<A, true, true> : channel_grads_kernel<A, false, true>);
    return start(g.pooled_t ? channel_grads_kernel<A, true, false> : channel_grads_kernel<A, false, false>);
  });
}

int match_backward(const MatchBackward& m, void* stream) {
  return dispatch(m.dtype, [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    return by_width<T>(m.Ct % 2 == 0 && aligned(2 * sizeof(T), {m.y, m.map_t, m.dy}), [&](auto width) {
      constexpr int V = decltype(width)::value;
      const auto kernel = m.map_t ? match_backward_kernel<T, A, V, true> : match_backward_kernel<T, A, V, false>;
      return launch_dependent(0, kernel, places(m.B, m.Ct, V), kThreads, stream, m);
    });
  });
}

}  // namespace ijckd
