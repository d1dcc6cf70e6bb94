#pragma once
// connector_match without torch: pointers, sizes, a stream. Implemented twice with the same signatures, by loops in
// cpu/connector_match.cpp and by kernels in cuda/connector_match.cu; the host side (connector_match.cpp) is compiled
// against each.
//
// Names: B images, P positions (H*W), N = B*P, Ct teacher channels. T is `dtype`; A its accumulator (dtype.h).
// Every function returns 0, or a CUDA error code. The stream is a cudaStream_t; the CPU ignores it.

#include <cstdint>

#include "dtype.h"
#include "row_math.h"

namespace ijckd {

// BatchNorm (or the projection's bias) as one affine map per channel; null mean: no BatchNorm.
struct Affine {
  const void* mean;   // [Ct] A, or null
  const void* var;    // [Ct] A, biased, or null
  const void* gamma;  // [Ct] A, or null
  const void* beta;   // [Ct] A, or null
  double eps;
};

// Channel c of the map, in numbers.
template <typename A>
IJCKD_HD Channel<A> channel(const Affine& f, int64_t c) {
  const A *mean = static_cast<const A*>(f.mean), *var = static_cast<const A*>(f.var);
  const A *gamma = static_cast<const A*>(f.gamma), *beta = static_cast<const A*>(f.beta);
  return {mean ? mean[c] : A(0), var ? A(1) / A(sqrt(var[c] + A(f.eps))) : A(1), gamma ? gamma[c] : A(1),
          beta ? beta[c] : A(0)};
}

// Batch statistics are made in two steps. First y's rows are cut into parts of `rows_per_part` neighbouring rows, the
// last part with what is left (at least one row); for part i and channel c over the rows r in [i * rows_per_part,
// min(N, (i + 1) * rows_per_part)):
//   part_mean[i, c] = mean of y[r, c],   part_m2[i, c] = sum of (y[r, c] - part_mean[i, c])^2,   both summed in A.
// Then combine_stats makes mean and variance of all rows from them. What writes y may fill the parts on the way
// instead of channel_stats, with a rows_per_part of its own, from the values it stores as T (so that the statistics are
// of the map that match_forward reads); combine_stats takes any. A sum of squares minus the square of a sum is no
// substitute: it cancels.
constexpr int64_t kStatRows = 128;  // channel_stats' rows_per_part

IJCKD_HD int64_t stat_parts(int64_t N, int64_t rows_per_part) { return (N + rows_per_part - 1) / rows_per_part; }

struct ChannelStats {
  DType dtype;
  const void* y;    // [N, Ct] T
  void* part_mean;  // [stat_parts(N, kStatRows), Ct] A  out
  void* part_m2;    // [stat_parts(N, kStatRows), Ct] A  out
  int64_t N, Ct;
};
int channel_stats(const ChannelStats& s, void* stream);

// Biased mean and variance of each channel over all N rows, parts in a fixed order.
struct CombineStats {
  DType dtype;            // A
  const void* part_mean;  // [stat_parts(N, rows_per_part), Ct] A
  const void* part_m2;    // [stat_parts(N, rows_per_part), Ct] A
  void* mean;             // [Ct] A  out
  void* var;              // [Ct] A  out
  int64_t N, Ct, rows_per_part;
};
int combine_stats(const CombineStats& s, void* stream);

// BatchNorm's running statistics after a batch, whose statistics are mean and var: row_math.h:followed.
struct RunningStats {
  DType dtype;         // A
  const void* mean;    // [Ct] A
  const void* var;     // [Ct] A, biased
  void* running_mean;  // [Ct] A  in, out
  void* running_var;   // [Ct] A  in, out
  int64_t* batches;    // []  in, out: one more; or null
  int64_t Ct;
  double unbiased;  // times var is the unbiased variance
  double share;
};
int follow_stats(const RunningStats& s, void* stream);

// BatchNorm-apply, ReLU, match against the teacher's map and pooling in one pass over (y, map_t).
struct MatchForward {
  DType dtype;
  const void* y;      // [N, Ct] T
  const void* map_t;  // [N, Ct] T, or null
  Affine affine;
  void* z;         // [B, Ct] A  out: mean over P of Z
  void* count;     // [B, Ct] A  out: Pooled::count
  void* yhat;      // [B, Ct] A  out: Pooled::yhat
  void* square;    // [B, Ct] A  out, with map_t: Pooled::square
  void* res;       // [B, Ct] A  out, with map_t: Pooled::res
  void* res_yhat;  // [B, Ct] A  out, with map_t: Pooled::res_yhat
  int* arrived;    // []  out, with map_t: 0, where match_sums counts; the CPU does without
  int64_t B, P, Ct;
  bool relu;
};
int match_forward(const MatchForward& m, void* stream);

// Sums of match_forward's outputs over the images, and the match.
struct MatchSums {
  DType dtype;           // A
  const void* square;    // [B, Ct] A
  const void* res;       // [B, Ct] A
  const void* res_yhat;  // [B, Ct] A
  void* res_sum;         // [Ct] A  out
  void* res_yhat_sum;    // [Ct] A  out
  void* fm;              // [] A  out: scale times the sum of all of `square`
  double scale;
  double* shares;  // [Ct]  workspace: parts of that sum
  int* arrived;    // []  0, and no longer afterwards: how many blocks have written theirs
  int64_t B, Ct;
};
int match_sums(const MatchSums& s, void* stream);

// g = grad_z (+ 2 grad_fm (z - pooled_t) / (B Ct) with pooled match) goes to grad_out; then, with c = 2 grad_fm / (B P
// Ct), d_beta[ch] = sum_b g count / P + c res[ch];  d_gamma[ch] = sum_b g yhat / P + c res_yhat[ch].
struct ChannelGrads {
  DType dtype;
  const void* grad_z;    // [B, Ct] A
  const void* scale;     // [] A, what grad_z is multiplied by, or null: 1
  const void* grad_fm;   // [] A, with a match
  const void* z;         // [B, Ct] A, with pooled_t
  const void* pooled_t;  // [B, Ct] A, or null
  const void* count;     // [B, Ct] A, or null like yhat: the P that it is where there is no ReLU
  const void* yhat;      // [B, Ct] A, or null: no d_gamma
  const void* res;       // [Ct] A, or null without map match
  const void* res_yhat;  // [Ct] A, or null
  void* grad_out;        // [B, Ct] A  out
  void* d_gamma;         // [Ct] A  out, with yhat
  void* d_beta;          // [Ct] A  out
  int64_t B, P, Ct;
};
int channel_grads(const ChannelGrads& g, void* stream);

// dL/dy, row_math.h:position_grad.
struct MatchBackward {
  DType dtype;
  const void* y;      // [N, Ct] T
  const void* map_t;  // [N, Ct] T, or null
  Affine affine;
  const void* grad_z;   // [B, Ct] A: channel_grads' grad_out
  const void* grad_fm;  // [] A, with map_t
  const void* d_gamma;  // [Ct] A: sums over all n_stats positions; null: BatchNorm did not use the batch's statistics
  const void* d_beta;   // [Ct] A, or null
  void* dy;             // [N, Ct] T  out
  int64_t B, P, Ct;
  double n_stats;  // positions behind the batch statistics, over all ranks
  bool relu;
};
int match_backward(const MatchBackward& m, void* stream);

}  // namespace ijckd
