#pragma once
// How every kernel starts, through plain functions of the runtime, so that tests/emulator can put its own in place.
// What the runtime must be told or asked beforehand is kept: a launch costs one call of it.

#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace ijckd {

// The error as a launcher returns it. The caller gets it from here: torch must not find it again after a launch of its
// own.
inline int returned(cudaError_t error) {
  cudaGetLastError();
  return static_cast<int>(error);
}

// Values by keys, of one thread, so that nothing locks. A key belongs to one of kSets sets, where a fifth one takes the
// oldest one's place.
template <int kWords, typename Value, int kSets>
class Kept {
 public:
  using Key = std::array<uint64_t, kWords>;

  // Null: not here.
  const Value* find(const Key& key) const {
    for (const Slot& slot : sets_[index(key)].slots)
      if (slot.used && slot.key == key) return &slot.value;
    return nullptr;
  }
  void put(const Key& key, const Value& value) {
    Set& set = sets_[index(key)];
    set.slots[set.next++ % kWays] = {true, key, value};
  }

 private:
  static constexpr int kWays = 4;
  struct Slot {
    bool used = false;
    Key key{};
    Value value{};
  };
  struct Set {
    std::array<Slot, kWays> slots{};
    unsigned next = 0;
  };

  static size_t index(const Key& key) {
    uint64_t hash = 0;
    for (const uint64_t word : key) hash = (hash ^ word) * 0x9E3779B97F4A7C15, hash ^= hash >> 32;
    return hash % kSets;
  }

  std::array<Set, kSets> sets_{};
};

inline uint64_t key_of(const void* p) { return reinterpret_cast<uintptr_t>(p); }

inline cudaError_t device_attribute(int device, cudaDeviceAttr attribute, int* value) {
  thread_local Kept<2, int, 8> kept;
  const std::array<uint64_t, 2> key{uint64_t(device), uint64_t(attribute)};
  if (const int* found = kept.find(key)) return *value = *found, cudaSuccess;
  const cudaError_t error = cudaDeviceGetAttribute(value, attribute, device);
  if (error == cudaSuccess) kept.put(key, *value);
  return error;
}

// Ten times the major version plus the minor; 0 where the runtime does not say.
inline int capability_of(int device) {
  int major = 0, minor = 0;
  if (device_attribute(device, cudaDevAttrComputeCapabilityMajor, &major) != cudaSuccess) return 0;
  if (device_attribute(device, cudaDevAttrComputeCapabilityMinor, &minor) != cudaSuccess) return 0;
  return 10 * major + minor;
}

// A kernel has one size of its own: a smaller one later would be the new limit.
inline cudaError_t allow_shared(const void* kernel, int device, int bytes) {
  if (bytes <= 48 << 10) return cudaSuccess;  // more than every GPU has must be asked for
  thread_local Kept<3, bool, 32> kept;
  const std::array<uint64_t, 3> key{key_of(kernel), uint64_t(device), uint64_t(bytes)};
  if (kept.find(key)) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) kept.put(key, true);
  return error;
}

// Ways to start a kernel that a GPU or its driver may refuse.
enum Feature {
  kDependent = 1,            // before the launch before it on the stream has ended: "programmatic dependent launch"
  kClusters = 2,             // in clusters of blocks
  kCooperative = 4,          // all blocks at a time
  kDependentCooperative = 8  // both
};

// Features that a driver has refused on a GPU that should have them: not tried again in this process.
inline std::atomic<int> refused_features{0};

// Whether to start kernels so on this device.
inline bool served(Feature feature, int device) {
  if (refused_features & feature) return false;
  if (feature != kCooperative) return capability_of(device) >= 90;
  int cooperative = 0;
  return device_attribute(device, cudaDevAttrCooperativeLaunch, &cooperative) == cudaSuccess && cooperative;
}

// `with`, which starts kernels by means of the feature, or where that is not served `without`; each returns 0 or an
// error code. What only `without` can do has been refused.
template <typename With, typename Without>
int either(Feature feature, const With& with, const Without& without) {
  int device;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return returned(error);
  const bool tried = served(feature, device);
  int error = tried ? with() : 0;
  if (tried && error == 0) return 0;
  error = without();
  if (tried && error == 0) refused_features |= feature;
  return error;
}

struct Start {
  dim3 grid, block;
  int shared_bytes = 0;
  // Whether blocks may start before the launch before this one on the stream has ended. The kernel then calls
  // wait_for_earlier_launches (instructions.cuh) before it touches anything that an earlier launch of the same op has.
  bool dependent = false;
  int cluster = 1;  // blocks, neighbours along x, that run at the same time and reach each other's shared memory
  bool cooperative = false;
};

// A launch that is dependent where that is served, and otherwise not. Where clusters or cooperative launches are not
// served it is an error: see `either`.
template <typename... Params, typename... Args>
int launch_as(const Start& start, void (*kernel)(Params...), void* stream, const Args&... args) {
  int device;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = allow_shared(reinterpret_cast<const void*>(kernel), device, start.shared_bytes);
  if (error != cudaSuccess) return returned(error);
  cudaLaunchAttribute attributes[3]{};
  unsigned count = 0;
  if (start.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = start.cluster;
    attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  if (start.cooperative) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count++].val.cooperative = 1;
  }
  const auto launch_with = [&](unsigned attribute_count) {
    const cudaLaunchConfig_t config{
        start.grid, start.block,    static_cast<size_t>(start.shared_bytes), static_cast<cudaStream_t>(stream),
        attributes, attribute_count};
    return cudaLaunchKernelEx(&config, kernel, args...);
  };
  const Feature overlap = start.cooperative ? kDependentCooperative : kDependent;
  if (!start.dependent || !served(overlap, device)) return returned(launch_with(count));
  attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[count].val.programmaticStreamSerializationAllowed = 1;
  const int refused = returned(launch_with(count + 1));
  if (refused == 0) return 0;
  error = launch_with(count);
  if (error == cudaSuccess) refused_features |= overlap;
  return returned(error);
}

template <typename... Params, typename... Args>
int launch_sharing(int shared_bytes, void (*kernel)(Params...), dim3 grid, dim3 block, void* stream,
                   const Args&... args) {
  return launch_as({grid, block, shared_bytes}, kernel, stream, args...);
}

template <typename... Params, typename... Args>
int launch_dependent(int shared_bytes, void (*kernel)(Params...), dim3 grid, dim3 block, void* stream,
                     const Args&... args) {
  return launch_as({grid, block, shared_bytes, true}, kernel, stream, args...);
}

template <typename... Params, typename... Args>
int launch(void (*kernel)(Params...), dim3 grid, dim3 block, void* stream, const Args&... args) {
  return launch_as({grid, block}, kernel, stream, args...);
}

// A dependent launch of a kernel whose blocks wait for one another: as many of `blocks` as the GPU holds at a time.
// Each of them must do what the missing ones would have done.
template <typename... Params, typename... Args>
int launch_resident(int shared_bytes, void (*kernel)(Params...), int blocks, int threads, void* stream,
                    const Args&... args) {
  const void* const address = reinterpret_cast<const void*>(kernel);
  int device, multiprocessors, on_each;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = device_attribute(device, cudaDevAttrMultiProcessorCount, &multiprocessors);
  if (error == cudaSuccess) error = allow_shared(address, device, shared_bytes);
  if (error != cudaSuccess) return returned(error);
  thread_local Kept<4, int, 8> kept;  // blocks on each multiprocessor
  const std::array<uint64_t, 4> key{key_of(address), uint64_t(device), uint64_t(threads), uint64_t(shared_bytes)};
  if (const int* found = kept.find(key)) {
    on_each = *found;
  } else {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&on_each, kernel, threads, shared_bytes);
    if (error != cudaSuccess) return returned(error);
    kept.put(key, on_each);
  }
  const int resident = multiprocessors * on_each;
  Start start{blocks < resident ? blocks : resident, threads, shared_bytes};
  start.dependent = start.cooperative = true;
  return launch_as(start, kernel, stream, args...);
}

}  // namespace ijckd
