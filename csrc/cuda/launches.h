#pragma once
// What a GPU's driver refuses of the ways in which kernels start (launch.cuh).

namespace ijckd {

// Starts an empty kernel in each way that the current GPU should have, unless it has been refused before; the ways that
// this process has been refused, as bits: 1 launches before the one before has ended, 2 clusters, 4 cooperative
// launches, 8 the first of these cooperatively. Returns 0 or an error code.
int refused_launches(int* refused, void* stream);

}  // namespace ijckd
