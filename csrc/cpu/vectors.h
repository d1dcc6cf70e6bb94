#pragma once
// Vectors of a width that the caller chooses, by GCC's vector extensions: the loops of block views are written once for
// W lanes of 16 bits and compiled for the width that each instruction set has (8, 16 or 32). What has no operator is a
// loop over an array of W, which the compiler turns into one instruction.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../blocks.h"
#include "vectorise.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // all is inlined: vectors are never passed
#endif

namespace ijckd {

template <typename T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <typename T, int N>
using Vec = typename VectorOf<T, N>::type;

template <typename V>
IJCKD_INLINE V load_as(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <typename V>
IJCKD_INLINE void store_as(void* p, const V& v) {
  std::memcpy(p, &v, sizeof v);
}
// The same past the caches, to an address divisible by the vector's size.
template <typename V>
IJCKD_INLINE void stream_as(void* p, const V& v) {
  struct Bytes {
    char of[sizeof(V)];
  };
#ifdef __x86_64__
  if constexpr (sizeof v == 16)
    asm("movntdq %1, %0" : "=m"(*static_cast<Bytes*>(p)) : "x"(v));
  else
    asm("vmovntdq %1, %0" : "=m"(*static_cast<Bytes*>(p)) : "v"(v));
#else
  store_as(p, v);
#endif
}
// f(0), f(1), .. with numbers that the compiler knows: an array of vectors must not be indexed by others, or it would
// lie in memory.
template <int kCount, typename F>
IJCKD_INLINE void each(const F& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, I>()), ...);
  }(std::make_integer_sequence<int, kCount>());
}
// The same bits as another vector of the same size.
template <typename To, typename From>
IJCKD_INLINE To bits_as(const From& v) {
  static_assert(sizeof(To) == sizeof(From));
  return To(v);
}

// Lane l is lane kPattern::at(l) of a, or, from N on, of b: chosen when this is compiled.
template <typename Pattern, typename T, int N>
IJCKD_INLINE Vec<T, N> shuffled(const Vec<T, N>& a, const Vec<T, N>& b) {
  return [&]<size_t... I>(std::index_sequence<I...>) __attribute__((always_inline)) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, Pattern::at(I)...);
#else
    return __builtin_shuffle(a, b, Vec<T, N>{T(Pattern::at(I))...});
#endif
  }(std::make_index_sequence<N>());
}

// Patterns that treat every 128 bits, M lanes, alike: the lower or upper halves of a and b, lane by lane in turn.
template <int N, int M, bool kUpper>
struct InTurn {
  static constexpr int at(int i) {
    const int part = i / M * M, k = i % M;
    return part + (kUpper ? M / 2 : 0) + k / 2 + (k % 2 ? N : 0);
  }
};
template <typename T, int N, bool kUpper>
IJCKD_INLINE Vec<uint16_t, N * sizeof(T) / 2> in_turn(const Vec<uint16_t, N * sizeof(T) / 2>& a,
                                                      const Vec<uint16_t, N * sizeof(T) / 2>& b) {
  using V = Vec<T, N>;
  using Words = Vec<uint16_t, N * sizeof(T) / 2>;
  return bits_as<Words>(shuffled<InTurn<N, 16 / sizeof(T), kUpper>, T, N>(bits_as<V>(a), bits_as<V>(b)));
}
template <int W, int kBytes, bool kUpper>
IJCKD_INLINE Vec<uint16_t, W> alternate(const Vec<uint16_t, W>& a, const Vec<uint16_t, W>& b) {
  if constexpr (kBytes == 2) return in_turn<uint16_t, W, kUpper>(a, b);
  if constexpr (kBytes == 4) return in_turn<uint32_t, W / 2, kUpper>(a, b);
  if constexpr (kBytes == 8) return in_turn<uint64_t, W / 4, kUpper>(a, b);
}

// times() of blocks.h in every lane.
template <int W>
IJCKD_INLINE Vec<int16_t, W> times_each(const Vec<int16_t, W>& a, const Vec<int16_t, W>& b) {
  int16_t x[W], y[W], out[W];
  store_as(x, a), store_as(y, b);
  IJCKD_ONE_VECTOR for (int l = 0; l < W; ++l) out[l] = int16_t(times(x[l], y[l]));
  return load_as<Vec<int16_t, W>>(out);
}
// The upper 16 bits of the product of what is unsigned.
template <int W>
IJCKD_INLINE Vec<uint16_t, W> upper_product(const Vec<uint16_t, W>& a, uint16_t factor) {
  uint16_t x[W], out[W];
  store_as(x, a);
  IJCKD_ONE_VECTOR for (int l = 0; l < W; ++l) out[l] = uint16_t((uint32_t(x[l]) * uint32_t(factor)) >> 16);
  return load_as<Vec<uint16_t, W>>(out);
}
template <int W>
IJCKD_INLINE Vec<int16_t, W> everywhere(int16_t x) {
  int16_t out[W];
  IJCKD_ONE_VECTOR for (int l = 0; l < W; ++l) out[l] = x;
  return load_as<Vec<int16_t, W>>(out);
}

// Of every 128 bits of eight vectors, eight lanes each, the transpose.
template <int W>
IJCKD_INLINE void transpose_eights(Vec<uint16_t, W> (&v)[8]) {
  Vec<uint16_t, W> a[8], b[8];
  for (int i = 0; i < 4; ++i)
    a[2 * i] = alternate<W, 2, false>(v[2 * i], v[2 * i + 1]),
          a[2 * i + 1] = alternate<W, 2, true>(v[2 * i], v[2 * i + 1]);
  for (int h = 0; h < 2; ++h)
    for (int i = 0; i < 2; ++i) {
      b[4 * h + 2 * i] = alternate<W, 4, false>(a[4 * h + i], a[4 * h + 2 + i]);
      b[4 * h + 2 * i + 1] = alternate<W, 4, true>(a[4 * h + i], a[4 * h + 2 + i]);
    }
  for (int i = 0; i < 4; ++i)
    v[2 * i] = alternate<W, 8, false>(b[i], b[4 + i]), v[2 * i + 1] = alternate<W, 8, true>(b[i], b[4 + i]);
}

// Three vectors, item by item in turn: out holds x0 y0 z0 x1 y1 z1 ... Item i of colour c goes to lane (3 i + c) mod N
// of vector (3 i + c) / N: every colour has one item for each lane, so that it is one permutation of its items, and the
// vectors are blends of the permuted ones. Where 128 bits are all that an instruction permutes they are done so first,
// and then moved as a whole.
template <int N, int M, int kColour>
struct Spread {  // lane (3 i + c) mod M of every M has item i
  static constexpr int at(int lane) {
    for (int i = 0; i < M; ++i)
      if ((3 * i + kColour) % M == lane % M) return lane / M * M + i;
    return 0;
  }
};
template <int N, int M, int kVector, int kSecond>  // lanes of the first, or of the second where they are of kSecond
struct Blend {
  static constexpr int at(int lane) { return lane + ((kVector * M + lane % M) % 3 == kSecond ? N : 0); }
};
template <typename T, int N, int M>
IJCKD_INLINE void in_turns_of_three(Vec<T, N> (&v)[3]) {
  const Vec<T, N> x = shuffled<Spread<N, M, 0>, T, N>(v[0], v[0]), y = shuffled<Spread<N, M, 1>, T, N>(v[1], v[1]),
                  z = shuffled<Spread<N, M, 2>, T, N>(v[2], v[2]);
  v[0] = shuffled<Blend<N, M, 0, 2>, T, N>(shuffled<Blend<N, M, 0, 1>, T, N>(x, y), z);
  v[1] = shuffled<Blend<N, M, 1, 2>, T, N>(shuffled<Blend<N, M, 1, 1>, T, N>(x, y), z);
  v[2] = shuffled<Blend<N, M, 2, 2>, T, N>(shuffled<Blend<N, M, 2, 1>, T, N>(x, y), z);
}
template <int W>
IJCKD_INLINE void interleave(Vec<uint16_t, W> (&v)[3]) {
  if constexpr (W > 16) {
    in_turns_of_three<uint16_t, W, W>(v);
  } else {
    in_turns_of_three<uint16_t, W, 8>(v);
    if constexpr (W > 8) {
      Vec<uint64_t, W / 4> halves[3];
      for (int c = 0; c < 3; ++c) halves[c] = bits_as<Vec<uint64_t, W / 4>>(v[c]);
      struct Lower {
        static constexpr int at(int i) { return i < 2 ? i : 4 + i - 2; }
      };
      struct Outer {
        static constexpr int at(int i) { return i < 2 ? i : 4 + i; }
      };
      struct Upper {
        static constexpr int at(int i) { return i < 2 ? 2 + i : 4 + i; }
      };
      v[0] = bits_as<Vec<uint16_t, W>>(shuffled<Lower, uint64_t, W / 4>(halves[0], halves[1]));
      v[1] = bits_as<Vec<uint16_t, W>>(shuffled<Outer, uint64_t, W / 4>(halves[2], halves[0]));
      v[2] = bits_as<Vec<uint16_t, W>>(shuffled<Upper, uint64_t, W / 4>(halves[1], halves[2]));
    }
  }
}

}  // namespace ijckd
