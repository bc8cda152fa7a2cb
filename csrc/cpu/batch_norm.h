// Batch norm as a scale and a shift, its statistics, and the three numbers of its backward.
//
// Statistics: per image and channel, float sums of (z - pivot) and its square in vector lanes; the pivot is the
// channel's first pixel, so channels far from zero lose nothing. Images are added up in double; threads are combined
// in order, so the bits depend on the thread count and on nothing else.
#pragma once

#include <cmath>

#include "cpu/simd.h"
#include "cpu/tiles.h"

namespace gunn {
namespace {

// Two running sums for each of `rows` channels: vector lanes for one image, doubles over images.
template <class Scalar>
struct Sums {
  Vector<Scalar>*first_lanes, *second_lanes;
  double *first, *second;
  Scalar* pivot;

  void take(Arena& arena, int64_t rows) {
    first_lanes = arena.take<Vector<Scalar>>(rows);
    second_lanes = arena.take<Vector<Scalar>>(rows);
    first = arena.take<double>(rows);
    second = arena.take<double>(rows);
    pivot = arena.take<Scalar>(rows);
  }
  void clear(int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r) {
      first_lanes[r] = second_lanes[r] = Vector<Scalar>{};
      first[r] = second[r] = 0;
    }
  }
  void finish_image(int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r) {
      first[r] += sum_of_lanes<Scalar>(first_lanes[r]);
      second[r] += sum_of_lanes<Scalar>(second_lanes[r]);
      first_lanes[r] = second_lanes[r] = Vector<Scalar>{};
    }
  }
};

// Adds one tile's z - pivot and (z - pivot)^2.
template <class Scalar>
GUNN_NOINLINE void add_moments(const Sums<Scalar>& sums, const Scalar* z, int64_t rows,
                               const typename Simd<Scalar>::Int* mask) {
  constexpr int64_t T = Simd<Scalar>::tile, L = Simd<Scalar>::lanes;
  const Mask<Scalar> mask0 = load_mask<Scalar>(mask), mask1 = load_mask<Scalar>(mask + L);
  for (int64_t r = 0; r < rows; ++r) {
    const Scalar pivot = sums.pivot[r];
    const Vector<Scalar> a = keep<Scalar>(load<Scalar>(z + r * T) - pivot, mask0);
    const Vector<Scalar> b = keep<Scalar>(load<Scalar>(z + r * T + L) - pivot, mask1);
    sums.first_lanes[r] += a + b;
    sums.second_lanes[r] += a * a + b * b;
  }
}

// Adds one tile's d and d * (z - mean); d is zero at padding pixels.
template <class Scalar>
GUNN_NOINLINE void add_gradient_sums(const Sums<Scalar>& sums, int64_t first_row, const Scalar* d, const Scalar* z,
                                     const Scalar* mean, int64_t rows) {
  constexpr int64_t T = Simd<Scalar>::tile, L = Simd<Scalar>::lanes;
  for (int64_t r = 0; r < rows; ++r) {
    const Vector<Scalar> d0 = load<Scalar>(d + r * T), d1 = load<Scalar>(d + r * T + L);
    sums.first_lanes[first_row + r] += d0 + d1;
    sums.second_lanes[first_row + r] +=
        d0 * (load<Scalar>(z + r * T) - mean[r]) + d1 * (load<Scalar>(z + r * T + L) - mean[r]);
  }
}

// The batch norms of one segment, row by row as in LayerShape::rows.
template <class Scalar>
struct Affine {
  Scalar *scale, *shift, *mean, *inverse;  // y = z * scale + shift; inverse = 1 / sqrt(var + eps)

  void take(Arena& arena, int64_t rows) {
    scale = arena.take<Scalar>(rows);
    shift = arena.take<Scalar>(rows);
    mean = arena.take<Scalar>(rows);
    inverse = arena.take<Scalar>(rows);
  }
  Affine at(int64_t row) const { return {scale + row, shift + row, mean + row, inverse + row}; }

  // From statistics already rounded to Scalar, so that forward and backward see the same numbers.
  void set(int64_t row, Scalar mean_, Scalar var, Scalar weight, Scalar bias, double eps) const {
    mean[row] = mean_;
    inverse[row] = static_cast<Scalar>(1.0 / std::sqrt(static_cast<double>(var) + eps));
    scale[row] = weight * inverse[row];
    shift[row] = bias - mean_ * scale[row];
  }
};

// dz = d * a + (z - mean) * b + c.
template <class Scalar>
struct Slope {
  Scalar *a, *b, *c;

  void take(Arena& arena, int64_t rows) {
    a = arena.take<Scalar>(rows);
    b = arena.take<Scalar>(rows);
    c = arena.take<Scalar>(rows);
  }
  // `sum` of d and `product` of d * (z - mean) over `count` values; with given statistics these do not depend on z.
  void set(int64_t row, const Affine<Scalar>& affine, int64_t affine_row, double sum, double product, double count,
           bool batch_statistics) const {
    const double scale = affine.scale[affine_row], inverse = affine.inverse[affine_row];
    a[row] = affine.scale[affine_row];
    b[row] = batch_statistics ? static_cast<Scalar>(-scale * inverse * inverse * product / count) : Scalar(0);
    c[row] = batch_statistics ? static_cast<Scalar>(-scale * sum / count) : Scalar(0);
  }
};

// out = gradient of the batch norm's input for `rows` rows of one tile, zero at padding pixels.
template <class Scalar>
GUNN_NOINLINE void batch_norm_backward(const Scalar* d, const Scalar* z, const Scalar* mean, const Slope<Scalar>& slope,
                                       int64_t first_row, int64_t rows, const typename Simd<Scalar>::Int* mask,
                                       Scalar* out) {
  constexpr int64_t T = Simd<Scalar>::tile, L = Simd<Scalar>::lanes;
  for (int64_t v = 0; v < 2; ++v) {
    const Mask<Scalar> inside = load_mask<Scalar>(mask + v * L);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = r * T + v * L, row = first_row + r;
      const Vector<Scalar> dz =
          load<Scalar>(d + at) * slope.a[row] + (load<Scalar>(z + at) - mean[r]) * slope.b[row] + slope.c[row];
      store<Scalar>(out + at, keep<Scalar>(dz, inside));
    }
  }
}

// out = relu(z * scale + shift) for `rows` rows of one tile, zero at padding pixels.
template <class Scalar>
GUNN_NOINLINE void activate(const Scalar* z, const Affine<Scalar>& affine, int64_t rows,
                            const typename Simd<Scalar>::Int* mask, Scalar* out) {
  constexpr int64_t T = Simd<Scalar>::tile, L = Simd<Scalar>::lanes;
  for (int64_t v = 0; v < 2; ++v) {
    const Mask<Scalar> inside = load_mask<Scalar>(mask + v * L);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = r * T + v * L;
      const Vector<Scalar> h = relu<Scalar>(load<Scalar>(z + at) * affine.scale[r] + affine.shift[r]);
      store<Scalar>(out + at, keep<Scalar>(h, inside));
    }
  }
}

// d, in place: through the ReLU that follows z * scale + shift; zero at padding pixels.
template <class Scalar>
GUNN_NOINLINE void activate_backward(Scalar* d, const Scalar* z, const Affine<Scalar>& affine, int64_t rows,
                                     const typename Simd<Scalar>::Int* mask) {
  constexpr int64_t T = Simd<Scalar>::tile, L = Simd<Scalar>::lanes;
  for (int64_t v = 0; v < 2; ++v) {
    const Mask<Scalar> inside = load_mask<Scalar>(mask + v * L);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = r * T + v * L;
      const Vector<Scalar> input = load<Scalar>(z + at) * affine.scale[r] + affine.shift[r];
      store<Scalar>(d + at, keep<Scalar>(relu_gradient<Scalar>(load<Scalar>(d + at), input), inside));
    }
  }
}

}  // namespace
}  // namespace gunn
