// Host side of connector_match: checks, allocation, library GEMMs around the passes of connector_match.h. A batch may
// be empty, as in torch: passes over its images are left out, and what sums over them is 0.
#include "connector_match.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <tuple>
#include <utility>

#include "connector_products.h"
#include "op.h"
#include "projection.h"
#include "rows.h"
#include "workspace.h"

#ifdef IJCKD_CUDA
#include "cuda/connector_tiles.h"
#include "cuda/linear_tiles.h"
#include "cuda/product_grads.h"
#include "cuda/stage.h"
#else
#include "cpu/linear.h"
#include "cpu/products.h"
#endif

namespace ijckd {
namespace {

constexpr const char* kOp = kConnectorOp;

// The affine map's tensors in the accumulator type; keeps them alive while pointers to them are in use.
struct AffineTensors {
  OptTensor mean, var, gamma, beta;  // [Ct] A

  Affine pointers(double eps) const { return {data(mean), data(var), data(gamma), data(beta), eps}; }
};

AffineTensors affine(const OptTensor& bias, const OptTensor& bn_weight, const OptTensor& bn_bias, const OptTensor& mean,
                     const OptTensor& var, DType acc) {
  for (const auto& [x, arg] : {std::pair{&bias, "bias"},
                               {&bn_weight, "bn_weight"},
                               {&bn_bias, "bn_bias"},
                               {&mean, "running_mean"},
                               {&var, "running_var"}})
    check_device(*x, kOp, arg), check_floating(*x, kOp, arg);
  return {as(mean, acc), as(var, acc), as(bn_weight, acc), as(bn_weight ? bn_bias : bias, acc)};
}

struct Projected {
  Tensor y, mean, var;  // [B, P, Ct] T, [Ct] A, [Ct] A (statistics empty unless asked for)
};

Projected project(const Tensor& u, const Tensor& weight, bool statistics) {
  check_projection(u, weight, kOp, "weight");
  const DType t = dtype(u, kOp, "u"), acc = accumulator(t);
  const int64_t B = u.size(0), P = u.size(1), Ct = weight.size(0), Cs = u.size(2), N = B * P;
  const Tensor rows = strided(dense(u), {N, Cs}, {Cs, 1});
  Projected out{none(u, t), none(u, acc), none(u, acc)};
  int64_t rows_per_part = kStatRows;
  bool parts_done = false;
  Workspace memory;
  uint8_t *part_mean = nullptr, *part_m2 = nullptr;  // [parts, Ct] A
  const auto make_parts = [&] {
    const int64_t each = stat_parts(N, rows_per_part) * Ct;
    const auto mean = memory.part(each, acc), m2 = memory.part(each, acc);
    memory.allocate(u);
    part_mean = memory[mean], part_m2 = memory[m2];
  };
  Launch launch(u);
#ifdef IJCKD_CUDA
  const Tensor w = dense(weight);
  const int stage = B > 0 ? tile_stage(rows, w, launch) : 0;
  if (stage > 0) {
    out.y = empty(u, {B, P, Ct}, t);
    rows_per_part = project_rows(stage, N, Ct);
    if (statistics) make_parts();
    launched(project_tiles({.stage = stage,
                            .dtype = t,
                            .u = rows.const_data_ptr(),
                            .weight = w.const_data_ptr(),
                            .y = out.y.mutable_data_ptr(),
                            .mean = reinterpret_cast<float*>(part_mean),
                            .m2 = reinterpret_cast<float*>(part_m2),
                            .N = N,
                            .Cs = Cs,
                            .Ct = Ct},
                           launch.stream),
             "connector_match's projection");
    parts_done = true;
  }
#endif
  if (!parts_done) {
    out.y = strided(times_weight(rows, weight), {B, P, Ct}, {P * Ct, Ct, 1});
    if (statistics && B > 0) {
      make_parts();
      launched(channel_stats({t, out.y.const_data_ptr(), part_mean, part_m2, N, Ct}, launch.stream),
               "connector_match's channel statistics");
    }
  }
  if (statistics) {
    out.mean = empty(u, {Ct}, acc);
    out.var = empty(u, {Ct}, acc);
    if (B == 0) {
      torch::stable::zero_(out.mean);
      torch::stable::zero_(out.var);
      return out;
    }
    launched(combine_stats({acc, part_mean, part_m2, out.mean.mutable_data_ptr(), out.var.mutable_data_ptr(), N, Ct,
                            rows_per_part},
                           launch.stream),
             "connector_match's channel statistics");
  }
  return out;
}

struct Applied {
  Tensor z, fm, count, yhat, res, res_yhat;  // [B, Ct], [], [B, Ct], [B, Ct], [Ct], [Ct], all A
};

// Everything that Z, a map [B, P, Ct] made of u, meets.
void check_match(const Tensor& u, int64_t Ct, const AffineTensors& a, const OptTensor& map_t, const OptTensor& pooled_t,
                 double eps) {
  const int64_t B = u.size(0), P = u.size(1);
  check(std::isfinite(eps) && eps >= 0, kOp, ": eps must be finite and not negative, got ", eps);
  check(!(map_t && pooled_t), kOp, ": give map_t or pooled_t, not both");
  check_shape(map_t, {B, P, Ct}, kOp, "map_t", "the teacher's map of Z's size, as rows [B, P, Ct]");
  check_shape(pooled_t, {B, Ct}, kOp, "pooled_t", "[B, Ct]");
  for (const auto& [p, arg] : {std::pair{&a.mean, "running_mean"},
                               {&a.var, "running_var"},
                               {&a.gamma, "bn_weight"},
                               {&a.beta, a.gamma ? "bn_bias" : "bias"}})
    check_shape(*p, {Ct}, kOp, arg, "[Ct]");
  check_device(map_t, kOp, "map_t");
  check_device(pooled_t, kOp, "pooled_t");
  check_floating(pooled_t, kOp, "pooled_t");
  check(!map_t || map_t->scalar_type() == u.scalar_type(), kOp, ": map_t must have u's dtype ", name(u.scalar_type()),
        ", got ", map_t ? name(map_t->scalar_type()) : "");
}

Applied apply(const Tensor& y, const AffineTensors& a, const OptTensor& map_t, const OptTensor& pooled_t, bool relu,
              double eps) {
  const DType t = dtype(y, kOp, "y"), acc = accumulator(t);
  const int64_t B = y.size(0), P = y.size(1), Ct = y.size(2);
  check_match(y, Ct, a, map_t, pooled_t, eps);
  const OptTensor target = as(map_t, t);
  Applied out{empty(y, {B, Ct}, acc), empty(y, {}, acc), empty(y, {B, Ct}, acc),
              empty(y, {B, Ct}, acc), none(y, acc),      none(y, acc)};
  Workspace memory;
  const int64_t matched = map_t ? B * Ct : 0;
  const auto square_part = memory.part(matched, acc), res_part = memory.part(matched, acc),
             res_yhat_part = memory.part(matched, acc);
  const auto shares_part = memory.part<double>(map_t ? Ct : 0);  // match_sums' shares and its count
  const auto arrived_part = memory.part<int>(map_t ? 1 : 0);
  memory.allocate(y);
  if (map_t && B == 0) memory.zero();
  void *const square = memory[square_part], *const res = memory[res_part], *const res_yhat = memory[res_yhat_part];
  double* const shares = memory[shares_part];
  int* const arrived = memory[arrived_part];
  Launch launch(y);
  if (B > 0)
    launched(match_forward({t, y.const_data_ptr(), data(target), a.pointers(eps), out.z.mutable_data_ptr(),
                            out.count.mutable_data_ptr(), out.yhat.mutable_data_ptr(), square, res, res_yhat, arrived,
                            B, P, Ct, relu},
                           launch.stream),
             "connector_match's forward pass");
  if (map_t) {
    out.res = empty(y, {Ct}, acc);
    out.res_yhat = empty(y, {Ct}, acc);
    launched(match_sums({.dtype = acc,
                         .square = square,
                         .res = res,
                         .res_yhat = res_yhat,
                         .res_sum = out.res.mutable_data_ptr(),
                         .res_yhat_sum = out.res_yhat.mutable_data_ptr(),
                         .fm = out.fm.mutable_data_ptr(),
                         .scale = 1 / (double(B) * double(P) * double(Ct)),
                         .shares = shares,
                         .arrived = arrived,
                         .B = B,
                         .Ct = Ct},
                        launch.stream),
             "connector_match's sums");
  } else if (pooled_t) {
    const Tensor target_z = as(*pooled_t, acc), d = empty(y, {B, Ct}, acc), rows = empty(y, {B}, acc);
    if (B > 0)
      launched(feature_diff({acc, out.z.const_data_ptr(), target_z.const_data_ptr(), d.mutable_data_ptr(),
                             rows.mutable_data_ptr(), B, Ct},
                            launch.stream),
               "connector_match's pooled match");
    launched(column_sum({acc, rows.const_data_ptr(), out.fm.mutable_data_ptr(), B, 1, 1 / (double(B) * double(Ct))},
                        launch.stream),
             "connector_match's feature loss");
  } else {
    torch::stable::zero_(out.fm);
  }
  return out;
}

// A linear connector on vectors: its gradients need none of what the others keep for backward. connector.py:_is_linear
// is the same.
bool is_linear(const Tensor& u, const OptTensor& bn_weight, const OptTensor& map_t, bool relu) {
  return u.size(1) == 1 && !bn_weight && !map_t && !relu;
}

// Its z [B, Ct] and fm [], both A.
std::pair<Tensor, Tensor> linear_match(const Projection& p, const OptTensor& pooled_t) {
#ifdef IJCKD_CUDA
  const int64_t B = p.u.size(0), Cs = p.u.size(2), Ct = p.weight.size(0);
  Launch launch(p.u);
  if (const int stage = linear_stage(p, {pooled_t}, launch)) {
    const Tensor rows = dense(p.u), w = dense(p.weight);
    const OptTensor target = as(pooled_t, DType::f32);
    const Tensor z = empty(p.u, {B, Ct}, DType::f32), fm = empty(p.u, {}, DType::f32);
    OptTensor squares;
    if (target) squares = empty(p.u, {linear_blocks(stage, B, Ct)}, DType::f32);
    launched(linear_tiles({.stage = stage,
                           .dtype = dtype(p.u, kOp, "u"),
                           .u = rows.const_data_ptr(),
                           .weight = w.const_data_ptr(),
                           .bias = static_cast<const float*>(data(p.bias)),
                           .pooled_t = static_cast<const float*>(data(target)),
                           .z = z.mutable_data_ptr<float>(),
                           .squares = squares ? squares->mutable_data_ptr<float>() : nullptr,
                           .fm = fm.mutable_data_ptr<float>(),
                           .anchors = {},
                           .B = B,
                           .Cs = Cs,
                           .Ct = Ct},
                          launch.stream),
             "connector_match's projection");
    if (target)
      launched(column_sum({DType::f32, data(squares), fm.mutable_data_ptr(), squares->size(0), 1,
                           1 / (double(B) * double(Ct))},
                          launch.stream),
               "connector_match's feature loss");
    return {z, fm};
  }
#endif
  AffineTensors a;
  a.beta = p.bias;
  const Applied o = apply(project(p.u, p.weight, false).y, a, {}, pooled_t, false, 0);
  return {o.z, o.fm};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> connector_match(
    const Tensor& u, const Tensor& given_weight, const OptTensor& bias, const OptTensor& bn_weight,
    const OptTensor& bn_bias, const OptTensor& mean, const OptTensor& var, const OptTensor& map_t,
    const OptTensor& pooled_t, bool relu, double eps) {
  const DType t = dtype(u, kOp, "u"), acc = accumulator(t);
  const bool cast = given_weight.scalar_type() == ScalarType::Float && acc == DType::f32 && t != DType::f32;
  const Tensor weight = cast ? as(given_weight, t) : given_weight, kept = cast ? weight : none(u, t);
  check_projection(u, weight, kOp, "weight");
  if (is_linear(u, bn_weight, map_t, relu)) {
    const AffineTensors a = affine(bias, {}, {}, {}, {}, acc);
    check_match(u, weight.size(0), a, {}, pooled_t, eps);
    const auto [z, fm] = linear_match({u, weight, a.beta}, pooled_t);
    const auto unused = [&] { return none(u, acc); };
    return {z, fm, unused(), unused(), none(u, t), unused(), unused(), unused(), unused(), kept};
  }
  const bool batch_stats = bn_weight && !mean;
  const Projected p = project(u, weight, batch_stats);
  const AffineTensors a = affine(bias, bn_weight, bn_bias, batch_stats ? OptTensor(p.mean) : mean,
                                 batch_stats ? OptTensor(p.var) : var, acc);
  const Applied o = apply(p.y, a, map_t, pooled_t, relu, eps);
  return {o.z, o.fm, p.mean, p.var, p.y, o.count, o.yhat, o.res, o.res_yhat, kept};
}

std::tuple<Tensor, Tensor, Tensor> connector_project(const Tensor& u, const Tensor& weight) {
  const Projected p = project(u, weight, true);
  return {p.y, p.mean, p.var};
}

void follow_statistics(const Tensor& running_mean, const Tensor& running_var, const OptTensor& batches,
                       const Tensor& mean, const Tensor& var, double unbiased, double share) {
  const DType acc = dtype(mean, kOp, "mean");
  for (const Tensor* x : {&running_mean, &running_var, &var})
    check(x->scalar_type() == mean.scalar_type() && x->is_contiguous() && x->numel() == mean.numel(), kOp,
          ": the statistics must be contiguous, of one dtype and of as many channels");
  Launch launch(mean);
  launched(follow_stats({.dtype = acc,
                         .mean = mean.const_data_ptr(),
                         .var = var.const_data_ptr(),
                         .running_mean = running_mean.mutable_data_ptr(),
                         .running_var = running_var.mutable_data_ptr(),
                         .batches = batches ? batches->mutable_data_ptr<int64_t>() : nullptr,
                         .Ct = mean.numel(),
                         .unbiased = unbiased,
                         .share = share},
                        launch.stream),
           "connector_match's running statistics");
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> connector_apply(
    const Tensor& y, const OptTensor& bias, const OptTensor& bn_weight, const OptTensor& bn_bias, const OptTensor& mean,
    const OptTensor& var, const OptTensor& map_t, const OptTensor& pooled_t, bool relu, double eps) {
  const AffineTensors a = affine(bias, bn_weight, bn_bias, mean, var, accumulator(dtype(y, kOp, "y")));
  const Applied o = apply(dense(y), a, map_t, pooled_t, relu, eps);
  return {o.z, o.fm, o.count, o.yhat, o.res, o.res_yhat};
}

std::tuple<Tensor, Tensor, Tensor> connector_channel_grads(const Tensor& grad_z, const OptTensor& grad_fm,
                                                           const Tensor& z, const OptTensor& pooled_t,
                                                           const Tensor& count, const Tensor& yhat, const Tensor& res,
                                                           const Tensor& res_yhat, int64_t positions, bool match_map) {
  const DType acc = dtype(z, kOp, "z");
  const int64_t B = z.size(0), Ct = z.size(1);
  check_shape(grad_z, {B, Ct}, kOp, "the gradient of z", "[B, Ct]");
  const Tensor g_in = as(grad_z, acc);
  const OptTensor fm_in = as(grad_fm, acc), target = as(pooled_t, acc);
  Tensor g = empty(z, {B, Ct}, acc), d_gamma = empty(z, {Ct}, acc), d_beta = empty(z, {Ct}, acc);
  if (B == 0) return {g, torch::stable::zero_(d_gamma), torch::stable::zero_(d_beta)};
  Launch launch(z);
  launched(channel_grads({acc, g_in.const_data_ptr(), nullptr, data(fm_in), z.const_data_ptr(), data(target),
                          count.const_data_ptr(), yhat.const_data_ptr(), match_map ? res.const_data_ptr() : nullptr,
                          match_map ? res_yhat.const_data_ptr() : nullptr, g.mutable_data_ptr(),
                          d_gamma.mutable_data_ptr(), d_beta.mutable_data_ptr(), B, positions, Ct},
                         launch.stream),
           "connector_match's channel gradients");
  return {g, d_gamma, d_beta};
}

std::tuple<Tensor, Tensor> connector_input_grads(const Tensor& grad_z, const OptTensor& grad_fm,
                                                 const OptTensor& d_gamma, const OptTensor& d_beta, double n_stats,
                                                 const Tensor& u, const Tensor& weight, const Tensor& y,
                                                 const OptTensor& bias, const OptTensor& bn_weight,
                                                 const OptTensor& bn_bias, const OptTensor& mean, const OptTensor& var,
                                                 const OptTensor& map_t, bool relu, double eps, bool need_du,
                                                 bool need_dweight, bool wide) {
  const DType t = dtype(y, kOp, "y"), acc = accumulator(t);
  const int64_t B = y.size(0), P = y.size(1), Ct = y.size(2), N = B * P;
  const AffineTensors a = affine(bias, bn_weight, bn_bias, mean, var, acc);
  const OptTensor target = as(map_t, t), fm = as(grad_fm, acc);
  const Tensor g = as(grad_z, acc), dy = empty(y, {N, Ct}, t);
  Launch launch(y);
  if (B > 0)
    launched(match_backward({t, y.const_data_ptr(), data(target), a.pointers(eps), g.const_data_ptr(), data(fm),
                             data(d_gamma), data(d_beta), dy.mutable_data_ptr(), B, P, Ct, n_stats, relu},
                            launch.stream),
             "connector_match's backward pass");
  return grads_of_product(dy, u, weight, need_du, need_dweight, wide, launch);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> connector_map_grads(
    const Tensor& grad_z, const OptTensor& grad_fm, const Tensor& z, const OptTensor& pooled_t, const Tensor& count,
    const Tensor& yhat, const Tensor& res, const Tensor& res_yhat, const Tensor& u, const Tensor& weight,
    const Tensor& y, const OptTensor& bias, const OptTensor& bn_weight, const OptTensor& bn_bias, const OptTensor& mean,
    const OptTensor& var, const OptTensor& map_t, bool batch_stats, bool relu, double eps, bool need_du,
    bool need_dweight, bool wide) {
  const int64_t P = y.size(1);
  const auto [g, d_gamma, d_beta] =
      connector_channel_grads(grad_z, grad_fm, z, pooled_t, count, yhat, res, res_yhat, P, map_t.has_value());
  if (!need_du && !need_dweight) {
    const DType t = dtype(u, kOp, "u");
    return {none(u, t), none(u, wide ? accumulator(t) : t), d_gamma, d_beta};
  }
  const auto sum = [&](const Tensor& x) { return batch_stats ? OptTensor(x) : OptTensor(); };
  const auto [du, dweight] =
      connector_input_grads(g, grad_fm, sum(d_gamma), sum(d_beta), double(y.size(0)) * double(P), u, weight, y, bias,
                            bn_weight, bn_bias, mean, var, map_t, relu, eps, need_du, need_dweight, wide);
  return {du, dweight, d_gamma, d_beta};
}

std::tuple<Tensor, Tensor, Tensor> connector_linear_grads(const Tensor& grad_z, const OptTensor& scale,
                                                          const OptTensor& grad_fm, const OptTensor& z,
                                                          const OptTensor& pooled_t, const Tensor& vectors,
                                                          const Tensor& weight, bool need_du, bool need_dweight,
                                                          bool need_dbias, [[maybe_unused]] const OptTensor& rounded,
                                                          bool wide) {
  const Tensor u = vectors_as_rows(vectors);
  const DType t = dtype(u, kOp, "u"), acc = accumulator(t);
  const int64_t B = u.size(0), Cs = u.size(2), Ct = weight.size(0);
  check_shape(grad_z, {B, Ct}, kOp, "the gradient of z", "[B, Ct]");
  const Tensor g = as(grad_z, acc);
  const OptTensor factor = as(scale, acc), fm = as(grad_fm, acc), target = as(pooled_t, acc);
  const auto like_u = [&](const Tensor& du) {
    return need_du && vectors.dim() == 2 ? strided(du, {B, Cs}, {Cs, 1}) : du;
  };
  Launch launch(u);
#ifdef IJCKD_CUDA
  const DType of_weight = wide ? acc : t;
  if (const int stage = linear_stage({u, weight, {}}, {g, rounded, z, target}, launch)) {
    const Tensor rows = dense(u), w = dense(weight);
    const Tensor du = need_du ? empty(u, {B, 1, Cs}, t) : none(u, t),
                 dweight = need_dweight ? empty(u, {Ct, Cs}, of_weight) : none(u, of_weight),
                 dbias = need_dbias ? empty(u, {Ct}, acc) : none(u, acc);
    const auto out = [](bool needed, const Tensor& x) { return needed ? x.mutable_data_ptr() : nullptr; };
    if (rounded)
      launched(product_grads({.stage = stage,
                              .dtype = t,
                              .dy = data(rounded),
                              .scale = static_cast<const float*>(data(factor)),
                              .float_dy = g.const_data_ptr<float>(),
                              .u = rows.const_data_ptr(),
                              .weight = w.const_data_ptr(),
                              .du = out(need_du, du),
                              .dweight = out(need_dweight, dweight),
                              .float_dweight = wide,
                              .dbias = static_cast<float*>(out(need_dbias, dbias)),
                              .N = B,
                              .Cs = Cs,
                              .Ct = Ct},
                             launch.stream),
               "connector_match's gradients");
    else
      launched(linear_grad_tiles({.dtype = t,
                                  .grad_z = g.const_data_ptr<float>(),
                                  .scale = static_cast<const float*>(data(factor)),
                                  .grad_fm = static_cast<const float*>(data(fm)),
                                  .z = static_cast<const float*>(data(z)),
                                  .pooled_t = static_cast<const float*>(data(target)),
                                  .u = rows.const_data_ptr(),
                                  .weight = w.const_data_ptr(),
                                  .du = out(need_du, du),
                                  .dweight = out(need_dweight, dweight),
                                  .float_dweight = wide,
                                  .dbias = static_cast<float*>(out(need_dbias, dbias)),
                                  .B = B,
                                  .Cs = Cs,
                                  .Ct = Ct},
                                 launch.stream),
               "connector_match's gradients");
    return {like_u(du), dweight, dbias};
  }
#endif
  Tensor dz = empty(u, {B, Ct}, acc), sums = empty(u, {Ct}, acc);
  if (B > 0)
    launched(channel_grads({acc, g.const_data_ptr(), data(factor), data(fm), data(z), data(target), nullptr, nullptr,
                            nullptr, nullptr, dz.mutable_data_ptr(), nullptr, sums.mutable_data_ptr(), B, 1, Ct},
                           launch.stream),
             "connector_match's channel gradients");
  else
    torch::stable::zero_(sums);
  const auto [du, dweight] = grads_of_product(as(dz, t), u, weight, need_du, need_dweight, wide, launch);
  return {like_u(du), dweight, need_dbias ? sums : none(u, acc)};
}

}  // namespace

void check_projection(const Tensor& u, const Tensor& weight, const char* op, const char* weight_arg) {
  check(u.dim() == 3, op, ": u must be rows [B, P, Cs], got ", shape(u));
  check(weight.dim() == 2 && weight.size(1) == u.size(2), op, ": ", weight_arg,
        " must be [Ct, Cs] with Cs = ", u.size(2), " like u, got ", shape(weight));
  check(on_device(u), op, ": u must be on ", kDevice);
  check_device(weight, op, weight_arg);
  dtype(u, op, "u");
  check(weight.scalar_type() == u.scalar_type(), op, ": ", weight_arg, " must have u's dtype ", name(u.scalar_type()),
        ", got ", name(weight.scalar_type()));
  check(u.size(1) > 0 && weight.size(0) > 0, op, ": positions and channels must not be empty, got u ", shape(u),
        " and ", weight_arg, " ", shape(weight));
}

#ifdef IJCKD_CUDA
Tensor projected(const Projection& p) { return linear_match(p, {}).first; }
#else
Tensor projected(const Projection& p) {
  const DType t = dtype(p.u, kOp, "u"), acc = accumulator(t);
  const int64_t B = p.u.size(0), Cs = p.u.size(2), Ct = p.weight.size(0);
  const Tensor u = dense(p.u), rows = strided(u, {B, Cs}, {Cs, 1});
  if (by_inner_product(rows) && worth_onednn(rows, p.weight)) return inner_product(rows, dense(p.weight), p.bias);
  const Tensor y = times_weight(rows, p.weight);
  const Tensor z = t == acc ? y : empty(y, {B, Ct}, acc);
  if (B > 0 && (t != acc || p.bias)) add_bias({t, y.const_data_ptr(), data(p.bias), z.mutable_data_ptr(), B, Ct});
  return z;
}
#endif

#ifdef IJCKD_CUDA
// Every tensor of teacher channels is read in pieces of 16 bytes.
int linear_stage(const Projection& p, std::initializer_list<OptTensor> others, const Launch& launch) {
  const bool whole = p.u.size(0) > 0 && p.weight.size(0) % 8 == 0 && aligned(p.bias) &&
                     std::all_of(others.begin(), others.end(), aligned);
  return whole ? readable_stage(dense(p.u), dense(p.weight), launch) : 0;
}
#endif

}  // namespace ijckd

#ifdef IJCKD_CUDA
STABLE_TORCH_LIBRARY_IMPL(ijckd, CUDA, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(ijckd, CPU, m) {
#endif
  m.impl("connector_match", TORCH_BOX(&ijckd::connector_match));
  m.impl("connector_project", TORCH_BOX(&ijckd::connector_project));
  m.impl("connector_apply", TORCH_BOX(&ijckd::connector_apply));
  m.impl("follow_statistics", TORCH_BOX(&ijckd::follow_statistics));
  m.impl("connector_channel_grads", TORCH_BOX(&ijckd::connector_channel_grads));
  m.impl("connector_input_grads", TORCH_BOX(&ijckd::connector_input_grads));
  m.impl("connector_map_grads", TORCH_BOX(&ijckd::connector_map_grads));
  m.impl("connector_linear_grads", TORCH_BOX(&ijckd::connector_linear_grads));
}
