// Batch norms as tables of a few numbers a row, made where they do not come out of a stage: for given statistics, and
// for steps, between which a caller may have changed them. One thread a row.
#pragma once

#include "cuda/view.cuh"

namespace gunn {

template <class Wide>
GUNN_DEVICE Affine<Wide> make_affine(Wide mean, Wide var, Wide weight, Wide bias, double eps) {
  Affine<Wide> affine;
  affine.mean = mean;
  affine.inverse = static_cast<Wide>(1.0 / sqrt(static_cast<double>(var) + eps));
  affine.scale = weight * affine.inverse;
  affine.shift = bias - mean * affine.scale;
  return affine;
}

// d, a gradient behind the batch norm, has `sum`; d * (z - mean) has `product`; both over `count` values.
template <class Wide>
GUNN_DEVICE Slope<Wide> make_slope(const Affine<Wide>& affine, double sum, double product, double count) {
  const double scale = affine.scale, inverse = affine.inverse;
  return {affine.scale, static_cast<Wide>(-scale * inverse * inverse * product / count),
          static_cast<Wide>(-scale * sum / count)};
}

// Rows of one batch norm of all segments, as arrays (P, channels) and as rows [row, row + channels) of (P, rows).
struct RowRange {
  int row, channels, rows, segments;

  GUNN_DEVICE bool mine(int64_t* in_norm, int64_t* in_table) const {
    const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, segment = at / channels;
    *in_norm = at;
    *in_table = segment * rows + row + at % channels;
    return segment < segments;
  }
};

template <class Wide>
__global__ void set_affine(RowRange range, const Wide* weight, const Wide* bias, const Wide* mean, const Wide* var,
                           Affine<Wide>* affine, double eps) {
  int64_t in_norm, at;
  if (!range.mine(&in_norm, &at)) return;
  affine[at] = make_affine(mean[at], var[at], weight[in_norm], bias[in_norm], eps);
}

// With given statistics (`sum` null) dz = d * scale.
template <class Wide>
__global__ void set_slopes(RowRange range, const Affine<Wide>* affine, const double* sum, const double* product,
                           double count, Slope<Wide>* slopes) {
  int64_t in_norm, at;
  if (!range.mine(&in_norm, &at)) return;
  slopes[at] = sum ? make_slope(affine[at], sum[at], product[at], count) : Slope<Wide>{affine[at].scale, 0, 0};
}

// Zeros, for the counters of the exchanges.
static __global__ void clear(unsigned* data, int64_t count) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at < count) data[at] = 0;
}

}  // namespace gunn
