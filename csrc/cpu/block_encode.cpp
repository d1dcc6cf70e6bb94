// Images to blocks and back, and the checksum of their bytes.
#include <algorithm>
#include <cstring>
#include <vector>

#include "block_codec.h"
#include "vectorise.h"

namespace ijckd {
namespace {

// Blocks that are encoded side by side: sample i of all of them lies together, so that every loop is over blocks.
constexpr int kBatch = 32;
constexpr int kRounds = 3;
constexpr int kMoves = 4;  // then: each end point by a level, to either side

struct Batch {
  int32_t v[kBlockSamples][kBatch];     // samples
  int32_t best[kBlockSamples][kBatch];  // indices with the least error so far, and what they are of
  int32_t a[kBatch], b[kBatch], error[kBatch];
};

// Indices k of the samples between end points a and b, kept where their error is less than that so far.
IJCKD_INLINE void try_ends(Batch& t, const int32_t* a, const int32_t* b, int32_t (&k)[kBlockSamples][kBatch],
                           int bits) {
  const int32_t L = (1 << bits) - 1;
  int32_t error[kBatch] = {}, step[kBatch];
  for (int n = 0; n < kBatch; ++n) {  // L / (b - a) with 16 fractional bits; all of a flat block is its a
    const int32_t d = b[n] - a[n], size = d < 0 ? -d : d;
    const int32_t s = int32_t(float(L << 16) / float(size > 0 ? size : 1));
    step[n] = size == 0 ? 0 : d < 0 ? -s : s;
  }
  for (int i = 0; i < kBlockSamples; ++i)
    for (int n = 0; n < kBatch; ++n) {
      const int32_t x = ((t.v[i][n] - a[n]) * step[n] + (1 << 15)) >> 16, low = x < 0 ? 0 : x, c = low > L ? L : low;
      const int32_t e = block_sample(a[n], b[n], c, bits) - t.v[i][n];
      k[i][n] = c;
      error[n] += e * e;
    }
  int32_t better[kBatch];
  for (int n = 0; n < kBatch; ++n) {
    better[n] = error[n] < t.error[n];
    t.error[n] = better[n] ? error[n] : t.error[n];
    t.a[n] = better[n] ? a[n] : t.a[n];
    t.b[n] = better[n] ? b[n] : t.b[n];
  }
  for (int i = 0; i < kBlockSamples; ++i)
    for (int n = 0; n < kBatch; ++n) t.best[i][n] = better[n] ? k[i][n] : t.best[i][n];
}

IJCKD_INLINE int32_t rounded_level(float x) {
  const float low = x < 0.0f ? 0.0f : x, v = low > 255.0f ? 255.0f : low;
  return int32_t(v + 0.5f);
}

// The end points with the least squared error for indices k. Its floats are only divided: a product that is added to
// something would be fused on some instruction sets.
IJCKD_INLINE void fit_ends(const Batch& t, const int32_t (&k)[kBlockSamples][kBatch], int32_t* a, int32_t* b,
                           int bits) {
  const int32_t L = (1 << bits) - 1;
  int32_t s00[kBatch] = {}, s01[kBatch] = {}, s11[kBatch] = {}, t0[kBatch] = {}, t1[kBatch] = {};
  for (int i = 0; i < kBlockSamples; ++i)
    for (int n = 0; n < kBatch; ++n) {
      const int32_t q = k[i][n], p = L - q;
      s00[n] += p * p, s01[n] += p * q, s11[n] += q * q;
      t0[n] += p * t.v[i][n], t1[n] += q * t.v[i][n];
    }
  for (int n = 0; n < kBatch; ++n) {
    const int32_t det = s00[n] * s11[n] - s01[n] * s01[n];  // 0 where all indices are equal: a and b stay
    const float whole = float(det > 0 ? det : 1) / float(L);
    const float at_a = float(t0[n] * s11[n] - t1[n] * s01[n]) / whole;
    const float at_b = float(s00[n] * t1[n] - s01[n] * t0[n]) / whole;
    a[n] = det > 0 ? rounded_level(at_a) : a[n];
    b[n] = det > 0 ? rounded_level(at_b) : b[n];
  }
}

IJCKD_INLINE void encode_batch(Batch& t, int bits) {
  int32_t a[kBatch], b[kBatch], k[kBlockSamples][kBatch];
  for (int n = 0; n < kBatch; ++n) a[n] = b[n] = t.v[0][n], t.error[n] = INT32_MAX;
  for (int i = 1; i < kBlockSamples; ++i)
    for (int n = 0; n < kBatch; ++n) a[n] = std::min(a[n], t.v[i][n]), b[n] = std::max(b[n], t.v[i][n]);
  for (int round = 0; round < kRounds; ++round) {
    if (round > 0) fit_ends(t, k, a, b, bits);
    try_ends(t, a, b, k, bits);
  }
  // rounded, the fit is no longer the best one: its neighbours often are better
  for (int move = 0; move < kMoves; ++move) {
    for (int n = 0; n < kBatch; ++n) {
      const int32_t by = move % 2 ? 1 : -1;
      a[n] = t.a[n] + (move % 4 < 2 ? by : 0), b[n] = t.b[n] + (move % 4 < 2 ? 0 : by);
      a[n] = std::clamp(a[n], 0, 255), b[n] = std::clamp(b[n], 0, 255);
    }
    try_ends(t, a, b, k, bits);
  }
}

// Blocks of a plane from its samples [4 high, 4 wide]; decoded: where they go as the blocks have them, or nullptr.
IJCKD_INLINE void encode_plane_body(const uint8_t* samples, const BlockPlane& plane, uint8_t* out, uint8_t* decoded) {
  const int64_t stride = kBlockSide * plane.wide, blocks = plane.blocks();
  if (plane.bits == 4) std::memset(out, 0, plane.ends_bytes());
  Batch t;
  for (int64_t first = 0; first < blocks; first += kBatch) {
    const int64_t count = std::min<int64_t>(kBatch, blocks - first);
    const auto corner = [&](int64_t n) {  // of a block; what a last batch lacks is its last block again
      const int64_t block = first + std::min(n, count - 1);
      return block / plane.wide * kBlockSide * stride + block % plane.wide * kBlockSide;
    };
    for (int64_t n = 0; n < kBatch; ++n) {
      const uint8_t* at = samples + corner(n);
      for (int64_t i = 0; i < kBlockSamples; ++i) t.v[i][n] = at[i / kBlockSide * stride + i % kBlockSide];
    }
    encode_batch(t, plane.bits);
    for (int64_t n = 0; n < (decoded ? count : 0); ++n) {
      uint8_t* at = decoded + corner(n);
      for (int64_t i = 0; i < kBlockSamples; ++i)
        at[i / kBlockSide * stride + i % kBlockSide] = uint8_t(block_sample(t.a[n], t.b[n], t.best[i][n], plane.bits));
    }
    for (int64_t n = 0; n < count; ++n) {
      uint64_t indices = 0;
      for (int i = 0; i < kBlockSamples; ++i) indices |= uint64_t(t.best[i][n]) << (plane.bits * i);
      uint8_t* ends = out + plane.ends_at(first + n);
      ends[0] = uint8_t(t.a[n]), ends[1] = uint8_t(t.b[n]);
      uint8_t* word = out + plane.word_at(first + n) + plane.skipped_bits() / 8;
      for (int i = 0; i < 2 * plane.bits; ++i) word[i] = uint8_t(indices >> (8 * i));
    }
  }
}
IJCKD_CLONES void encode_plane(const uint8_t* samples, const BlockPlane& plane, uint8_t* out, uint8_t* decoded) {
  encode_plane_body(samples, plane, out, decoded);
}

// One row of pixels [w, 3] to rows of samples [wide], padded by the last pixel's.
IJCKD_CLONES void split_row(const uint8_t* rgb, int64_t w, int64_t wide, uint8_t* y, uint8_t* cb, uint8_t* cr) {
  for (int64_t x = 0; x < w; ++x) {
    const int r = rgb[3 * x], g = rgb[3 * x + 1], b = rgb[3 * x + 2];
    y[x] = uint8_t(luma_of(r, g, b));
    cb[x] = uint8_t(blue_of(r, g, b));
    cr[x] = uint8_t(red_of(r, g, b));
  }
  for (uint8_t* row : {y, cb, cr}) std::memset(row + w, row[w - 1], wide - w);
}

// Two rows of chroma [2 n] to the sums of each 2 x 2, [n], with those at both ends repeated: sums[-1], sums[n].
IJCKD_CLONES void halve_rows(const uint8_t* upper, const uint8_t* lower, int64_t n, int16_t* sums) {
  for (int64_t x = 0; x < n; ++x) sums[x] = int16_t(upper[2 * x] + upper[2 * x + 1] + lower[2 * x] + lower[2 * x + 1]);
  sums[-1] = sums[0], sums[n] = sums[n - 1];
}

// Chroma samples [n] from the sums of the row, of that above and of that below.
IJCKD_CLONES void sharpen_row(const int16_t* above, const int16_t* row, const int16_t* below, int64_t n, uint8_t* out) {
  const auto across = [](const int16_t* s, int64_t x)
                          __attribute__((always_inline)) { return s[x - 1] + 6 * s[x] + s[x + 1]; };
  for (int64_t x = 0; x < n; ++x)
    out[x] = uint8_t(chroma_of(row[x], across(above, x) + 6 * across(row, x) + across(below, x)));
}

// A row at full size [2 n], times 16, from the nearest row of a plane at half size [n] and the next nearest. line: n
// + 2.
IJCKD_CLONES void widen_row(const uint8_t* near, const uint8_t* far, int64_t n, int16_t* line, int16_t* out) {
  for (int64_t x = 0; x < n; ++x) line[x + 1] = int16_t(3 * near[x] + far[x]);
  line[0] = line[1], line[n + 1] = line[n];
  for (int64_t x = 0; x < n; ++x) {
    out[2 * x] = int16_t(3 * line[x + 1] + line[x]);
    out[2 * x + 1] = int16_t(3 * line[x + 1] + line[x + 2]);
  }
}

// A row of luma [n] beside Cb and Cr; wide_u, wide_v: what has become of them, times 16.
IJCKD_CLONES void make_up_row(const uint8_t* cb, const uint8_t* cr, const int16_t* wide_u, const int16_t* wide_v,
                              int64_t n, uint8_t* y) {
  for (int64_t x = 0; x < n; ++x) y[x] = uint8_t(luma_beside(y[x], wide_u[x] - 16 * cb[x], wide_v[x] - 16 * cr[x]));
}

IJCKD_CLONES uint64_t checksum_of(const uint8_t* data, int64_t n) {
  constexpr int kHalf = kChecksumLanes / 2;  // 64-bit words of two lanes each
  uint64_t even_a[kHalf] = {}, even_b[kHalf] = {}, odd_a[kHalf] = {}, odd_b[kHalf] = {};
  const auto add = [&](const uint64_t* words) __attribute__((always_inline)) {
    for (int i = 0; i < kHalf; ++i) {
      even_a[i] += words[i] & 0xffffffffu, odd_a[i] += words[i] >> 32;
      even_b[i] += even_a[i], odd_b[i] += odd_a[i];
    }
  };
  constexpr int64_t kStep = 4 * kChecksumLanes;
  uint64_t words[kHalf];
  int64_t at = 0;
  for (; at + kStep <= n; at += kStep) {
    std::memcpy(words, data + at, kStep);
    add(words);
  }
  if (at < n) {
    std::memset(words, 0, kStep);
    std::memcpy(words, data + at, n - at);
    add(words);
  }
  uint64_t h = uint64_t(n);
  for (int i = 0; i < kHalf; ++i) {
    h = mixed(h, even_b[i] + (even_a[i] << 32));
    h = mixed(h, odd_b[i] + (odd_a[i] << 32));
  }
  return h;
}

}  // namespace

void encode_blocks(const uint8_t* rgb, const BlockImage& image, uint8_t* out) {
  const BlockPlane luma = image.plane(0);
  const int64_t high = kBlockSide * luma.high, wide = kBlockSide * luma.wide, half = wide / 2, stride = half + 2;
  std::vector<uint8_t> full[kPlanes], small[2];  // small: Cb and Cr at half size
  for (auto& plane : full) plane.resize(high * wide);
  for (int64_t i = 0; i < high; ++i) {
    const uint8_t* pixels = rgb + std::min(i, image.h - 1) * image.w * 3;
    split_row(pixels, image.w, wide, &full[0][i * wide], &full[1][i * wide], &full[2][i * wide]);
  }
  std::vector<int16_t> sums(high / 2 * stride), widened[2];
  for (int c = 1; c < kPlanes; ++c) {
    for (int64_t i = 0; i < high / 2; ++i)
      halve_rows(&full[c][2 * i * wide], &full[c][(2 * i + 1) * wide], half, &sums[i * stride + 1]);
    const auto row = [&](int64_t at) { return &sums[std::clamp<int64_t>(at, 0, high / 2 - 1) * stride + 1]; };
    std::vector<uint8_t>& plane = small[c - 1];
    plane.resize(high / 2 * half), widened[c - 1].resize(wide);
    for (int64_t i = 0; i < high / 2; ++i) sharpen_row(row(i - 1), row(i), row(i + 1), half, &plane[i * half]);
    encode_plane(plane.data(), image.plane(c), out + image.plane_at(c), plane.data());
  }
  for (int64_t i = 0; i < high; ++i) {
    const int64_t near = i / 2, far = std::clamp<int64_t>(i % 2 ? near + 1 : near - 1, 0, high / 2 - 1);
    for (int c = 0; c < 2; ++c)
      widen_row(&small[c][near * half], &small[c][far * half], half, sums.data(), widened[c].data());
    make_up_row(&full[1][i * wide], &full[2][i * wide], widened[0].data(), widened[1].data(), wide, &full[0][i * wide]);
  }
  encode_plane(full[0].data(), luma, out, nullptr);
}

void decode_blocks(const uint8_t* data, const BlockPlane& plane, int64_t h, int64_t w, uint8_t* out) {
  for (int64_t y = 0; y < h; ++y)
    for (int64_t x = 0; x < w; ++x) {
      const int64_t n = y / kBlockSide * plane.wide + x / kBlockSide;
      const int i = int(y % kBlockSide * kBlockSide + x % kBlockSide);
      uint64_t word;
      std::memcpy(&word, data + plane.word_at(n), sizeof word);
      const int index = int(word >> (plane.skipped_bits() + plane.bits * i)) & ((1 << plane.bits) - 1);
      const uint8_t* ends = data + plane.ends_at(n);
      out[y * w + x] = uint8_t(block_sample(ends[0], ends[1], index, plane.bits));
    }
}

uint64_t block_checksum(const uint8_t* data, int64_t n) { return checksum_of(data, n); }

}  // namespace ijckd
