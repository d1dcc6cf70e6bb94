#pragma once
// The memory that a call of an op needs in passing, as one allocation: each costs the host about as much as a launch.

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

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

  // `count` elements of an accumulator type, in bytes.
  Part<uint8_t> part(int64_t count, DType acc) { return part<uint8_t>(count * (acc == DType::f64 ? 8 : 4)); }

#ifdef IJCKD_CUDA
  void allocate(const Tensor& like) {
    if (bytes_ > 0) memory_ = empty(like, {bytes_}, ScalarType::Byte);
  }
#else
  void allocate(const Tensor&) {  // no tensor: making one takes longer than making room
    if (bytes_ == 0) return;
    memory_.reset(static_cast<uint8_t*>(std::aligned_alloc(kAlignment, bytes_)));
    if (!memory_) throw std::bad_alloc();
  }
#endif

  // Sets all of what was allocated to 0.
  void zero() {
#ifdef IJCKD_CUDA
    if (memory_) torch::stable::zero_(*memory_);
#else
    if (memory_) std::memset(memory_.get(), 0, bytes_);
#endif
  }

  template <typename T>
  T* operator[](Part<T> part) const {
    if (part.first == kNone) return nullptr;
    return reinterpret_cast<T*>(start() + part.first);
  }

 private:
  static constexpr int64_t kNone = -1;
#ifdef IJCKD_CUDA
  // As torch's allocator aligns what it gives out on a GPU; the kernels and their tile copies ask for 16 bytes.
  static constexpr int64_t kAlignment = 512;
  OptTensor memory_;
  uint8_t* start() const { return memory_->mutable_data_ptr<uint8_t>(); }
#else
  static constexpr int64_t kAlignment = 64;  // as torch's, a cache line
  struct Free {
    void operator()(uint8_t* memory) const { std::free(memory); }
  };
  std::unique_ptr<uint8_t, Free> memory_;
  uint8_t* start() const { return memory_.get(); }
#endif
  int64_t bytes_ = 0;
};

}  // namespace ijckd
