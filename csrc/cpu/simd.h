// Vectors as GCC vector extensions, one source for every instruction set.
//
// level.cpp compiles these headers once per instruction set, with its flags and its GUNN_VECTOR_BYTES. Everything in
// cpu/ lives in an anonymous namespace and calls no standard function with external linkage: otherwise the linker could
// keep the AVX-512 copy of such a function for machines without it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#define GUNN_INLINE inline __attribute__((always_inline))
#define GUNN_NOINLINE __attribute__((noinline))
#define GUNN_UNROLL _Pragma("GCC unroll 32")

namespace gunn {
namespace {

template <class Scalar>
struct IntegerOf;
template <>
struct IntegerOf<float> {
  using type = int32_t;
};
template <>
struct IntegerOf<double> {
  using type = int64_t;
};

template <class Scalar>
struct Simd {
  using Lane = Scalar;
  using Int = typename IntegerOf<Scalar>::type;
  static constexpr int lanes = GUNN_VECTOR_BYTES / sizeof(Scalar);
  static constexpr int half = lanes / 2;
  static constexpr int tile = 2 * lanes;  // pixels of one tile: two vectors, so that a 1x1 block has two columns

  typedef Scalar Vector __attribute__((vector_size(GUNN_VECTOR_BYTES)));
  typedef Scalar Unaligned __attribute__((vector_size(GUNN_VECTOR_BYTES), aligned(alignof(Scalar)), may_alias));
  typedef Int Mask __attribute__((vector_size(GUNN_VECTOR_BYTES)));
  typedef Int UnalignedMask __attribute__((vector_size(GUNN_VECTOR_BYTES), aligned(alignof(Int)), may_alias));
  typedef Scalar Half __attribute__((vector_size(GUNN_VECTOR_BYTES / 2), aligned(alignof(Scalar)), may_alias));
  typedef Scalar Quad __attribute__((vector_size(4 * sizeof(Scalar)), aligned(alignof(Scalar)), may_alias));
};

// Two bfloat16, in one lane of 32 bits; the first in the lower half.
struct Pair {
  int32_t bits;
};
template <>
struct IntegerOf<int32_t> {
  using type = int32_t;
};
template <>
struct Simd<Pair> : Simd<int32_t> {};

template <class Scalar>
using Vector = typename Simd<Scalar>::Vector;
template <class Scalar>
using Mask = typename Simd<Scalar>::Mask;

template <class Scalar>
GUNN_INLINE Vector<Scalar> load(const Scalar* p) {
  return *reinterpret_cast<const typename Simd<Scalar>::Unaligned*>(p);
}
template <class Scalar>
GUNN_INLINE void store(Scalar* p, Vector<Scalar> v) {
  *reinterpret_cast<typename Simd<Scalar>::Unaligned*>(p) = v;
}
template <class Scalar>
GUNN_INLINE Mask<Scalar> load_mask(const typename Simd<Scalar>::Int* p) {
  return *reinterpret_cast<const typename Simd<Scalar>::UnalignedMask*>(p);
}

// Lanes outside the mask become zero.
template <class Scalar>
GUNN_INLINE Vector<Scalar> keep(Vector<Scalar> v, Mask<Scalar> mask) {
  return reinterpret_cast<Vector<Scalar>>(reinterpret_cast<Mask<Scalar>>(v) & mask);
}

// Written so that NaN passes, as in torch.
template <class Scalar>
GUNN_INLINE Vector<Scalar> relu(Vector<Scalar> v) {
  return v < Vector<Scalar>{} ? Vector<Scalar>{} : v;
}
// d where the ReLU's input was above zero.
template <class Scalar>
GUNN_INLINE Vector<Scalar> relu_gradient(Vector<Scalar> d, Vector<Scalar> input) {
  return input <= Vector<Scalar>{} ? Vector<Scalar>{} : d;
}

template <class Scalar>
GUNN_INLINE double sum_of_lanes(Vector<Scalar> v) {
  double sum = 0;
  GUNN_UNROLL for (int j = 0; j < Simd<Scalar>::lanes; ++j) sum += static_cast<double>(v[j]);
  return sum;
}

// __builtin_shufflevector came to GCC with version 12; before it, memory does the same.
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define GUNN_HAS_SHUFFLE 1
#endif
#endif

// The first half of a vector: no instruction.
template <class Scalar>
GUNN_INLINE typename Simd<Scalar>::Half low_half(Vector<Scalar> v) {
  typename Simd<Scalar>::Half half;
  __builtin_memcpy(&half, &v, sizeof(half));
  return half;
}

template <class Scalar, size_t... I>
GUNN_INLINE Vector<Scalar> join(typename Simd<Scalar>::Half low, typename Simd<Scalar>::Half high,
                                std::index_sequence<I...>) {
#ifdef GUNN_HAS_SHUFFLE
  return __builtin_shufflevector(low, high, I...);
#else
  constexpr int half = Simd<Scalar>::half;
  return Vector<Scalar>{(I < half ? low[I % half] : high[I % half])...};
#endif
}
// Stores lanes I only.
template <class Scalar, size_t... I>
GUNN_INLINE void store_lanes(Scalar* p, Vector<Scalar> v, std::index_sequence<I...>) {
  typedef typename Simd<Scalar>::Lane Part
      __attribute__((vector_size(sizeof...(I) * sizeof(Scalar)), aligned(alignof(Scalar)), may_alias));
#ifdef GUNN_HAS_SHUFFLE
  *reinterpret_cast<Part*>(p) = __builtin_shufflevector(v, v, I...);
#else
  *reinterpret_cast<Part*>(p) = Part{v[I]...};
#endif
}
template <size_t Offset, size_t... I>
constexpr std::index_sequence<(Offset + I)...> offset_by(std::index_sequence<I...>);

// Two half vectors from p and p + step.
template <class Scalar>
GUNN_INLINE Vector<Scalar> load_halves(const Scalar* p, int64_t step) {
  using Half = typename Simd<Scalar>::Half;
  return join<Scalar>(*reinterpret_cast<const Half*>(p), *reinterpret_cast<const Half*>(p + step),
                      std::make_index_sequence<Simd<Scalar>::lanes>());
}
template <class Scalar>
GUNN_INLINE void store_halves(Scalar* p, int64_t step, Vector<Scalar> v) {
  constexpr int half = Simd<Scalar>::half;
  store_lanes<Scalar>(p, v, std::make_index_sequence<half>());
  store_lanes<Scalar>(p + step, v, decltype(offset_by<half>(std::make_index_sequence<half>()))());
}
template <size_t Factor, size_t... I>
constexpr std::index_sequence<(Factor * I)...> times(std::index_sequence<I...>);

// Even lanes to p, odd ones to p + step.
template <class Scalar>
GUNN_INLINE void store_columns(Scalar* p, int64_t step, Vector<Scalar> v) {
  using Even = decltype(times<2>(std::make_index_sequence<Simd<Scalar>::half>()));
  store_lanes<Scalar>(p, v, Even());
  store_lanes<Scalar>(p + step, v, decltype(offset_by<1>(Even()))());
}
// The same for each half of v, the second one's to p + half_step.
template <class Scalar>
GUNN_INLINE void store_columns_of_halves(Scalar* p, int64_t step, int64_t half_step, Vector<Scalar> v) {
  if constexpr (Simd<Scalar>::lanes >= 8) {
    constexpr int half = Simd<Scalar>::half;
    using Even = decltype(times<2>(std::make_index_sequence<half / 2>()));
    store_lanes<Scalar>(p, v, Even());
    store_lanes<Scalar>(p + step, v, decltype(offset_by<1>(Even()))());
    store_lanes<Scalar>(p + half_step, v, decltype(offset_by<half>(Even()))());
    store_lanes<Scalar>(p + half_step + step, v, decltype(offset_by<half + 1>(Even()))());
  }
}

// Lanes I of the 2 * lanes that `low` and `high` have together.
template <class Scalar, size_t... I>
GUNN_INLINE Vector<Scalar> pick(Vector<Scalar> low, Vector<Scalar> high, std::index_sequence<I...>) {
#ifdef GUNN_HAS_SHUFFLE
  return __builtin_shufflevector(low, high, I...);
#else
  constexpr int lanes = Simd<Scalar>::lanes;
  return Vector<Scalar>{(I < lanes ? low[I % lanes] : high[I % lanes])...};
#endif
}
template <int lanes, size_t... I>
constexpr std::index_sequence<(I / 2 + I % 2 * lanes)...> zipped(std::index_sequence<I...>);

// Even and odd lanes taken in turn from `even` and `odd`: of the first and of the second half of both.
template <class Scalar>
GUNN_INLINE Vector<Scalar> zip_low(Vector<Scalar> even, Vector<Scalar> odd) {
  constexpr int lanes = Simd<Scalar>::lanes;
  return pick<Scalar>(even, odd, decltype(zipped<lanes>(std::make_index_sequence<lanes>()))());
}
template <class Scalar>
GUNN_INLINE Vector<Scalar> zip_high(Vector<Scalar> even, Vector<Scalar> odd) {
  constexpr int lanes = Simd<Scalar>::lanes;
  return pick<Scalar>(even, odd, decltype(offset_by<lanes / 2>(zipped<lanes>(std::make_index_sequence<lanes>())))());
}

// Transposes 4 rows of 4 neighbouring elements: to[j][i] = from[i][j].
template <class Scalar>
GUNN_INLINE void transpose_4x4(const Scalar* const (&from)[4], Scalar* const (&to)[4]) {
  using Quad = typename Simd<Scalar>::Quad;
#ifdef GUNN_HAS_SHUFFLE
  const auto quad = [&](int i) { return *reinterpret_cast<const Quad*>(from[i]); };
  const Quad a = quad(0), b = quad(1), c = quad(2), d = quad(3);
  const Quad ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Quad cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  *reinterpret_cast<Quad*>(to[0]) = __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5);
  *reinterpret_cast<Quad*>(to[1]) = __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7);
  *reinterpret_cast<Quad*>(to[2]) = __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5);
  *reinterpret_cast<Quad*>(to[3]) = __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7);
#else
  GUNN_UNROLL for (int j = 0; j < 4; ++j) {
    *reinterpret_cast<Quad*>(to[j]) = Quad{from[0][j], from[1][j], from[2][j], from[3][j]};
  }
#endif
}

}  // namespace
}  // namespace gunn
