#pragma once
// Views of images in blocks (blocks.h) made on a GPU, without torch: from blocks to normalised pixels in one kernel.

#include <cstdint>

#include "blocks.h"

namespace ijckd {

enum class Pixels { u8, f32, bf16, f16 };

// The bits of the CPU's op; float16 is rounded from float32, too.
struct BlockViews {
  const int64_t* files;  // [n_files, 2]: address and bytes, of memory that the GPU can read: its own, or pinned
  int64_t n_files;
  const int64_t* rows;  // [B, kViewColumns]
  int luma_bits, chroma_bits;
  Pixels type;
  float shift[3], scale[3];
  void* out;        // [B, S, S, 3] of type    out
  uint8_t* status;  // [B]                     out: 1 of a row that does not fit, whose view is all zeros
  int64_t B, S;     // B: at most kMostViews
};
constexpr int64_t kMostViews = 65535;   // what a grid's third dimension holds
constexpr int64_t kBlockAlignment = 8;  // of an image's first byte
int block_views(const BlockViews& v, void* stream);

}  // namespace ijckd
