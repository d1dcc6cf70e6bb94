#include "view_weights.h"

#include <algorithm>

#include "vectorise.h"

namespace ijckd {

namespace {

constexpr int64_t kTogether = 8;  // outputs whose weights are made side by side

// Weights of outputs first .. first + kTogether - 1, whose taps begin at low, to out [kTogether, n].
template <typename T>
IJCKD_INLINE void weights_of(const PlaneAxis& axis, int64_t first, const int64_t* low, int64_t n, int bits, T* out) {
  int64_t at[kTogether], total[kTogether] = {}, inverse[kTogether], sum[kTogether] = {}, before[kTogether] = {};
  const int64_t apart = 2 * axis.pitch, support = axis.support;
  const auto tap = [&](int64_t l, int64_t j) __attribute__((always_inline)) {
    const int64_t from = at[l] + apart * j, t = support - (from < 0 ? -from : from);
    return t > 0 ? t : 0;
  };
  IJCKD_ONE_VECTOR for (int64_t l = 0; l < kTogether; ++l) at[l] =
      axis.pitch * (2 * low[l] + 1) - axis.centre(first + l);
  for (int64_t j = 0; j < n; ++j) IJCKD_ONE_VECTOR for (int64_t l = 0; l < kTogether; ++l) total[l] += tap(l, j);
  IJCKD_ONE_VECTOR for (int64_t l = 0; l < kTogether; ++l) inverse[l] = reciprocal(total[l]);
  for (int64_t j = 0; j < n; ++j) {
    int64_t weight[kTogether];
    IJCKD_ONE_VECTOR for (int64_t l = 0; l < kTogether; ++l) {
      sum[l] += tap(l, j);
      const int64_t after = (sum[l] * inverse[l] + (int64_t(1) << (61 - bits))) >> (62 - bits);
      weight[l] = after - before[l], before[l] = after;
    }
    for (int64_t l = 0; l < kTogether; ++l) out[l * n + j] = T(weight[l]);
  }
}

IJCKD_CLONES void make_weights(const PlaneAxis& axis, int64_t first, const int64_t* low, int64_t count, int64_t n,
                               int16_t* narrow, int32_t* wide) {
  for (int64_t t = 0; t < count; t += kTogether)
    if (narrow)
      weights_of(axis, first + t, low + t, n, kFewBits, narrow + t * n);
    else
      weights_of(axis, first + t, low + t, n, kManyBits, wide + t * n);
}

}  // namespace

void ViewWeights::make(const PlaneAxis& axis, int64_t first, int64_t last) {
  few = axis.few();
  // Centres of samples lie 2 pitch apart, and those that weigh anything lie nearer to the output's than support.
  n = std::min((axis.support + axis.pitch - 1) / axis.pitch, axis.end - axis.begin);
  outputs = last - first;
  const int64_t room = (outputs + kTogether - 1) / kTogether * kTogether;
  if (int64_t(low.size()) < room) low.resize(room);
  if (few && int64_t(narrow.size()) < room * n) narrow.resize(room * n);
  if (!few && int64_t(wide.size()) < room * n) wide.resize(room * n);
  int64_t lowest = axis.lowest(axis.centre(first));
  const int64_t highest = axis.end - n;
  for (int64_t i = first; i < first + room; ++i) {  // beyond the last too, whose weights nobody reads
    const int64_t beyond = axis.centre(i) - axis.support;
    while (lowest < highest && axis.pitch * (2 * lowest + 1) <= beyond) ++lowest;
    low[i - first] = std::min(lowest, highest);
  }
  make_weights(axis, first, low.data(), room, n, few ? narrow.data() : nullptr, wide.data());
  begin = low[0], end = low[outputs - 1] + n;
}

}  // namespace ijckd
