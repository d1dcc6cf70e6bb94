#pragma once
// What makes the CPU loops fast without -ffast-math: function clones per instruction set, an exponential that the
// compiler can vectorise, and sums in lanes.
//
// The library is compiled for any x86-64; a function marked IJCKD_CLONES is compiled again for AVX2 and AVX-512 and the
// loader takes the best that the processor has. What such a function calls must be IJCKD_INLINE, or it would not be
// cloned with it. Other architectures vectorise with what their baseline has (NEON on aarch64).

#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#define IJCKD_INLINE __attribute__((always_inline)) inline
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && \
    __GNUC__ >= 12    // older: no levels
#define IJCKD_LEVELS  // functions for more than the baseline
#define IJCKD_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define IJCKD_CLONES
#endif

// Before a loop over the lanes of one vector: it would be unrolled before it could become one.
#ifdef __clang__
#define IJCKD_ONE_VECTOR
#else
#define IJCKD_ONE_VECTOR _Pragma("GCC unroll 1")
#endif

namespace ijckd {

// Element i of p in the accumulator type, and back. BFloat16's own operators branch on NaN, which stops vectorisation.
IJCKD_INLINE float load(const float* p, int64_t i) { return p[i]; }
IJCKD_INLINE double load(const double* p, int64_t i) { return p[i]; }
IJCKD_INLINE float load(const c10::BFloat16* p, int64_t i) { return std::bit_cast<float>(uint32_t(p[i].x) << 16); }
IJCKD_INLINE void store(float* p, int64_t i, float v) { p[i] = v; }
IJCKD_INLINE void store(double* p, int64_t i, double v) { p[i] = v; }
IJCKD_INLINE void store(c10::BFloat16* p, int64_t i, float v) {
  const uint32_t u = std::bit_cast<uint32_t>(v);
  p[i].x = uint16_t(v != v ? 0x7fc0u : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16);  // to the nearest, ties to even
}

// e^x to 2 units in the last place, any x: 0 below -104, infinity above 88.7, NaN for NaN. x = n ln 2 + r with |r| <=
// ln 2 / 2; 2^n in two factors, so that results near the ends of the range neither overflow nor vanish early.
IJCKD_INLINE float exponential(float x) {
  const float low = x < -104.0f ? -104.0f : x, v = low > 89.0f ? 89.0f : low;  // NaN passes both
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = v * 1.44269504f + kRound, n = shifted - kRound;
  const float r = (v - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const int32_t e = std::bit_cast<int32_t>(shifted) - std::bit_cast<int32_t>(kRound), half = e >> 1;
  return p * std::bit_cast<float>(uint32_t(half + 127) << 23) * std::bit_cast<float>(uint32_t(e - half + 127) << 23);
}
IJCKD_INLINE double exponential(double x) { return std::exp(x); }

// Terms that are added up one after the other in A. A chain of thousands of floats would lose digits, so that longer
// sums are made of runs, whose sums are added up in double. A run's bounds follow from the sizes alone.
constexpr int64_t kRun = 64;

// Sum and maximum over n items, item(i) given; in 32 lanes, always the same ones, so that the order never depends on
// the instruction set's width.
constexpr int64_t kLanes = 32;

// Half of the lanes that n items reach, rounded up to a power of 2: rows of few classes are many.
IJCKD_INLINE int64_t half_of(int64_t n) {
  int64_t half = kLanes / 2;
  while (half > 0 && n <= half) half /= 2;
  return half;
}

template <typename A, typename Item>
IJCKD_INLINE A lane_sum(int64_t n, const Item& item) {
  double total = 0;
  for (int64_t first = 0; first < n; first += kRun * kLanes) {
    const int64_t last = std::min(n, first + kRun * kLanes), whole = last - (last - first) % kLanes;
    A lanes[kLanes] = {};
    for (int64_t i = first; i < whole; i += kLanes)
      for (int64_t j = 0; j < kLanes; ++j) lanes[j] += item(i + j);
    for (int64_t i = whole; i < last; ++i) lanes[i - whole] += item(i);
    for (int64_t half = half_of(last - first); half > 0; half /= 2)
      for (int64_t j = 0; j < half; ++j) lanes[j] += lanes[j + half];
    total += double(lanes[0]);
  }
  return A(total);
}

// NaN items are passed over; -infinity where there is no other.
template <typename A>
IJCKD_INLINE A lane_max(int64_t n, const A* x) {
  A lanes[kLanes];
  for (A& lane : lanes) lane = -INFINITY;
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
  for (int64_t i = whole; i < n; ++i) lanes[i - whole] = x[i] > lanes[i - whole] ? x[i] : lanes[i - whole];
  for (int64_t half = half_of(n); half > 0; half /= 2)
    for (int64_t j = 0; j < half; ++j) lanes[j] = lanes[j + half] > lanes[j] ? lanes[j + half] : lanes[j];
  return lanes[0];
}

}  // namespace ijckd
