#pragma once
// What a thread keeps from view to view.

#include <cstdlib>
#include <new>
#include <utility>
#include <vector>

#include "../block_codec.h"
#include "view_weights.h"

namespace ijckd {

constexpr int64_t kLine = 64;  // bytes of a cache line: loads of whole vectors shall not cross one
constexpr int64_t kLane = 32;  // samples in one: rows are padded to whole ones
constexpr int64_t kChunk = 8;  // columns that are transposed together
constexpr int64_t kBand = 2;   // rows that are made together

inline int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Memory that begins with a cache line and never shrinks. What it holds is lost where it grows.
template <typename T>
class Lines {
 public:
  Lines() = default;
  Lines(const Lines&) = delete;
  Lines& operator=(const Lines&) = delete;
  ~Lines() { std::free(data_); }
  T* of(int64_t n) {
    if (n > room_) {
      std::free(data_);
      room_ = padded(n * int64_t(sizeof(T)), kLine) / int64_t(sizeof(T));
      data_ = static_cast<T*>(std::aligned_alloc(kLine, room_ * sizeof(T)));
      if (!data_) room_ = 0, throw std::bad_alloc();
    }
    return data_;
  }
  T* data() const { return data_; }

 private:
  T* data_ = nullptr;
  int64_t room_ = 0;
};

// One plane after the pass along x, or two that lie alike: sample (y, x) is in row(y)[x]. Rows are in
// the order in which they are decoded: the first row of every block, then the second of every block, and so on.
struct ViewPlane {
  int64_t first_row;      // of the blocks
  int64_t blocks;         // in a column of one plane
  int64_t lanes;          // in a column of all planes
  int64_t stride;         // between rows
  Lines<int16_t> rows;    // samples with 7 fractional bits
  Lines<int64_t> places;  // where each row of the first plane begins

  void find_rows() {
    int64_t* to = places.of(kBlockSide * blocks);
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t y = 0; y < kBlockSide; ++y) to[block * kBlockSide + y] = (y * lanes + block) * stride;
  }
  // Of the first plane; the second one's is blocks * stride further on.
  const int16_t* row(int64_t y) const { return rows.data() + places.data()[y - first_row]; }
};

struct ViewScratch {
  // Those of blocks.h, and what rounds to a level, in every lane. The compiler shall not know them: it would not see
  // rounded products in some.
  alignas(kLine) int16_t factors[5][kLane];
  ViewWeights luma_x, luma_y, chroma_x, chroma_y;
  ViewPlane luma, chroma;
  Lines<int64_t> places;   // where a column's words lie
  Lines<int64_t> ends;     // where its end points do
  Lines<uint64_t> words;   // of one column of blocks
  Lines<int16_t> columns;  // decoded
  Lines<int16_t> band;     // [kBand, 3, stride]: after both passes, with 6 fractional bits
  Lines<uint8_t> stored;   // [kBand, stride, 3] as they are written

  ViewScratch() {
    const int of[5] = {kRedOfCr, kGreenOfCb, kGreenOfCr, kBlueOfCb, 1 << (15 - kPassBits)};
    for (int c = 0; c < 5; ++c)
      for (int16_t& factor : factors[c]) factor = int16_t(of[c]);
  }
};

}  // namespace ijckd
