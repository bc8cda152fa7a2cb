// What the instruction set can do at best: float32 multiply-adds between registers, as many at a time as a block has
// accumulators. Nothing but a yardstick.
#pragma once

#include "cpu/gemm.h"

namespace gunn {
namespace {

// Returns the FLOPs done.
GUNN_NOINLINE double multiply_add_registers(int64_t rounds) {
  constexpr int kSums = 2 * kBlockRows;
  volatile float unknown = 0.5f;  // to the compiler, which would know the result otherwise
  const Vector<float> factor = Vector<float>{} + unknown;
  Vector<float> sums[kSums];
  for (int j = 0; j < kSums; ++j) sums[j] = factor * unknown;  // each on its own: equal sums would be made one
  for (int64_t round = 0; round < rounds; ++round) {
    GUNN_UNROLL for (int j = 0; j < kSums; ++j) sums[j] = sums[j] * factor + factor;
  }
  for (int j = 1; j < kSums; ++j) sums[0] += sums[j];
  unknown = sums[0][0];
  return 2.0 * kSums * Simd<float>::lanes * static_cast<double>(rounds);
}

}  // namespace
}  // namespace gunn
