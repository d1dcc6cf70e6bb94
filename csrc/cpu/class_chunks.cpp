#include "class_chunks.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "conv1x1.h"
#include "gemm.h"
#include "logit_match.h"
#include "loops.h"
#include "vectorise.h"

namespace ijckd {
namespace {

constexpr int64_t kWhole = 1 << 20;  // logits up to which whole rows are held: 4 MiB of float32
// Logits in the rows that are held where only whole rows will do: 16 MiB of float32, and as much for W d. W is read
// twice for each so many rows, so beyond 131,072 classes it is more memory rather than fewer rows.
constexpr int64_t kRowLogits = 1 << 22, kLeastRows = 32;
constexpr int64_t kChunk =
    1 << 19;  // logits in a chunk: 2 MiB of float32 stay in the last-level cache between the two GEMMs
constexpr int64_t kConvWeights = 1 << 20;  // elements of W in a chunk's convolution, which makes a copy of them
constexpr int64_t kLeastClasses = 256;     // below this the library's GEMM loses more than the cache gives
constexpr int64_t kLeastWeight = 1 << 18;  // elements of W from which G = W^T W saves more than its lookup costs
constexpr int64_t kRowGrain = 4;
constexpr int64_t kColumns = 64;  // columns of W per task when its rows are summed

// The anchor is raised once a logit lies this far above it: e^60 times any number of classes is still a float.
constexpr int kFar = 60;

// What a row has gathered over the chunks so far. Exponentials are relative to `anchor`, at first the label's logit; of
// two labels that with the larger logit is `label`, so that both lie within what is summed.
template <typename A>
struct Row {
  int64_t label, other;  // other: the second label
  A share, share_other;  // of each in the target
  A anchor, label_logit, other_logit;
  double others = 0;  // s: sum of exponentials but the label's
  A label_term = 1;   // the label's exponential
  A rescale = 1;      // by which the last chunk's new anchor scales what was gathered before
  double below = 0;   // sum of best - logit, for label smoothing
  A best = -std::numeric_limits<A>::infinity();
  int64_t best_class = -1;
};

// One row's part of one chunk: logits [n] (without bias) become exponentials, 0 at the label; x [n] is scratch.
template <typename T, typename A>
IJCKD_INLINE void chunk_row_body(T* logits, const A* bias, A* x, int64_t first_class, int64_t n, int64_t label,
                                 bool smoothing, Row<A>& row) {
  if (bias)
    for (int64_t k = 0; k < n; ++k) x[k] = load(logits, k) + bias[k];
  else
    for (int64_t k = 0; k < n; ++k) x[k] = load(logits, k);
  const A top = lane_max(n, x);
  if (top > row.best) {
    if (smoothing && first_class > 0) row.below += A(first_class) * (top - row.best);
    row.best = top;
    int64_t k = 0;
    while (x[k] != top) ++k;
    row.best_class = first_class + k;
  }
  if (smoothing) row.below += lane_sum<A>(n, [&](int64_t k) __attribute__((always_inline)) { return row.best - x[k]; });
  row.rescale = 1;
  if (top - row.anchor > A(kFar)) {
    row.rescale = std::exp(row.anchor - top);
    row.others *= row.rescale;
    row.label_term *= row.rescale;
    row.anchor = top;
  }
  const A anchor = row.anchor;
  for (int64_t k = 0; k < n; ++k) x[k] = exponential(x[k] - anchor);
  if (label >= first_class && label < first_class + n) x[label - first_class] = 0;
  row.others += lane_sum<A>(n, [&](int64_t k) __attribute__((always_inline)) { return x[k]; });
  for (int64_t k = 0; k < n; ++k) store(logits, k, x[k]);
}

IJCKD_CLONES void chunk_row(float* logits, const float* bias, float* x, int64_t first_class, int64_t n, int64_t label,
                            bool smoothing, Row<float>& row) {
  chunk_row_body(logits, bias, x, first_class, n, label, smoothing, row);
}
IJCKD_CLONES void chunk_row(c10::BFloat16* logits, const float* bias, float* x, int64_t first_class, int64_t n,
                            int64_t label, bool smoothing, Row<float>& row) {
  chunk_row_body(logits, bias, x, first_class, n, label, smoothing, row);
}
IJCKD_CLONES void chunk_row(double* logits, const double* bias, double* x, int64_t first_class, int64_t n,
                            int64_t label, bool smoothing, Row<double>& row) {
  chunk_row_body(logits, bias, x, first_class, n, label, smoothing, row);
}

template <typename T, typename A>
IJCKD_INLINE A dot_body(const T* a, const T* b, int64_t n) {
  return lane_sum<A>(n, [&](int64_t i) __attribute__((always_inline)) { return load(a, i) * load(b, i); });
}
IJCKD_CLONES float dot(const float* a, const float* b, int64_t n) { return dot_body<float, float>(a, b, n); }
IJCKD_CLONES float dot(const c10::BFloat16* a, const c10::BFloat16* b, int64_t n) {
  return dot_body<c10::BFloat16, float>(a, b, n);
}
IJCKD_CLONES double dot(const double* a, const double* b, int64_t n) { return dot_body<double, double>(a, b, n); }

// to = scale to + factor from
template <typename T, typename A>
IJCKD_INLINE void add_body(A* to, A scale, A factor, const T* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = scale * to[i] + factor * load(from, i);
}
IJCKD_CLONES void add(float* to, float scale, float factor, const float* from, int64_t n) {
  add_body(to, scale, factor, from, n);
}
IJCKD_CLONES void add(float* to, float scale, float factor, const c10::BFloat16* from, int64_t n) {
  add_body(to, scale, factor, from, n);
}
IJCKD_CLONES void add(double* to, double scale, double factor, const double* from, int64_t n) {
  add_body(to, scale, factor, from, n);
}

IJCKD_CLONES void round_to(c10::BFloat16* to, const float* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) store(to, i, from[i]);
}
IJCKD_CLONES void round_to(float* to, const float* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(c10::BFloat16(from[i]));
}
IJCKD_CLONES void widen_to(float* to, const c10::BFloat16* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = load(from, i);
}

// columns [n] += sum over the rows of w [rows, n], which lie Ct elements apart; n <= kColumns
template <typename T>
IJCKD_INLINE void add_rows_body(double* columns, const T* w, int64_t rows, int64_t Ct, int64_t n) {
  double sums[kColumns] = {};
  for (int64_t k = 0; k < rows; ++k)
    for (int64_t i = 0; i < n; ++i) sums[i] += load(w, k * Ct + i);
  for (int64_t i = 0; i < n; ++i) columns[i] += sums[i];
}
IJCKD_CLONES void add_rows(double* columns, const float* w, int64_t rows, int64_t Ct, int64_t n) {
  add_rows_body(columns, w, rows, Ct, n);
}
IJCKD_CLONES void add_rows(double* columns, const c10::BFloat16* w, int64_t rows, int64_t Ct, int64_t n) {
  add_rows_body(columns, w, rows, Ct, n);
}
IJCKD_CLONES void add_rows(double* columns, const double* w, int64_t rows, int64_t Ct, int64_t n) {
  add_rows_body(columns, w, rows, Ct, n);
}

// columns [Ct] += sum over the rows of w [n, Ct]
template <typename T>
void add_column_sums(const T* w, double* columns, int64_t n, int64_t Ct) {
  parallel_for((Ct + kColumns - 1) / kColumns, 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first * kColumns; c < std::min(Ct, last * kColumns); c += kColumns)
      add_rows(columns + c, w + c, n, Ct, std::min(kColumns, Ct - c));
  });
}

template <typename T, typename A>
class Chunks {
 public:
  explicit Chunks(const LossRows& loss)
      : c(loss),
        t(loss.dtype),
        acc(accumulator(t)),
        B(loss.z.size(0)),
        K(loss.terms.weight.size(0)),
        Ct(loss.z.size(1)),
        z(as(loss.z, t)),
        by_conv(by_convolution(z)),
        stored(dtype(loss.terms.weight, "classifier_loss", "weight")),
        by_pieces(stored != t || loss.rounding != t),
        match(loss.terms.weights.sr != 0),
        w(loss.terms.weight.const_data_ptr()),
        dz(static_cast<A*>(loss.dz.mutable_data_ptr())),
        bias(static_cast<const A*>(data(loss.terms.bias))),
        mix(static_cast<const A*>(data(loss.terms.mix))),
        labels(labels_of(loss.terms.labels)),
        labels_b(labels_of(loss.terms.labels_b)),
        smoothing(A(loss.terms.weights.label_smoothing)),
        rows(B) {}

  void run() {
    anchor();
    int64_t most = std::min(K, std::max(kChunk / B, kLeastClasses));
    if (by_conv) most = std::min(most, std::max(kConvWeights / Ct, kLeastClasses));
    const int64_t chunks = (K + most - 1) / most;
    // nearly equal, of whole groups of hashed rows
    const int64_t size = std::min(K, ((K + chunks - 1) / chunks + kHashedRows - 1) / kHashedRows * kHashedRows);
    const Tensor logits = empty(z, {by_conv ? 0 : B * size}, t);
    if (match) hashes.resize((K + kHashedRows - 1) / kHashedRows);
    {
      const Tensor converted = empty(z, {by_pieces ? size : 0, Ct}, t),
                   product = empty(z, {c.grad && !by_conv ? B : 0, Ct}, t);
      if (c.grad && smoothing != 0) columns.assign(Ct, 0);
      for (int64_t k = 0; k < K; k += size) chunk(k, std::min(size, K - k), converted, logits, product);
    }
    finish();
  }

 private:
  // Elements [first, first + n) of W in T.
  void convert(int64_t first, int64_t n, T* to) const {
    if constexpr (std::is_same_v<T, float>)
      if (stored == DType::bf16) return widen_to(to, static_cast<const c10::BFloat16*>(w) + first, n);
    if constexpr (!std::is_same_v<T, double>) round_to(to, static_cast<const float*>(w) + first, n);
  }

  // Row k of W in T; `scratch` is for a converted one.
  const T* weight_row(int64_t k, std::vector<T>& scratch) const {
    if (!by_pieces) return static_cast<const T*>(w) + k * Ct;
    scratch.resize(Ct);
    convert(k * Ct, Ct, scratch.data());
    return scratch.data();
  }

  // Rows [k, k + n) of W in T, and their hashes on the way: what is read from memory here lies in a cache for the
  // GEMMs.
  Tensor weight_rows(int64_t k, int64_t n, const Tensor& converted) {
    const Tensor rows = by_pieces ? rows_of(converted, 0, n) : rows_of(c.terms.weight, k, n);
    if (!by_pieces && !match) return rows;
    const T* data = static_cast<const T*>(rows.const_data_ptr());
    parallel_for((n + kHashedRows - 1) / kHashedRows, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t from = i * kHashedRows * Ct, elements = std::min(kHashedRows, n - i * kHashedRows) * Ct;
        if (by_pieces) convert(k * Ct + from, elements, static_cast<T*>(converted.mutable_data_ptr()) + from);
        if (match) hashes[k / kHashedRows + i] = content_hash(data + from, elements * int64_t(sizeof(T)));
      }
    });
    return rows;
  }

  void anchor() {
    const T* features = static_cast<const T*>(z.const_data_ptr());
    parallel_for(B, kRowGrain, [&](int64_t first, int64_t last) {
      std::vector<T> scratch;
      const auto logit = [&](int64_t b, int64_t k) {
        return dot(features + b * Ct, weight_row(k, scratch), Ct) + (bias ? bias[k] : A(0));
      };
      for (int64_t b = first; b < last; ++b) {
        Row<A>& row = rows[b];
        row.label = row.other = labels[b];
        row.label_logit = row.other_logit = logit(b, row.label);
        row.share = 1, row.share_other = 0;
        if (labels_b) {
          row.other = labels_b[b], row.other_logit = logit(b, row.other);
          row.share = mix[b], row.share_other = A(1) - mix[b];
          if (row.other_logit > row.label_logit) {
            std::swap(row.label, row.other), std::swap(row.label_logit, row.other_logit);
            std::swap(row.share, row.share_other);
          }
        }
        row.anchor = row.label_logit;
        // An infinite anchor would hide itself: every other exponential is 0, and the loss that of a perfect sample.
        if (!(row.anchor < std::numeric_limits<A>::infinity())) row.others = std::numeric_limits<A>::quiet_NaN();
        if (c.grad) std::fill_n(dz + b * Ct, Ct, A(0));
      }
    });
  }

  // Classes [k, k + n): logits, their exponentials in place, and what these add to the rows and to dz.
  void chunk(int64_t k, int64_t n, const Tensor& converted, const Tensor& buffer, const Tensor& product) {
    const Tensor w_chunk = weight_rows(k, n, converted);
    Tensor logits;
    if (by_conv) {
      logits = conv_rows(z, w_chunk);
    } else {
      logits = torch::stable::view(rows_of(buffer, 0, B * n), {B, n});
      matmul_out(z, torch::stable::transpose(w_chunk, 0, 1), logits);
    }
    T* l = static_cast<T*>(logits.mutable_data_ptr());
    parallel_for(B, kRowGrain, [&](int64_t first, int64_t last) {
      std::vector<A> x(n);
      for (int64_t b = first; b < last; ++b)
        chunk_row(l + b * n, bias ? bias + k : nullptr, x.data(), k, n, rows[b].label, smoothing != 0, rows[b]);
    });
    if (!c.grad) return;
    Tensor dz_w = product;
    if (by_conv)
      dz_w = *conv_rows_backward(logits, z, w_chunk, true, false)[0];
    else
      matmul_out(logits, w_chunk, product);
    const T* p = static_cast<const T*>(dz_w.const_data_ptr());
    parallel_for(B, kRowGrain, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) add(dz + b * Ct, rows[b].rescale, A(1), p + b * Ct, Ct);
    });
    if (smoothing != 0) add_column_sums(static_cast<const T*>(w_chunk.const_data_ptr()), columns.data(), n, Ct);
  }

  void finish() {
    const LossWeights& weights = c.terms.weights;
    const A ce_weight = A(weights.ce) / A(B), q = A(1) - smoothing;
    const A c_sr = A(2 * weights.sr / (double(B) * double(K))), c_fm = A(2 * weights.fm / (double(B) * double(Ct)));
    const A* d = static_cast<const A*>(data(c.d));
    OptTensor squares, matched;
    if (match) {
      squares = empty(z, {B}, acc), matched = empty(z, {B, Ct}, acc);
      logit_match(c, hashes, *squares, *matched);
    }
    const A* square = static_cast<const A*>(data(squares));            // [B] |W d|^2
    const A* gd = static_cast<const A*>(data(matched));                // [B, Ct] W^T W d
    const std::vector<A> weight_sums(columns.begin(), columns.end());  // [Ct]
    A* parts = static_cast<A*>(c.part_rows);
    int64_t* hits = c.top1_rows;
    parallel_for(B, kRowGrain, [&](int64_t first, int64_t last) {
      std::vector<T> scratch;
      for (int64_t b = first; b < last; ++b) {
        const Row<A>& row = rows[b];
        const A others = A(row.others), sum = others + row.label_term;
        hits[b] = row.best_class == labels[b];

        A ce = 0;
        if (weights.ce != 0) {
          ce = row.anchor == row.label_logit ? std::log1p(others) : row.anchor - row.label_logit + std::log(sum);
          if (labels_b) ce += q * row.share_other * (row.label_logit - row.other_logit);
          if (smoothing != 0) ce += smoothing * (row.label_logit - row.best + A(row.below / double(K)));
        }
        parts[kPartCe * B + b] = ce;
        parts[kPartSr * B + b] = match ? square[b] : A(0);
        for (int part = kPartKl; part < kParts; ++part) parts[part * B + b] = 0;

        if (!c.grad) continue;
        A* out = dz + b * Ct;
        if (weights.ce != 0) {
          // p_a - q_a = (1 - share of a in the target) - s / sum: a confident sample's gradient keeps its digits
          add(out, ce_weight / sum, ce_weight * ((smoothing + q * row.share_other) - others / sum),
              weight_row(row.label, scratch), Ct);
          if (labels_b) add(out, A(1), -ce_weight * q * row.share_other, weight_row(row.other, scratch), Ct);
          if (smoothing != 0) add(out, A(1), -ce_weight * smoothing / A(K), weight_sums.data(), Ct);
        } else {
          std::fill_n(out, Ct, A(0));
        }
        if (match) add(out, A(1), c_sr, gd + b * Ct, Ct);
        if (weights.fm != 0) add(out, A(1), c_fm, d + b * Ct, Ct);
      }
    });
  }

  const LossRows& c;
  const DType t, acc;
  const int64_t B, K, Ct;
  const Tensor z;        // [B, Ct] T
  const bool by_conv;    // its products
  const DType stored;    // of W
  const bool by_pieces;  // W must be converted
  const bool match;
  const void* w;            // [K, Ct]
  A* dz;                    // [B, Ct]: the exponentials' part until finish
  const A* bias;            // [K] or null
  const A* mix;             // [B] or null
  const int64_t* labels;    // [B], in [0, K)
  const int64_t* labels_b;  // [B], or null
  const A smoothing;
  std::vector<Row<A>> rows;     // [B]
  std::vector<double> columns;  // [Ct] column sums of W, for label smoothing
  std::vector<Hash> hashes;     // of W's rows, for the match
};

}  // namespace

bool in_class_chunks(const LossWeights& weights, bool by_features, DType t, int64_t B, int64_t K, int64_t Ct) {
  if (weights.both_rows()) return false;
  if (weights.sr == 0) return B * K > kWhole;
  // G d takes Ct / K of the time of W d; where G is float32 and W bfloat16, 4.4 times that (measured with AVX-512
  // BF16).
  const bool gram_pays = t == DType::bf16 ? 6 * Ct <= K : 3 * Ct <= 2 * K;
  return by_features && K * Ct >= kLeastWeight && gram_pays;
}

void chunked_loss(const LossRows& c) {
  dispatch(c.dtype, [&](auto element, auto a) { Chunks<decltype(element), decltype(a)>(c).run(); });
}

int64_t rows_at_once(int64_t B, int64_t K) {
  const int64_t most = std::max(kRowLogits / K, kLeastRows);
  const int64_t times = (B + most - 1) / most;
  return (B + times - 1) / times;
}

}  // namespace ijckd
