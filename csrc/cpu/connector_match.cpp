// CPU loops of connector_match. Channels are the contiguous dimension, so every inner loop runs over channels and
// vectorises.
#include "connector_match.h"

#include <algorithm>
#include <type_traits>

#include "loops.h"
#include "rows.h"
#include "vectorise.h"

namespace ijckd {
namespace {

constexpr int64_t kChannelTile = 64;  // six float accumulators of 64 channels stay in L1 beside the rows
constexpr int64_t kSumTile = 512;     // of sums over the images or the parts, likewise

// Mean and sum of squared deviations of each channel over rows [rows, Ct]. In double and relative to the first row,
// which lies within sqrt(rows) standard deviations of the mean, the difference of squares loses no digit that counts;
// of bfloat16, whose own digits are few, in float too.
template <typename T, typename A>
IJCKD_INLINE void block_stats(const T* y, int64_t rows, int64_t Ct, A* mean, A* m2) {
  for (int64_t c0 = 0; c0 < Ct; c0 += kChannelTile) {
    const int64_t n = std::min(kChannelTile, Ct - c0);
    using S = std::conditional_t<std::is_same_v<T, c10::BFloat16>, float, double>;
    S origin[kChannelTile], sum[kChannelTile] = {}, squares[kChannelTile] = {};
    for (int64_t i = 0; i < n; ++i) origin[i] = load(y, c0 + i);
    for (int64_t r = 1; r < rows; ++r)
      for (int64_t i = 0; i < n; ++i) {
        const S d = load(y, r * Ct + c0 + i) - origin[i];
        sum[i] += d;
        squares[i] += d * d;
      }
    for (int64_t i = 0; i < n; ++i) {
      const double to_mean = double(sum[i]) / double(rows);
      mean[c0 + i] = A(origin[i] + to_mean);
      m2[c0 + i] = A(squares[i] - sum[i] * to_mean);
    }
  }
}
IJCKD_CLONES void block_stats_f32(const float* y, int64_t rows, int64_t Ct, float* mean, float* m2) {
  block_stats(y, rows, Ct, mean, m2);
}
IJCKD_CLONES void block_stats_f64(const double* y, int64_t rows, int64_t Ct, double* mean, double* m2) {
  block_stats(y, rows, Ct, mean, m2);
}
IJCKD_CLONES void block_stats_bf16(const c10::BFloat16* y, int64_t rows, int64_t Ct, float* mean, float* m2) {
  block_stats(y, rows, Ct, mean, m2);
}

// Some channels' affine maps, one array per coefficient so that loops over channels vectorise.
template <typename A>
struct Channels {
  A mean[kChannelTile], inv_std[kChannelTile], gamma[kChannelTile], beta[kChannelTile];

  Channels(const Affine& affine, int64_t first, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const Channel<A> ch = channel<A>(affine, first + i);
      mean[i] = ch.mean, inv_std[i] = ch.inv_std, gamma[i] = ch.gamma, beta[i] = ch.beta;
    }
  }
  IJCKD_INLINE Channel<A> operator[](int64_t i) const { return {mean[i], inv_std[i], gamma[i], beta[i]}; }
};

// Pooled of some channels, likewise.
template <typename A>
struct PooledChannels {
  A out[kChannelTile] = {}, count[kChannelTile] = {}, yhat[kChannelTile] = {}, square[kChannelTile] = {},
    res[kChannelTile] = {}, res_yhat[kChannelTile] = {};

  IJCKD_INLINE Pooled<A> get(int64_t i) const { return {out[i], count[i], yhat[i], square[i], res[i], res_yhat[i]}; }
  IJCKD_INLINE void set(int64_t i, const Pooled<A>& p) {
    out[i] = p.out, count[i] = p.count, yhat[i] = p.yhat, square[i] = p.square, res[i] = p.res,
    res_yhat[i] = p.res_yhat;
  }
  // Pooled::add, an array at a time: so it vectorises.
  template <typename R>
  IJCKD_INLINE void add(const PooledChannels<R>& run, bool matched) {
    const auto add_to = [](A* to, const R* from) __attribute__((always_inline)) {
      for (int64_t i = 0; i < kChannelTile; ++i) to[i] += A(from[i]);
    };
    add_to(out, run.out), add_to(count, run.count), add_to(yhat, run.yhat);
    if (matched) add_to(square, run.square), add_to(res, run.res), add_to(res_yhat, run.res_yhat);
  }
};

// Channels [c0, c0 + n) and positions [first, last) of image b.
struct MapTile {
  int64_t b, c0, n, first, last;
};

// `relu` and `matched` are constants where this is inlined.
template <typename T, typename A>
IJCKD_INLINE void pool_tile(const MatchForward& m, const MapTile& t, bool relu, bool matched, const Channels<A>& ch,
                            PooledChannels<A>& sums) {
  const auto [b, c0, n, first, last] = t;
  const T *y = static_cast<const T*>(m.y), *map_t = static_cast<const T*>(m.map_t);
  for (int64_t p = first; p < last; ++p) {
    const int64_t row = (b * m.P + p) * m.Ct + c0;
    for (int64_t i = 0; i < n; ++i) {
      Pooled<A> sum = sums.get(i);
      if (matched)
        sum.add_matched(ch[i], load(y, row + i), relu, load(map_t, row + i));
      else
        sum.add(ch[i], load(y, row + i), relu);
      sums.set(i, sum);
    }
  }
}

template <typename T, typename A>
IJCKD_INLINE void pool_positions(const MatchForward& m, const MapTile& t, const Channels<A>& ch,
                                 PooledChannels<A>& sums) {
  if (m.map_t && m.relu)
    pool_tile<T>(m, t, true, true, ch, sums);
  else if (m.map_t)
    pool_tile<T>(m, t, false, true, ch, sums);
  else if (m.relu)
    pool_tile<T>(m, t, true, false, ch, sums);
  else
    pool_tile<T>(m, t, false, false, ch, sums);
}

template <typename A, typename S>
IJCKD_INLINE void store_pooled(const MatchForward& m, const MapTile& t, const PooledChannels<S>& sums) {
  const auto at = [&](void* p, int64_t i) __attribute__((always_inline)) -> A& { return static_cast<A*>(p)[i]; };
  for (int64_t i = 0; i < t.n; ++i) {
    const int64_t o = t.b * m.Ct + t.c0 + i;
    at(m.z, o) = A(sums.out[i] / A(m.P));
    at(m.count, o) = A(sums.count[i]);
    at(m.yhat, o) = A(sums.yhat[i]);
    if (m.map_t) {
      at(m.square, o) = A(sums.square[i]);
      at(m.res, o) = A(sums.res[i]);
      at(m.res_yhat, o) = A(sums.res_yhat[i]);
    }
  }
}

template <typename T, typename A>
IJCKD_INLINE void pool_image(const MatchForward& m, int64_t b) {
  for (int64_t c0 = 0; c0 < m.Ct; c0 += kChannelTile) {
    MapTile t{b, c0, std::min(kChannelTile, m.Ct - c0), 0, m.P};
    const Channels<A> ch(m.affine, c0, t.n);
    if (m.P <= kRun) {
      PooledChannels<A> sums;
      pool_positions<T>(m, t, ch, sums);
      store_pooled<A>(m, t, sums);
      continue;
    }
    PooledChannels<double> sums;
    for (; t.first < m.P; t.first += kRun) {
      t.last = std::min(m.P, t.first + kRun);
      PooledChannels<A> run;
      pool_positions<T>(m, t, ch, run);
      sums.add(run, m.map_t != nullptr);
    }
    store_pooled<A>(m, t, sums);
  }
}
IJCKD_CLONES void pool_image_f32(const MatchForward& m, int64_t b) { pool_image<float, float>(m, b); }
IJCKD_CLONES void pool_image_f64(const MatchForward& m, int64_t b) { pool_image<double, double>(m, b); }
IJCKD_CLONES void pool_image_bf16(const MatchForward& m, int64_t b) { pool_image<c10::BFloat16, float>(m, b); }

// Per channel of one image, what position_grad needs beside the channel's map.
template <typename A>
struct PositionTerms {
  A g_pos[kChannelTile], shift[kChannelTile], slope[kChannelTile], c_fm;
};

template <typename T, typename A>
IJCKD_INLINE void grad_tile(const MatchBackward& m, int64_t b, int64_t c0, int64_t n, bool relu, bool matched,
                            const Channels<A>& ch, const PositionTerms<A>& terms) {
  const T *y = static_cast<const T*>(m.y), *map_t = static_cast<const T*>(m.map_t);
  T* dy = static_cast<T*>(m.dy);
  for (int64_t p = 0; p < m.P; ++p) {
    const int64_t row = (b * m.P + p) * m.Ct + c0;
    for (int64_t i = 0; i < n; ++i) {
      const A target = matched ? load(map_t, row + i) : A(0);
      store(dy, row + i,
            position_grad(ch[i], load(y, row + i), relu, terms.g_pos[i], terms.c_fm, target, terms.shift[i],
                          terms.slope[i]));
    }
  }
}

template <typename T, typename A>
IJCKD_INLINE void grad_image(const MatchBackward& m, int64_t b) {
  const A *grad_z = static_cast<const A*>(m.grad_z), *d_gamma = static_cast<const A*>(m.d_gamma);
  const A* d_beta = static_cast<const A*>(m.d_beta);
  PositionTerms<A> terms;
  terms.c_fm = m.map_t ? A(2) * *static_cast<const A*>(m.grad_fm) / A(double(m.B) * double(m.P) * double(m.Ct)) : A(0);
  for (int64_t c0 = 0; c0 < m.Ct; c0 += kChannelTile) {
    const int64_t n = std::min(kChannelTile, m.Ct - c0);
    const Channels<A> ch(m.affine, c0, n);
    for (int64_t i = 0; i < n; ++i) {
      terms.g_pos[i] = grad_z[b * m.Ct + c0 + i] / A(m.P);
      terms.shift[i] = d_beta ? d_beta[c0 + i] / A(m.n_stats) : A(0);
      terms.slope[i] = d_gamma ? d_gamma[c0 + i] / A(m.n_stats) : A(0);
    }
    if (m.map_t && m.relu)
      grad_tile<T>(m, b, c0, n, true, true, ch, terms);
    else if (m.map_t)
      grad_tile<T>(m, b, c0, n, false, true, ch, terms);
    else if (m.relu)
      grad_tile<T>(m, b, c0, n, true, false, ch, terms);
    else
      grad_tile<T>(m, b, c0, n, false, false, ch, terms);
  }
}
IJCKD_CLONES void grad_image_f32(const MatchBackward& m, int64_t b) { grad_image<float, float>(m, b); }
IJCKD_CLONES void grad_image_f64(const MatchBackward& m, int64_t b) { grad_image<double, double>(m, b); }
IJCKD_CLONES void grad_image_bf16(const MatchBackward& m, int64_t b) { grad_image<c10::BFloat16, float>(m, b); }

// Channels [first, last) of combine_stats.
template <typename A>
IJCKD_INLINE void combine_channels(const CombineStats& s, int64_t first, int64_t last) {
  const A *part_mean = static_cast<const A*>(s.part_mean), *part_m2 = static_cast<const A*>(s.part_m2);
  const int64_t parts = stat_parts(s.N, s.rows_per_part);
  const auto rows = [&](int64_t k) { return double(std::min(s.N - k * s.rows_per_part, s.rows_per_part)); };
  for (int64_t c0 = first; c0 < last; c0 += kSumTile) {
    const int64_t n = std::min(kSumTile, last - c0);
    double mean[kSumTile] = {}, m2[kSumTile] = {};
    for (int64_t k = 0; k < parts; ++k)
      for (int64_t i = 0; i < n; ++i) mean[i] += rows(k) * part_mean[k * s.Ct + c0 + i];
    for (int64_t i = 0; i < n; ++i) mean[i] /= double(s.N);
    for (int64_t k = 0; k < parts; ++k)
      for (int64_t i = 0; i < n; ++i) {
        const double d = part_mean[k * s.Ct + c0 + i] - mean[i];
        m2[i] += part_m2[k * s.Ct + c0 + i] + rows(k) * d * d;
      }
    for (int64_t i = 0; i < n; ++i) {
      static_cast<A*>(s.mean)[c0 + i] = A(mean[i]);
      static_cast<A*>(s.var)[c0 + i] = A(m2[i] / double(s.N));
    }
  }
}
IJCKD_CLONES void combine_channels_f32(const CombineStats& s, int64_t first, int64_t last) {
  combine_channels<float>(s, first, last);
}
IJCKD_CLONES void combine_channels_f64(const CombineStats& s, int64_t first, int64_t last) {
  combine_channels<double>(s, first, last);
}

// Channels [first, last) of channel_grads.
template <typename A>
IJCKD_INLINE void grads_of_channels(const ChannelGrads& g, int64_t first, int64_t last) {
  const A *grad_z = static_cast<const A*>(g.grad_z), *count = static_cast<const A*>(g.count);
  const A *z = static_cast<const A*>(g.z), *pooled_t = static_cast<const A*>(g.pooled_t);
  const A *yhat = static_cast<const A*>(g.yhat), *res = static_cast<const A*>(g.res);
  const A* res_yhat = static_cast<const A*>(g.res_yhat);
  const A scale = g.scale ? *static_cast<const A*>(g.scale) : A(1);
  const A grad_fm = g.grad_fm ? *static_cast<const A*>(g.grad_fm) : A(0);
  const A c_map = A(2) * grad_fm / A(double(g.B) * double(g.P) * double(g.Ct));
  const A c_pooled = A(2) * grad_fm / A(double(g.B) * double(g.Ct));
  for (int64_t c0 = first; c0 < last; c0 += kSumTile) {
    const int64_t n = std::min(kSumTile, last - c0);
    double d_beta[kSumTile] = {}, d_gamma[kSumTile] = {};
    for (int64_t b = 0; b < g.B; ++b) {
      const int64_t at = b * g.Ct + c0;
      A* out = static_cast<A*>(g.grad_out) + at;
      if (pooled_t)
        for (int64_t i = 0; i < n; ++i) out[i] = scale * grad_z[at + i] + c_pooled * (z[at + i] - pooled_t[at + i]);
      else
        for (int64_t i = 0; i < n; ++i) out[i] = scale * grad_z[at + i];
      if (count)
        for (int64_t i = 0; i < n; ++i) d_beta[i] += double(out[i]) * count[at + i];
      else
        for (int64_t i = 0; i < n; ++i) d_beta[i] += double(out[i]) * double(g.P);
      if (yhat)
        for (int64_t i = 0; i < n; ++i) d_gamma[i] += double(out[i]) * yhat[at + i];
    }
    for (int64_t i = 0; i < n; ++i) {
      const int64_t c = c0 + i;
      static_cast<A*>(g.d_beta)[c] = A(d_beta[i] / double(g.P) + (res ? double(c_map) * res[c] : 0));
      if (yhat) static_cast<A*>(g.d_gamma)[c] = A(d_gamma[i] / double(g.P) + (res ? double(c_map) * res_yhat[c] : 0));
    }
  }
}
IJCKD_CLONES void grads_of_channels_f32(const ChannelGrads& g, int64_t first, int64_t last) {
  grads_of_channels<float>(g, first, last);
}
IJCKD_CLONES void grads_of_channels_f64(const ChannelGrads& g, int64_t first, int64_t last) {
  grads_of_channels<double>(g, first, last);
}

// Calls part(s, first, last) for tiles of s's channels, each of `rows` rows.
template <typename S, typename Part>
void over_channels(const S& s, int64_t rows, const Part& part) {
  parallel_for((s.Ct + kSumTile - 1) / kSumTile, row_grain(rows * kSumTile, 1 << 16),
               [&](int64_t first, int64_t last) { part(s, first * kSumTile, std::min(s.Ct, last * kSumTile)); });
}

// Parts in parallel: their size is fixed, so that the statistics do not depend on the number of threads.
template <typename T, typename A, typename Block>
void stats(const ChannelStats& s, const Block& block) {
  const T* y = static_cast<const T*>(s.y);
  A *mean = static_cast<A*>(s.part_mean), *m2 = static_cast<A*>(s.part_m2);
  parallel_for(stat_parts(s.N, kStatRows), 1, [&](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; ++k)
      block(y + k * kStatRows * s.Ct, std::min(s.N - k * kStatRows, kStatRows), s.Ct, mean + k * s.Ct, m2 + k * s.Ct);
  });
}

}  // namespace

int channel_stats(const ChannelStats& s, void*) {
  by_dtype(
      s.dtype, [&] { stats<float, float>(s, block_stats_f32); }, [&] { stats<double, double>(s, block_stats_f64); },
      [&] { stats<c10::BFloat16, float>(s, block_stats_bf16); });
  return 0;
}

int combine_stats(const CombineStats& s, void*) {
  const auto run = [&](auto part) { over_channels(s, stat_parts(s.N, s.rows_per_part), part); };
  by_dtype(s.dtype, [&] { run(combine_channels_f32); }, [&] { run(combine_channels_f64); }, [] {});
  return 0;
}

int follow_stats(const RunningStats& s, void*) {
  const auto run = [&](auto zero) {
    using A = decltype(zero);
    A *running_mean = static_cast<A*>(s.running_mean), *running_var = static_cast<A*>(s.running_var);
    for (int64_t c = 0; c < s.Ct; ++c) {
      running_mean[c] = followed(running_mean[c], static_cast<const A*>(s.mean)[c], A(s.share));
      running_var[c] = followed(running_var[c], A(s.unbiased) * static_cast<const A*>(s.var)[c], A(s.share));
    }
  };
  by_dtype(s.dtype, [&] { run(float{}); }, [&] { run(double{}); }, [] {});
  if (s.batches) ++*s.batches;
  return 0;
}

int match_forward(const MatchForward& m, void*) {
  const auto run = [&](auto image) {
    parallel_for(m.B, 1, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) image(m, b);
    });
  };
  by_dtype(m.dtype, [&] { run(pool_image_f32); }, [&] { run(pool_image_f64); }, [&] { run(pool_image_bf16); });
  return 0;
}

int match_sums(const MatchSums& s, void* stream) {
  column_sum({s.dtype, s.square, s.shares, s.B, s.Ct, 1}, stream);
  column_sum({s.dtype, s.shares, s.fm, s.Ct, 1, s.scale}, stream);
  column_sum({s.dtype, s.res, s.res_sum, s.B, s.Ct, 1}, stream);
  return column_sum({s.dtype, s.res_yhat, s.res_yhat_sum, s.B, s.Ct, 1}, stream);
}

int channel_grads(const ChannelGrads& g, void*) {
  const auto run = [&](auto part) { over_channels(g, g.B, part); };
  by_dtype(g.dtype, [&] { run(grads_of_channels_f32); }, [&] { run(grads_of_channels_f64); }, [] {});
  return 0;
}

int match_backward(const MatchBackward& m, void*) {
  const auto run = [&](auto image) {
    parallel_for(m.B, 1, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) image(m, b);
    });
  };
  by_dtype(m.dtype, [&] { run(grad_image_f32); }, [&] { run(grad_image_f64); }, [&] { run(grad_image_bf16); });
  return 0;
}

}  // namespace ijckd
