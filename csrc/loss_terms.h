#pragma once
// What classifier_loss computes on its features: one description, from the op's arguments down to the passes.

#include <vector>

#include "classifier_loss.h"
#include "op.h"

namespace ijckd {

// What the loss reads and never trains, and its numbers. ijckd_fast/head/classifier.py:LossTerms is the same in
// Python.
struct LossTerms {
  Tensor weight;       // [K, Ct]
  OptTensor bias;      // [K]
  Tensor labels;       // [B] int64
  OptTensor labels_b;  // [B] int64, with
  OptTensor mix;       // [B]: share of `labels` in the target
  OptTensor pooled_t;  // [B, Ct]
  OptTensor logits_t;  // [B, K], any floating dtype: the teacher's, also where pooled_t is given, which then serves fm
  OptTensor gram;      // [2, Ct, Ct] bfloat16, classifier_gram of this weight; read on a GPU only
  LossWeights weights;

  // From the two lists of the schema, in the order in which Python packs them; both may end before the last, with
  // nothing and 0 for the others.
  static LossTerms from(const char* op, const std::vector<OptTensor>& tensors, const std::vector<double>& numbers) {
    check(tensors.size() <= 8 && numbers.size() <= 13, op, ": the loss must be at most 8 tensors and 13 numbers, got ",
          tensors.size(), " and ", numbers.size());
    check(tensors.size() > 2 && tensors[0] && tensors[2], op, ": weight and labels must be given");
    const auto given = [&](size_t i) { return i < tensors.size() ? tensors[i] : OptTensor(); };
    const auto number = [&](size_t i) { return i < numbers.size() ? numbers[i] : 0; };
    return {*tensors[0],
            tensors[1],
            *tensors[2],
            given(3),
            given(4),
            given(5),
            given(6),
            given(7),
            {number(0), number(1), number(2), number(3), number(4), number(5), number(6), number(7), number(8),
             number(9), number(10), number(11), number(12)}};
  }

  bool match() const { return weights.sr != 0 || weights.both_rows(); }  // whether it needs the teacher's logits
};

inline const int64_t* labels_of(const OptTensor& t) { return t ? t->const_data_ptr<int64_t>() : nullptr; }

// Rows of the batch for the passes around library products, and where their results go. T is the products' type, A its
// accumulator.
struct LossRows {
  DType dtype;      // T
  DType rounding;   // what the classifier is rounded to before it becomes T: T, or bfloat16 where T is float32
  Tensor z;         // [B, Ct] A
  LossTerms terms;  // bias and mix in A, labels contiguous; weight in T, or as classifier_loss.cpp:classifier leaves it
  OptTensor d;      // [B, Ct] A: z - pooled_t
  void* part_rows;  // [kParts, B] A  out
  int64_t* top1_rows;  // [B]  out
  Tensor dz;           // [B, Ct] A  out: dloss/dz if `grad`
  bool grad;
  int64_t batch;  // samples over which the loss is a mean
};

}  // namespace ijckd
