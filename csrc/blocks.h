#pragma once
// Block packs: how an image is stored in blocks and what a view of it is, as scalar formulas that the CPU loops and the
// CUDA kernels share. Integers throughout, and one correctly rounded division of doubles, so that every machine gives
// the same bits.
//
// An image is three planes: Y, Cb, Cr of JFIF (full range). Luma is padded to multiples of 8 by repeating its last row
// and column; a chroma plane has one sample for each 2 x 2 of the padded plane of full size. Planes are in blocks
// of 4 x 4 samples, row-major; a block has two end points and sixteen indices between them.
//
// A view is a crop of the planes, resized with Pillow's antialiased triangle filter: first along rows, then along
// columns, then converted to RGB and rounded to 8 bits.

#include <stdint.h>

#include "host_device.h"

namespace ijckd {

// ---- The format

constexpr int64_t kBlockSide = 4, kBlockSamples = 16;
constexpr int64_t kMostSide = 65535;  // of an image
constexpr int kPlanes = 3;            // Y, Cb, Cr

// One plane. With indices of 3 bits a block is 8 bytes: a, b, then the indices in 48 bits. With 4 bits there are two
// sections: a, b of all blocks, padded with zeros to a multiple of 8 bytes, then 8 bytes of indices of all blocks.
// Index i of sample (y, x) of a block begins at bit `bits` (4 y + x) of a little-endian number.
struct BlockPlane {
  int64_t high, wide;  // blocks
  int bits;            // of an index: 3 or 4

  IJCKD_HD int64_t blocks() const { return high * wide; }
  // Bytes before the first block's 64-bit word that has the indices; of the section of end points if there is one.
  IJCKD_HD int64_t ends_bytes() const { return bits == 3 ? 0 : (2 * blocks() + 7) / 8 * 8; }
  IJCKD_HD int64_t bytes() const { return ends_bytes() + 8 * blocks(); }
  // Where block n's a and b lie, and its word; bits of that word before the first index.
  IJCKD_HD int64_t ends_at(int64_t n) const { return bits == 3 ? 8 * n : 2 * n; }
  IJCKD_HD int64_t word_at(int64_t n) const { return ends_bytes() + 8 * n; }
  IJCKD_HD int skipped_bits() const { return bits == 3 ? 16 : 0; }
};

// An image of h x w pixels. Its bytes follow from its size and its bits.
struct BlockImage {
  int64_t h, w;
  int luma_bits, chroma_bits;

  IJCKD_HD BlockPlane plane(int c) const {
    const int64_t high = (h + 7) / 8, wide = (w + 7) / 8;
    return c == 0 ? BlockPlane{2 * high, 2 * wide, luma_bits} : BlockPlane{high, wide, chroma_bits};
  }
  IJCKD_HD int64_t plane_at(int c) const { return c == 0 ? 0 : plane(0).bytes() + (c - 1) * plane(1).bytes(); }
  IJCKD_HD int64_t bytes() const { return plane_at(kPlanes); }
};

// Sample with index i between the end points a and b: (a (L - i) + b i + L / 2) / L with L the largest index, 7 or 15,
// rounded down twice; in 16 bits, where the multiplication by 2^16 / L gives the quotient of every sum that occurs.
IJCKD_HD int block_sample(int a, int b, int i, int bits) {
  return bits == 3 ? int((uint32_t(a * 7 + 3 + (b - a) * i) * 9363u) >> 16)
                   : int((uint32_t(a * 15 + 7 + (b - a) * i) * 4370u) >> 16);
}

// RGB to Y, Cb, Cr in 16 fractional bits, libjpeg's own numbers. (On the host alone, as all that encodes or checks.)
inline int luma_of(int r, int g, int b) { return (19595 * r + 38470 * g + 7471 * b + 32768) >> 16; }
inline int blue_of(int r, int g, int b) { return (-11059 * r - 21709 * g + 32768 * b + (128 << 16) + 32767) >> 16; }
inline int red_of(int r, int g, int b) { return (32768 * r - 27439 * g - 5329 * b + (128 << 16) + 32767) >> 16; }

// A sample of a chroma plane from s, the sum of four samples of the full-size plane, and the sum of the sums around it,
// weighted (1, 6, 1) along x and along y, which repeat beyond the plane's sides: the mean m, sharpened by three
// quarters of what a resize to full size would blur, m + 3 (m - blurred) / 4, rounded half up.
inline int chroma_of(int s, int around) {
  const int v = (448 * s - 3 * around + 512) >> 10;
  return v < 0 ? 0 : v > 255 ? 255 : v;
}

// Luma makes up for some of what Cb and Cr have lost to half their size and to their blocks. Where they are off by u
// and v, RGB is off by (1.402 v, -0.344 u - 0.714 v, 1.772 u), and luma less the mean of the three leaves the least
// squares. Three quarters of it are best where views make images smaller, too. u and v come times 16.
inline int luma_beside(int y, int u, int v) {
  const int x = y - ((1462 * u + 704 * v + 32768) >> 16);
  return x < 0 ? 0 : x > 255 ? 255 : x;
}

// ---- The checksum of an image's bytes
//
// The bytes, padded with zeros to a multiple of 64, are little-endian 32-bit words w_0, w_1, ... Lane l of 16 has every
// word whose number is l modulo 16. In each lane, one word after the other: a += w; b += a; in 64 bits, from 0. Then
// h = number of bytes, and for every lane in turn h = mixed(h, b + 2^32 a), all modulo 2^64.
//
// One word altered, or two of one lane exchanged, always gives another checksum: b changes by less than 2^64, and
// mixed() is one-to-one in each argument. Anything else is missed once in 2^64 times.
constexpr int kChecksumLanes = 16;

inline uint64_t mixed(uint64_t h, uint64_t x) {
  h = (h ^ x) * 0x9e3779b97f4a7c15ull;
  return h ^ (h >> 32);
}

// ---- Where a view lies
//
// The columns of a view's row, int64. The crop's upper left pixel and size are in the image's own pixels; or, where the
// whole image is resized first (kResizedHeight > 0), in the resized image's: then the crop has the view's own size and
// is black where it lies outside.
enum {
  kFile = 0,  // which of the files
  kOffset,    // of the image's first byte in it
  kLength,    // bytes
  kChecksum,  // as two's complement
  kHeight,    // of the image
  kWidth,
  kTop,  // of the crop
  kLeft,
  kCropHeight,
  kCropWidth,
  kResizedHeight,  // of the whole image; 0: the crop is resized
  kResizedWidth,
  kFlip,  // 1: mirrored left to right
  kViewColumns
};
constexpr int64_t kMostResized = int64_t(1) << 28, kMostViewSide = 1 << 14;

// One axis of a view. Output k of the view is output i = first + k of the resize, black outside [0, outputs); with
// kFlip, column k is made as column S - 1 - k.
struct ViewAxis {
  int64_t start, length;  // what is resized, in the image's pixels
  int64_t outputs;        // to so many
  int64_t first;

  // From a row of the table, for a view of side S; axis 0: columns of pixels (y), 1: along x.
  IJCKD_HD static ViewAxis of(const int64_t* row, int axis, int64_t S) {
    const int64_t at = row[kTop + axis];
    return row[kResizedHeight] > 0 ? ViewAxis{0, row[kHeight + axis], row[kResizedHeight + axis], at}
                                   : ViewAxis{at, row[kCropHeight + axis], S, 0};
  }
};

// The same for one plane. Positions are in units of 1 / (2 outputs) of a luma sample, so that all are integers: sample
// j of the plane has its centre at pitch (2 j + 1).
struct PlaneAxis {
  int64_t start, length, outputs;
  int64_t pitch;       // half a sample
  int64_t support;     // of the filter, to either side
  int64_t begin, end;  // samples that may enter: those the crop touches

  IJCKD_HD PlaneAxis(const ViewAxis& v, bool chroma)
      : start(v.start),
        length(v.length),
        outputs(v.outputs),
        pitch(chroma ? 2 * v.outputs : v.outputs),
        support(2 * (pitch > v.length ? pitch : v.length)),
        begin(chroma ? v.start / 2 : v.start),
        end(chroma ? (v.start + v.length + 1) / 2 : v.start + v.length) {}

  IJCKD_HD int64_t centre(int64_t i) const { return 2 * outputs * start + (2 * i + 1) * length; }

  // A tap's weight before it is normalised.
  IJCKD_HD int64_t tap(int64_t centre, int64_t j) const {
    const int64_t from = pitch * (2 * j + 1) - centre, t = support - (from < 0 ? -from : from);
    return t > 0 ? t : 0;
  }

  // Taps that may weigh anything: [lowest(centre), lowest(centre) + most_taps()), of which those count that lie in
  // [begin, end).
  IJCKD_HD int64_t lowest(int64_t centre) const {
    const int64_t from = centre - support;
    return from <= 0 ? begin : (from / (2 * pitch) > begin ? from / (2 * pitch) : begin);
  }
  IJCKD_HD int64_t most_taps() const { return (support + pitch - 1) / pitch + 1; }

  // Whether a pass is in 16 bits: at most 4 samples to an output. Each output has then at most 8 taps.
  IJCKD_HD bool few() const { return length <= 4 * pitch; }
};

// ---- Weights
//
// Of an output's taps t_0, t_1, ... with sum T, in the order of the samples, tap j weighs
//   w_j = share(t_0 + .. + t_j) - share(t_0 + .. + t_{j-1}),   share(C) = round(C floor(2^62 / T) / 2^(62 - bits)),
// so that they sum to 2^bits exactly. Where samples are added that weigh nothing, nothing changes.
constexpr int kFewBits = 14, kManyBits = 26;

// 2^62 / T as a double, rounded to nearest, then down. T is below 2^35: one double holds it.
IJCKD_HD int64_t reciprocal(int64_t T) { return int64_t(4611686018427387904.0 / double(T)); }

IJCKD_HD int32_t share(int64_t sum, int64_t reciprocal, int bits) {
  return int32_t((sum * reciprocal + (int64_t(1) << (61 - bits))) >> (62 - bits));
}

// ---- Passes
//
// A pass takes samples with 7 fractional bits (15 bits in all) and gives them with 6. Between the two passes a sample
// is doubled, so that both are alike. The result of a pass with few taps is the sum of times(sample, weight), whose
// weights have kFewBits; with many taps it is the sum of products, whose weights have kManyBits, rounded once.
//
// How far a view may lie from the same filter in exact numbers, in grey levels: with 8 taps, 8 roundings of half a 64th
// and weights whose running sums are off by half of 2^-14: 8 / 128 + 7 * 255 / 2^15 = 0.117 a pass, 0.234 for both; the
// blue channel, the worst of the three, has it from Y and 1.772 times from Cb, and two roundings of the colour's: 0.67.
// With up to 65,535 taps a pass is off by at most 1 / 128 + 65,535 * 255 / 2^27 = 0.132, so 0.264 for both and 0.75.
// Below 1, so that the rounded levels differ by at most 1.
constexpr int kSampleBits = 7, kPassBits = 6;

// a b / 2^15, rounded to nearest, halves up: what one instruction gives for 16-bit lanes.
IJCKD_HD int times(int a, int b) { return (((a * b) >> 14) + 1) >> 1; }

IJCKD_HD int many_rounded(int64_t sum) {
  constexpr int shift = kManyBits + kSampleBits - kPassBits;
  return int((sum + (int64_t(1) << (shift - 1))) >> shift);
}

// ---- Colour: Y, Cb, Cr with 6 fractional bits to R, G, B with 6, in 16 bits; then to 8 bits, rounded and clamped.
constexpr int kGrey = 128 << kPassBits;  // what Cb and Cr have where there is no colour; u, v: Cb, Cr less it

constexpr int kRedOfCr = 13173, kGreenOfCb = 11277, kGreenOfCr = 23401, kBlueOfCb = 25297;  // 0.402 .. 0.772 of 2^15

IJCKD_HD int red_from(int y, int v) { return y + v + times(v, kRedOfCr); }
IJCKD_HD int green_from(int y, int u, int v) { return y - times(u, kGreenOfCb) - times(v, kGreenOfCr); }
IJCKD_HD int blue_from(int y, int u) { return y + u + times(u, kBlueOfCb); }
IJCKD_HD int level(int x) {
  const int v = (x + (1 << (kPassBits - 1))) >> kPassBits;
  return v < 0 ? 0 : v > 255 ? 255 : v;
}

}  // namespace ijckd
