#pragma once
// The memory that a call of an op needs in passing, as one allocation: each costs the host about as much as a launch.

#include "op.h"

namespace ijckd {

// Parts are named first; `allocate` makes the memory of all, which lasts as long as this. On a GPU torch's allocator
// hands it on to later launches of the stream alone.
class Workspace {
 public:
  template <typename T>
  struct Part {
    int64_t first;  // byte, or none
  };

  // Room for `count` elements of T; 0: none, and no place.
  template <typename T>
  Part<T> part(int64_t count) {
    if (count == 0) return {kNone};
    const Part<T> next{bytes_};
    bytes_ += (count * int64_t(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
    return next;
  }

  void allocate(const Tensor& like) { memory_ = empty(like, {bytes_}, ScalarType::Byte); }

  template <typename T>
  T* operator[](Part<T> part) const {
    if (part.first == kNone) return nullptr;
    return reinterpret_cast<T*>(memory_->mutable_data_ptr<uint8_t>() + part.first);
  }

 private:
  static constexpr int64_t kNone = -1;
  // As torch's allocator aligns what it gives out on a GPU; the kernels and their tile copies ask for 16 bytes.
  static constexpr int64_t kAlignment = 512;

  int64_t bytes_ = 0;
  OptTensor memory_;
};

}  // namespace ijckd
