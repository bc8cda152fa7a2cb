// What the kernels compute with, and the 16-bit numbers of feature maps.
//
//   Storage   of feature maps; the state is rounded to it at every write-back, so that the backward, which has it from
//             y, sees the bits that the forward saw
//   Scalar    of everything else: parameters, pre-activations, gradients, accumulators
//   Factor    of products, and of the state: Scalar, or a Pair of bfloat16 (factors.h)
//
// The conversions are made of integers and take one number as they take a vector of them: every instruction set
// vectorises both.
#pragma once

#include <type_traits>

#include "core/layer.h"
#include "cpu/simd.h"

namespace gunn {
namespace {

template <class Storage_, class Scalar_ = Storage_, class Factor_ = Scalar_>
struct Precision {
  using Storage = Storage_;
  using Scalar = Scalar_;
  using Factor = Factor_;
  using Forward = ForwardTensors<Storage, Scalar, Scalar>;
  using Backward = BackwardTensors<Storage, Scalar, Scalar>;
  using Table = Kernels<Storage, Scalar, Scalar>;
};

// Unsigned integers beside floats: one or a vector.
template <class Floats>
struct BitsOf {
  typedef uint32_t type __attribute__((vector_size(sizeof(Floats))));
};
template <>
struct BitsOf<float> {
  using type = uint32_t;
};
template <class Floats>
using Bits = typename BitsOf<Floats>::type;

// A 16-bit number, in the low half of 32 bits, from and to float32; rounded to nearest, ties to even.
template <class Storage>
struct Format;

template <>
struct Format<BFloat16> {
  template <class Floats>
  static GUNN_INLINE Floats widen(Bits<Floats> bits) {
    return __builtin_bit_cast(Floats, bits << 16);
  }
  template <class Floats>
  static GUNN_INLINE Bits<Floats> narrow(Floats value) {
    const Bits<Floats> bits = __builtin_bit_cast(Bits<Floats>, value);
    const Bits<Floats> number = bits + (0x7fff + (bits >> 16 & 1)), nan = bits | 0x400000;
    return (value != value ? nan : number) >> 16;
  }
};

template <>
struct Format<Float16> {
  // Shifted into place, the exponent is too small by 112: the product puts it right, subnormal numbers included.
  template <class Floats>
  static GUNN_INLINE Floats widen(Bits<Floats> bits) {
    const Bits<Floats> sign = (bits & 0x8000) << 16, magnitude = (bits & 0x7fff) << 13;
    const Bits<Floats> finite = __builtin_bit_cast(Bits<Floats>, __builtin_bit_cast(Floats, magnitude) * 0x1p112f);
    const Bits<Floats> special = magnitude | 0x7f800000;  // infinity or NaN
    return __builtin_bit_cast(Floats, sign | ((bits & 0x7c00) == 0x7c00 ? special : finite));
  }
  template <class Floats>
  static GUNN_INLINE Bits<Floats> narrow(Floats value) {
    const Bits<Floats> bits = __builtin_bit_cast(Bits<Floats>, value), magnitude = bits & 0x7fffffff;
    const Floats size = __builtin_bit_cast(Floats, magnitude);
    const Bits<Floats> normal = (magnitude + (0xfff + (magnitude >> 13 & 1)) - 0x38000000) >> 13;
    // Multiples of 2^-24: adding a number whose last bit is that one lets the FPU round.
    const Bits<Floats> subnormal = __builtin_bit_cast(Bits<Floats>, size + 0.5f) - 0x3f000000;
    const Bits<Floats> infinity = Bits<Floats>{} + 0x7c00, nan = Bits<Floats>{} + 0x7e00;
    const Bits<Floats> finite = size < 0x1p-14f ? subnormal : normal;
    const Bits<Floats> number = size >= 65520.0f ? infinity : finite;
    return (bits >> 16 & 0x8000) | (value != value ? nan : number);
  }
};

template <class Scalar, class Storage>
GUNN_INLINE Scalar widen(Storage value) {
  if constexpr (std::is_same_v<Scalar, Storage>) {
    return value;
  } else {
    return Format<Storage>::template widen<Scalar>(value.bits);
  }
}
template <class Storage, class Scalar>
GUNN_INLINE Storage narrow(Scalar value) {
  if constexpr (std::is_same_v<Scalar, Storage>) {
    return value;
  } else {
    return {static_cast<uint16_t>(Format<Storage>::narrow(value))};
  }
}

// A vector's numbers as Storage holds them.
template <class Storage, class Floats>
GUNN_INLINE Floats rounded(Floats values) {
  if constexpr (sizeof(Storage) == 2) {
    return Format<Storage>::template widen<Floats>(Format<Storage>::narrow(values));
  } else {
    return values;
  }
}

}  // namespace
}  // namespace gunn
