#pragma once
// Which kernels may run: 0 library GEMMs and plain kernels, any GPU and shape; 1 tensor-core tiles too (sm_80 and newer). What
// may run and what serves a call are two things: the second is the host side's to say, by size and type.

#include <cstdint>

namespace ijckd {

constexpr int64_t kStages = 2;

int64_t stage_limit();

// Of the current GPU, ten times its major version plus the minor; 0 if there is none. Tensor-core tiles need 80.
int compute_capability();

}  // namespace ijckd
