// The short floating-point formats in plain bits, rounded as the GPU rounds: to nearest, ties to even (tf32: ties
// away).
#pragma once

#include <cstdint>

#include "emulator/vocabulary.h"

namespace gunn::emulator {

inline float bfloat16_to_float(uint16_t bits) { return bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

inline uint16_t float_to_bfloat16(float value) {
  if (value != value) return 0x7fff;  // the NaN a GPU's conversion gives
  const uint32_t bits = bit_cast<uint32_t>(value);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Shifted into place, a half's exponent is too small by 112: the product puts it right, subnormal numbers included.
inline float float16_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, magnitude = static_cast<uint32_t>(bits & 0x7fff)
                                                                                << 13;
  const float scaled = bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t special = (bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;  // infinity or NaN
  return bit_cast<float>(sign | bit_cast<uint32_t>(scaled) | special);
}

// Adding a number whose last bit is the half's last bit lets the FPU round, as it does for every sum.
inline uint16_t float_to_float16(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value), magnitude = bits & 0x7fffffff;
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // 65520 and above round to infinity
  if (magnitude < 0x38800000) {                       // below 2^-14: a multiple of 2^-24
    const float sum = bit_cast<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (bit_cast<uint32_t>(sum) - bit_cast<uint32_t>(0.5f)));
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000) >> 13));
}

inline float round_to_tf32(float value) {
  if (value != value) return value;
  return bit_cast<float>((bit_cast<uint32_t>(value) + 0x1000) & 0xffffe000u);
}

// What a tensor core reads of a float: the lowest 13 bits do not take part.
inline float truncate_to_tf32(uint32_t bits) { return bit_cast<float>(bits & 0xffffe000u); }

}  // namespace gunn::emulator
