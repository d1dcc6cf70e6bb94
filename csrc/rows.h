#pragma once
// Passes over rows and columns that both ops need, without torch; loops in cpu/rows.cpp, kernels in cuda/rows.cu.
// A is `dtype`, an accumulator type (dtype.h). Every function returns 0, or a CUDA error code; the CPU ignores the
// stream.

#include <cstdint>

#include "dtype.h"

namespace ijckd {

// d = z - pooled_t, formed in A before any rounding: late in training z and pooled_t agree to a few per cent, and the
// difference of two rounded logits would keep none of it.
struct FeatureDiff {
  DType dtype;
  const void* z;         // [B, Ct] A
  const void* pooled_t;  // [B, Ct] A
  void* d;               // [B, Ct] A  out
  void* square_rows;     // [B]     A  out: sum over Ct of d^2
  int64_t B, Ct;
};
int feature_diff(const FeatureDiff& f, void* stream);

// out[c] = scale * sum over rows of x[r, c], in an order that the sizes alone decide: equal inputs give equal bits.
struct ColumnSum {
  DType dtype;
  const void* x;  // [rows, cols] A
  void* out;      // [cols]       A  out
  int64_t rows, cols;
  double scale;
};
int column_sum(const ColumnSum& s, void* stream);

}  // namespace ijckd
