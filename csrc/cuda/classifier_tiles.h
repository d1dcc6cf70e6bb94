#pragma once
// classifier_loss on tensor cores (sm_80 and newer), without torch: launchers, in the order of use; each has a unit
// of its own.
//
// Two ways, both begun by anchor_rows, or by linear_tiles.h:linear_tiles where z is made too. The anchored one, for
// bfloat16: then logits_exp and grad_rows for every chunk of classes. Where the loss needs what only whole rows of
// logits can give (temperature KL, a teacher's logits) or float16's range is too small for exponentials that are not
// yet probabilities: of the first step the rounding alone, then logit_rows and times_classifier.
//
// Names: B samples, K classes, Ct teacher channels (a multiple of 8; rows of 16-byte aligned arrays). Unless said
// otherwise arrays are float. Every function returns 0 or a CUDA error code.
//
// Anchored softmax. The label's logit l_a is a dot product, known before any GEMM, so exponentials are taken relative
// to it and no tile of classes needs another:
//   e_k = exp(l_k - l_a) for k != a, else 0;   s = sum of e_k;   cross-entropy = log1p(s);
//   dCE/dz = (sum of e_k w_k - s w_a) / (1 + s).
// Of two labels `a` is the one with the larger logit, so that both lie within the sum: no part of the cross-entropy is
// below 0 then. The e_k are kept as bfloat16, whose exponent is float's, so their accuracy does not depend on the
// anchor. A row whose largest logit lies more than kSaturation nats above the label's is saturated: it is counted, its
// loss is taken from the largest logits of the tiles, and its gradient from logits computed again, which is slow.
//
// Logit match. With G = W^T W, |W d|^2 = d^T G d and its gradient is 2 G d, at a cost that does not grow with K. d and
// G are each split into two bfloat16 numbers, high + low, and three products of four are summed in float.

#include <cstdint>

#include "classifier_loss.h"
#include "dtype.h"

namespace ijckd {

constexpr float kSaturation = 76;  // nats: exp(76) times 2^17 classes is still a float

// Sums over each row's channels, taken in `parts` of them: the sum over the parts, in their order, is the row's.
struct RowParts {
  float* anchor;   // [parts, B], or null: the label's logit of the rounded z; NaN where a label lies outside [0, K)
  float* logit_b;  // [parts, B], with anchor: labels_b's logit
  float* fm;       // [parts, B], or null: d^2
  float* pooled;   // [parts, B], or null: pooled_t^2
  int parts;
};

// What each row needs before the GEMMs.
struct Anchors {
  const void* weight;       // [K, Ct] T
  const float* bias;        // [K], or null
  const int64_t* labels;    // [B]; may be null without rows.anchor
  const int64_t* labels_b;  // [B], or null
  void* z_t;                // [B, Ct] T  out: z rounded
  void* d_t;                // [B, Ct] T  out, or null: d = z - pooled_t, formed in float, rounded
  void* pooled;             // [B, Ct] T  out, or null: pooled_t rounded
  void* d_split;            // [2, B, Ct] bfloat16  out, or null: d's high and low parts
  RowParts rows;            // out
  int64_t* counts;          // [kCounts] in and out, with rows.anchor: counts.h
  int64_t K;
};

// In one part.
struct AnchorRows {
  DType dtype;            // T: bfloat16 or float16
  const float* z;         // [B, Ct]
  const float* pooled_t;  // [B, Ct], or null
  Anchors anchors;
  int64_t B, Ct;
};
int anchor_rows(const AnchorRows& a, void* stream);

// What the batch comes to. Some blocks of the last launch take a share of the rows each, in doubles; the last of them
// to finish adds the shares in the blocks' order. The launch before it sets `arrived` to 0.
constexpr int kLossBlocks = 4, kLossShares = kLossBlocks * (kParts + 1);
struct Losses {
  float* loss;                 // []  out
  float* parts;                // [kParts]  out
  int64_t* top1;               // []  out
  unsigned long long* shares;  // [kLossShares]  scratch: doubles' bits; [kLossBlocks, kParts + 1]
  int* arrived;                // []  out of logits_exp and logit_rows, in and out of the last launch: blocks done
};

// Per tile of classes (of G's columns) and row, written by logits_exp and summed in tile order by grad_rows: [tiles, B]
// each.
struct TileSums {
  float* others;    // sum of e_k
  float* logits;    // sum of l_k - l_a; null without label smoothing
  float* best;      // largest l_k
  int* best_class;  // and its class, the first on a tie
  float* square;    // [gram tiles, B]: d . (G d); null without logit match
  int class_tiles;  // of all classes
  int gram_tiles;
};

// Classes (columns of G) in a tile of logits_exp.
int class_tile(int stage, int64_t B, int64_t classes);

// Classes [first_class, first_class + classes): their e_k, and the tiles' sums. With gram, G d too.
struct LogitsExp {
  int stage;           // 1 or 2: stage.h
  const void* z_t;     // [B, Ct] bfloat16
  const void* weight;  // [K, Ct] bfloat16
  const float* bias;   // [K], or null
  RowParts rows;
  const int64_t *labels, *labels_b;  // [B], [B] or null
  void* e;                           // [B, stride_e] bfloat16  out, or null: not needed; columns past the classes are 0
  int64_t stride_e;                  // classes rounded up to a multiple of 8
  TileSums sums;                     // out
  int first_tile;                    // of these classes among all tiles
  const void* gram;     // [2, Ct, Ct] bfloat16: G's high and low parts; null: no logit match, or not in this call
  const void* d_split;  // [2, B, Ct] bfloat16, with gram
  const float* z;       // [B, Ct], with gram
  const float* pooled_t;
  float* gram_d;  // [B, Ct]  out, with gram: G d
  int* arrived;   // []  out: 0, of Losses
  int64_t B, Ct, first_class, classes;
};
int logits_exp(const LogitsExp& l, void* stream);

// dz += e W over some classes; with the last of them dz becomes dloss/dz, and the losses are written.
struct GradRows {
  int stage;           // 1 or 2; with label smoothing 1 serves both
  const void* e;       // [B, stride_e] bfloat16
  const void* weight;  // [K, Ct] bfloat16
  int64_t stride_e, first_class, classes;
  bool first, last;
  bool grad;                    // false: the losses only
  float* dz;                    // [B, Ct]  in, out
  void* dz_t;                   // [B, Ct] bfloat16  out with the last classes, or null: dz rounded
  const float* weight_sums_in;  // [Ct], or null with the first classes: columns' sums of W so far, for label smoothing
  float* weight_sums_out;       // [Ct]  out: these classes included; null with the last, or without smoothing or grad
  // read with the last classes:
  TileSums sums;
  const void* z_t;    // [B, Ct] bfloat16
  const float* bias;  // [K], or null
  RowParts rows;
  const int64_t *labels, *labels_b;  // [B], [B] or null
  const float* mix;                  // [B], with labels_b
  const float *z, *pooled_t;         // [B, Ct], for the feature match
  const float* gram_d;               // [B, Ct], or null without logit match
  Losses losses;
  int64_t* counts;  // [kCounts] in and out: counts.h
  int64_t B, K, Ct;
  LossWeights weights;
};
int grad_rows(const GradRows& g, void* stream);

// Whole rows of logits, in float, and classifier_loss.h:row_loss of them with the gradient kept apart in T. One launch,
// whose blocks wait for one another between the two.
struct LogitRows {
  int stage;           // 1 or 2
  DType dtype;         // T: bfloat16 or float16
  const void* stack;   // [B, Ct] T: z; with rows.delta [2, B, Ct]: d too; with squares.pooled [3, B, Ct]: and pooled_t
  const void* weight;  // [K, Ct] T
  RowLoss rows;  // float; logits [B, K], and with it delta, which follows, are out, and no gradient takes their place
  RowParts squares;  // fm and pooled say which rows are far (row_math.h): delta is W pooled_t there. pooled null: none
  void* gradient;    // [B, stride] T  out, with rows.grad; columns past K are 0
  int* arrived;      // []  out: 0, of Losses
  int64_t Ct, stride;  // stride: K rounded up to a multiple of 8
};
int logit_rows(const LogitRows& l, void* stream);

// Its products by themselves, where another pass follows.
struct LogitProducts {
  int stage;           // 1 or 2
  DType dtype;         // T: bfloat16 or float16
  const void* stack;   // [3, B, Ct] T: z, d, pooled_t
  const void* weight;  // [K, Ct] T
  float* logits;       // [2, B, K]  out: of z, and beneath them W d, or W pooled_t
  RowParts squares;    // fm and pooled say of which rows
  int64_t B, K, Ct;
};
int logit_products(const LogitProducts& l, void* stream);

// dz = (gradient W + 2 fm (z - pooled_t) / Ct) / batch, and the losses as classifier_loss.h:loss_sum has them.
struct TimesClassifier {
  int stage;               // 1 or 2
  DType dtype;             // T
  bool grad;               // false: the losses only
  const void* gradient;    // [B, stride] T
  const void* weight;      // [K, Ct] T
  const float* z;          // [B, Ct]
  const float* pooled_t;   // [B, Ct], or null where weights.fm is 0
  float* dz;               // [B, Ct]  out
  void* dz_t;              // [B, Ct] T  out, or null: dz rounded, which may be too small for float16
  const float* part_rows;  // [kParts, B]: logit_rows'; of kPartFm rows.fm instead
  RowParts rows;
  const int64_t* top1_rows;  // [B]
  Losses losses;             // loss null: none are taken, nor what they are made of read
  int64_t B, K, Ct, stride;
  int64_t batch;  // rows over which dz is a mean; with losses B
  LossWeights weights;
};
int times_classifier(const TimesClassifier& t, void* stream);

}  // namespace ijckd
