#pragma once
// Labels as the losses take them.

#include "op.h"

namespace ijckd {

inline void check_labels(const OptTensor& labels, int64_t B, int64_t K, const char* op, const char* arg) {
  if (!labels) return;
  check_shape(labels, {B}, op, arg, "[B]");
  check_device(labels, op, arg);
  check(labels->scalar_type() == ScalarType::Long, op, ": ", arg, " must be int64, got ", name(labels->scalar_type()));
#ifndef IJCKD_CUDA  // on a GPU the check would wait for the device; there such a row's loss is NaN and the row is
                    // counted
  const int64_t* l = labels->const_data_ptr<int64_t>();
  for (int64_t b = 0; b < B; ++b)
    check(l[b] >= 0 && l[b] < K, op, ": ", arg, " must lie in [0, K) = [0, ", K, "), got ", l[b], " at position ", b);
#else
  (void)K;
#endif
}

}  // namespace ijckd
