#pragma once
// The first half of a view: a crop's blocks are decoded column by column (samples of one column side by side), resized
// along x, and transposed.

#include <algorithm>
#include <type_traits>

#include "vectors.h"
#include "view_scratch.h"

namespace ijckd {

// f(k) with k = n known to the compiler where it is in [1, kMost]; else f(0).
template <int kMost, typename F>
IJCKD_INLINE void with_taps(int64_t n, const F& f) {
  const auto known = [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    return ((n == I + 1 && (f(std::integral_constant<int, I + 1>()), true)) || ...);
  };
  if (!known(std::make_integer_sequence<int, kMost>())) f(std::integral_constant<int, 0>());
}

// W outputs from sample k on: the sum of n rows or columns, each times its weight. weight(j): of few taps a vector, of
// many a number.
template <int W, int kTaps, typename From, typename Weight>
IJCKD_INLINE Vec<int16_t, W> weighted(const From& from, const Weight& weight, int64_t n) {
  using Words = Vec<int16_t, W>;
  if constexpr (kTaps > 0) {
    Words sum = times_each<W>(load_as<Words>(from(0)), weight(0));
    for (int j = 1; j < kTaps; ++j) sum += times_each<W>(load_as<Words>(from(j)), weight(j));
    return sum;
  } else {
    int64_t sum[W] = {};
    int16_t out[W];
    for (int64_t j = 0; j < n; ++j) {
      const int16_t* p = from(j);
      const int64_t w = weight(j);
      for (int l = 0; l < W; ++l) sum[l] += p[l] * w;
    }
    for (int l = 0; l < W; ++l) out[l] = int16_t(many_rounded(sum[l]));
    return load_as<Words>(out);
  }
}

// Where the 64-bit words of a column's blocks lie in the image, and (of 4 bits) their end points, for the crop's first
// column. A column has the blocks of all planes, one plane after the other. The words of every W blocks are in the
// order that split_words undoes: block 8 l + 2 i + e of them is word W / 4 i + 2 l + e.
template <int W>
IJCKD_INLINE void find_words(const BlockPlane& plane, int64_t planes, int64_t first, const ViewPlane& out,
                             ViewScratch& s) {
  const int64_t whole = padded(out.lanes, W);
  int64_t *places = s.places.of(whole), *ends = s.ends.of(whole);
  s.words.of(whole);
  const auto put = [&](int64_t k, int64_t from, int64_t n) __attribute__((always_inline)) {
    const int64_t l = k % W;
    places[k - l + W / 4 * (l % 8 / 2) + 2 * (l / 8) + l % 2] = from + plane.word_at(n);
    ends[k] = from + plane.ends_at(n);
  };
  int64_t k = 0;
  for (int64_t c = 0; c < planes; ++c)
    for (int64_t y = 0; y < out.blocks; ++y) put(k++, c * plane.bytes(), first + y * plane.wide);
  for (; k < whole; ++k) put(k, 0, first);
}

// W words to their four parts of 16 bits, block by block.
template <int W>
IJCKD_INLINE void split_words(const uint64_t* words, Vec<uint16_t, W> (&parts)[4]) {
  using Words = Vec<uint16_t, W>;
  struct Halves {  // of two blocks' parts 0 1 2 3 0 1 2 3: 0 0 1 1 2 2 3 3
    static constexpr int at(int i) { return i / 8 * 8 + i % 8 / 2 + i % 2 * 4; }
  };
  Words q[4];
  for (int i = 0; i < 4; ++i) {
    const Words pairs = load_as<Words>(words + i * W / 4);
    q[i] = shuffled<Halves, uint16_t, W>(pairs, pairs);
  }
  const Words a = alternate<W, 4, false>(q[0], q[1]), b = alternate<W, 4, false>(q[2], q[3]);
  const Words c = alternate<W, 4, true>(q[0], q[1]), d = alternate<W, 4, true>(q[2], q[3]);
  parts[0] = alternate<W, 8, false>(a, b), parts[1] = alternate<W, 8, true>(a, b);
  parts[2] = alternate<W, 8, false>(c, d), parts[3] = alternate<W, 8, true>(c, d);
}

// block_sample() of W blocks, with 7 fractional bits: the sum is moved up so that the upper half of its product with
// 2^16 / L has them already.
template <int kBits, int W>
struct Decoder {
  using Words = Vec<uint16_t, W>;
  static constexpr int L = (1 << kBits) - 1, kUp = kBits == 3 ? 5 : 4;
  static constexpr uint16_t kFactor = uint16_t((kBits == 3 ? 9363 : 4370) << (kSampleBits - kUp));
  Words parts[4], base, step;

  IJCKD_INLINE void begin(const Words& ends) {
    const Words a = ends & 255, b = ends >> 8;
    base = (a * L + L / 2) << kUp, step = (b - a) << kUp;
  }
  template <int kSample>
  IJCKD_INLINE Words sample() const {
    constexpr int bit = (kBits == 3 ? 16 : 0) + kBits * kSample, at = bit % 16, word = bit / 16;
    Words index = parts[word] >> at;
    if constexpr (at > 16 - kBits) index |= parts[word + 1] << (16 - at);
    if constexpr (at != 16 - kBits) index &= L;
    return upper_product<W>(base + step * index, kFactor) & uint16_t(-1 << kSampleBits);
  }
};

// The four columns of one column of blocks: [4, height], each [4, lanes]: see ViewPlane. The last blocks come first:
// what is written beyond them is overwritten.
template <int kBits, int W>
IJCKD_INLINE void decode_column(const uint8_t* data, int64_t column, const ViewPlane& plane, int64_t height,
                                ViewScratch& s, int16_t* out) {
  const int64_t whole = padded(plane.lanes, W), *places = s.places.data(), *ends = s.ends.data();
  uint64_t* words = s.words.data();
  for (int64_t k = 0; k < whole; ++k) {
    uint64_t word = load_as<uint64_t>(data + 8 * column + places[k]);
    asm("" : "+r"(word));  // one by one: compilers would gather them in vectors, which takes longer
    words[k] = word;
  }
  for (int64_t k = whole - W; k >= 0; k -= W) {
    Decoder<kBits, W> d;
    split_words<W>(words + k, d.parts);
    if constexpr (kBits == 3) {
      d.begin(d.parts[0]);
    } else {
      uint16_t pairs[W];
      for (int l = 0; l < W; ++l) std::memcpy(pairs + l, data + 2 * column + ends[k + l], 2);
      d.begin(load_as<Vec<uint16_t, W>>(pairs));
    }
    [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
      (store_as(out + I / 4 * height + I % 4 * plane.lanes + k, d.template sample<4 * (I % 4) + I / 4>()), ...);
    }(std::make_integer_sequence<int, kBlockSamples>());
  }
}

// Outputs t .. t + 7 of the pass along x, those from `outputs` on being the last one again, to columns
// [at, at + 8) of out, or, mirrored, in the opposite order. columns: [.., height], from sample `base` on.
template <int W, int kTaps>
IJCKD_INLINE void pass_along_x(const ViewWeights& along, int64_t t, const int16_t* columns, int64_t base,
                               int64_t height, int64_t rows, bool flip, int16_t* out, int64_t stride) {
  using Words = Vec<int16_t, W>;
  const int16_t* from[kChunk];
  const int32_t* wide[kChunk];
  Words weights[kChunk][kTaps > 0 ? kTaps : 1];
  for (int c = 0; c < kChunk; ++c) {
    const int64_t i = std::min(t + (flip ? kChunk - 1 - c : c), along.outputs - 1);
    from[c] = columns + (along.low[i] - base) * height;
    if constexpr (kTaps > 0)
      for (int j = 0; j < kTaps; ++j) weights[c][j] = everywhere<W>(along.narrow[i * along.n + j]);
    else
      wide[c] = along.wide.data() + i * along.n;
  }
  for (int64_t k = 0; k < rows; k += W) {
    Vec<uint16_t, W> v[kChunk];
    for (int c = 0; c < kChunk; ++c) {
      const auto sample = [&](int64_t j) __attribute__((always_inline)) { return from[c] + j * height + k; };
      if constexpr (kTaps > 0)
        v[c] = bits_as<Vec<uint16_t, W>>(
            weighted<W, kTaps>(sample, [&](int j) __attribute__((always_inline)) { return weights[c][j]; }, 0) << 1);
      else
        v[c] = bits_as<Vec<uint16_t, W>>(
            weighted<W, 0>(sample, [&](int64_t j) __attribute__((always_inline)) { return wide[c][j]; }, along.n) << 1);
    }
    transpose_eights<W>(v);
    for (int r = 0; r < kChunk; ++r) {
      uint16_t lanes[W];
      store_as(lanes, v[r]);
      for (int l = 0; l < W / 8; ++l) std::memcpy(out + (k + 8 * l + r) * stride, lanes + 8 * l, 16);
    }
  }
}

// The pass along x of the crop in one plane, or in two that lie one after the other: all outputs of `along`, for the
// rows that `down` reads. Output t is column t of out, or, mirrored, column (stride - 1 - t).
template <int kBits, int W>
IJCKD_INLINE void make_columns(const uint8_t* data, const BlockPlane& from, int64_t planes, const ViewWeights& along,
                               const ViewWeights& down, bool flip, StageClock& clock, ViewScratch& s, ViewPlane& out) {
  const int64_t left = along.begin / kBlockSide, top = down.begin / kBlockSide, count = along.outputs;
  out.first_row = top * kBlockSide;
  out.blocks = (down.end + kBlockSide - 1) / kBlockSide - top;
  out.lanes = planes * out.blocks;
  const int64_t height = padded(3 * out.lanes + padded(out.lanes, kLane), kLane);  // of a column
  // rows whose distance is an even number of lines would share few places of a cache
  out.stride = padded(count, 2 * kLane) - kLane;
  if (out.stride < count) out.stride += 2 * kLane;
  out.rows.of(height * out.stride);
  out.find_rows();
  find_words<W>(from, planes, top * from.wide, out, s);
  clock.lap(ViewStage::weights);

  int64_t span = 0;  // samples that eight outputs read
  for (int64_t t = 0; t < count; t += kChunk)
    span = std::max(span, along.low[std::min(t + kChunk, count) - 1] - along.low[t] + along.n);
  const int64_t room = padded(2 * span, kBlockSide) + 8 * kBlockSide;
  int16_t* columns = s.columns.of(room * height);
  int64_t base = left * kBlockSide, ready = base;  // columns [base, ready) are there
  for (int64_t t = 0; t < count; t += kChunk) {
    const int64_t until = along.low[std::min(t + kChunk, count) - 1] + along.n;
    while (ready < until) {
      if (ready + kBlockSide - base > room) {
        const int64_t kept = along.low[t];
        std::memmove(columns, columns + (kept - base) * height, (ready - kept) * height * sizeof *columns);
        base = kept;
      }
      decode_column<kBits, W>(data, ready / kBlockSide, out, height, s, columns + (ready - base) * height);
      ready += kBlockSide;
    }
    clock.lap(ViewStage::decode);
    int16_t* to = out.rows.data() + (flip ? out.stride - kChunk - t : t);
    with_taps<kMostFew>(along.few ? along.n : 0, [&](auto taps) __attribute__((always_inline)) {
      pass_along_x<W, taps.value>(along, t, columns, base, height, kBlockSide * out.lanes, flip, to, out.stride);
    });
    clock.lap(ViewStage::along_x);
  }
}

}  // namespace ijckd
