#pragma once
// G = W^T W of a frozen classifier, with which the logit match costs nothing that grows with the number of classes:
// |W d|^2 = d^T G d, and its gradient is 2 G d.

#include <cstdint>
#include <memory>
#include <vector>

#include "op.h"

namespace ijckd {

// The key under which G is kept is W's content, all of it, hashed again in every call, because neither a pointer nor
// anything else that the stable ABI shows says whether the values behind it have changed. What reads W hashes it on
// the way.
struct Hash {
  uint64_t a = 0, b = 0;
  bool operator==(const Hash&) const = default;
};

constexpr int64_t kHashedRows = 64;  // rows of W, the last fewer, that are hashed together

Hash content_hash(const void* data, int64_t bytes);

// G as the match reads it. A few directions in which W is much larger than in most are kept beside it: of a difference
// that avoids them, a G with them in it would leave rounding errors of their size.
//
//   G = rest + sum over i, j of sizes[i, j] u_i u_j^T,  u_i = directions[i]
struct Gram {
  Tensor rest;                     // [Ct, Ct] A
  int64_t count = 0;               // r, 0 where none stands out
  std::vector<double> directions;  // [r, Ct], orthonormal
  std::vector<double> sizes;       // [r, r]
  std::vector<double> diagonal;    // [Ct] of `rest`
  std::vector<double> squares;     // [Ct] sums of the squares of its columns
  double row_norm = 0;             // of W's rows, their geometric mean
  double fourth_powers = 0;        // sum over W's rows of |w_k|^4
  bool in_range = false;           // whether rest's numbers are finite and none of a size that matters has vanished
};

// Of weight [K, Ct], contiguous, rounded to `rounding`, for products in T; `rows` are the hashes of its rounded rows in
// T, in order. Made once per classifier and kept; those of the last kGrams classifiers are kept (Ct^2 elements each).
std::shared_ptr<const Gram> gram(const Tensor& weight, DType t, DType rounding, const std::vector<Hash>& rows);

}  // namespace ijckd
