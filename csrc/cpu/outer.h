// The weight gradients: sums over pixels of outer products of an input and a gradient.
//
//     out[c][row] += sum over pixels of input[c][pixel] * gradient[pixel][row]
//
// Lanes are rows of the gradient, which is transposed for that. The input has several times as many channels: it is
// read where it lies, number by number, each of which multiplies all rows. A register block is 12 channels x 2 vectors,
// 8 x 3 or 24 x 1 with AVX-512, half as many channels otherwise. The last vector may be a half one, where vectors are
// so wide that a layer's rows would leave much of it empty.
#pragma once

#include "cpu/gemm.h"

namespace gunn {
namespace {

constexpr bool kHalfVectors = GUNN_VECTOR_BYTES == 64;

// Rows of a gradient as they lie in memory: with what is multiplied beyond the last one.
template <class Scalar>
constexpr int64_t padded_rows(int64_t rows) {
  return round_up(rows, kHalfVectors ? Simd<Scalar>::half : Simd<Scalar>::lanes);
}

template <class Factor>
using Element = typename Products<Factor>::Element;

// The pixels of a sum: `lines` runs of `count` factors, the lines at steps of their own in input and gradient.
struct PixelLines {
  int64_t lines, count;
  int64_t input_line, gradient_line;
};

// R channels, `channel` elements apart, and V vectors of rows, the last one a half one where `half`.
template <class Factor, int64_t channel, int R, int V, bool half>
GUNN_NOINLINE void outer_block(const PixelLines& pixels, const Element<Factor>* input, const Factor* gradient,
                               int64_t pitch, Sum<Factor>* out) {
  using Scalar = Sum<Factor>;
  using Half = typename Simd<Scalar>::Half;
  using HalfFactor = typename Simd<Factor>::Half;
  constexpr int64_t L = Simd<Scalar>::lanes;
  constexpr int kFull = half ? V - 1 : V;
  Vector<Scalar> sums[R][V];
  Half last[R];
  clear<Scalar, R, V>(sums);
  for (int r = 0; half && r < R; ++r) last[r] = Half{};
  for (int64_t line = 0; line < pixels.lines; ++line) {
    const Element<Factor>* from = input + line * pixels.input_line;
    const Factor* rows = gradient + line * pixels.gradient_line;
    for (int64_t p = 0; p < pixels.count; ++p) {
      Vector<Factor> full[V];
      GUNN_UNROLL for (int v = 0; v < kFull; ++v) full[v] = load<Factor>(rows + v * L);
      HalfFactor rest{};
      if constexpr (half) rest = *reinterpret_cast<const HalfFactor*>(rows + kFull * L);
      GUNN_UNROLL for (int r = 0; r < R; ++r) {
        const Vector<Factor> value = Products<Factor>::in_all_lanes(Products<Factor>::at(from + r * channel));
        GUNN_UNROLL for (int v = 0; v < kFull; ++v) Products<Factor>::add(sums[r][v], full[v], value);
        if constexpr (half) Products<Factor>::add(last[r], rest, low_half<Factor>(value));
      }
      from += kDepth<Factor>;
      rows += pitch;
    }
  }
  GUNN_UNROLL for (int r = 0; r < R; ++r) {
    Scalar* to = out + r * pitch;
    GUNN_UNROLL for (int v = 0; v < kFull; ++v) store<Scalar>(to + v * L, load<Scalar>(to + v * L) + sums[r][v]);
    if constexpr (half) *reinterpret_cast<Half*>(to + kFull * L) += last[r];
  }
}

// Calls visit(number of vectors, whether the last is a half one, first row) for groups that cover `rows`.
template <class Scalar, class Visit>
GUNN_INLINE void for_row_vectors(int64_t rows, Visit visit) {
  constexpr int64_t L = Simd<Scalar>::lanes;
  const bool half = padded_rows<Scalar>(rows) % L != 0;
  int64_t left = (rows + L - 1) / L, row = 0;
  for (; left > 3; left -= 2, row += 2 * L) visit(Rows<2>(), std::false_type(), row);
  const auto visit_last = [&](auto vectors) {
    if (!half) return visit(vectors, std::false_type(), row);
    if constexpr (kHalfVectors) visit(vectors, std::true_type(), row);
  };
  if (left == 3) visit_last(Rows<3>());
  if (left == 2) visit_last(Rows<2>());
  if (left == 1) visit_last(Rows<1>());
}

// out[channels][padded rows] of a gradient [pixel][padded rows], whose padding may be anything.
template <class Factor, int64_t channel>
GUNN_INLINE void outer_product(const PixelLines& pixels, const Element<Factor>* input, int64_t channels,
                               const Factor* gradient, int64_t rows, Sum<Factor>* out) {
  using Scalar = Sum<Factor>;
  const int64_t pitch = padded_rows<Scalar>(rows);
  for_row_vectors<Scalar>(rows, [&](auto vectors, auto half, int64_t row) {
    constexpr int V = decltype(vectors)::value;
    for_row_blocks<2 * kBlockRows / V>(channels, [&](auto block, int64_t c) {
      constexpr int R = decltype(block)::value;
      outer_block<Factor, channel, R, V, decltype(half)::value>(pixels, input + c * channel, gradient + row, pitch,
                                                                out + c * pitch + row);
    });
  });
}

}  // namespace
}  // namespace gunn
