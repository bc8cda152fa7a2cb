// Batch norm as a scale and a shift, its statistics, and the three numbers of its backward.
//
// Sums over pixels run in vector lanes for kTilesARun tiles and are then merged in double. The statistics' lanes hold
// z - pivot, where the pivot is the mean of all pixels merged so far (a first pixel to begin with, for one tile):
// channels far from zero lose nothing, and neither does an outlier. Threads are combined in order, so the bits depend
// on the thread count and on nothing else.
#pragma once

#include <cmath>

#include "cpu/simd.h"
#include "cpu/tiles.h"

namespace gunn {
namespace {

constexpr int64_t kTilesARun = 16;

// Mean and sum of squared deviations of `rows` channels, over the tiles given to it.
template <class Scalar>
struct Moments {
  struct Counts {
    double merged, pending;  // pixels
    int64_t tiles;           // pending
  };
  Vector<Scalar>*sum_lanes, *square_lanes;
  double *mean, *squares;
  Scalar* pivot;
  Counts* counts;

  void take(Arena& arena, int64_t rows) {
    sum_lanes = arena.take<Vector<Scalar>>(rows);
    square_lanes = arena.take<Vector<Scalar>>(rows);
    mean = arena.take<double>(rows);
    squares = arena.take<double>(rows);
    pivot = arena.take<Scalar>(rows);
    counts = arena.take<Counts>(1);
  }
  void clear(int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r) {
      sum_lanes[r] = square_lanes[r] = Vector<Scalar>{};
      mean[r] = squares[r] = 0;
    }
    *counts = {0, 0, 0};
  }
  // Adds one tile. The very first must begin with a pixel of the image, as every tile does.
  GUNN_NOINLINE void add(const Scalar* z, int64_t rows, const typename Simd<Scalar>::Int* mask) const {
    constexpr int64_t T = Simd<Scalar>::tile, L = Simd<Scalar>::lanes;
    const bool first = counts->merged == 0;
    if (first) {
      for (int64_t r = 0; r < rows; ++r) pivot[r] = z[r * T];
    }
    const Mask<Scalar> mask0 = load_mask<Scalar>(mask), mask1 = load_mask<Scalar>(mask + L);
    for (int64_t r = 0; r < rows; ++r) {
      const Vector<Scalar> a = keep<Scalar>(load<Scalar>(z + r * T) - pivot[r], mask0);
      const Vector<Scalar> b = keep<Scalar>(load<Scalar>(z + r * T + L) - pivot[r], mask1);
      sum_lanes[r] += a + b;
      square_lanes[r] += a * a + b * b;
    }
    for (int64_t j = 0; j < T; ++j) counts->pending -= static_cast<double>(mask[j]);
    if (++counts->tiles == kTilesARun || first) merge(rows);
  }
  // Takes the lanes into mean and squares (Chan et al.).
  void merge(int64_t rows) const {
    const double n = counts->pending, total = counts->merged + n;
    if (n == 0) return;
    for (int64_t r = 0; r < rows; ++r) {
      const double sum = sum_of_lanes<Scalar>(sum_lanes[r]), square = sum_of_lanes<Scalar>(square_lanes[r]);
      const double apart = static_cast<double>(pivot[r]) + sum / n - mean[r];
      mean[r] += apart * n / total;
      squares[r] += square - sum * sum / n + apart * apart * counts->merged * n / total;
      sum_lanes[r] = square_lanes[r] = Vector<Scalar>{};
      pivot[r] = static_cast<Scalar>(mean[r]);
    }
    *counts = {total, 0, 0};
  }
};

// The backward's sums of d and of d * (z - mean) for `rows` channels.
template <class Scalar>
struct GradientSums {
  Vector<Scalar>*sum_lanes, *product_lanes;
  double *sum, *product;
  int64_t* tiles;  // pending

  void take(Arena& arena, int64_t rows) {
    sum_lanes = arena.take<Vector<Scalar>>(rows);
    product_lanes = arena.take<Vector<Scalar>>(rows);
    sum = arena.take<double>(rows);
    product = arena.take<double>(rows);
    tiles = arena.take<int64_t>(1);
  }
  void clear(int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r) {
      sum_lanes[r] = product_lanes[r] = Vector<Scalar>{};
      sum[r] = product[r] = 0;
    }
    *tiles = 0;
  }
  // Adds one tile to rows [first_row, first_row + rows); d is zero at padding pixels.
  GUNN_NOINLINE void add(int64_t first_row, const Scalar* d, const Scalar* z, const Scalar* mean, int64_t rows) const {
    constexpr int64_t T = Simd<Scalar>::tile, L = Simd<Scalar>::lanes;
    for (int64_t r = 0; r < rows; ++r) {
      const Vector<Scalar> d0 = load<Scalar>(d + r * T), d1 = load<Scalar>(d + r * T + L);
      sum_lanes[first_row + r] += d0 + d1;
      product_lanes[first_row + r] +=
          d0 * (load<Scalar>(z + r * T) - mean[r]) + d1 * (load<Scalar>(z + r * T + L) - mean[r]);
    }
  }
  void finish_tile(int64_t rows) const {
    if (++*tiles == kTilesARun) merge(rows);
  }
  void merge(int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r) {
      sum[r] += sum_of_lanes<Scalar>(sum_lanes[r]);
      product[r] += sum_of_lanes<Scalar>(product_lanes[r]);
      sum_lanes[r] = product_lanes[r] = Vector<Scalar>{};
    }
    *tiles = 0;
  }
};

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

// dz = d * a + (z - mean) * b + c; with given statistics dz = d * a, whatever z is.
template <class Scalar>
struct Slope {
  Scalar *a, *b, *c;
  bool batch_statistics;

  void take(Arena& arena, int64_t rows, bool batch_statistics_) {
    a = arena.take<Scalar>(rows);
    b = arena.take<Scalar>(rows);
    c = arena.take<Scalar>(rows);
    batch_statistics = batch_statistics_;
  }
  // `sum` of d and `product` of d * (z - mean) over `count` values.
  void set(int64_t row, const Affine<Scalar>& affine, int64_t affine_row, double sum, double product,
           double count) const {
    const double scale = affine.scale[affine_row], inverse = affine.inverse[affine_row];
    a[row] = affine.scale[affine_row];
    b[row] = static_cast<Scalar>(-scale * inverse * inverse * product / count);
    c[row] = static_cast<Scalar>(-scale * sum / count);
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
      Vector<Scalar> dz = load<Scalar>(d + at) * slope.a[row];
      if (slope.batch_statistics) dz += (load<Scalar>(z + at) - mean[r]) * slope.b[row] + slope.c[row];
      store<Scalar>(out + at, keep<Scalar>(dz, inside));
    }
  }
}

// Calls visit(factor of rows, first vector, second vector) with relu(z * scale + shift) of one tile, zero at padding
// pixels.
template <class Factor, class Visit>
GUNN_INLINE void for_activated(const Sum<Factor>* z, const Affine<Sum<Factor>>& affine, int64_t rows,
                               const typename Simd<Sum<Factor>>::Int* mask, const Visit& visit) {
  using Scalar = Sum<Factor>;
  constexpr int64_t T = Simd<Scalar>::tile, L = Simd<Scalar>::lanes;
  const Mask<Scalar> inside[2] = {load_mask<Scalar>(mask), load_mask<Scalar>(mask + L)};
  for (int64_t first = 0; first < rows; first += kDepth<Factor>) {
    Vector<Factor> h[2];
    GUNN_UNROLL for (int v = 0; v < 2; ++v) {
      h[v] = join_rows<Factor>(first, rows, [&](int64_t r) {
        const Vector<Scalar> y = load<Scalar>(z + r * T + v * L) * affine.scale[r] + affine.shift[r];
        return keep<Scalar>(relu<Scalar>(y), inside[v]);
      });
    }
    visit(first / kDepth<Factor>, h[0], h[1]);
  }
}
template <class Factor>
GUNN_NOINLINE void activate(const Sum<Factor>* z, const Affine<Sum<Factor>>& affine, int64_t rows,
                            const typename Simd<Sum<Factor>>::Int* mask, Factor* out) {
  constexpr int64_t T = Simd<Factor>::tile, L = Simd<Factor>::lanes;
  for_activated<Factor>(z, affine, rows, mask, [&](int64_t f, Vector<Factor> first, Vector<Factor> second) {
    store<Factor>(out + f * T, first);
    store<Factor>(out + f * T + L, second);
  });
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
