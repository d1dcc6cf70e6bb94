// CPU loops of rows.h.
#include "rows.h"

#include <algorithm>

#include "loops.h"
#include "vectorise.h"

namespace ijckd {
namespace {

template <typename A>
IJCKD_INLINE void diff_rows(const FeatureDiff& f, int64_t first, int64_t last) {
  for (int64_t b = first; b < last; ++b) {
    const A *z = static_cast<const A*>(f.z) + b * f.Ct, *pooled_t = static_cast<const A*>(f.pooled_t) + b * f.Ct;
    A* d = static_cast<A*>(f.d) + b * f.Ct;
    for (int64_t i = 0; i < f.Ct; ++i) d[i] = z[i] - pooled_t[i];
    static_cast<A*>(f.square_rows)[b] =
        lane_sum<A>(f.Ct, [&](int64_t i) __attribute__((always_inline)) { return d[i] * d[i]; });
  }
}
IJCKD_CLONES void diff_rows_f32(const FeatureDiff& f, int64_t first, int64_t last) { diff_rows<float>(f, first, last); }
IJCKD_CLONES void diff_rows_f64(const FeatureDiff& f, int64_t first, int64_t last) {
  diff_rows<double>(f, first, last);
}

constexpr int64_t kTile = 512;  // columns that are summed at once: their sums stay in L1

template <typename A>
IJCKD_INLINE void sum_columns(const ColumnSum& s, int64_t first, int64_t last) {
  const A* x = static_cast<const A*>(s.x);
  A* out = static_cast<A*>(s.out);
  if (s.cols == 1) {
    out[0] = A(s.scale) * lane_sum<A>(s.rows, [&](int64_t r) __attribute__((always_inline)) { return x[r]; });
    return;
  }
  for (int64_t c0 = first * kTile; c0 < std::min(s.cols, last * kTile); c0 += kTile) {
    const int64_t n = std::min(kTile, s.cols - c0);
    double total[kTile] = {};
    for (int64_t r = 0; r < s.rows; ++r)
      for (int64_t i = 0; i < n; ++i) total[i] += x[r * s.cols + c0 + i];
    for (int64_t i = 0; i < n; ++i) out[c0 + i] = A(s.scale * total[i]);
  }
}
IJCKD_CLONES void sum_columns_f32(const ColumnSum& s, int64_t first, int64_t last) {
  sum_columns<float>(s, first, last);
}
IJCKD_CLONES void sum_columns_f64(const ColumnSum& s, int64_t first, int64_t last) {
  sum_columns<double>(s, first, last);
}

}  // namespace

int feature_diff(const FeatureDiff& f, void*) {
  const auto run = [&](auto part) {
    parallel_for(f.B, row_grain(f.Ct, 1 << 15), [&](int64_t first, int64_t last) { part(f, first, last); });
  };
  by_dtype(f.dtype, [&] { run(diff_rows_f32); }, [&] { run(diff_rows_f64); }, [] {});
  return 0;
}

int column_sum(const ColumnSum& s, void*) {
  const auto run = [&](auto part) {
    parallel_for((s.cols + kTile - 1) / kTile, row_grain(s.rows * kTile, 1 << 16),
                 [&](int64_t first, int64_t last) { part(s, first, last); });
  };
  by_dtype(s.dtype, [&] { run(sum_columns_f32); }, [&] { run(sum_columns_f64); }, [] {});
  return 0;
}

}  // namespace ijckd
