// Host side of take_counts.
#include "counts.h"

#include "op.h"

namespace ijckd {
namespace {

Tensor read_counts(const Tensor& like) {
  const Tensor out = torch::stable::new_empty(like, {kCounts}, ScalarType::Long);
  Launch launch(like);
  int64_t* counts = nullptr;
  launched(device_counts(&counts), "the search for the counters");
  launched(take_counts({counts, out.mutable_data_ptr<int64_t>()}, launch.stream), "take_counts");
  return out;
}

}  // namespace
}  // namespace ijckd

#ifdef IJCKD_CUDA
STABLE_TORCH_LIBRARY_IMPL(ijckd, CUDA, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(ijckd, CPU, m) {
#endif
  m.impl("take_counts", TORCH_BOX(&ijckd::read_counts));
}
