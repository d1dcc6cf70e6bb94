// CPU loops of connector_match. Channels are the contiguous dimension, so every inner loop runs over channels and vectorises.
#include "connector_match.h"

#include <algorithm>
#include <vector>

#include "loops.h"

namespace ijckd {
namespace {

constexpr int64_t kStatRows = 64;     // rows per partial: fixed, so that the sum does not depend on the number of threads
constexpr int64_t kChannelTile = 64;  // six float accumulators of 64 channels stay in L1 beside the rows

}  // namespace

int channel_stats(const ChannelStats& s, void*) {
  dispatch(s.dtype, [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    const T* y = static_cast<const T*>(s.y);
    const int64_t N = s.N, Ct = s.Ct, blocks = (N + kStatRows - 1) / kStatRows;
    std::vector<A> means(blocks * Ct), m2s(blocks * Ct);  // [blocks, Ct]
    parallel_for(blocks, 1, [&](int64_t first, int64_t last) {
      for (int64_t k = first; k < last; ++k) {
        const int64_t lo = k * kStatRows, hi = std::min(N, lo + kStatRows);
        A *mean = &means[k * Ct], *m2 = &m2s[k * Ct];
        for (int64_t r = lo; r < hi; ++r)
          for (int64_t c = 0; c < Ct; ++c) mean[c] += A(y[r * Ct + c]);
        for (int64_t c = 0; c < Ct; ++c) mean[c] /= A(hi - lo);
        for (int64_t r = lo; r < hi; ++r)
          for (int64_t c = 0; c < Ct; ++c) {
            const A d = A(y[r * Ct + c]) - mean[c];
            m2[c] += d * d;
          }
      }
    });
    A *mean = static_cast<A*>(s.mean), *var = static_cast<A*>(s.var);
    std::copy_n(means.begin(), Ct, mean);
    std::copy_n(m2s.begin(), Ct, var);
    for (int64_t k = 1; k < blocks; ++k) {  // Chan's update: exact where sum of squares minus square of sum cancels
      const A n = A(k * kStatRows), m = A(std::min(N, (k + 1) * kStatRows) - k * kStatRows);
      for (int64_t c = 0; c < Ct; ++c) {
        const A d = means[k * Ct + c] - mean[c];
        mean[c] += d * (m / (n + m));
        var[c] += m2s[k * Ct + c] + d * d * (n * m / (n + m));
      }
    }
    for (int64_t c = 0; c < Ct; ++c) var[c] /= A(N);
  });
  return 0;
}

int match_forward(const MatchForward& m, void*) {
  dispatch(m.dtype, [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    const T *y = static_cast<const T*>(m.y), *map_t = static_cast<const T*>(m.map_t);
    const auto at = [&](void* p, int64_t i) -> A& { return static_cast<A*>(p)[i]; };
    parallel_for(m.B, 1, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        for (int64_t c0 = 0; c0 < m.Ct; c0 += kChannelTile) {
          const int64_t n = std::min(kChannelTile, m.Ct - c0);
          Channel<A> ch[kChannelTile];
          Pooled<A> sum[kChannelTile];
          for (int64_t i = 0; i < n; ++i) ch[i] = channel<A>(m.affine, c0 + i);
          for (int64_t p = 0; p < m.P; ++p) {
            const int64_t row = (b * m.P + p) * m.Ct + c0;
            if (map_t)
              for (int64_t i = 0; i < n; ++i) sum[i].add_matched(ch[i], A(y[row + i]), m.relu, A(map_t[row + i]));
            else
              for (int64_t i = 0; i < n; ++i) sum[i].add(ch[i], A(y[row + i]), m.relu);
          }
          for (int64_t i = 0; i < n; ++i) {
            const int64_t o = b * m.Ct + c0 + i;
            at(m.z, o) = sum[i].out / A(m.P);
            at(m.count, o) = sum[i].count;
            at(m.yhat, o) = sum[i].yhat;
            if (map_t) {
              at(m.square, o) = sum[i].square;
              at(m.res, o) = sum[i].res;
              at(m.res_yhat, o) = sum[i].res_yhat;
            }
          }
        }
      }
    });
  });
  return 0;
}

int channel_grads(const ChannelGrads& g, void*) {
  dispatch(g.dtype, [&](auto, auto a) {
    using A = decltype(a);
    const A *grad_z = static_cast<const A*>(g.grad_z), *count = static_cast<const A*>(g.count);
    const A *z = static_cast<const A*>(g.z), *pooled_t = static_cast<const A*>(g.pooled_t);
    const A *yhat = static_cast<const A*>(g.yhat), *res = static_cast<const A*>(g.res);
    const A *res_yhat = static_cast<const A*>(g.res_yhat), grad_fm = *static_cast<const A*>(g.grad_fm);
    A *grad_out = static_cast<A*>(g.grad_out), *d_gamma = static_cast<A*>(g.d_gamma), *d_beta = static_cast<A*>(g.d_beta);
    const A c_map = A(2) * grad_fm / A(double(g.B) * double(g.P) * double(g.Ct));
    const A c_pooled = A(2) * grad_fm / A(double(g.B) * double(g.Ct));
    for (int64_t c = 0; c < g.Ct; ++c) {
      d_beta[c] = res ? c_map * res[c] : A(0);
      d_gamma[c] = res ? c_map * res_yhat[c] : A(0);
    }
    for (int64_t b = 0; b < g.B; ++b)
      for (int64_t c = 0; c < g.Ct; ++c) {
        const int64_t i = b * g.Ct + c;
        grad_out[i] = grad_z[i] + (pooled_t ? c_pooled * (z[i] - pooled_t[i]) : A(0));
        d_beta[c] += grad_out[i] / A(g.P) * count[i];
        d_gamma[c] += grad_out[i] / A(g.P) * yhat[i];
      }
  });
  return 0;
}

int match_backward(const MatchBackward& m, void*) {
  dispatch(m.dtype, [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    const T *y = static_cast<const T*>(m.y), *map_t = static_cast<const T*>(m.map_t);
    const A *grad_z = static_cast<const A*>(m.grad_z), *d_gamma = static_cast<const A*>(m.d_gamma);
    const A* d_beta = static_cast<const A*>(m.d_beta);
    T* dy = static_cast<T*>(m.dy);
    const A c_fm = map_t ? A(2) * *static_cast<const A*>(m.grad_fm) / A(double(m.B) * double(m.P) * double(m.Ct)) : A(0);
    parallel_for(m.B, 1, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        for (int64_t c0 = 0; c0 < m.Ct; c0 += kChannelTile) {
          const int64_t n = std::min(kChannelTile, m.Ct - c0);
          Channel<A> ch[kChannelTile];
          A g_pos[kChannelTile], shift[kChannelTile], slope[kChannelTile];
          for (int64_t i = 0; i < n; ++i) {
            ch[i] = channel<A>(m.affine, c0 + i);
            g_pos[i] = grad_z[b * m.Ct + c0 + i] / A(m.P);
            shift[i] = d_beta ? d_beta[c0 + i] / A(m.n_stats) : A(0);
            slope[i] = d_gamma ? d_gamma[c0 + i] / A(m.n_stats) : A(0);
          }
          for (int64_t p = 0; p < m.P; ++p) {
            const int64_t row = (b * m.P + p) * m.Ct + c0;
            for (int64_t i = 0; i < n; ++i) {
              const A target = map_t ? A(map_t[row + i]) : A(0);
              dy[row + i] = T(position_grad(ch[i], A(y[row + i]), m.relu, g_pos[i], c_fm, target, shift[i], slope[i]));
            }
          }
        }
      }
    });
  });
  return 0;
}

}  // namespace ijckd
