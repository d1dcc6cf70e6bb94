#pragma once
// The weights of one axis of one plane of a view, see blocks.h.

#include <cstdint>
#include <vector>

#include "../blocks.h"

namespace ijckd {

constexpr int kMostFew = 8;  // taps of an output of few()

// The taps of outputs [first, last); output first + t's are samples low[t] + 0 .. n - 1.
struct ViewWeights {
  bool few;
  int64_t n, outputs;
  int64_t begin, end;           // samples that are read
  std::vector<int64_t> low;     // [outputs] or more, like the others
  std::vector<int16_t> narrow;  // [outputs, n] if few
  std::vector<int32_t> wide;    // [outputs, n] if not

  void make(const PlaneAxis& axis, int64_t first, int64_t last);
};

}  // namespace ijckd
