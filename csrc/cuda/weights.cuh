// The parameters as loaders of a product: rows of the loader are columns of the tile.
#pragma once

#include "cuda/view.cuh"

namespace gunn {

// A matrix of `split` rows with more rows in a second one behind; transposed, those rows are the depth.
template <class Wide, bool transposed>
struct Matrix {
  struct Row {
    bool valid;
    const Wide *upper, *lower;
  };
  using Column = int64_t;
  static constexpr bool rows_fast = transposed;
  const Wide *upper, *lower;
  int split;
  int64_t width;
  int first, count;  // rows of the loader from `first` on

  GUNN_DEVICE Row row(int m) const {
    const int64_t r = first + m;
    if (transposed) return {m < count, upper + r, lower + r};
    const Wide* data = r < split ? upper + r * width : lower + (r - split) * width;
    return {m < count, data, data};
  }
  GUNN_DEVICE Column column(int64_t depth) const { return depth; }
  GUNN_DEVICE Wide value(const Row& row, Column depth) const {
    if (!transposed) return row.upper[depth];
    return depth < split ? row.upper[depth * width] : row.lower[(depth - split) * width];
  }
};

// (channels, channels, 3, 3); depth is tap * channels + channel. Transposed, rows are the convolution's inputs.
template <class Wide, bool transposed>
struct Kernel3x3 {
  struct Row {
    bool valid;
    const Wide* data;
  };
  using Column = int64_t;
  static constexpr bool rows_fast = false;
  const Wide* data;
  int channels, first, count;

  GUNN_DEVICE Row row(int m) const {
    return {m < count, data + static_cast<int64_t>(first + m) * (transposed ? 9 : 9 * channels)};
  }
  GUNN_DEVICE Column column(int64_t depth) const {
    const int at = static_cast<int>(depth), tap = at / channels;
    return static_cast<int64_t>(at - tap * channels) * (transposed ? 9 * channels : 9) + tap;
  }
  GUNN_DEVICE Wide value(const Row& row, Column column) const { return row.data[column]; }
};

}  // namespace gunn
