// What the kernels compute with, one struct for each dtype:
//
//   Storage   in feature maps and in the workspace; every result is rounded to it before anything else reads it
//   Wide      parameters, statistics, sums, accumulators
//   Element   one operand of a product, in shared memory
//
// Tensor cores take 32-bit registers of operands: two 16-bit values that are neighbours in depth, or one TF32.
#pragma once

#include "cuda/launch.cuh"

namespace gunn {

struct Float64 {
  using Storage = double;
  using Wide = double;
  using Element = double;
  static constexpr bool kTensorCores = false;
  static GUNN_DEVICE double element(double value) { return value; }
};

struct Float32 {
  using Storage = float;
  using Wide = float;
  using Element = float;
  static constexpr bool kTensorCores = false;
  static GUNN_DEVICE float element(float value) { return value; }
};

struct TensorFloat32 {
  using Storage = float;
  using Wide = float;
  using Element = float;
  static constexpr bool kTensorCores = true;
  static GUNN_DEVICE float element(float value) { return round_to_tf32(value); }
  static GUNN_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_tf32(c, a, b); }
};

template <class Scalar>
struct Float16Bits {
  using Storage = Scalar;
  using Wide = float;
  using Element = Scalar;
  static constexpr bool kTensorCores = true;
  static GUNN_DEVICE Scalar element(float value) { return from_float<Scalar>(value); }
  static GUNN_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma<Scalar>(c, a, b);
  }
};

}  // namespace gunn
