// CPU loop of linear.h.
#include "linear.h"

#include "loops.h"
#include "vectorise.h"

namespace ijckd {
namespace {

template <typename T, typename A>
IJCKD_INLINE void bias_rows(const AddBias& f, int64_t first, int64_t last) {
  const T* y = static_cast<const T*>(f.y);
  const A* bias = static_cast<const A*>(f.bias);
  A* z = static_cast<A*>(f.z);
  for (int64_t b = first; b < last; ++b)
    for (int64_t c = 0, i = b * f.Ct; c < f.Ct; ++c, ++i) z[i] = load(y, i) + (bias ? bias[c] : A(0));
}
IJCKD_CLONES void bias_rows_f32(const AddBias& f, int64_t first, int64_t last) {
  bias_rows<float, float>(f, first, last);
}
IJCKD_CLONES void bias_rows_f64(const AddBias& f, int64_t first, int64_t last) {
  bias_rows<double, double>(f, first, last);
}
IJCKD_CLONES void bias_rows_bf16(const AddBias& f, int64_t first, int64_t last) {
  bias_rows<c10::BFloat16, float>(f, first, last);
}

}  // namespace

void add_bias(const AddBias& f) {
  const auto run = [&](auto part) {
    parallel_for(f.B, row_grain(f.Ct, 1 << 15), [&](int64_t first, int64_t last) { part(f, first, last); });
  };
  by_dtype(f.dtype, [&] { run(bias_rows_f32); }, [&] { run(bias_rows_f64); }, [&] { run(bias_rows_bf16); });
}

}  // namespace ijckd
