#pragma once
// What the ops of block packs compute, without torch; loops in cpu/block_encode.cpp and cpu/block_views.cpp. One thread
// each: the loader's threads call them side by side.

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

// One view, out [S, S, 3]: (level - shift) * scale of each colour, or the levels themselves.
struct BlockView {
  BlockImage image;
  const uint8_t* data;  // image.bytes()
  const int64_t* row;   // [kViewColumns], checked
  int64_t S;
  ViewType type;
  const float* shift;  // [3]
  const float* scale;  // [3]
  void* out;
};
void block_view(const BlockView& v);

}  // namespace ijckd
