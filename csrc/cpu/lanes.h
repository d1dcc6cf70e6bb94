#pragma once
// How the CPU goes through a row (soft_row.h): in lanes, whose order never depends on the instruction set.

#include <algorithm>
#include <cstdint>

#include "../soft_row.h"
#include "vectorise.h"

namespace ijckd {

template <typename A>
struct Lanes {
  int64_t K;
  A* scratch;  // [K]

  // All N at once: what an item computes for one of them serves the others. Added up as vectorise.h:lane_sum does.
  template <int N, typename Item>
  IJCKD_INLINE Sums<A, N> sums(const Item& item) const {
    double total[N] = {};
    for (int64_t first = 0; first < K; first += kRun * kLanes) {
      const int64_t last = std::min(K, first + kRun * kLanes), whole = last - (last - first) % kLanes;
      A lanes[N][kLanes] = {};
      for (int64_t i = first; i < whole; i += kLanes)
        for (int64_t j = 0; j < kLanes; ++j) {
          const Sums<A, N> one = item(i + j);
          for (int n = 0; n < N; ++n) lanes[n][j] += one.of[n];
        }
      for (int64_t i = whole; i < last; ++i) {
        const Sums<A, N> one = item(i);
        for (int n = 0; n < N; ++n) lanes[n][i - whole] += one.of[n];
      }
      for (int n = 0; n < N; ++n) {
        for (int64_t half = half_of(last - first); half > 0; half /= 2)
          for (int64_t j = 0; j < half; ++j) lanes[n][j] += lanes[n][j + half];
        total[n] += double(lanes[n][0]);
      }
    }
    Sums<A, N> out;
    for (int n = 0; n < N; ++n) out.of[n] = A(total[n]);
    return out;
  }
  template <typename Item>
  IJCKD_INLINE A most(const Item& item) const {
    for (int64_t k = 0; k < K; ++k) scratch[k] = item(k);
    return std::max(lane_max(K, scratch), lowest<A>());
  }
  template <typename Item>
  IJCKD_INLINE int64_t first_most(const Item& item) const {
    const A top = most(item);
    int64_t k = 0;
    while (k < K - 1 && scratch[k] != top) ++k;
    return k;
  }
  static IJCKD_INLINE A exponential(A x) { return ijckd::exponential(x); }
  template <typename Store>
  static IJCKD_INLINE void once(const Store& store) {
    store();
  }
};

}  // namespace ijckd
