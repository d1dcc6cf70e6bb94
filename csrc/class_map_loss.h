#pragma once
// class_map_loss without torch: pointers, sizes, a stream; loops in cpu/class_map_loss.cpp, kernels in
// cuda/class_map_loss.cu.
//
// Names: B images, P positions of each, those of the coarsest pooling first, K classes. T is `dtype` (the products'), A
// its accumulator (dtype.h). Every function returns 0, or a CUDA error code; the CPU ignores the stream.

#include <cstdint>

#include "counts.h"
#include "dtype.h"
#include "host_device.h"

namespace ijckd {

enum { kMapKl = 0, kMapDkd, kMapCam, kMapParts };

struct ClassMapWeights {
  double kl, dkd_alpha, dkd_beta, cam;
  double temperature;

  // Whether rows of logits are compared, each by itself.
  IJCKD_HD bool of_rows() const { return kl != 0 || dkd_alpha != 0 || dkd_beta != 0; }
  // What the loss has of a part: DKD's own two are within it.
  IJCKD_HD double of_part(int i) const { return i == kMapKl ? kl : i == kMapCam ? cam : of_rows() ? 1.0 : 0.0; }
};

// KL and DKD of every row of logits (position_row.h), the class maps' distance (class_map.h), and the gradient of the
// image's own weighted loss times P: what a mean over B P rows then divides by.
struct ClassMapRows {
  DType dtype;
  DType gradient_dtype;  // G: T; on a GPU where T is float32 a half type too
  const void* logits;    // [B, P, K] T: x W^T, without bias
  const void* delta;     // [B, P, K] T: W d = logits - logits_t
  const uint8_t* far;    // [B, P]: rows of delta that are W x_t, the teacher's logits without bias; on a GPU null where
                         // these follow from
  const float* square;   // [B, P]: |d|^2 and
  const float* square_t;  // [B, P]: |x_t|^2, by row_math.h:far_from
  const void* bias;       // [K] A, or null; not seen by the class maps
  const int64_t* labels;  // [B], or null without KL and DKD; one outside [0, K) makes the image's loss NaN
  const void* share;      // [B] A, or null: each image's factor
  void* part_rows;        // [B, P, kMapCam] A  out, with KL or DKD: row by row, unweighted
  void* cam_rows;         // [B, cam_parts] A  out, with `cam`: sums over some classes and all positions
  int64_t* counts;        // [kCounts] in and out: device_counts
  void* gradient;         // [B, P, stride] G  out, or null: none is wanted; on the CPU may be the logits
  int64_t stride;         // K, on a GPU also K rounded up to a multiple of 8; columns past K become 0
  int64_t B, P, K;
  int64_t map;  // positions of the class maps, the last of the P
  ClassMapWeights weights;
};
int class_map_rows(const ClassMapRows& r, void* stream);

// In how many parts class_map_rows gives an image's distance of class maps.
int64_t cam_parts(int64_t K);

// Means of the parts (NaN where B is 0, as torch's) and their weighted sum.
struct ClassMapSum {
  DType dtype;            // A
  const void* part_rows;  // [B, P, kMapCam] A
  const void* cam_rows;   // [B, cam_parts] A
  void* loss;             // []          A  out
  void* parts;            // [kMapParts] A  out
  int64_t B, P, K, map;
  ClassMapWeights weights;
};
int class_map_sum(const ClassMapSum& s, void* stream);

}  // namespace ijckd
