#pragma once
// G = W^T W of a frozen classifier, with which the logit match costs nothing that grows with the number of classes:
// |W d|^2 = d^T G d, and its gradient is 2 G d.

#include "op.h"

namespace ijckd {

// G [Ct, Ct] in the accumulator's type, of weight [K, Ct], contiguous. Made once per classifier and kept: the key is the weight's
// content, all of it, hashed anew in every call, because neither a pointer nor anything else that the stable ABI shows says
// whether the values behind it have changed. G of the last kGrams classifiers is kept (Ct^2 elements each).
Tensor gram(const Tensor& weight);

}  // namespace ijckd
