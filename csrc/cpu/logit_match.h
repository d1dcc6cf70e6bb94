#pragma once
// The logit match |W d|^2 of the class chunks by G = W^T W (gram.h), |W d|^2 = d^T G d with gradient 2 G d, and by W
// itself for those rows of d that G would serve badly: its rounding errors are of the size of W's largest directions,
// and of a d that avoids these little else would be left.

#include "gram.h"
#include "loss_terms.h"

namespace ijckd {

// squares [B] = |W d|^2 and products [B, Ct] = W^T W d, both A, of all of r's rows; `hashes` of W as gram() takes them.
void logit_match(const LossRows& r, const std::vector<Hash>& hashes, const Tensor& squares, const Tensor& products);

}  // namespace ijckd
