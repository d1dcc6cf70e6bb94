#include "cuda/stage.h"

#include <algorithm>
#include <atomic>

#include "op.h"

namespace ijckd {
namespace {

std::atomic<int64_t> limit{kStages - 1};

int64_t limit_stage(int64_t most) {
  check(most >= 0 && most < kStages, "limit_stage: the stages are 0 to ", kStages - 1, ", got ", most);
  return limit.exchange(most);
}

}  // namespace

int stage(const Launch&) {
  const int capability = compute_capability(), highest = capability == 90 ? 2 : capability >= 80 ? 1 : 0;
  return std::min(highest, static_cast<int>(limit));
}

}  // namespace ijckd

STABLE_TORCH_LIBRARY_IMPL(ijckd, CompositeExplicitAutograd, m) {
  m.impl("limit_stage", TORCH_BOX(&ijckd::limit_stage));
}
