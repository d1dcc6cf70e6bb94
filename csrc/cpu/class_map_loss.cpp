// CPU loops of class_map_loss: one task per image.
#include "class_map_loss.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "class_map.h"
#include "lanes.h"
#include "loops.h"
#include "position_row.h"
#include "vectorise.h"

namespace ijckd {
namespace {

// One image's numbers in passing.
template <typename A>
struct Scratch {
  std::vector<A> memory;
  A *l, *t, *diff;                        // [K]: a row of logits, the teacher's, the difference
  A* item;                                // [K]: Lanes'
  A *square, *square_t, *longer, *along;  // [K]: of every class's map
  A* map_grad;                            // [map, K]

  explicit Scratch(const ClassMapRows& r) {
    memory.resize((8 + (r.weights.cam != 0 && r.gradient ? r.map : 0)) * r.K);
    A* next = memory.data();
    for (A** row : {&l, &t, &diff, &item, &square, &square_t, &longer, &along}) *row = next, next += r.K;
    map_grad = next;
  }
};

// Row `row` of all: l, t and diff without a bias.
template <typename T, typename A>
IJCKD_INLINE void load_row(const ClassMapRows& r, int64_t row, const Scratch<A>& s) {
  const T *logits = static_cast<const T*>(r.logits) + row * r.K, *delta = static_cast<const T*>(r.delta) + row * r.K;
  const int64_t K = r.K;
  A *l = s.l, *t = s.t, *diff = s.diff;
  for (int64_t k = 0; k < K; ++k) l[k] = load(logits, k);
  if (r.far[row])
    for (int64_t k = 0; k < K; ++k) t[k] = load(delta, k), diff[k] = l[k] - t[k];
  else
    for (int64_t k = 0; k < K; ++k) diff[k] = load(delta, k), t[k] = l[k] - diff[k];
}

// The distance of image b's class maps, and its gradient in s.map_grad.
template <typename T, typename A>
IJCKD_INLINE void class_maps(const ClassMapRows& r, int64_t b, A share, const Scratch<A>& s) {
  const int64_t K = r.K, first = b * r.P + r.P - r.map;
  A *l = s.l, *t = s.t, *diff = s.diff, *square = s.square, *square_t = s.square_t, *longer = s.longer,
    *along = s.along;
  std::fill_n(square, K, A(0)), std::fill_n(square_t, K, A(0)), std::fill_n(longer, K, A(0)),
      std::fill_n(along, K, A(0));
  for (int64_t p = 0; p < r.map; ++p) {
    load_row<T>(r, first + p, s);
    for (int64_t k = 0; k < K; ++k) {
      ClassMap<A> map{square[k], square_t[k], longer[k]};
      map.add(l[k], t[k], diff[k]);
      square[k] = map.square, square_t[k] = map.square_t, longer[k] = map.longer;
    }
  }
  const auto normalised = [&](int64_t k) __attribute__((always_inline)) {
    NormalisedMap<A> map(ClassMap<A>{square[k], square_t[k], longer[k]});
    map.along = along[k];
    return map;
  };
  double distance = 0;
  for (int64_t p = 0; p < r.map; ++p) {
    load_row<T>(r, first + p, s);
    for (int64_t k = 0; k < K; ++k) {
      NormalisedMap<A> map = normalised(k);
      map.add(l[k], t[k], diff[k]);
      along[k] = map.along, s.item[k] = map.distance;
    }
    distance += double(lane_sum<A>(K, [&](int64_t k) __attribute__((always_inline)) { return s.item[k]; }));
  }
  static_cast<A*>(r.cam_rows)[b] = share * A(distance);
  if (!r.gradient) return;
  const A c = share * A(2 * r.weights.cam * double(r.P) / (double(r.map) * double(K)));
  for (int64_t p = 0; p < r.map; ++p) {
    load_row<T>(r, first + p, s);
    A* grad = s.map_grad + p * K;
    for (int64_t k = 0; k < K; ++k) grad[k] = c * normalised(k).grad(l[k], t[k], diff[k]);
  }
}

template <typename T, typename A>
IJCKD_INLINE void image(const ClassMapRows& r, int64_t b, const Scratch<A>& s) {
  const int64_t K = r.K, P = r.P;
  const ClassMapWeights& w = r.weights;
  const A share = r.share ? static_cast<const A*>(r.share)[b] : A(1);
  const bool maps = w.cam != 0;
  if (maps) class_maps<T>(r, b, share, s);
  const A* bias = static_cast<const A*>(r.bias);
  A *l = s.l, *t = s.t, *rows = static_cast<A*>(r.part_rows);
  const Lanes<A> lanes{K, s.item};
  const auto of = [](const A* row) { return [row](int64_t k) __attribute__((always_inline)) { return row[k]; }; };
  bool right_at_all = false;  // whether the teacher's answer to the whole map is the label
  for (int64_t p = 0; p < P; ++p) {
    const int64_t row = b * P + p;
    const A* map_grad = maps && p >= P - r.map ? s.map_grad + (p - (P - r.map)) * K : nullptr;
    T* gradient = static_cast<T*>(r.gradient) + row * r.stride;
    if (!w.of_rows()) {
      if (!r.gradient) continue;
      for (int64_t k = 0; k < K; ++k) store(gradient, k, map_grad ? map_grad[k] : A(0));
      continue;
    }
    load_row<T>(r, row, s);
    if (bias)
      for (int64_t k = 0; k < K; ++k) l[k] += bias[k], t[k] += bias[k];
    const bool right = lanes.first_most(of(t)) == r.labels[b];
    if (p == 0) right_at_all = right;
    const PositionRow<A> found(w, lanes, of(l), of(t), K, r.labels[b], right == right_at_all ? share : A(2) * share);
    for (int part = 0; part < kMapCam; ++part) rows[row * kMapCam + part] = found.values[part];
    if (!r.gradient) continue;
    const auto store_all = [&](auto kl, auto dkd) __attribute__((always_inline)) {
      const auto grad = [&](int64_t k) __attribute__((always_inline)) {
        return found.template grad<kl(), dkd()>(lanes, k, l[k], t[k]);
      };
      if (map_grad)
        for (int64_t k = 0; k < K; ++k) store(gradient, k, grad(k) + map_grad[k]);
      else
        for (int64_t k = 0; k < K; ++k) store(gradient, k, grad(k));
    };
    const bool dkd = w.dkd_alpha != 0 || w.dkd_beta != 0;
    if (w.kl != 0 && dkd)
      store_all(std::true_type(), std::true_type());
    else if (dkd)
      store_all(std::false_type(), std::true_type());
    else
      store_all(std::true_type(), std::false_type());
  }
}

IJCKD_CLONES void image_f32(const ClassMapRows& r, int64_t b, const Scratch<float>& s) { image<float>(r, b, s); }
IJCKD_CLONES void image_f64(const ClassMapRows& r, int64_t b, const Scratch<double>& s) { image<double>(r, b, s); }
IJCKD_CLONES void image_bf16(const ClassMapRows& r, int64_t b, const Scratch<float>& s) {
  image<c10::BFloat16>(r, b, s);
}

template <typename A, typename Image>
void every_image(const ClassMapRows& r, const Image& one) {
  parallel_for(r.B, row_grain(r.P * r.K, 1 << 13), [&](int64_t first, int64_t last) {
    const Scratch<A> scratch(r);
    for (int64_t b = first; b < last; ++b) one(r, b, scratch);
  });
}

}  // namespace

int class_map_rows(const ClassMapRows& r, void*) {
  by_dtype(
      r.dtype, [&] { every_image<float>(r, image_f32); }, [&] { every_image<double>(r, image_f64); },
      [&] { every_image<float>(r, image_bf16); });
  return 0;
}

int64_t cam_parts(int64_t) { return 1; }

int class_map_sum(const ClassMapSum& s, void*) {
  dispatch(s.dtype, [&](auto, auto a) {
    using A = decltype(a);
    // of n numbers, each `apart` from the next, per image and `of`
    const auto mean = [&](const void* from, int64_t n, int64_t apart, double of) {
      double sum = 0;
      for (int64_t i = 0; i < n; ++i) sum += double(static_cast<const A*>(from)[i * apart]);
      return sum / (double(s.B) * of);
    };
    double loss = 0;
    for (int i = 0; i < kMapParts; ++i) {
      double part = 0;
      if (s.weights.of_part(i) != 0)
        part = i == kMapCam ? mean(s.cam_rows, s.B, 1, double(s.K) * double(s.map))
                            : mean(static_cast<const A*>(s.part_rows) + i, s.B * s.P, kMapCam, double(s.P));
      static_cast<A*>(s.parts)[i] = A(part);
      loss += s.weights.of_part(i) * part;
    }
    *static_cast<A*>(s.loss) = A(loss);
  });
  return 0;
}

}  // namespace ijckd
