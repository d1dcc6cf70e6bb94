#pragma once
// The second half of a view: the pass along y, the colours, and the stores.

#include <algorithm>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "vectors.h"
#include "view_columns.h"
#include "view_scratch.h"

namespace ijckd {

IJCKD_INLINE int64_t bytes_of(ViewType type) { return type == ViewType::u8 ? 1 : type == ViewType::f32 ? 4 : 2; }

// One row of the pass along y, out [length].
template <int W>
IJCKD_INLINE void pass_along_y(const ViewWeights& down, int64_t k, const ViewPlane& plane, int64_t part, int64_t length,
                               int16_t* out) {
  const int64_t low = down.low[k];
  with_taps<kMostFew>(down.few ? down.n : 0, [&](auto taps) __attribute__((always_inline)) {
    if constexpr (taps.value > 0) {
      const int16_t* from[taps.value];
      Vec<int16_t, W> weights[taps.value];
      for (int j = 0; j < taps.value; ++j)
        from[j] = plane.row(low + j, part), weights[j] = everywhere<W>(down.narrow[k * down.n + j]);
      for (int64_t x = 0; x < length; x += W)
        store_as(out + x, weighted<W, taps.value>([&](int j) __attribute__((always_inline)) { return from[j] + x; },
                                                  [&](int j) __attribute__((always_inline)) { return weights[j]; }, 0));
    } else {
      for (int64_t x = 0; x < length; x += W)
        store_as(out + x,
                 weighted<W, 0>([&](int64_t j) __attribute__((always_inline)) { return plane.row(low + j, part) + x; },
                                [&](int64_t j) __attribute__((always_inline)) { return down.wide[k * down.n + j]; },
                                down.n));
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
  const auto level_of = [](const Words& colour) __attribute__((always_inline)) {
    int16_t x[W];
    store_as(x, (colour + (1 << (kPassBits - 1))) >> kPassBits);
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
template <int W, bool kHalfWay>
IJCKD_INLINE void put_bf16(const Vec<uint16_t, W> (&levels)[kPlanes], const Normalised& n, uint8_t* out) {
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
    store_as(out + 2 * W * m, both);
  });
}
template <int W>
IJCKD_INLINE void put_f32(const Vec<uint16_t, W> (&levels)[kPlanes], const Normalised& n, uint8_t* out) {
  each<kPlanes>([&](auto m) __attribute__((always_inline)) {
    const float *shift = n.shift[W * m % kPlanes], *scale = n.scale[W * m % kPlanes];
    uint16_t x[W];
    float value[W];
    store_as(x, levels[m]);
    IJCKD_ONE_VECTOR for (int l = 0; l < W; ++l) value[l] = (float(x[l]) - shift[l]) * scale[l];
    std::memcpy(out + 4 * W * m, value, sizeof value);
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

// A row of three planes, [3, stride] side by side, to out [stride, 3]. Up to W pixels more are written.
template <int W, ViewType kType>
IJCKD_INLINE void finish_row(const int16_t (*factors)[kLane], const int16_t* row, int64_t stride, const Normalised& n,
                             uint8_t* out) {
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
    const auto all = [&](auto half_way) __attribute__((always_inline)) {
      for (int64_t k = 0; k < stride; k += W) {
        levels_of<W>(factors, y + k, u + k, v + k, x);
        interleave<W>(x);
        if constexpr (kType == ViewType::bf16)
          put_bf16<W, half_way.value>(x, n, out + 2 * kPlanes * k);
        else
          put_f32<W>(x, n, out + 4 * kPlanes * k);
      }
    };
    if (n.half_way)
      all(std::true_type());
    else
      all(std::false_type());
  }
}

// Whole lines past the caches: what fills a batch is not read again before it has left them.
#ifdef IJCKD_LEVELS
__attribute__((target("avx512f"))) inline void stream(const uint8_t* from, int64_t bytes, uint8_t* out,
                                                      std::integral_constant<int, 32>) {
  for (int64_t k = 0; k < bytes; k += 64)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(out + k), _mm512_loadu_si512(from + k));
}
__attribute__((target("avx2"))) inline void stream(const uint8_t* from, int64_t bytes, uint8_t* out,
                                                   std::integral_constant<int, 16>) {
  for (int64_t k = 0; k < bytes; k += 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(out + k),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + k)));
}
#endif
#ifdef __SSE2__
inline void stream(const uint8_t* from, int64_t bytes, uint8_t* out, std::integral_constant<int, 8>) {
  for (int64_t k = 0; k < bytes; k += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(out + k), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + k)));
}
#else
inline void stream(const uint8_t* from, int64_t bytes, uint8_t* out, std::integral_constant<int, 8>) {
  std::memcpy(out, from, bytes);
}
#endif
template <int W>
IJCKD_INLINE void put_row(const uint8_t* from, int64_t bytes, uint8_t* out) {
  const uintptr_t both = reinterpret_cast<uintptr_t>(out) | uintptr_t(bytes);
  if (both % (2 * W) == 0) {
    stream(from, bytes, out, std::integral_constant<int, W>());
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
  const int64_t row_bytes = padded(kPlanes * size * (stride + kLane), kLine);
  const int64_t share = padded(v.next_bytes / ((count + kBand - 1) / kBand) + 1, kLine);
  int64_t fetched = 0;
  const Normalised n(v);
  int16_t* band = s.band.of(kBand * kPlanes * stride);
  uint8_t* stored = s.stored.of(kBand * row_bytes);
  for (int64_t k = 0; k < count; k += kBand) {
    const int64_t rows = std::min(kBand, count - k);
    for (const int64_t until = std::min(v.next_bytes, fetched + share); fetched < until; fetched += kLine)
      __builtin_prefetch(v.next + fetched, 0, 2);
    for (int64_t r = 0; r < rows; ++r)
      for (int c = 0; c < kPlanes; ++c)
        pass_along_y<W>(c == 0 ? s.luma_y : s.chroma_y, k + r, c == 0 ? s.luma : s.chroma, c == 2, stride,
                        band + (r * kPlanes + c) * stride);
    clock.lap(ViewStage::along_y);
    for (int64_t r = 0; r < rows; ++r)
      finish_row<W, kType>(s.factors, band + r * kPlanes * stride, stride, n, stored + r * row_bytes);
    clock.lap(ViewStage::colours);
    for (int64_t r = 0; r < rows; ++r)
      put_row<W>(stored + r * row_bytes + skipped, wide * kPlanes * size,
                 static_cast<uint8_t*>(v.out) + ((first + k + r) * v.S + left) * kPlanes * size);
    clock.lap(ViewStage::stores);
  }
}

}  // namespace ijckd
