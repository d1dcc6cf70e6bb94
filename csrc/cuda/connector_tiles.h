#pragma once
// connector_match's projection on tensor cores (sm_80 and newer), without torch. Returns 0 or a CUDA error code.

#include <cstdint>

#include "dtype.h"

namespace ijckd {

// y = u W^T, with the statistics of each channel over every part of the rows as connector_match.h:ChannelStats wants
// them, so that BatchNorm's statistics cost no pass over y. They are those of y as stored.
struct ProjectTiles {
  int stage;           // 1 or 2: stage.h
  DType dtype;         // T: bfloat16 or float16
  const void* u;       // [N, Cs] T, aligned to 16 bytes, Cs a multiple of 8
  const void* weight;  // [Ct, Cs] T, likewise
  void* y;             // [N, Ct] T  out; Ct is a multiple of 2
  float* mean;         // [parts, Ct]  out, or null: no statistics
  float* m2;           // [parts, Ct]  out: sum of squared distances from the part's mean
  int64_t N, Cs, Ct;
};
int project_tiles(const ProjectTiles& p, void* stream);

// Rows in a part.
int64_t project_rows(int stage, int64_t N, int64_t Ct);

}  // namespace ijckd
