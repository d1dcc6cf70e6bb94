#pragma once
// The distance of one class's map to the teacher's, both divided by their norms over the positions: CAT-KD, Guo et al.
// 2023. Formulas that the CPU loops and the CUDA kernels share.

#include <math.h>

#include "host_device.h"

namespace ijckd {

constexpr double kLeastNorm = 1e-12;  // as torch's F.normalize

// With c and t the two maps' values at a position and diff = c - t, which keeps digits that c and t have no more:
//   e = c / |c| - t / |t| = (diff - t / |t| (|c| - |t|)) / |c|,   |c| - |t| = sum of diff (c + t) / (|c| + |t|)
// The distance is the sum of e^2 over the positions; its gradient is 2 (e - c / |c| sum of e c / |c|) / |c|.
template <typename A>
struct ClassMap {
  A square = 0, square_t = 0, longer = 0;  // sums over the positions: of c^2, t^2 and diff (c + t)

  IJCKD_HD void add(A c, A t, A diff) { square += c * c, square_t += t * t, longer += diff * (c + t); }
};

template <typename A>
struct NormalisedMap {
  A scale, scale_t;           // 1 / |c|, 1 / |t|
  A stretch;                  // (|c| - |t|) / |t|
  bool plain;                 // one of the norms is that least one, or not finite: e from its definition
  bool turns;                 // whether |c| depends on c
  A distance = 0, along = 0;  // sums over the positions: of e^2 and of e c / |c|

  IJCKD_HD explicit NormalisedMap(const ClassMap<A>& of) {
    const A least = A(kLeastNorm), norm = sqrt(of.square), norm_t = sqrt(of.square_t);
    turns = !(norm <= least);  // NaN stays
    plain = !turns || !(norm_t > least);
    scale = A(1) / (turns ? norm : least), scale_t = A(1) / (norm_t <= least ? least : norm_t);
    stretch = of.longer / (norm + norm_t) * scale_t;
  }

  IJCKD_HD A apart(A c, A t, A diff) const { return plain ? c * scale - t * scale_t : (diff - t * stretch) * scale; }
  IJCKD_HD void add(A c, A t, A diff) {
    const A e = apart(c, t, diff);
    distance += e * e, along += e * c * scale;
  }
  // Half the distance's gradient with respect to c.
  IJCKD_HD A grad(A c, A t, A diff) const { return (apart(c, t, diff) - (turns ? c * scale * along : A(0))) * scale; }
};

}  // namespace ijckd
