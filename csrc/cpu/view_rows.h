#pragma once
// The second half of a view: the pass along y, the colours, and the stores.

#include <algorithm>

#include "vectors.h"
#include "view_columns.h"
#include "view_scratch.h"

namespace ijckd {

IJCKD_INLINE int64_t bytes_of(ViewType type) { return type == ViewType::u8 ? 1 : type == ViewType::f32 ? 4 : 2; }

// Rows k .. k + rows - 1 of the pass along y of all planes of one size, kParts of them, to out [rows, 3, stride].
template <int W, int kParts>
IJCKD_INLINE void pass_along_y(const ViewWeights& down, int64_t k, int64_t rows, const ViewPlane& plane, int16_t* out) {
  const int64_t stride = plane.stride, apart = plane.blocks * stride;
  with_taps<kMostFew>(down.few ? down.n : 0, [&](auto taps) __attribute__((always_inline)) {
    for (int64_t r = k; r < k + rows; ++r, out += kPlanes * stride) {
      const int64_t low = down.low[r];
      if constexpr (taps.value > 0) {
        const int16_t* from[taps.value];
        Vec<int16_t, W> weights[taps.value];
        for (int j = 0; j < taps.value; ++j)
          from[j] = plane.row(low + j), weights[j] = everywhere<W>(down.narrow[r * down.n + j]);
        for (int64_t x = 0; x < stride; x += W)
          for (int part = 0; part < kParts; ++part)
            store_as(out + part * stride + x,
                     weighted<W, taps.value>([&](int j)
                                                 __attribute__((always_inline)) { return from[j] + part * apart + x; },
                                             [&](int j) __attribute__((always_inline)) { return weights[j]; }, 0));
      } else {
        for (int64_t x = 0; x < stride; x += W)
          for (int part = 0; part < kParts; ++part)
            store_as(
                out + part * stride + x,
                weighted<W, 0>(
                    [&](int64_t j) __attribute__((always_inline)) { return plane.row(low + j) + part * apart + x; },
                    [&](int64_t j) __attribute__((always_inline)) { return down.wide[r * down.n + j]; }, down.n));
      }
    }
  });
}

// Y, Cb, Cr of W pixels to the levels of R, G, B.
// factors: see ViewScratch.
template <int W>
IJCKD_INLINE void levels_of(const int16_t (*factors)[kLane], const int16_t* y, const int16_t* u, const int16_t* v,
                            Vec<uint16_t, W> (&out)[kPlanes]) {
  using Words = Vec<int16_t, W>;
  const Words luma = load_as<Words>(y), cb = load_as<Words>(u) - kGrey, cr = load_as<Words>(v) - kGrey;
  const auto part = [&](const Words& of, int factor)
                        __attribute__((always_inline)) { return times_each<W>(of, load_as<Words>(factors[factor])); };
  const auto level_of = [&](const Words& colour) __attribute__((always_inline)) {
    int16_t x[W];
    store_as(x, part(colour, 4));
    IJCKD_ONE_VECTOR for (int l = 0; l < W; ++l) x[l] = std::min<int16_t>(std::max<int16_t>(x[l], 0), 255);
    return load_as<Vec<uint16_t, W>>(x);
  };
  out[0] = level_of(luma + cr + part(cr, 0));
  out[1] = level_of(luma - part(cb, 1) - part(cr, 2));
  out[2] = level_of(luma + cb + part(cb, 3));
}

// What a row's levels become: shift and scale of the colours, again and again from each of the three on; for bfloat16
// those of every second value.
struct Normalised {
  float shift[kPlanes][kLane], scale[kPlanes][kLane];
  bool half_way;  // see block_codec.h

  explicit Normalised(const BlockView& v) : half_way(v.half_way) {
    const int64_t step = v.type == ViewType::bf16 ? 2 : 1;
    for (int64_t c = 0; c < kPlanes; ++c)
      for (int64_t l = 0; l < kLane; ++l)
        shift[c][l] = v.shift[(c + step * l) % kPlanes], scale[c][l] = v.scale[(c + step * l) % kPlanes];
  }
};

// W pixels' levels, those of a pixel side by side, as bfloat16: even and odd lanes apart, in 32 bits.
template <int W, bool kHalfWay, typename Put>
IJCKD_INLINE void put_bf16(const Vec<uint16_t, W> (&levels)[kPlanes], const Normalised& n, const Put& put) {
  using Pairs = Vec<uint32_t, W / 2>;
  const auto rounded = [&](const Pairs& level, int phase) __attribute__((always_inline)) {
    const float *shift = n.shift[phase], *scale = n.scale[phase];
    uint32_t x[W / 2];
    store_as(x, level);
    IJCKD_ONE_VECTOR for (int l = 0; l < W / 2; ++l) {
      const uint32_t u = std::bit_cast<uint32_t>((float(int32_t(x[l])) - shift[l]) * scale[l]);
      x[l] = kHalfWay ? u + 0x7fff + (u >> 16 & 1) : u + 0x8000;
    }
    return load_as<Pairs>(x);
  };
  each<kPlanes>([&](auto m) __attribute__((always_inline)) {
    const Pairs pairs = bits_as<Pairs>(levels[m]);
    const Pairs even = rounded(pairs & 0xffff, W * m % kPlanes), odd = rounded(pairs >> 16, (W * m + 1) % kPlanes);
    const Pairs both = even >> 16 | (odd & 0xffff0000);
    put(m, both);
  });
}
template <int W, typename Put>
IJCKD_INLINE void put_f32(const Vec<uint16_t, W> (&levels)[kPlanes], const Normalised& n, const Put& put) {
  each<kPlanes>([&](auto m) __attribute__((always_inline)) {
    const float *shift = n.shift[W * m % kPlanes], *scale = n.scale[W * m % kPlanes];
    uint16_t x[W];
    float value[W];
    store_as(x, levels[m]);
    IJCKD_ONE_VECTOR for (int l = 0; l < W; ++l) value[l] = (float(x[l]) - shift[l]) * scale[l];
    put(2 * m, load_as<Vec<float, W / 2>>(value)), put(2 * m + 1, load_as<Vec<float, W / 2>>(value + W / 2));
  });
}

// The levels of 2 W pixels as bytes: of two neighbours in 16 bits r g, b r, g b; then all of them in turn.
template <int W>
IJCKD_INLINE void put_bytes(const Vec<uint16_t, W> (&first)[kPlanes], const Vec<uint16_t, W> (&second)[kPlanes],
                            uint8_t* out) {
  using Words = Vec<uint16_t, W>;
  using Pairs = Vec<uint32_t, W / 2>;
  Pairs parts[2][kPlanes];
  each<2>([&](auto h) __attribute__((always_inline)) {
    const auto& x = h.value ? second : first;
    const Pairs r = bits_as<Pairs>(x[0]), g = bits_as<Pairs>(x[1]), b = bits_as<Pairs>(x[2]);
    parts[h][0] = r | g << 8, parts[h][1] = b | r >> 8, parts[h][2] = (g | b << 8) >> 16;
  });
  Words pixels[kPlanes];
  for (int c = 0; c < kPlanes; ++c)  // pairs of the first in even lanes, of the second in odd ones
    pixels[c] = bits_as<Words>((parts[0][c] & 0xffff) | parts[1][c] << 16);
  // to the order of the pixels
  struct Apart {
    static constexpr int at(int l) { return l < W / 2 ? 2 * l : 2 * (l - W / 2) + 1; }
  };
  for (int c = 0; c < kPlanes; ++c) pixels[c] = shuffled<Apart, uint16_t, W>(pixels[c], pixels[c]);
  interleave<W>(pixels);
  each<kPlanes>([&](auto m) __attribute__((always_inline)) { store_as(out + 2 * W * m, pixels[m]); });
}

// A row of three planes, [3, stride] side by side, to out [stride, 3]. Of bytes up to W pixels more are written.
// past: past the caches, where out is streamable<W>; bytes are not.
template <int W, ViewType kType>
IJCKD_INLINE void finish_row(const int16_t (*factors)[kLane], const int16_t* row, int64_t stride, const Normalised& n,
                             bool past, uint8_t* out) {
  const int16_t *y = row, *u = row + stride, *v = row + 2 * stride;
  Vec<uint16_t, W> x[kPlanes];
  if constexpr (kType == ViewType::u8) {
    for (int64_t k = 0; k < stride; k += 2 * W) {
      Vec<uint16_t, W> next[kPlanes];
      const int64_t second = std::min(k + W, stride - W);
      levels_of<W>(factors, y + k, u + k, v + k, x);
      levels_of<W>(factors, y + second, u + second, v + second, next);
      put_bytes<W>(x, next, out + kPlanes * k);
    }
  } else {
    const auto all = [&](auto half_way, auto past) __attribute__((always_inline)) {
      const auto put = [&](int64_t m, const auto& vector) __attribute__((always_inline)) {
        if constexpr (past)
          stream_as(out + 2 * W * m, vector);
        else
          store_as(out + 2 * W * m, vector);
      };
      for (int64_t k = 0; k < stride; k += W, out += kPlanes * W * bytes_of(kType)) {
        levels_of<W>(factors, y + k, u + k, v + k, x);
        interleave<W>(x);
        if constexpr (kType == ViewType::bf16)
          put_bf16<W, half_way>(x, n, put);
        else
          put_f32<W>(x, n, put);
      }
    };
    using Yes = std::true_type;
    using No = std::false_type;
    if (kType == ViewType::bf16 && n.half_way)
      past ? all(Yes(), Yes()) : all(Yes(), No());
    else
      past ? all(No(), Yes()) : all(No(), No());
  }
}

// Whether whole vectors of W lanes can be written past the caches: what fills a batch is not read again before it has
// left them.
template <int W>
IJCKD_INLINE bool streamable(const uint8_t* out, int64_t bytes) {
  return (reinterpret_cast<uintptr_t>(out) | uintptr_t(bytes)) % (2 * W) == 0;
}
template <int W>
IJCKD_INLINE void put_row(const uint8_t* from, int64_t bytes, uint8_t* out) {
  if (streamable<W>(out, bytes)) {
    for (int64_t k = 0; k < bytes; k += 2 * W) stream_as(out + k, load_as<Vec<int16_t, W>>(from + k));
  } else if constexpr (W > 8) {
    put_row<W / 2>(from, bytes, out);
  } else {
    std::memcpy(out, from, bytes);
  }
}

// Rows [first, first + count) of the view, columns [left, left + wide).
template <int W, ViewType kType>
IJCKD_INLINE void make_rows(const BlockView& v, int64_t first, int64_t count, int64_t left, int64_t wide, bool flip,
                            StageClock& clock, ViewScratch& s) {
  const int64_t stride = s.luma.stride, size = bytes_of(kType), skipped = (flip ? stride - wide : 0) * kPlanes * size;
  const int64_t bytes = wide * kPlanes * size, apart = v.S * kPlanes * size;
  const int64_t room = padded(kPlanes * size * (stride + kLane), kLine);
  const Normalised n(v);
  int16_t* band = s.band.of(kBand * kPlanes * stride);
  uint8_t* stored = s.stored.of(kBand * room);
  uint8_t* out = static_cast<uint8_t*>(v.out) + (first * v.S + left) * kPlanes * size;
  // At once while the colours are made, which hides the time it takes; but a clock shall tell the two apart.
  const bool past = kType != ViewType::u8 && wide == stride && streamable<W>(out, apart) && !v.ticks;
  int64_t fetched = 0;
  for (int64_t k = 0; k < count; k += kBand) {
    const int64_t rows = std::min(kBand, count - k);
    for (const int64_t until = v.next_bytes * (k + rows) / count; fetched < until; fetched += kLine)
      __builtin_prefetch(v.next + fetched, 0, 2);
    pass_along_y<W, 1>(s.luma_y, k, rows, s.luma, band);
    pass_along_y<W, 2>(s.chroma_y, k, rows, s.chroma, band + stride);
    clock.lap(ViewStage::along_y);
    for (int64_t r = 0; r < rows; ++r)
      finish_row<W, kType>(s.factors, band + r * kPlanes * stride, stride, n, past,
                           past ? out + (k + r) * apart : stored + r * room);
    clock.lap(ViewStage::colours);
    for (int64_t r = 0; r < rows && !past; ++r) put_row<W>(stored + r * room + skipped, bytes, out + (k + r) * apart);
    clock.lap(ViewStage::stores);
  }
}

}  // namespace ijckd
