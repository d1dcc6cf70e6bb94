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

}  // namespace

int feature_diff(const FeatureDiff& f, void*) {
  const auto run = [&](auto part) {
    parallel_for(f.B, row_grain(f.Ct, 1 << 15), [&](int64_t first, int64_t last) { part(f, first, last); });
  };
  by_dtype(f.dtype, [&] { run(diff_rows_f32); }, [&] { run(diff_rows_f64); }, [] {});
  return 0;
}

int column_sum(const ColumnSum& s, void*) {
  dispatch(s.dtype, [&](auto, auto a) {
    using A = decltype(a);
    const A* x = static_cast<const A*>(s.x);
    A* out = static_cast<A*>(s.out);
    std::fill_n(out, s.cols, A(0));
    for (int64_t r = 0; r < s.rows; ++r)
      for (int64_t c = 0; c < s.cols; ++c) out[c] += x[r * s.cols + c];
    for (int64_t c = 0; c < s.cols; ++c) out[c] *= A(s.scale);
  });
  return 0;
}

}  // namespace ijckd
