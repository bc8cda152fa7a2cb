// Batch norms as tables of a few numbers a row, made where they do not come out of a stage: for given statistics, and
// for steps, between which a caller may have changed them. One thread a row (prepare.cuh).
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
// in tables (P, z_rows), where `padded_channels` have a place.
struct NormRows {
  int channels, padded_channels, row, rows, z_row, z_rows;
};

// What tables are made from.
template <class Wide>
struct TableSource {
  bool affine, slopes;  // which of them: mean, scale, shift, inverse; a, b, c, for which the others are there or made
  const Wide* statistics;  // (2, P, rows), or null: zeros
  double eps;
  const double* sums;  // (2, P, rows): sum and product of every slope; null: dz = d * scale, as with given statistics
  double count;
};

// Place `at` of a norm's; zeros in the padding.
template <class Wide>
GUNN_DEVICE void make_tables(const NormRows& norm, int64_t at, int64_t segments, const Wide* weight, const Wide* bias,
                             const TableSource<Wide>& from, const Tables<Wide>& tables) {
  const int64_t segment = at / norm.padded_channels, channel = at % norm.padded_channels;
  const int64_t in_norm = segment * norm.channels + channel, to = segment * norm.z_rows + norm.z_row + channel;
  const int64_t mean = segment * norm.rows + norm.row + channel, var = mean + segments * norm.rows;
  const bool real = channel < norm.channels;
  if (from.affine && real && from.statistics != nullptr) {
    set_affine(tables, to, from.statistics[mean], from.statistics[var], weight[in_norm], bias[in_norm], from.eps);
  } else if (from.affine) {
    tables.mean[to] = tables.scale[to] = tables.shift[to] = tables.inverse[to] = 0;
  }
  if (from.slopes && real && from.sums != nullptr) {
    set_slope(tables, to, from.sums[mean], from.sums[var], from.count);
  } else if (from.slopes) {
    tables.a[to] = tables.scale[to];
    tables.b[to] = tables.c[to] = 0;
  }
}

}  // namespace gunn
