#pragma once
// G = W^T W of a frozen classifier, with which the logit match costs nothing that grows with the number of classes:
// |W d|^2 = d^T G d, and its gradient is 2 G d.

#include <cstdint>
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

// G [Ct, Ct] in T's accumulator, of weight [K, Ct], contiguous, rounded to `rounding`; `rows` are the hashes of its
// rounded rows in T, in order. Made once per classifier and kept; G of the last kGrams classifiers is kept (Ct^2
// elements each).
Tensor gram(const Tensor& weight, DType t, DType rounding, const std::vector<Hash>& rows);

}  // namespace ijckd
