#pragma once
// What the ops of block packs compute, without torch; loops in cpu/block_encode.cpp and cpu/block_views.cpp. One thread
// each: the loader's threads call them side by side.

#include <chrono>
#include <cstdint>

#include "blocks.h"

namespace ijckd {

// rgb [h, w, 3] -> out [image.bytes()]. End points by least squares.
void encode_blocks(const uint8_t* rgb, const BlockImage& image, uint8_t* out);

// A plane's bytes -> its first h rows and w columns, out [h, w].
void decode_blocks(const uint8_t* data, const BlockPlane& plane, int64_t h, int64_t w, uint8_t* out);

// Of n bytes, as blocks.h defines it.
uint64_t block_checksum(const uint8_t* data, int64_t n);

enum class ViewType { u8, f32, bf16 };

// What a view's time goes to.
enum class ViewStage { checksum, weights, decode, along_x, along_y, colours, stores };
constexpr int kViewStages = 7;

// Adds the time since the last lap to a stage's, where someone asks for it.
class StageClock {
 public:
  explicit StageClock(int64_t* ticks) : ticks_(ticks), last_(ticks ? now() : 0) {}
  void lap(ViewStage stage) {
    if (!ticks_) return;
    const int64_t t = now();
    ticks_[int(stage)] += t - last_;
    last_ = t;
  }

 private:
  static int64_t now() {
#ifdef __x86_64__
    return int64_t(__builtin_ia32_rdtsc());
#else
    return std::chrono::steady_clock::now().time_since_epoch().count();
#endif
  }
  int64_t *ticks_, last_;
};

constexpr int kMostLanes = 32;  // of 16 bits, in a vector

// One view, out [S, S, 3]: (level - shift) * scale of each colour, or the levels themselves.
struct BlockView {
  BlockImage image;
  const uint8_t* data;  // image.bytes()
  const int64_t* row;   // [kViewColumns], checked
  int64_t S;
  ViewType type;
  const float* shift;  // [3]
  const float* scale;  // [3]
  bool half_way;       // any_half_way(shift, scale)
  void* out;
  const uint8_t* next = nullptr;  // what the next view reads, to be fetched meanwhile
  int64_t next_bytes = 0;
  int lanes = kMostLanes;    // that may be used: 8, 16 or 32
  int64_t* ticks = nullptr;  // [kViewStages]: what each stage takes is added, in units of the processor's clock
};
void block_view(const BlockView& v);

// Whether a level lies half way between two bfloat16: then they are rounded to the even one, which takes longer.
bool any_half_way(const float* shift, const float* scale);

}  // namespace ijckd
