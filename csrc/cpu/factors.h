// The factors of products: what one lane multiplies at once, and how values become factors.
//
// A product is summed over its depth: channels in the convolutions, pixels in the gradients of the weights. A factor is
// one number of it, or with AVX512_BF16 a Pair: two neighbours in depth as bfloat16, whose products go to one float32.
// Both have the width of the sum's lanes, so that addresses do not depend on which it is, and only the depth is counted
// in factors, the last one filled up with zero.
#pragma once

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "cpu/precision.h"
#include "cpu/simd.h"

namespace gunn {
namespace {

template <class Factor>
struct Products {
  using Sum = Factor;
  using Element = Factor;              // one number of a factor
  static constexpr int64_t depth = 1;  // numbers in a factor

  // One factor for all lanes, or one for each; vectors, or half ones.
  template <class Sums, class Values, class Weight>
  static GUNN_INLINE void add(Sums& sum, Values x, Weight w) {
    sum += x * w;
  }
  static GUNN_INLINE Vector<Factor> in_all_lanes(Factor w) { return w - Vector<Factor>{}; }

  // The factor of neighbours in memory.
  static GUNN_INLINE Factor at(const Element* p) { return *p; }

  // Between a factor and its numbers in memory, `step` apart.
  template <class Storage>
  static GUNN_INLINE Factor gather(const Storage* from, int64_t) {
    return widen<Factor>(*from);
  }
  template <class Storage>
  static GUNN_INLINE void scatter(Factor value, Storage* to, int64_t) {
    *to = narrow<Storage>(value);
  }

  // The factors of neighbours in depth.
  static GUNN_INLINE Vector<Factor> join(const Vector<Sum> (&values)[depth]) { return values[0]; }
  static GUNN_INLINE Factor join(const Sum (&values)[depth]) { return values[0]; }
  // Four factors of neighbours in depth; `room` is used where that takes a copy.
  static GUNN_INLINE const Factor* four(const Sum* from, Factor*) { return from; }

  // Between one vector of a tile's channel and the tile's factors, where it is number `part` of the factor at p.
  static GUNN_INLINE Vector<Sum> part(const Factor* p, int64_t) { return load<Factor>(p); }
  static GUNN_INLINE void set_part(Factor* p, int64_t, Vector<Sum> values) { store<Factor>(p, values); }
};

#ifdef __AVX512BF16__
template <>
struct Products<Pair> {
  using Sum = float;
  using Element = BFloat16;
  static constexpr int64_t depth = 2;
  typedef uint16_t Halves __attribute__((vector_size(GUNN_VECTOR_BYTES)));

  using HalfSum = Simd<Sum>::Half;
  using HalfPairs = Simd<Pair>::Half;
  static GUNN_INLINE Vector<Pair> in_all_lanes(Pair w) {
    return reinterpret_cast<Vector<Pair>>(_mm512_set1_epi32(w.bits));
  }
  static GUNN_INLINE void add(Vector<Sum>& sum, Vector<Pair> x, Vector<Pair> w) {
    sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(w));
  }
  static GUNN_INLINE void add(Vector<Sum>& sum, Vector<Pair> x, Pair w) { add(sum, x, in_all_lanes(w)); }
  static GUNN_INLINE void add(HalfSum& sum, HalfPairs x, HalfPairs w) {
    sum = reinterpret_cast<HalfSum>(
        _mm256_dpbf16_ps(reinterpret_cast<__m256>(sum), reinterpret_cast<__m256bh>(x), reinterpret_cast<__m256bh>(w)));
  }

  static GUNN_INLINE Pair at(const BFloat16* p) {
    Pair pair;
    __builtin_memcpy(&pair, p, sizeof(pair));
    return pair;
  }
  static GUNN_INLINE Pair gather(const BFloat16* from, int64_t step) {
    return {static_cast<int32_t>(from[0].bits | static_cast<uint32_t>(from[step].bits) << 16)};
  }

  static GUNN_INLINE void scatter(Pair value, BFloat16* to, int64_t step) {
    to[0].bits = static_cast<uint16_t>(value.bits);
    to[step].bits = static_cast<uint16_t>(value.bits >> 16);
  }

  // All of `a`, then all of `b`.
  static GUNN_INLINE Halves narrow_both(Vector<Sum> a, Vector<Sum> b) {
    return reinterpret_cast<Halves>(_mm512_cvtne2ps_pbh(b, a));
  }
  static GUNN_INLINE Vector<Pair> join(const Vector<Sum> (&values)[depth]) {
    constexpr Halves kInterleaved{0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                  8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return reinterpret_cast<Vector<Pair>>(__builtin_shuffle(narrow_both(values[0], values[1]), kInterleaved));
  }
  static GUNN_INLINE Pair join(const Sum (&values)[depth]) {
    return {static_cast<int32_t>(Format<BFloat16>::narrow(values[0]) | Format<BFloat16>::narrow(values[1]) << 16)};
  }
  static GUNN_INLINE const Pair* four(const Sum* from, Pair* room) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(room),
                     reinterpret_cast<__m128i>(_mm256_cvtneps_pbh(_mm256_loadu_ps(from))));
    return room;
  }
  static GUNN_INLINE Vector<Pair> neighbours(const Sum* from) {
    return reinterpret_cast<Vector<Pair>>(narrow_both(load<Sum>(from), load<Sum>(from + Simd<Sum>::lanes)));
  }

  // The pixel pairs of one of the two channels whose pairs fill a row of a tile.
  static GUNN_INLINE void regroup(const Pair* row, int64_t part, Pair* to) {
    constexpr Halves kFirst{0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                            32, 34, 36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62};
    const auto low = reinterpret_cast<Halves>(load<Pair>(row));
    const auto high = reinterpret_cast<Halves>(load<Pair>(row + Simd<Pair>::lanes));
    store<Pair>(to, reinterpret_cast<Vector<Pair>>(part ? __builtin_shuffle(low, high, kFirst + 1)
                                                        : __builtin_shuffle(low, high, kFirst)));
  }

  static GUNN_INLINE Vector<Sum> part(const Pair* p, int64_t part) {
    const auto bits = reinterpret_cast<Bits<Vector<Sum>>>(load<Pair>(p));
    return reinterpret_cast<Vector<Sum>>(part ? bits & 0xffff0000 : bits << 16);
  }
  static GUNN_INLINE void set_part(Pair* p, int64_t part, Vector<Sum> values) {
    const auto bits = reinterpret_cast<Bits<Vector<Sum>>>(load<Pair>(p)), own = Format<BFloat16>::narrow(values);
    store<Pair>(p, reinterpret_cast<Vector<Pair>>(part ? (bits & 0xffff) | own << 16 : (bits & 0xffff0000) | own));
  }
};
#endif

template <class Factor>
using Sum = typename Products<Factor>::Sum;
template <class Factor>
constexpr int64_t kDepth = Products<Factor>::depth;

// Factors of a product of this depth.
template <class Factor>
constexpr int64_t factors(int64_t depth) {
  return (depth + kDepth<Factor> - 1) / kDepth<Factor>;
}

// Where the numbers of a factor lie that is packed: [j] is the factor of number j from each of them on.
template <class Factor>
struct Sources {
  const Sum<Factor>* at[kDepth<Factor>];

  GUNN_INLINE Factor operator[](int64_t j) const {
    Sum<Factor> values[kDepth<Factor>];
    for (int64_t d = 0; d < kDepth<Factor>; ++d) values[d] = at[d][j];
    return Products<Factor>::join(values);
  }
};
// Of factor f, where number c of the depth lies at pointer(c): zeros beyond the depth.
template <class Factor, class Pointer>
GUNN_INLINE Sources<Factor> sources(int64_t f, int64_t depth, const Pointer& pointer) {
  static constexpr Sum<Factor> kZeros[16] = {};  // as many as a block has rows, or a kernel taps
  Sources<Factor> from;
  for (int64_t d = 0; d < kDepth<Factor>; ++d) {
    const int64_t c = f * kDepth<Factor> + d;
    from.at[d] = c < depth ? pointer(c) : kZeros;
  }
  return from;
}

// Rows [r, r + depth of a factor) of something, zero from `rows` on, as one vector of factors.
template <class Factor, class Row>
GUNN_INLINE Vector<Factor> join_rows(int64_t r, int64_t rows, Row row) {
  Vector<Sum<Factor>> values[kDepth<Factor>];
  GUNN_UNROLL for (int64_t j = 0; j < kDepth<Factor>; ++j) {
    values[j] = r + j < rows ? row(r + j) : Vector<Sum<Factor>>{};
  }
  return Products<Factor>::join(values);
}

// One vector of channel c of a tile, from pixel `pixel` of the tile on.
template <class Factor>
GUNN_INLINE Vector<Sum<Factor>> load_channel(const Factor* tile, int64_t c, int64_t pixel) {
  return Products<Factor>::part(tile + c / kDepth<Factor> * Simd<Factor>::tile + pixel, c % kDepth<Factor>);
}
template <class Factor>
GUNN_INLINE void store_channel(Factor* tile, int64_t c, int64_t pixel, Vector<Sum<Factor>> values) {
  Products<Factor>::set_part(tile + c / kDepth<Factor> * Simd<Factor>::tile + pixel, c % kDepth<Factor>, values);
}

// The numbers of channel c of a tile; those of neighbouring pixels are a factor's depth apart.
template <class Factor>
GUNN_INLINE auto channel_elements(Factor* tile, int64_t c) {
  using Element = typename Products<std::remove_const_t<Factor>>::Element;
  using Pointer = std::conditional_t<std::is_const_v<Factor>, const Element*, Element*>;
  constexpr int64_t D = kDepth<std::remove_const_t<Factor>>;
  return reinterpret_cast<Pointer>(tile + c / D * Simd<std::remove_const_t<Factor>>::tile) + c % D;
}

// `rows` rows of one tile as the factors of a product over them; `room` is used where that takes a copy.
template <class Factor>
GUNN_INLINE const Factor* row_factors(const Sum<Factor>* from, int64_t rows, Factor* room) {
  constexpr int64_t T = Simd<Factor>::tile, L = Simd<Factor>::lanes;
  if constexpr (kDepth<Factor> == 1) {
    return from;
  } else {
    for (int64_t v = 0; v < T; v += L) {
      for (int64_t r = 0; r < rows; r += kDepth<Factor>) {
        const auto row = [&](int64_t at) { return load<Sum<Factor>>(from + at * T + v); };
        store<Factor>(room + r / kDepth<Factor> * T + v, join_rows<Factor>(r, rows, row));
      }
    }
    return room;
  }
}

// `rows` rows of one tile as numbers of a product over pixels, [row][pixel]; `room` is used where that takes a copy.
template <class Factor>
GUNN_INLINE auto pixel_elements(const Sum<Factor>* from, int64_t rows, Factor* room) {
  constexpr int64_t T = Simd<Factor>::tile;
  if constexpr (kDepth<Factor> == 1) {
    return from;
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      store<Factor>(room + r * T / kDepth<Factor>, Products<Factor>::neighbours(from + r * T));
    }
    return reinterpret_cast<const typename Products<Factor>::Element*>(room);
  }
}
// The same from `channels` channels as factors of a product over channels.
template <class Factor>
GUNN_INLINE void channels_to_pixels(const Factor* from, int64_t channels, Factor* to) {
  constexpr int64_t T = Simd<Factor>::tile, D = kDepth<Factor>;
  for (int64_t c = 0; c < channels; ++c) Products<Factor>::regroup(from + c / D * T, c % D, to + c * T / D);
}

// Numbers of neighbours in depth, `step` apart in `from`, as factors: one from each of the first `size` - `step` on.
// `room` is used where that takes a copy, and written and `from` read in whole vectors.
template <class Factor>
GUNN_INLINE const Factor* pixel_factors(const Sum<Factor>* from, int64_t step, int64_t size, Factor* room) {
  if constexpr (kDepth<Factor> == 1) {
    return from;
  } else {
    for (int64_t j = 0; j < size - step; j += Simd<Factor>::lanes) {
      const auto neighbour = [&](int64_t at) { return load<Sum<Factor>>(from + j + at * step); };
      store<Factor>(room + j, join_rows<Factor>(0, kDepth<Factor>, neighbour));
    }
    return room;
  }
}

}  // namespace
}  // namespace gunn
