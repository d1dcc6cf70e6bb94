// On the CPU there is nothing to count.
#include "counts.h"

#include <algorithm>

namespace ijckd {

int device_counts(int64_t** counts) {
  *counts = nullptr;
  return 0;
}

int take_counts(const TakeCounts& t, void*) {
  std::fill_n(t.out, static_cast<int>(kCounts), int64_t(0));
  return 0;
}

}  // namespace ijckd
