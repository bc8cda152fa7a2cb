// Batch norms as tables of a few numbers a row, made where they do not come out of a stage: for given statistics, and
// for steps, between which a caller may have changed them. One thread a row.
#pragma once

#include "cuda/view.cuh"

namespace gunn {

// One batch norm's tensors (P, channels) among a unit's.
template <class Pointer>
__host__ GUNN_DEVICE Pointer norm_weight(const UnitTensors<Pointer>& unit, Norm norm) {
  return norm == Norm::reduce     ? unit.reduce_weight
         : norm == Norm::shortcut ? unit.shortcut_weight
         : norm == Norm::spatial  ? unit.spatial_weight
                                  : unit.project_weight;
}
template <class Pointer>
__host__ GUNN_DEVICE Pointer norm_bias(const UnitTensors<Pointer>& unit, Norm norm) {
  return norm == Norm::reduce     ? unit.reduce_bias
         : norm == Norm::shortcut ? unit.shortcut_bias
         : norm == Norm::spatial  ? unit.spatial_bias
                                  : unit.project_bias;
}

template <class Wide>
GUNN_DEVICE Wide inverse_deviation(Wide var, double eps) {
  return static_cast<Wide>(1.0 / sqrt(static_cast<double>(var) + eps));
}

template <class Wide>
GUNN_DEVICE void set_affine(const Tables<Wide>& tables, int64_t at, Wide mean, Wide var, Wide weight, Wide bias,
                            double eps) {
  const Wide inverse = inverse_deviation(var, eps), scale = weight * inverse;
  tables.mean[at] = mean;
  tables.inverse[at] = inverse;
  tables.scale[at] = scale;
  tables.shift[at] = bias - mean * scale;
}

// A batch norm's b and c. d, a gradient behind it, has `sum`; d * (z - mean) has `product`; both over `count` values.
template <class Wide>
struct Slope {
  Wide b, c;

  GUNN_DEVICE Slope(double scale, double inverse, double sum, double product, double count)
      : b(static_cast<Wide>(-scale * inverse * inverse * product / count)),
        c(static_cast<Wide>(-scale * sum / count)) {}
};
template <class Wide>
GUNN_DEVICE void set_slope(const Tables<Wide>& tables, int64_t at, double sum, double product, double count) {
  const Slope<Wide> slope(tables.scale[at], tables.inverse[at], sum, product, count);
  tables.a[at] = tables.scale[at];
  tables.b[at] = slope.b;
  tables.c[at] = slope.c;
}

// One batch norm of all segments: as parameters (P, channels), from `row` on in statistics (P, rows), from `z_row` on
// in tables (P, z_rows), where `padded_channels` have a place. One thread each.
struct NormRows {
  int channels, padded_channels, row, rows, z_row, z_rows, segments;

  GUNN_DEVICE bool mine(int64_t* in_norm, int64_t* in_statistics, int64_t* in_tables) const {
    const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, segment = at / padded_channels;
    const int64_t channel = at % padded_channels;
    *in_norm = channel < channels ? segment * channels + channel : -1;
    *in_statistics = segment * rows + row + channel;
    *in_tables = segment * z_rows + z_row + channel;
    return segment < segments;
  }
};

// Rows of zeros, as the padding keeps them; with statistics, scale and shift.
template <class Wide>
__global__ void make_tables(NormRows norm, const Wide* weight, const Wide* bias, const Wide* mean, const Wide* var,
                            Tables<Wide> tables, double eps) {
  int64_t in_norm, in_statistics, at;
  if (!norm.mine(&in_norm, &in_statistics, &at)) return;
  if (in_norm >= 0 && mean != nullptr) {
    set_affine(tables, at, mean[in_statistics], var[in_statistics], weight[in_norm], bias[in_norm], eps);
  } else {
    tables.mean[at] = tables.scale[at] = tables.shift[at] = tables.inverse[at] = 0;
  }
}

// With given statistics (`sum` null) dz = d * scale.
template <class Wide>
__global__ void make_slopes(NormRows norm, const double* sum, const double* product, double count,
                            Tables<Wide> tables) {
  int64_t in_norm, in_statistics, at;
  if (!norm.mine(&in_norm, &in_statistics, &at)) return;
  if (in_norm >= 0 && sum != nullptr) {
    set_slope(tables, at, sum[in_statistics], product[in_statistics], count);
  } else {
    tables.a[at] = tables.scale[at];
    tables.b[at] = tables.c[at] = 0;
  }
}

// Zeros, for the counters of the exchanges.
static __global__ void clear(unsigned* data, int64_t count) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at < count) data[at] = 0;
}

}  // namespace gunn
