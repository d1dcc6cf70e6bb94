// Views of images in blocks. Every loop runs along contiguous memory: a plane's columns are decoded and resized first
// (samples of one column side by side), then transposed, then its rows.
#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>
#include <vector>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "block_codec.h"
#include "vectorise.h"

namespace ijckd {
namespace {

constexpr int64_t kLane = 32;   // samples that a loop works on at a time: rows are padded to whole ones
constexpr int64_t kStrip = 16;  // columns that are transposed together
constexpr int kMostFew = 9;     // taps of an output of few(), and one that weighs nothing

int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// The taps of outputs [first, last) of one axis of one plane; output i's are samples low[i - first] + 0 .. n - 1.
struct Weights {
  bool few;
  int64_t n;
  int64_t begin, end;           // samples that are read
  std::vector<int64_t> low;     // [outputs]
  std::vector<int16_t> narrow;  // [outputs, n] if few
  std::vector<int32_t> wide;    // [outputs, n] if not

  void make(const PlaneAxis& axis, int64_t first, int64_t last) {
    few = axis.few();
    n = std::min(axis.most_taps(), axis.end - axis.begin);
    low.resize(last - first);
    if (few)
      narrow.resize((last - first) * n);
    else
      wide.resize((last - first) * n);
    int64_t lowest = axis.lowest(axis.centre(first)), last_total = 0, inverse = 0;
    for (int64_t i = first; i < last; ++i) {
      const int64_t centre = axis.centre(i);
      while (lowest < axis.end - n && axis.pitch * (2 * lowest + 1) <= centre - axis.support) ++lowest;
      const int64_t from = std::min(lowest, axis.end - n);
      low[i - first] = from;
      int64_t total = 0, sum = 0, before = 0;
      for (int64_t j = 0; j < n; ++j) total += axis.tap(centre, from + j);
      if (total != last_total) inverse = reciprocal(total), last_total = total;
      for (int64_t j = 0; j < n; ++j) {
        sum += axis.tap(centre, from + j);
        const int64_t after = share(sum, inverse, few ? kFewBits : kManyBits);
        if (few)
          narrow[(i - first) * n + j] = int16_t(after - before);
        else
          wide[(i - first) * n + j] = int32_t(after - before);
        before = after;
      }
    }
    begin = low.front(), end = low.back() + n;
  }
};

// A plane after the pass along x: sample (y, x) of the crop's blocks at rows[row(y)][x]. Rows are in the order in which
// they are decoded: the first row of every block, then the second of every block, and so on.
struct Plane {
  int64_t first_row;  // of the blocks
  int64_t blocks;     // in a column
  int64_t stride;
  std::vector<int16_t> rows;  // samples with 7 fractional bits

  const int16_t* row(int64_t y) const {
    const int64_t at = y - first_row;
    return rows.data() + (at % kBlockSide * blocks + at / kBlockSide) * stride;
  }
};

// What a thread keeps from view to view.
struct Scratch {
  Weights luma_x, luma_y, chroma_x, chroma_y;
  Plane planes[kPlanes];
  std::vector<uint64_t> words;
  std::vector<uint16_t> parts;    // [5, blocks]: end points, then the words' four
  std::vector<int16_t> columns;   // [columns, stride]: decoded
  std::vector<int16_t> strip[2];  // [kStrip, stride]
  std::vector<const int16_t*> taps;
  std::vector<int16_t> row;  // of the three planes, with 6 fractional bits
  int16_t colours[4] = {kRedOfCr, kBlueOfCb, kGreenOfCb, kGreenOfCr};
  std::vector<uint8_t> stored;  // the same as it is written
  std::vector<uint8_t> rgb;     // of the three colours, then of all side by side
};

// Sample i of n blocks, with 7 fractional bits. part[0]: a and b; part[1..4]: the 64-bit word's 16-bit parts.
template <int kBits>
IJCKD_INLINE void decode_sample(const uint16_t* const* part, int i, int64_t n, int16_t* out) {
  constexpr int kSkipped = kBits == 3 ? 16 : 0, L = (1 << kBits) - 1;
  const int bit = kSkipped + kBits * i, at = bit % 16;
  const uint16_t *ends = part[0], *word = part[1 + bit / 16],
                 *next = part[at > 16 - kBits ? 2 + bit / 16 : 1 + bit / 16];
  const int rest = at > 16 - kBits ? 16 - at : 15;
  for (int64_t k = 0; k < n; ++k) {
    const uint16_t a = ends[k] & 255, b = ends[k] >> 8;
    const uint16_t index = uint16_t(at > 16 - kBits ? word[k] >> at | next[k] << rest : word[k] >> at) & L;
    const uint16_t sum = uint16_t(a * L + L / 2 + uint16_t(uint16_t(b - a) * index));
    const uint16_t sample = uint16_t((uint32_t(sum) * uint32_t(kBits == 3 ? 9363 : 4370)) >> 16);
    out[k] = int16_t(sample << kSampleBits);
  }
}

// The four columns of a column of blocks: [4, stride], each [4, blocks]: see Plane. What a loop writes beyond `blocks`
// the next one overwrites.
template <int kBits>
IJCKD_INLINE void decode_column(const uint16_t* const* part, int64_t blocks, int64_t stride, int16_t* out) {
  const int64_t whole = padded(blocks, kLane);
  for (int x = 0; x < kBlockSide; ++x)
    for (int y = 0; y < kBlockSide; ++y)
      decode_sample<kBits>(part, kBlockSide * y + x, whole, out + x * stride + y * blocks);
}

// sum of n rows or columns, each times its weight. length: a multiple of kLane.
template <int kTaps>
IJCKD_INLINE void sum_few(const int16_t* const* in, const int16_t* weights, int64_t length, int doubled, int16_t* out) {
  const int16_t* p[kTaps];
  int16_t w[kTaps];
  for (int j = 0; j < kTaps; ++j) p[j] = in[j], w[j] = weights[j];
  const int64_t whole = length / kLane * kLane;  // so that the compiler knows it, too
  for (int64_t k = 0; k < whole; ++k) {
    int16_t sum = 0;
    for (int j = 0; j < kTaps; ++j) sum = int16_t(sum + int16_t(times(p[j][k], w[j])));
    out[k] = int16_t(sum << doubled);
  }
}

IJCKD_INLINE void sum_taps(const int16_t* const* in, const Weights& weights, int64_t i, int64_t length, int doubled,
                           int16_t* out) {
  if (!weights.few) {
    const int32_t* w = weights.wide.data() + i * weights.n;
    for (int64_t k = 0; k < length; k += kLane) {
      int64_t sum[kLane] = {};
      for (int64_t j = 0; j < weights.n; ++j)
        for (int64_t l = 0; l < kLane; ++l) sum[l] += int64_t(in[j][k + l]) * w[j];
      for (int64_t l = 0; l < kLane; ++l) out[k + l] = int16_t(many_rounded(sum[l]) << doubled);
    }
    return;
  }
  const int16_t* w = weights.narrow.data() + i * weights.n;
  switch (weights.n) {
    case 1:
      return sum_few<1>(in, w, length, doubled, out);
    case 2:
      return sum_few<2>(in, w, length, doubled, out);
    case 3:
      return sum_few<3>(in, w, length, doubled, out);
    case 4:
      return sum_few<4>(in, w, length, doubled, out);
    case 5:
      return sum_few<5>(in, w, length, doubled, out);
    case 6:
      return sum_few<6>(in, w, length, doubled, out);
    case 7:
      return sum_few<7>(in, w, length, doubled, out);
    case 8:
      return sum_few<8>(in, w, length, doubled, out);
    default:
      return sum_few<kMostFew>(in, w, length, doubled, out);
  }
}

// The 64-bit words and end points of a column of blocks, in 16-bit parts: part[0] is end points, part[1..4] the word.
IJCKD_INLINE void gather_column(const uint8_t* data, const BlockPlane& plane, int64_t first, int64_t blocks,
                                uint64_t* words, uint16_t* parts, int64_t stride) {
  const uint8_t* word = data + plane.word_at(first);
  const int64_t step = 8 * plane.wide;
  for (int64_t k = 0; k < blocks; ++k) std::memcpy(words + k, word + k * step, sizeof *words);
  for (int part = 0; part < 4; ++part)
    for (int64_t k = 0; k < stride; ++k) parts[(1 + part) * stride + k] = uint16_t(words[k] >> (16 * part));
  if (plane.bits == 3) {
    std::memcpy(parts, parts + stride, stride * sizeof *parts);
    return;
  }
  for (int64_t k = 0; k < blocks; ++k)
    std::memcpy(parts + k, data + plane.ends_at(first + k * plane.wide), sizeof *parts);
}

using Pair [[gnu::may_alias]] = uint32_t;  // two samples
using Four [[gnu::may_alias]] = uint64_t;

// A strip [kStrip, stride] to rows of a plane: sample k of column c to out[k * out_stride + c]. Of two columns pairs
// of 16 bits are laid side by side, then of 32, then of 64; then every row takes 128 bits from each of two.
IJCKD_INLINE void transpose_strip(int16_t* __restrict strip, int16_t* __restrict spare, int64_t stride, int64_t n,
                                  int16_t* out, int64_t out_stride) {
  const int64_t whole = stride / kLane * kLane;  // so that the compiler knows it, too
  for (int64_t c = 0; c < kStrip; c += 2) {
    const int16_t *even = strip + c * stride, *odd = even + stride;
    int16_t* pairs = spare + c * stride;
    for (int64_t k = 0; k < whole; ++k) pairs[2 * k] = even[k], pairs[2 * k + 1] = odd[k];
  }
  for (int64_t c = 0; c < kStrip; c += 4) {
    const Pair *even = reinterpret_cast<const Pair*>(spare + c * stride), *odd = even + stride;
    Pair* fours = reinterpret_cast<Pair*>(strip + c * stride);
    for (int64_t k = 0; k < whole; ++k) fours[2 * k] = even[k], fours[2 * k + 1] = odd[k];
  }
  for (int64_t c = 0; c < kStrip; c += 8) {
    const Four *even = reinterpret_cast<const Four*>(strip + c * stride), *odd = even + stride;
    Four* eights = reinterpret_cast<Four*>(spare + c * stride);
    for (int64_t k = 0; k < whole; ++k) eights[2 * k] = even[k], eights[2 * k + 1] = odd[k];
  }
  for (int64_t k = 0; k < n; ++k)
    for (int64_t c = 0; c < kStrip; c += 8) std::memcpy(out + k * out_stride + c, spare + c * stride + 8 * k, 16);
}

// The pass along x of one plane's crop: outputs [count] of `along` to plane.rows, for the rows that `down` reads.
// Output t is column t, or, mirrored, column (plane.stride - 1 - t).
template <int kBits>
IJCKD_INLINE void columns_body(const uint8_t* data, const BlockPlane& from, const Weights& along, const Weights& down,
                               int64_t count, bool flip, Scratch& s, Plane& plane) {
  const int64_t top = down.begin / kBlockSide, left = along.begin / kBlockSide;
  const int64_t wide = (along.end + kBlockSide - 1) / kBlockSide - left;
  plane.first_row = top * kBlockSide, plane.blocks = (down.end + kBlockSide - 1) / kBlockSide - top;
  plane.stride = padded(count, kLane);
  const int64_t stride = padded(kBlockSide * plane.blocks, kLane), whole = padded(plane.blocks, kLane);
  const auto grow = [](auto& v, int64_t n) {
    if (int64_t(v.size()) < n) v.resize(n);
  };
  grow(plane.rows, kBlockSide * plane.blocks * plane.stride);
  grow(s.words, whole), grow(s.parts, 5 * whole);
  grow(s.columns, kBlockSide * wide * stride + kLane);  // the last column's last loop writes beyond
  grow(s.strip[0], kStrip * stride), grow(s.strip[1], kStrip * stride);
  const uint16_t* part[6];
  for (int p = 0; p < 6; ++p) part[p] = s.parts.data() + std::min(p, 4) * whole;

  int64_t t = 0;  // the next output
  std::vector<const int16_t*>& taps = s.taps;
  grow(taps, std::max(along.n, down.n));
  for (int64_t bx = 0; bx < wide; ++bx) {
    gather_column(data, from, top * from.wide + left + bx, plane.blocks, s.words.data(), s.parts.data(), whole);
    decode_column<kBits>(part, plane.blocks, stride, s.columns.data() + bx * kBlockSide * stride);
    for (const int64_t ready = (left + bx + 1) * kBlockSide; t < count && along.low[t] + along.n <= ready; ++t) {
      for (int64_t j = 0; j < along.n; ++j)
        taps[j] = s.columns.data() + (along.low[t] + j - left * kBlockSide) * stride;
      const int64_t in_strip = t % kStrip, at = flip ? kStrip - 1 - in_strip : in_strip;
      sum_taps(taps.data(), along, t, stride, 1, s.strip[0].data() + at * stride);
      if (in_strip == kStrip - 1 || t == count - 1) {
        const int64_t column = flip ? plane.stride - kStrip - (t - in_strip) : t - in_strip;
        transpose_strip(s.strip[0].data(), s.strip[1].data(), stride, kBlockSide * plane.blocks,
                        plane.rows.data() + column, plane.stride);
      }
    }
  }
}
IJCKD_CLONES void columns_of_3(const uint8_t* data, const BlockPlane& from, const Weights& along, const Weights& down,
                               int64_t count, bool flip, Scratch& s, Plane& plane) {
  columns_body<3>(data, from, along, down, count, flip, s, plane);
}
IJCKD_CLONES void columns_of_4(const uint8_t* data, const BlockPlane& from, const Weights& along, const Weights& down,
                               int64_t count, bool flip, Scratch& s, Plane& plane) {
  columns_body<4>(data, from, along, down, count, flip, s, plane);
}

// 16 of each colour to 16 pixels [16, 3].
IJCKD_INLINE void interleave(const uint8_t* r, const uint8_t* g, const uint8_t* b, uint8_t* out) {
#if defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 12)
  using Bytes [[gnu::vector_size(16)]] = uint8_t;
  Bytes x, y, z;
  std::memcpy(&x, r, 16), std::memcpy(&y, g, 16), std::memcpy(&z, b, 16);
  const Bytes xy0 = __builtin_shufflevector(x, y, 0, 16, -1, 1, 17, -1, 2, 18, -1, 3, 19, -1, 4, 20, -1, 5);
  const Bytes xy1 = __builtin_shufflevector(x, y, 21, -1, 6, 22, -1, 7, 23, -1, 8, 24, -1, 9, 25, -1, 10, 26);
  const Bytes xy2 = __builtin_shufflevector(x, y, -1, 11, 27, -1, 12, 28, -1, 13, 29, -1, 14, 30, -1, 15, 31, -1);
  const Bytes done0 = __builtin_shufflevector(xy0, z, 0, 1, 16, 3, 4, 17, 6, 7, 18, 9, 10, 19, 12, 13, 20, 15);
  const Bytes done1 = __builtin_shufflevector(xy1, z, 0, 21, 2, 3, 22, 5, 6, 23, 8, 9, 24, 11, 12, 25, 14, 15);
  const Bytes done2 = __builtin_shufflevector(xy2, z, 26, 1, 2, 27, 4, 5, 28, 7, 8, 29, 10, 11, 30, 13, 14, 31);
  std::memcpy(out, &done0, 16), std::memcpy(out + 16, &done1, 16), std::memcpy(out + 32, &done2, 16);
#else
  for (int l = 0; l < 16; ++l) out[3 * l] = r[l], out[3 * l + 1] = g[l], out[3 * l + 2] = b[l];
#endif
}

// level(), in 16 bits.
IJCKD_INLINE uint8_t to_level(int16_t x) {
  const int16_t v = int16_t(int16_t(x + (1 << (kPassBits - 1))) >> kPassBits);
  const int16_t low = v < 0 ? int16_t(0) : v;
  return uint8_t(low > 255 ? int16_t(255) : low);
}

// One row of three planes [n] to colours side by side [n, 3]. n: a multiple of kLane.
// factors: those of blocks.h (Scratch), not known to the compiler, which would not see rounded products in those of
// less than 2^14.
IJCKD_INLINE void colour_row(const int16_t* factors, const int16_t* y, const int16_t* u, const int16_t* v, int64_t n,
                             uint8_t* out) {
  for (int64_t k = 0; k < n; k += kLane, y += kLane, u += kLane, v += kLane, out += kPlanes * kLane) {
    // in steps of 16 bits, each a loop of its own: the compiler would widen the whole to 32
    int16_t cb[kLane], cr[kLane], red[kLane], green[kLane], blue[kLane], more[kLane];
    for (int64_t l = 0; l < kLane; ++l) cb[l] = int16_t(u[l] - kGrey);
    for (int64_t l = 0; l < kLane; ++l) cr[l] = int16_t(v[l] - kGrey);
    for (int64_t l = 0; l < kLane; ++l) red[l] = int16_t(times(cr[l], factors[0]));
    for (int64_t l = 0; l < kLane; ++l) blue[l] = int16_t(times(cb[l], factors[1]));
    for (int64_t l = 0; l < kLane; ++l) green[l] = int16_t(times(cb[l], factors[2]));
    for (int64_t l = 0; l < kLane; ++l) more[l] = int16_t(times(cr[l], factors[3]));
    for (int64_t l = 0; l < kLane; ++l) red[l] = int16_t(int16_t(y[l] + cr[l]) + red[l]);
    for (int64_t l = 0; l < kLane; ++l) blue[l] = int16_t(int16_t(y[l] + cb[l]) + blue[l]);
    for (int64_t l = 0; l < kLane; ++l) green[l] = int16_t(int16_t(y[l] - green[l]) - more[l]);
    uint8_t r[kLane], g[kLane], b[kLane];
    for (int64_t l = 0; l < kLane; ++l) r[l] = to_level(red[l]);
    for (int64_t l = 0; l < kLane; ++l) g[l] = to_level(green[l]);
    for (int64_t l = 0; l < kLane; ++l) b[l] = to_level(blue[l]);
    for (int64_t l = 0; l < kLane; l += 16) interleave(r + l, g + l, b + l, out + kPlanes * l);
  }
}

// store() of what is not NaN.
IJCKD_INLINE void put(float* p, int64_t i, float v) { p[i] = v; }
IJCKD_INLINE void put(c10::BFloat16* p, int64_t i, float v) {
  const uint32_t u = std::bit_cast<uint32_t>(v);
  p[i].x = uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

// One row of levels [n, 3] to out. shift, scale: [3 kLane], the three colours' again and again.
IJCKD_INLINE void store_row(const uint8_t* rgb, int64_t n, ViewType type, const float* shift, const float* scale,
                            void* out) {
  const auto normalised = [&](auto* to) __attribute__((always_inline)) {
    int64_t k = 0;
    for (; k + 3 * kLane <= 3 * n; k += 3 * kLane)
      for (int64_t l = 0; l < 3 * kLane; ++l) put(to, k + l, (float(rgb[k + l]) - shift[l]) * scale[l]);
    for (int64_t l = 0; k + l < 3 * n; ++l) put(to, k + l, (float(rgb[k + l]) - shift[l]) * scale[l]);
  };
  switch (type) {
    case ViewType::u8:
      std::memcpy(out, rgb, 3 * n);
      return;
    case ViewType::f32:
      return normalised(static_cast<float*>(out));
    case ViewType::bf16:
      return normalised(static_cast<c10::BFloat16*>(out));
  }
}

// Whether a row can pass the caches: what fills a batch is not read again before it has left them.
IJCKD_INLINE bool streamable(const uint8_t* out, int64_t bytes) {
#ifdef __SSE2__
  return (reinterpret_cast<uintptr_t>(out) | uintptr_t(bytes)) % 16 == 0;
#else
  return false;
#endif
}

IJCKD_INLINE void stream(const uint8_t* from, int64_t bytes, uint8_t* out) {
#ifdef __SSE2__
  for (int64_t k = 0; k < bytes; k += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(out + k), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + k)));
#else
  std::memcpy(out, from, bytes);
#endif
}

// The pass along y and the colours: rows [first, first + count) of the view, columns [left, left + wide).
IJCKD_CLONES void rows_of(const BlockView& v, int64_t first, int64_t count, int64_t left, int64_t wide, bool flip,
                          Scratch& s) {
  const int64_t stride = s.planes[0].stride, skipped = flip ? stride - wide : 0;
  const int64_t size = v.type == ViewType::u8 ? 1 : v.type == ViewType::f32 ? 4 : 2;
  float shift[3 * kLane], scale[3 * kLane];
  for (int64_t k = 0; k < 3 * kLane; ++k) shift[k] = v.shift[k % 3], scale[k] = v.scale[k % 3];
  s.row.resize(kPlanes * stride), s.rgb.resize(kPlanes * stride), s.stored.resize(kPlanes * stride * size);
  int16_t* row = s.row.data();
  uint8_t* rgb = s.rgb.data();
  for (int64_t k = 0; k < count; ++k) {
    for (int c = 0; c < kPlanes; ++c) {
      const Weights& down = c == 0 ? s.luma_y : s.chroma_y;
      for (int64_t j = 0; j < down.n; ++j) s.taps[j] = s.planes[c].row(down.low[k] + j);
      sum_taps(s.taps.data(), down, k, stride, 0, row + c * stride);
    }
    colour_row(s.colours, row, row + stride, row + 2 * stride, stride, rgb);
    uint8_t* out = static_cast<uint8_t*>(v.out) + ((first + k) * v.S + left) * kPlanes * size;
    const int64_t bytes = wide * kPlanes * size;
    if (!streamable(out, bytes)) {
      store_row(rgb + kPlanes * skipped, wide, v.type, shift, scale, out);
      continue;
    }
    const uint8_t* from = rgb + kPlanes * skipped;
    if (v.type != ViewType::u8) {
      store_row(from, wide, v.type, shift, scale, s.stored.data());
      from = s.stored.data();
    }
    stream(from, bytes, out);
  }
}

// What a view has outside of the image.
IJCKD_CLONES void blacken(const BlockView& v) {
  std::vector<uint8_t> rgb(3 * v.S);
  float shift[3 * kLane], scale[3 * kLane];
  for (int64_t k = 0; k < 3 * kLane; ++k) shift[k] = v.shift[k % 3], scale[k] = v.scale[k % 3];
  const int64_t size = v.type == ViewType::u8 ? 1 : v.type == ViewType::f32 ? 4 : 2;
  for (int64_t y = 0; y < v.S; ++y)
    store_row(rgb.data(), v.S, v.type, shift, scale, static_cast<uint8_t*>(v.out) + y * v.S * kPlanes * size);
}

}  // namespace

void block_view(const BlockView& v) {
  static thread_local Scratch s;
  const ViewAxis y = ViewAxis::of(v.row, 0, v.S), x = ViewAxis::of(v.row, 1, v.S);
  const bool flip = v.row[kFlip] != 0;
  const auto within = [&](const ViewAxis& a) {  // outputs [first, last) of the view that are of the image
    return std::pair(std::max<int64_t>(0, -a.first), std::min(v.S, a.outputs - a.first));
  };
  const auto [top, bottom] = within(y);
  const auto [left, right] = within(x);
  if (top > 0 || left > 0 || bottom < v.S || right < v.S) blacken(v);
  if (top >= bottom || left >= right) return;
  s.luma_y.make(PlaneAxis(y, false), y.first + top, y.first + bottom);
  s.luma_x.make(PlaneAxis(x, false), x.first + left, x.first + right);
  s.chroma_y.make(PlaneAxis(y, true), y.first + top, y.first + bottom);
  s.chroma_x.make(PlaneAxis(x, true), x.first + left, x.first + right);
  for (int c = 0; c < kPlanes; ++c) {
    const BlockPlane plane = v.image.plane(c);
    const auto columns = plane.bits == 3 ? columns_of_3 : columns_of_4;
    columns(v.data + v.image.plane_at(c), plane, c == 0 ? s.luma_x : s.chroma_x, c == 0 ? s.luma_y : s.chroma_y,
            right - left, flip, s, s.planes[c]);
  }
  rows_of(v, top, bottom - top, flip ? v.S - right : left, right - left, flip, s);
}

}  // namespace ijckd
