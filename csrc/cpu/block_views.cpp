// Views of images in blocks: view_columns.h, then view_rows.h; both for the widest vectors that the processor has.
#include <algorithm>
#include <utility>

#include "view_columns.h"
#include "view_rows.h"
#include "view_scratch.h"

namespace ijckd {
namespace {

// Which part of a view is of the image: rows [top, bottom), columns [left, right).
struct Part {
  int64_t top, bottom, left, right;
  bool flip;
};

template <int W>
IJCKD_INLINE void view_of(const BlockView& v, const Part& p, ViewScratch& s) {
  StageClock clock(v.ticks);
  for (int c = 0; c < 2; ++c) {
    const BlockPlane plane = v.image.plane(c);
    const auto columns = [&](auto bits) __attribute__((always_inline)) {
      make_columns<bits.value, W>(v.data + v.image.plane_at(c), plane, c == 0 ? 1 : 2, c == 0 ? s.luma_x : s.chroma_x,
                                  c == 0 ? s.luma_y : s.chroma_y, p.flip, clock, s, c == 0 ? s.luma : s.chroma);
    };
    if (plane.bits == 3)
      columns(std::integral_constant<int, 3>());
    else
      columns(std::integral_constant<int, 4>());
  }
  const int64_t count = p.bottom - p.top, wide = p.right - p.left, left = p.flip ? v.S - p.right : p.left;
  switch (v.type) {
    case ViewType::u8:
      return make_rows<W, ViewType::u8>(v, p.top, count, left, wide, p.flip, clock, s);
    case ViewType::f32:
      return make_rows<W, ViewType::f32>(v, p.top, count, left, wide, p.flip, clock, s);
    case ViewType::bf16:
      return make_rows<W, ViewType::bf16>(v, p.top, count, left, wide, p.flip, clock, s);
  }
}

using Maker = void (*)(const BlockView&, const Part&, ViewScratch&);

void view_of_128_bits(const BlockView& v, const Part& p, ViewScratch& s) { view_of<8>(v, p, s); }
#ifdef IJCKD_LEVELS
__attribute__((target("arch=x86-64-v3"))) void view_of_256_bits(const BlockView& v, const Part& p, ViewScratch& s) {
  view_of<16>(v, p, s);
}
__attribute__((target("arch=x86-64-v4"))) void view_of_512_bits(const BlockView& v, const Part& p, ViewScratch& s) {
  view_of<32>(v, p, s);
}
#endif

// For vectors of at most `lanes` lanes of 16 bits.
Maker best_maker(int lanes) {
#ifdef IJCKD_LEVELS
  static const bool avx512 = __builtin_cpu_supports("x86-64-v4"), avx2 = __builtin_cpu_supports("x86-64-v3");
  if (lanes >= 32 && avx512) return view_of_512_bits;
  if (lanes >= 16 && avx2) return view_of_256_bits;
#endif
  return lanes >= 8 ? view_of_128_bits : nullptr;
}

// What a view has outside of the image.
void blacken(const BlockView& v) {
  for (int64_t k = 0; k < v.S * v.S * kPlanes; ++k) {
    const float black = (0 - v.shift[k % kPlanes]) * v.scale[k % kPlanes];
    switch (v.type) {
      case ViewType::u8:
        static_cast<uint8_t*>(v.out)[k] = 0;
        break;
      case ViewType::f32:
        store(static_cast<float*>(v.out), k, black);
        break;
      case ViewType::bf16:
        store(static_cast<c10::BFloat16*>(v.out), k, black);
    }
  }
}

}  // namespace

bool any_half_way(const float* shift, const float* scale) {
  for (int c = 0; c < kPlanes; ++c)
    for (int level = 0; level < 256; ++level)
      if ((std::bit_cast<uint32_t>((float(level) - shift[c]) * scale[c]) & 0xffff) == 0x8000) return true;
  return false;
}

void block_view(const BlockView& v) {
  static thread_local ViewScratch s;
  const ViewAxis y = ViewAxis::of(v.row, 0, v.S), x = ViewAxis::of(v.row, 1, v.S);
  const auto within = [&](const ViewAxis& a) {  // outputs [first, last) of the view that are of the image
    return std::pair(std::max<int64_t>(0, -a.first), std::min(v.S, a.outputs - a.first));
  };
  const auto [top, bottom] = within(y);
  const auto [left, right] = within(x);
  if (top > 0 || left > 0 || bottom < v.S || right < v.S) blacken(v);
  if (top >= bottom || left >= right) return;
  StageClock clock(v.ticks);
  s.luma_y.make(PlaneAxis(y, false), y.first + top, y.first + bottom);
  s.luma_x.make(PlaneAxis(x, false), x.first + left, x.first + right);
  s.chroma_y.make(PlaneAxis(y, true), y.first + top, y.first + bottom);
  s.chroma_x.make(PlaneAxis(x, true), x.first + left, x.first + right);
  clock.lap(ViewStage::weights);
  best_maker(v.lanes)(v, {top, bottom, left, right, v.row[kFlip] != 0}, s);
}

}  // namespace ijckd
