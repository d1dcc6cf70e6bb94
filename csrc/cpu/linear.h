#pragma once
// The pass of a linear connector on vectors, without torch; connector_match.h's would keep what only maps need.

#include <cstdint>

#include "dtype.h"

namespace ijckd {

struct AddBias {
  DType dtype;
  const void* y;     // [B, Ct] T
  const void* bias;  // [Ct] A, or null
  void* z;           // [B, Ct] A  out: y + bias; may be y
  int64_t B, Ct;
};
void add_bias(const AddBias& a);

}  // namespace ijckd
