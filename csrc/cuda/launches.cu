// launches.h
#include <utility>

#include "cuda/launches.h"
#include "device.cuh"
#include "instructions.cuh"

namespace ijckd {
namespace {

__global__ void empty_kernel() { wait_for_earlier_launches(); }

}  // namespace

int refused_launches(int* refused, void* stream) {
  const Start plain{2, 32};
  Start dependent = plain, cluster = plain, cooperative = plain;
  dependent.dependent = cooperative.cooperative = cooperative.dependent = true;
  cluster.cluster = 2;
  const auto start = [&](const Start& how) { return launch_as(how, empty_kernel, stream); };
  int error = start(dependent);
  for (const auto& [feature, how] : {std::pair{kClusters, cluster}, {kCooperative, cooperative}})
    if (!error) error = either(feature, [&, &how = how] { return start(how); }, [&] { return start(plain); });
  *refused = refused_features;
  return error;
}

}  // namespace ijckd
