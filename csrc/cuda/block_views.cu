// Views of images in blocks: decoded, cropped, resized, mirrored, converted to colours and normalised in one launch,
// and a second one for the views that it leaves, in which an output may have many taps.
//
// First launch: a thread block makes a tile of a view, one plane after the other. It reads each of its blocks once;
// samples, and what the pass along x makes of them, stay in shared memory, whose size no row can change: with at most
// four samples to an output those of a tile fit. Second launch: a thread makes a pixel from all its samples. That is
// slow, and for images that shrink to less than a quarter alone.
//
// Launches depend on sizes alone. What differs from call to call is read from memory, so that a CUDA graph can be
// replayed with other rows.
#include "cuda/block_views.h"
#include "device.cuh"

namespace ijckd {
namespace {

constexpr int kTile = 32, kWarps = 8;  // outputs along either side of a tile; a warp makes a row at a time
constexpr int kThreads = kTile * kWarps, kAxes = 4;
constexpr int kParts = 4;  // blocks of the second launch for each view
constexpr int kTaps = 9;   // of an output of few(), and one that weighs nothing
// Samples that the outputs of a tile read along one axis, at four samples from one output to the next; and the blocks
// in which so many lie.
constexpr int kSpan = 4 * (kTile - 1) + kTaps;
constexpr int kBlocks = (kSpan + 2 * (kBlockSide - 1)) / kBlockSide;

// The row is from memory that anyone may have written: nothing of the image is read before this has passed.
__device__ __forceinline__ bool fits(const BlockViews& v, const int64_t* row, const BlockImage& image) {
  if (row[kFile] < 0 || row[kFile] >= v.n_files) return false;
  if (image.h < 1 || image.h > kMostSide || image.w < 1 || image.w > kMostSide) return false;
  const int64_t *file = v.files + 2 * row[kFile], bytes = image.bytes();
  if (row[kLength] != bytes || row[kOffset] < 0 || row[kOffset] > file[1] - bytes) return false;
  if ((file[0] + row[kOffset]) % kBlockAlignment != 0) return false;
  if (row[kFlip] < 0 || row[kFlip] > 1) return false;
  const int64_t y = row[kTop], x = row[kLeft], high = row[kCropHeight], wide = row[kCropWidth];
  const int64_t tall = row[kResizedHeight], broad = row[kResizedWidth];
  if (tall == 0 && broad == 0) {
    if (high < 1 || high > image.h || wide < 1 || wide > image.w) return false;
    return y >= 0 && y <= image.h - high && x >= 0 && x <= image.w - wide;
  }
  if (tall < 1 || tall > kMostResized || broad < 1 || broad > kMostResized) return false;
  if (y < -kMostResized || y > kMostResized || x < -kMostResized || x > kMostResized) return false;
  return high == v.S && wide == v.S;
}

// What a row says of its view. One that is not good has no outputs, and few taps.
struct View {
  bool good, flip;
  BlockImage image;
  const uint8_t* data = nullptr;
  ViewAxis y{}, x{};

  __device__ __forceinline__ View(const BlockViews& v, int64_t b) {
    const int64_t* row = v.rows + b * kViewColumns;
    image = {row[kHeight], row[kWidth], v.luma_bits, v.chroma_bits};
    good = fits(v, row, image);
    flip = row[kFlip] == 1;
    if (!good) return;
    data = reinterpret_cast<const uint8_t*>(v.files[2 * row[kFile]]) + row[kOffset];
    y = ViewAxis::of(row, 0, v.S), x = ViewAxis::of(row, 1, v.S);
  }
  // Of luma, and then of chroma, too.
  __device__ __forceinline__ bool few() const { return PlaneAxis(y, false).few() && PlaneAxis(x, false).few(); }
};

struct Block {
  int a, b, bits;
  uint64_t indices;

  __device__ __forceinline__ Block(const uint8_t* data, const BlockPlane& plane, int64_t n) : bits(plane.bits) {
    const uint64_t word = *reinterpret_cast<const uint64_t*>(data + plane.word_at(n));
    const int ends = bits == 3 ? int(word & 0xffff) : *reinterpret_cast<const uint16_t*>(data + plane.ends_at(n));
    a = ends & 255, b = ends >> 8;
    indices = word >> plane.skipped_bits();
  }

  __device__ __forceinline__ int sample(int i) const {
    return block_sample(a, b, int(indices >> (bits * i)) & ((1 << bits) - 1), bits);
  }
};

// One output of a resize along one axis of a plane.
struct Output {
  int64_t centre, taps, low;  // its samples: low .. low + taps - 1
  int64_t inverse;
  int bits;

  __device__ __forceinline__ Output(const PlaneAxis& axis, int64_t i) : centre(axis.centre(i)) {
    const int64_t most = axis.most_taps(), all = axis.end - axis.begin, lowest = axis.lowest(centre);
    taps = most < all ? most : all;
    low = lowest < axis.end - taps ? lowest : axis.end - taps;
    int64_t total = 0;
#pragma unroll 1
    for (int64_t j = 0; j < taps; ++j) total += axis.tap(centre, low + j);
    inverse = reciprocal(total);
    bits = axis.few() ? kFewBits : kManyBits;
  }

  // Calls use(j, weight of sample low + j).
  template <typename Use>
  __device__ __forceinline__ void weigh(const PlaneAxis& axis, const Use& use) const {
    int64_t sum = 0;
    int before = 0;
#pragma unroll 1
    for (int64_t j = 0; j < taps; ++j) {
      sum += axis.tap(centre, low + j);
      const int after = share(sum, inverse, bits);
      use(j, after - before);
      before = after;
    }
  }

  __device__ __forceinline__ int64_t product(int sample, int weight) const {
    return bits == kFewBits ? times(sample, weight) : int64_t(sample) * weight;
  }
  __device__ __forceinline__ int rounded(int64_t sum) const { return bits == kFewBits ? int(sum) : many_rounded(sum); }
};

// One pixel of a plane from all its samples: with 6 fractional bits.
__device__ __forceinline__ int pixel(const View& view, int c, int64_t i, int64_t k) {
  const BlockPlane plane = view.image.plane(c);
  const uint8_t* data = view.data + view.image.plane_at(c);
  const PlaneAxis down(view.y, c > 0), along(view.x, c > 0);
  const Output y(down, i), x(along, k);
  int64_t total = 0;
  y.weigh(down, [&](int64_t j, int weight) {
    const int64_t row = y.low + j, first = row / kBlockSide * plane.wide;
    int64_t sum = 0;
    x.weigh(along, [&](int64_t l, int w) {
      const int64_t column = x.low + l;
      const Block block(data, plane, first + column / kBlockSide);
      const int s = block.sample(int(row % kBlockSide * kBlockSide + column % kBlockSide));
      sum += x.product(s << kSampleBits, w);
    });
    total += y.product(x.rounded(sum) * 2, weight);
  });
  return y.rounded(total);
}

// What a tile's threads share, in the block's memory. Of the axes: y of luma, x of luma, y of chroma, x of chroma.
struct Shared {
  uint32_t (*samples)[kBlocks];      // [kBlocks * kBlockSide]: four samples, a row of a block, in each
  int16_t (*along)[kTile];           // [kSpan]: after the pass along x, doubled
  int16_t (*weights)[kTaps][kTile];  // [kAxes]
  int (*low)[kTile];                 // [kAxes]
  int* taps;                         // [kAxes]
};

// The outputs [first, last) of a tile's kTile that are of the image; the tile begins with output `begin` of the resize.
struct Range {
  int64_t begin;
  int first, last;

  __device__ __forceinline__ Range(const ViewAxis& axis, int64_t tile) : begin(axis.first + tile * kTile) {
    const auto clamped = [](int64_t o) { return o < 0 ? 0 : o > kTile ? kTile : int(o); };
    first = clamped(-begin), last = clamped(axis.outputs - begin);
  }
  __device__ __forceinline__ bool has(int o) const { return o >= first && o < last; }
};

// The taps of the tile's outputs: a warp each axis.
__device__ __forceinline__ void make_weights(const View& view, const Range& rows, const Range& columns,
                                             const Shared& s) {
  const int which = threadIdx.y, o = threadIdx.x;
  if (which >= kAxes) return;
  const bool along = which % 2 == 1;
  const int first = along ? columns.first : rows.first, last = along ? columns.last : rows.last;
  if (o < first || o >= last) return;
  const PlaneAxis axis(along ? ViewAxis(view.x) : ViewAxis(view.y), which >= 2);
  const Output output(axis, (along ? columns.begin : rows.begin) + o);
  s.low[which][o] = int(output.low);
  if (o == first) s.taps[which] = int(output.taps);
  output.weigh(axis, [&](int64_t j, int weight) { s.weights[which][j][o] = int16_t(weight); });
}

// One plane of a tile whose outputs have few taps: with 6 fractional bits. made: the thread's own pixels, rows
// threadIdx.y, + kWarps, ...
__device__ __forceinline__ void make_plane(const uint8_t* data, const BlockPlane& plane, int first_axis,
                                           const Range& rows, const Range& columns, const Shared& s,
                                           int16_t (*made)[kTile]) {
  const int lane = threadIdx.x, warp = threadIdx.y, across = first_axis + 1;
  const int *low_y = s.low[first_axis], *low_x = s.low[across], taps_y = s.taps[first_axis], taps_x = s.taps[across];
  const int top = low_y[rows.first], bottom = low_y[rows.last - 1] + taps_y;  // samples
  const int left = low_x[columns.first], right = low_x[columns.last - 1] + taps_x;
  const int side = kBlockSide, first_row = top / side, first_column = left / side;  // blocks
  const int wide = (right + side - 1) / side - first_column;
  const int blocks = ((bottom + side - 1) / side - first_row) * wide;
  for (int k = kTile * warp + lane; k < blocks; k += kTile * kWarps) {
    const int row = k / wide, column = k % wide;
    const Block block(data, plane, (first_row + row) * plane.wide + first_column + column);
    for (int y = 0; y < side; ++y) {
      uint32_t four = 0;
      for (int x = 0; x < side; ++x) four |= uint32_t(block.sample(side * y + x)) << (8 * x);
      s.samples[side * row + y][column] = four;
    }
  }
  __syncthreads();
  if (columns.has(lane))
    for (int y = top + warp; y < bottom; y += kWarps) {
      const uint8_t* from = reinterpret_cast<const uint8_t*>(s.samples[y - side * first_row]) + low_x[lane];
      int sum = 0;
      for (int j = 0; j < taps_x; ++j)
        sum += times(from[j - side * first_column] << kSampleBits, s.weights[across][j][lane]);
      s.along[y - top][lane] = int16_t(sum * 2);
    }
  __syncthreads();
  if (columns.has(lane))
    for (int o = warp; o < rows.last; o += kWarps) {
      if (o < rows.first) continue;
      int sum = 0;
      for (int j = 0; j < taps_y; ++j) sum += times(s.along[low_y[o] - top + j][lane], s.weights[first_axis][j][o]);
      made[o][lane] = int16_t(sum);
    }
}

struct Levels {
  int red = 0, green = 0, blue = 0;  // black, as what lies outside of the image

  __device__ __forceinline__ Levels() {}
  // From samples of Y, Cb, Cr with 6 fractional bits.
  __device__ __forceinline__ Levels(int luma, int cb, int cr)
      : red(level(red_from(luma, cr - kGrey))),
        green(level(green_from(luma, cb - kGrey, cr - kGrey))),
        blue(level(blue_from(luma, cb - kGrey))) {}
};

// Element i of out, of colour c; 0 of a view that is not made.
__device__ __forceinline__ void put(const BlockViews& v, bool made, int64_t i, int c, int level) {
  const float normalised = made ? (float(level) - v.shift[c]) * v.scale[c] : 0;
  switch (v.type) {
    case Pixels::u8:
      static_cast<uint8_t*>(v.out)[i] = uint8_t(level);
      return;
    case Pixels::f32:
      return store(static_cast<float*>(v.out), i, normalised);
    case Pixels::bf16:
      return store(static_cast<__nv_bfloat16*>(v.out), i, normalised);
    case Pixels::f16:
      return store(static_cast<__half*>(v.out), i, normalised);
  }
}

// What is made as pixel (y, x) of view b.
__device__ __forceinline__ void put_pixel(const BlockViews& v, const View& view, int64_t b, int64_t y, int64_t x,
                                          const Levels& levels) {
  const int64_t at = ((b * v.S + y) * v.S + (view.flip ? v.S - 1 - x : x)) * kPlanes;
  put(v, view.good, at, 0, levels.red);
  put(v, view.good, at + 1, 1, levels.green);
  put(v, view.good, at + 2, 2, levels.blue);
}

// A block (kTile, kWarps) for each tile of each view: columns of tiles, rows of tiles, views.
__global__ void __launch_bounds__(kThreads, 4) block_views_kernel(BlockViews v) {
  __shared__ uint32_t samples[kBlocks * kBlockSide][kBlocks];
  __shared__ int16_t along[kSpan][kTile];
  __shared__ int16_t weights[kAxes][kTaps][kTile];
  __shared__ int low[kAxes][kTile];
  __shared__ int taps[kAxes];
  __shared__ int16_t made[kPlanes][kTile][kTile];  // every thread reads what it wrote itself
  const Shared s{samples, along, weights, low, taps};
  const int lane = threadIdx.x, warp = threadIdx.y;
  const int64_t b = blockIdx.z, top = int64_t(blockIdx.y) * kTile, left = int64_t(blockIdx.x) * kTile;
  const View view(v, b);
  if (top == 0 && left == 0 && warp == 0 && lane == 0) v.status[b] = !view.good;
  if (!view.few()) return;  // the second launch's
  const Range rows(view.y, blockIdx.y), columns(view.x, blockIdx.x);
  if (rows.first < rows.last && columns.first < columns.last) {
    make_weights(view, rows, columns, s);
    __syncthreads();
    for (int c = 0; c < kPlanes; ++c)
      make_plane(view.data + view.image.plane_at(c), view.image.plane(c), c == 0 ? 0 : 2, rows, columns, s, made[c]);
  }
  if (left + lane >= v.S) return;
  for (int o = warp; o < kTile && top + o < v.S; o += kWarps) {
    Levels levels;
    if (rows.has(o) && columns.has(lane)) levels = Levels(made[0][o][lane], made[1][o][lane], made[2][o][lane]);
    put_pixel(v, view, b, top + o, left + lane, levels);
  }
}

// kParts blocks for each view.
__global__ void __launch_bounds__(kThreads) many_taps_kernel(BlockViews v) {
  const View view(v, blockIdx.y);
  if (view.few()) return;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < v.S * v.S; i += kParts * kThreads) {
    const int64_t y = i / v.S, x = i % v.S, row = view.y.first + y, column = view.x.first + x;
    Levels levels;
    if (row >= 0 && row < view.y.outputs && column >= 0 && column < view.x.outputs) {
      int luma = 0, cb = 0, cr = 0;
#pragma unroll 1
      for (int c = 0; c < kPlanes; ++c) luma = cb, cb = cr, cr = pixel(view, c, row, column);
      levels = Levels(luma, cb, cr);
    }
    put_pixel(v, view, blockIdx.y, y, x, levels);
  }
}

}  // namespace

int block_views(const BlockViews& v, void* stream) {
  const int tiles = ceil_div(v.S, kTile);
  const unsigned views = static_cast<unsigned>(v.B);
  const int error = launch(block_views_kernel, dim3(tiles, tiles, views), dim3(kTile, kWarps), stream, v);
  return error ? error : launch(many_taps_kernel, dim3(kParts, views), kThreads, stream, v);
}

}  // namespace ijckd
