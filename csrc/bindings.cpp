// The table of contents: the schema of every op. Implementations register themselves beside their code, for the CPU in
// _C and for CUDA in _C_cuda; contracts and gradients are in ijckd_fast/head/, those of the block ops in
// ijckd_fast/data/blocks/. All ops but follow_statistics, take_counts and those that make views of blocks are
// functional.
//
// u and the maps come as rows: [B, P, C] with P = H*W positions, channels last.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(ijckd, m) {
  // Projection, BatchNorm (batch statistics unless mean and var are given), ReLU, match, pooling. What backward alone
  // reads is empty of a linear connector: y, count, yhat with one position, no BatchNorm, no ReLU and no map_t. The
  // weight may be float32 where u is a half type: weight_t is what it becomes, else empty.
  m.def(
      "connector_match(Tensor u, Tensor weight, Tensor? bias, Tensor? bn_weight, Tensor? bn_bias, Tensor? mean, "
      "Tensor? var, Tensor? map_t, Tensor? pooled_t, bool relu, float eps) -> "
      "(Tensor z, Tensor fm, Tensor mean, Tensor var, Tensor y, Tensor count, Tensor yhat, Tensor res, "
      "Tensor res_yhat, Tensor weight_t)");
  // The same in two steps, with the all-reduce of SyncBN between them.
  m.def("connector_project(Tensor u, Tensor weight) -> (Tensor y, Tensor mean, Tensor var)");
  m.def(
      "connector_apply(Tensor y, Tensor? bias, Tensor? bn_weight, Tensor? bn_bias, Tensor? mean, Tensor? var, "
      "Tensor? map_t, Tensor? pooled_t, bool relu, float eps) -> "
      "(Tensor z, Tensor fm, Tensor count, Tensor yhat, Tensor res, Tensor res_yhat)");
  // BatchNorm's running statistics after a batch of these statistics, var biased: a share of the way to mean and to
  // var times unbiased. One batch more.
  m.def(
      "follow_statistics(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!)? batches, Tensor mean, Tensor "
      "var, "
      "float unbiased, float share) -> ()");
  // Backward, in two steps for the same reason: the channel sums, then all that needs them. grad_fm with a match.
  m.def(
      "connector_channel_grads(Tensor grad_z, Tensor? grad_fm, Tensor z, Tensor? pooled_t, Tensor count, Tensor yhat, "
      "Tensor res, Tensor res_yhat, int positions, bool match_map) -> (Tensor grad_z, Tensor d_gamma, Tensor d_beta)");
  m.def(
      "connector_input_grads(Tensor grad_z, Tensor? grad_fm, Tensor? d_gamma, Tensor? d_beta, float n_stats, Tensor u, "
      "Tensor weight, Tensor y, Tensor? bias, Tensor? bn_weight, Tensor? bn_bias, Tensor? mean, Tensor? var, "
      "Tensor? map_t, bool relu, float eps, bool need_du, bool need_dweight, bool wide=False) -> "
      "(Tensor du, Tensor dweight)");
  // Both where nothing comes between them; batch_stats: whether mean and var are those of this batch.
  m.def(
      "connector_map_grads(Tensor grad_z, Tensor? grad_fm, Tensor z, Tensor? pooled_t, Tensor count, Tensor yhat, "
      "Tensor res, Tensor res_yhat, Tensor u, Tensor weight, Tensor y, Tensor? bias, Tensor? bn_weight, Tensor? "
      "bn_bias, Tensor? mean, Tensor? var, Tensor? map_t, bool batch_stats, bool relu, float eps, bool need_du, "
      "bool need_dweight, bool wide) -> (Tensor du, Tensor dweight, Tensor d_gamma, Tensor d_beta)");
  // All of backward for a linear connector, u [B, Cs] or [B, 1, Cs]; grad_fm and z with pooled_t. grad_z is what it
  // says times scale []; rounded, without pooled_t, is grad_z in bfloat16. dweight in the accumulator's type if `wide`.
  m.def(
      "connector_linear_grads(Tensor grad_z, Tensor? scale, Tensor? grad_fm, Tensor? z, Tensor? pooled_t, Tensor u, "
      "Tensor weight, bool need_du, bool need_dweight, bool need_dbias, Tensor? rounded=None, bool wide=False) -> "
      "(Tensor du, Tensor dweight, Tensor dbias)");

  // Classifier logits and every loss on them. `tensors` and `numbers` are the loss, in the order of loss_terms.h and of
  // ijckd_fast/head/classifier.py:LossTerms. dz is dloss/dz, made in the forward pass if `grad`. The matrix products
  // are in `dtype`, or in the weight's own without it.
  m.def(
      "classifier_loss(Tensor z, Tensor?[] tensors, float[] numbers, bool grad, ScalarType? dtype) -> "
      "(Tensor loss, Tensor parts, Tensor top1, Tensor dz)");

  // The same of z = u projection^T + projection_bias, u [B, Cs] or [B, 1, Cs]: a linear connector on vectors. With
  // `dtype` the projection may be float32 where u is not. For backward, if `grad`: dz_t is dz in bfloat16 where u is
  // and on a GPU (else empty), projection_t the projection in u's dtype where it was another (else empty).
  m.def(
      "projected_classifier_loss(Tensor u, Tensor projection, Tensor? projection_bias, Tensor?[] tensors, float[] "
      "numbers, bool grad, ScalarType? dtype) -> "
      "(Tensor loss, Tensor parts, Tensor top1, Tensor dz, Tensor dz_t, Tensor projection_t)");

  // The classifier at positions of maps, and losses on what it says there: KL, DKD, class maps. maps and maps_t are
  // [B, Ct, H, W] with means and means_t [P, H*W] of their positions, or without these pooled already, x [B, P, Ct].
  // numbers: those of class_map_loss.h:ClassMapWeights. dx [B, P, Ct] is dloss/dx, made in the forward pass if `grad`.
  m.def(
      "class_map_loss(Tensor maps, Tensor weight, Tensor? bias, Tensor maps_t, Tensor? labels, Tensor? share, Tensor? "
      "means, Tensor? means_t, int[] scales, float[] numbers, bool grad, ScalarType? dtype) -> (Tensor loss, Tensor "
      "parts, Tensor dx)");

  // The highest stage of CUDA kernels that may run from here on; returns the one before. For tests and benchmarks.
  m.def("limit_stage(int most) -> int");
  // What the driver of like's GPU refuses (cuda/launches.h), as bits; on a GPU alone.
  m.def("refused_launches(Tensor like) -> int");
  // The counters of counts.h on the device of `like`, [2] int64, which begin again at 0. Zeros on the CPU.
  m.def("take_counts(Tensor like) -> Tensor");

  // Images in blocks (blocks.h), which have no gradient. rgb [h, w, 3] uint8 to its bytes and those to its three
  // planes.
  m.def("block_encode(Tensor rgb, int luma_bits, int chroma_bits) -> Tensor");
  m.def("block_planes(Tensor data, int h, int w, int luma_bits, int chroma_bits) -> (Tensor y, Tensor cb, Tensor cr)");
  m.def("block_checksum(Tensor data) -> int");
  // rows [B, kViewColumns] of images in the files' bytes to out [B, S, S, 3]; status [B], 1 where a checksum is
  // another.
  m.def(
      "block_views(Tensor[] files, Tensor rows, int luma_bits, int chroma_bits, float[] shift, float[] scale, "
      "Tensor(a!) out) -> Tensor status");
  // The same status without views, where rows fit views of this side.
  m.def("block_check(Tensor[] files, Tensor rows, int luma_bits, int chroma_bits, int side) -> Tensor status");
  // Views made on a GPU, of files [n, 2] int64, addresses and bytes. Checksums are not compared: status [B] is 1 where
  // a row does not fit.
  m.def(
      "block_views_at(Tensor files, Tensor rows, int luma_bits, int chroma_bits, float[] shift, float[] scale, "
      "Tensor(a!) out) -> Tensor status");
  // The same with vectors of at most `lanes` (8, 16 or 32) lanes of 16 bits; ticks [kViewStages] int64: what each stage
  // (block_codec.h) took, in units of the processor's clock, zeros without `clock`. For tests and
  // benchmarks.
  m.def(
      "block_view_ticks(Tensor[] files, Tensor rows, int luma_bits, int chroma_bits, float[] shift, float[] scale, "
      "Tensor(a!) out, int lanes, bool clock) -> Tensor ticks");
}
