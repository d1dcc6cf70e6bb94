// CPU loops of rows.h.
#include "rows.h"

#include <algorithm>

#include "loops.h"

namespace ijckd {

int feature_diff(const FeatureDiff& f, void*) {
  dispatch(f.dtype, [&](auto, auto a) {
    using A = decltype(a);
    const A *z = static_cast<const A*>(f.z), *pooled_t = static_cast<const A*>(f.pooled_t);
    A *d = static_cast<A*>(f.d), *rows = static_cast<A*>(f.square_rows);
    parallel_for(f.B, 16, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        A s = 0;
        for (int64_t i = b * f.Ct; i < (b + 1) * f.Ct; ++i) {
          d[i] = z[i] - pooled_t[i];
          s += d[i] * d[i];
        }
        rows[b] = s;
      }
    });
  });
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
