#pragma once
// Checks of the arguments that the ops of views have in common, on the CPU and on a GPU.

#include <cmath>

#include "blocks.h"
#include "op.h"

namespace ijckd {

inline void check_bits(int64_t luma_bits, int64_t chroma_bits, const char* op) {
  const auto served = [](int64_t bits) { return bits == 3 || bits == 4; };
  check(served(luma_bits) && served(chroma_bits), op, ": luma_bits and chroma_bits must be 3 or 4, got ", luma_bits,
        " and ", chroma_bits);
}

inline void check_view_rows(const Tensor& rows, const char* op) {
  check_device(rows, op, "rows");
  check(rows.scalar_type() == ScalarType::Long && rows.dim() == 2 && rows.size(1) == kViewColumns, op,
        ": rows must be int64 [B, ", int(kViewColumns), "], got ", name(rows.scalar_type()), " ", shape(rows));
}

// Of `out` for B views; their side.
inline int64_t view_side(const Tensor& out, int64_t B, const char* op) {
  const int64_t S = out.dim() == 4 ? out.size(1) : 0;
  check_device(out, op, "out");
  check(out.dim() == 4 && out.size(0) == B && out.size(2) == S && out.size(3) == 3 && S >= 1 && S <= kMostViewSide, op,
        ": out must be [B, S, S, 3] with B = ", B, " and S in [1, ", kMostViewSide, "], got ", shape(out));
  check(out.is_contiguous(), op, ": out must be contiguous");
  return S;
}

// Both as floats, [3] each.
inline void normalisation(const std::vector<double>& shift, const std::vector<double>& scale, const char* op,
                          float* shifts, float* scales) {
  check(shift.size() == 3 && scale.size() == 3, op, ": shift and scale must be 3 numbers each, got ", shift.size(),
        " and ", scale.size());
  for (int c = 0; c < 3; ++c) {
    shifts[c] = float(shift[c]), scales[c] = float(scale[c]);
    check(std::isfinite(shifts[c]) && std::isfinite(255 * scales[c]), op, ": shift and scale must be finite, got ",
          shift[c], " and ", scale[c]);
  }
}

}  // namespace ijckd
