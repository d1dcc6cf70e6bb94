#pragma once
// Which kernels may run: 0 library GEMMs and plain kernels, any GPU and shape; 1 tensor-core tiles too (sm_80 and
// newer); 2 those with Hopper's own instructions instead of stage 1's (sm_90 alone). What may run and what serves
// a call are two things: the second is the host side's to say, by size and type.

#include <cstdint>

namespace ijckd {

constexpr int kStages = 3;

class Launch;  // op.h

// The highest stage of the launch's GPU, which is that of its tensors and current while it lives, and none that
// torch.ops.ijckd.limit_stage forbids.
int stage(const Launch& launch);

// Of the current GPU, ten times its major version plus the minor; 0 if there is none.
int compute_capability();

}  // namespace ijckd
