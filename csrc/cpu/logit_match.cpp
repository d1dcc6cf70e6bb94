#include "logit_match.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "conv1x1.h"
#include "gemm.h"
#include "loops.h"
#include "vectorise.h"

namespace ijckd {
namespace {

constexpr int64_t kConvWeights = 1 << 20;  // elements of G in a convolution, which makes a copy of them
constexpr int64_t kLeastRows = 256;        // of G in one
constexpr int64_t kDirectRows = 1024;      // classes that are widened at a time
constexpr int64_t kRowGrain = 4;

// What a row must not exceed to be served by G, as measured against eager's errors on W with equal and with decaying
// spectra, with one large row, with a vector that all rows share. In units of a rounding error of A.
constexpr double kValue = 5;           // s (below) over the mean of |W d|^2
constexpr double kValueOfLogits = 20;  // s over what the rounding of eager's own logits leaves in that mean
constexpr double kGradient = 1.5;      // the same of the gradient
constexpr double kGradientOfLogits = 2;
// What rounding to bfloat16 leaves in logits and gradients, over what rounding to float32 does.
constexpr double kBfloat16 = 1 << 15;

// Of one row: what G makes of it, and bounds of the rounding errors in that.
struct RowSizes {
  double square = 0;       // d^T G d
  double s = 0;            // sum of d_i^2 rest_ii: the error of `square` is a part of a rounding of it
  double gradient = 0;     // |G d|^2
  double of_gradient = 0;  // sum of d_i^2 |rest_i|^2: that of G d is a few roundings of its root
  double features = 0;     // |z|^2 + |pooled_t|^2, whose logits eager subtracts
};

// Adds the directions beside `rest` to gd [Ct] = rest d, and measures. scratch [Ct + r].
template <typename A>
IJCKD_INLINE RowSizes measured_body(const Gram& g, const A* d, A* gd, const A* z, const A* pooled_t, double* scratch,
                                    int64_t Ct) {
  RowSizes out;
  out.square = lane_sum<double>(Ct, [&](int64_t i) __attribute__((always_inline)) { return double(d[i]) * gd[i]; });
  if (const int64_t r = g.count) {
    double *sum = scratch, *along = sum + Ct;
    for (int64_t k = 0; k < r; ++k) {
      const double* u = g.directions.data() + k * Ct;
      // Of the difference before its own rounding, which a direction this large would show.
      along[k] = lane_sum<double>(
          Ct, [&](int64_t i) __attribute__((always_inline)) { return u[i] * (double(z[i]) - double(pooled_t[i])); });
    }
    for (int64_t i = 0; i < Ct; ++i) sum[i] = gd[i];
    for (int64_t k = 0; k < r; ++k) {
      const double* u = g.directions.data() + k * Ct;
      double factor = 0;
      for (int64_t j = 0; j < r; ++j) factor += g.sizes[k * r + j] * along[j];
      out.square += factor * along[k];
      for (int64_t i = 0; i < Ct; ++i) sum[i] += factor * u[i];
    }
    for (int64_t i = 0; i < Ct; ++i) gd[i] = A(sum[i]);
  }
  const double *diagonal = g.diagonal.data(), *squares = g.squares.data();
  const auto square = [](A x) __attribute__((always_inline)) { return double(x) * double(x); };
  out.s = lane_sum<double>(Ct, [&](int64_t i) __attribute__((always_inline)) { return square(d[i]) * diagonal[i]; });
  out.of_gradient =
      lane_sum<double>(Ct, [&](int64_t i) __attribute__((always_inline)) { return square(d[i]) * squares[i]; });
  // `rest` may have a small diagonal and large elements beside it, where directions were not wholly taken out.
  const double length = lane_sum<double>(Ct, [&](int64_t i) __attribute__((always_inline)) { return square(d[i]); });
  const double by_columns = std::sqrt(length * out.of_gradient / double(Ct));
  out.s = by_columns > out.s ? by_columns : out.s;
  out.gradient = lane_sum<double>(Ct, [&](int64_t i) __attribute__((always_inline)) { return square(gd[i]); });
  out.features = lane_sum<double>(
      Ct, [&](int64_t i) __attribute__((always_inline)) { return square(z[i]) + square(pooled_t[i]); });
  return out;
}
IJCKD_CLONES RowSizes measured(const Gram& g, const float* d, float* gd, const float* z, const float* pooled_t,
                               double* scratch, int64_t Ct) {
  return measured_body(g, d, gd, z, pooled_t, scratch, Ct);
}
IJCKD_CLONES RowSizes measured(const Gram& g, const double* d, double* gd, const double* z, const double* pooled_t,
                               double* scratch, int64_t Ct) {
  return measured_body(g, d, gd, z, pooled_t, scratch, Ct);
}

template <typename A>
IJCKD_INLINE double square_of_body(const A* x, int64_t n) {
  return lane_sum<double>(n, [&](int64_t i) __attribute__((always_inline)) { return double(x[i]) * double(x[i]); });
}
IJCKD_CLONES double square_of(const float* x, int64_t n) { return square_of_body(x, n); }
IJCKD_CLONES double square_of(const double* x, int64_t n) { return square_of_body(x, n); }

// to [B, Ct] = d G, some rows of G (its own columns) after others.
void times_gram(const Tensor& d, const Tensor& g, const Tensor& to) {
  if (!by_convolution(d)) return matmul_out(d, g, to);
  const int64_t B = d.size(0), Ct = d.size(1), most = std::max(kConvWeights / Ct, kLeastRows);
  for (int64_t first = 0; first < Ct; first += most) {
    const int64_t n = std::min(most, Ct - first);
    const Tensor part = conv_rows(d, rows_of(g, first, n));  // [B, n]
    const float* from = part.const_data_ptr<float>();
    float* out = to.mutable_data_ptr<float>();
    for (int64_t b = 0; b < B; ++b) std::copy_n(from + b * n, n, out + b * Ct + first);
  }
}

// Which rows G serves badly; all where its own numbers are out of range. What is not finite stands for itself: the
// comparisons are false of NaN.
std::vector<int64_t> badly_served(const LossRows& r, const Gram& g, const std::vector<RowSizes>& rows) {
  const double B = double(rows.size()), Ct = double(r.z.size(1));
  const double rounding = r.rounding == DType::bf16 ? kBfloat16 : 1;
  double square = 0, gradient = 0;
  for (const RowSizes& row : rows)
    if (std::isfinite(row.square) && std::isfinite(row.gradient)) square += row.square, gradient += row.gradient;
  square /= B, gradient /= B;  // the loss is the mean over the batch, and so is what the gradient becomes in the end
  std::vector<int64_t> bad;
  for (size_t b = 0; b < rows.size(); ++b) {
    const RowSizes& row = rows[b];
    const double most = std::max(square, row.square), steepest = std::max(gradient, row.gradient);
    const double logits = rounding * std::sqrt(row.features / Ct);
    const bool value = row.s <= kValue * most + kValueOfLogits * logits * g.row_norm * std::sqrt(most / B);
    const bool grad = std::sqrt(row.of_gradient) <= kGradient * rounding * std::sqrt(steepest) +
                                                        kGradientOfLogits * logits * std::sqrt(g.fourth_powers);
    if (!(g.in_range && value && grad)) bad.push_back(int64_t(b));
  }
  return bad;
}

// The same of rows `bad` by W, in chunks of classes; of the difference in two parts, since W may be far larger in one
// direction than in all others.
template <typename A>
void directly(const LossRows& r, const std::vector<int64_t>& bad, const Tensor& squares, const Tensor& products) {
  const int64_t n = int64_t(bad.size()), K = r.terms.weight.size(0), Ct = r.z.size(1);
  const DType acc = accumulator(r.dtype);
  const Tensor parts = empty(r.z, {2 * n, Ct}, acc), product = empty(r.z, {n, Ct}, acc);
  const A *d = static_cast<const A*>(r.d->const_data_ptr()), *z = static_cast<const A*>(r.z.const_data_ptr()),
          *pooled_t = static_cast<const A*>(r.terms.pooled_t->const_data_ptr());
  A *high = static_cast<A*>(parts.mutable_data_ptr()), *low = high + n * Ct,
    *to = static_cast<A*>(products.mutable_data_ptr()), *square = static_cast<A*>(squares.mutable_data_ptr());
  for (int64_t i = 0; i < n; ++i)
    for (int64_t c = 0, at = bad[i] * Ct; c < Ct; ++c, ++at) {
      const double whole = double(z[at]) - double(pooled_t[at]), left = whole - double(d[at]);
      high[i * Ct + c] = d[at];
      low[i * Ct + c] = std::isfinite(left) ? A(left) : A(0);
    }
  std::vector<double> sums(n, 0), gradient(n * Ct, 0);
  for (int64_t k = 0; k < K; k += kDirectRows) {
    const int64_t classes = std::min(kDirectRows, K - k);
    const Tensor w = as(as(rows_of(r.terms.weight, k, classes), r.rounding), acc);
    const Tensor both = empty(r.z, {2 * n, classes}, acc);
    matmul_out(parts, transposed(w), both);
    const Tensor logits = rows_of(both, 0, n);  // W d
    A* l = static_cast<A*>(both.mutable_data_ptr());
    for (int64_t i = 0; i < n * classes; ++i) l[i] += l[n * classes + i];
    matmul_out(logits, w, product);
    const A* p = static_cast<const A*>(product.const_data_ptr());
    parallel_for(n, kRowGrain, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        sums[i] += square_of(l + i * classes, classes);
        for (int64_t c = 0; c < Ct; ++c) gradient[i * Ct + c] += p[i * Ct + c];
      }
    });
  }
  for (int64_t i = 0; i < n; ++i) {
    square[bad[i]] = A(sums[i]);
    for (int64_t c = 0; c < Ct; ++c) to[bad[i] * Ct + c] = A(gradient[i * Ct + c]);
  }
}

}  // namespace

void logit_match(const LossRows& r, const std::vector<Hash>& hashes, const Tensor& squares, const Tensor& products) {
  const int64_t B = r.z.size(0), Ct = r.z.size(1);
  const std::shared_ptr<const Gram> g = gram(r.terms.weight, r.dtype, r.rounding, hashes);
  times_gram(*r.d, g->rest, products);
  std::vector<RowSizes> sizes(B);
  dispatch(accumulator(r.dtype), [&](auto a, auto) {
    using A = decltype(a);
    if constexpr (std::is_floating_point_v<A>) {
      const auto at = [&](const Tensor& t, int64_t b) { return static_cast<const A*>(t.const_data_ptr()) + b * Ct; };
      A *to = static_cast<A*>(products.mutable_data_ptr()), *square = static_cast<A*>(squares.mutable_data_ptr());
      parallel_for(B, kRowGrain, [&](int64_t first, int64_t last) {
        std::vector<double> scratch(Ct + g->count);
        for (int64_t b = first; b < last; ++b) {
          sizes[b] = measured(*g, at(*r.d, b), to + b * Ct, at(r.z, b), at(*r.terms.pooled_t, b), scratch.data(), Ct);
          square[b] = A(sizes[b].square);
        }
      });
      const std::vector<int64_t> bad = badly_served(r, *g, sizes);
      if (!bad.empty()) directly<A>(r, bad, squares, products);
      // Not below 0, as |W d|^2 is not; NaN stays NaN.
      for (int64_t b = 0; b < B; ++b) square[b] = square[b] < 0 ? A(0) : square[b];
    }
  });
}

}  // namespace ijckd
