// The backward's chain of gradients, one kernel a stage, segments and units in reverse order. The pre-activations z of
// the segment are at hand; g is the gradient of the state, in the wide dtype. For one unit:
//
//   unit_gradient     d3 = gradient of the unit's output (the last unit's: g[c_i]); sums of d3, d3 * (z3 - mean)
//   project_backward  d2 = W3ᵀ dz3 through the ReLU; sums of d2, d2 * (z2 - mean)
//   spatial_backward  d1 = transposed conv3x3 of dz2 through the ReLU; sums of d1, d1 * (z1 - mean)
//   input_backward    g += W1ᵀ dz1 + Wsᵀ dzs; in a later unit the gradient of the one before: d3 + W1ᵀ dz1
//
// dz of a batch norm's input is computed where it is loaded, from d, z and three numbers a channel (view.cuh).
//
// Owns:      as in forward.cuh: tile of 64 pixels x tile of 64 channels of the result.
// Barriers:  none between blocks; sums travel as statistics do (exchange.cuh).
// Costs:     the forward's FLOPs: 2*pixels*(k*s + 9*k^2 + n*(k + s)); d is rounded to storage, as torch rounds
// gradients.
#pragma once

#include <type_traits>

#include "cuda/forward.cuh"

namespace gunn {

// What is done with a stage's sums. `exchange.partials` null: nobody needs them.
template <class Wide>
struct SumsOut {
  Exchange exchange;
  StageNorms<Wide*> gradients;  // of the batch norm's weight and bias; null where not wanted
  double *sum, *product;        // (P, rows), or null
  bool batch_statistics;        // so that gradients flow through them
  double count;
};

// From the tile's pair of the thread's column to table and gradients. `row` is the column's in the segment's tables.
template <class Precision>
GUNN_DEVICE void publish_sums(Pool<Precision>& pool, const View<Precision>& view, const Share& share, int segment,
                              int row, int first_column, Pair mine, const SumsOut<typename Precision::Wide>& out) {
  using Wide = typename Precision::Wide;
  Pair sums = add_halves(pool, share, mine);
  if (!climb<Sums>(pool, out.exchange, share, first_column, view.extents.pixels, &sums)) return;
  if (share.half != 0 || !share.active) return;
  const int64_t at = static_cast<int64_t>(segment) * view.extents.rows + row;
  const Affine<Wide> affine = view.affine[at];
  if (out.sum != nullptr) {
    out.sum[at] = sums.a;
    out.product[at] = sums.b;
  }
  if (out.batch_statistics) view.slopes[at] = make_slope(affine, sums.a, sums.b, out.count);
  if (out.gradients.first.weight != nullptr) {
    const auto gradient = out.gradients.at(first_column + share.column);
    *gradient.weight = static_cast<Wide>(sums.b * affine.inverse);
    *gradient.bias = static_cast<Wide>(sums.a);
  }
}

// Gradient of a unit's output. Columns [0, s) belong to the project's batch norm, [s, 2s) to the shortcut's: the same
// d, another z. From g where the unit is the last one, else as input_backward left it.
template <class Precision>
__global__ void __launch_bounds__(kThreads)
    unit_gradient(View<Precision> view, FeatureMap<const typename Precision::Wide> g, int segment, int unit,
                  SumsOut<typename Precision::Wide> out) {
  using Wide = typename Precision::Wide;
  using Storage = typename Precision::Storage;
  Pool<Precision>& pool = open_pool(view);
  __syncthreads();
  const Extents& extents = view.extents;
  const int s = extents.segment;
  const Columns columns(extents.projects(unit) ? 2 * s : s);
  const Share share(columns.count);
  const int column = columns.first + share.column, j = column < s ? column : column - s;
  const bool from_g = unit == extents.units - 1;
  const int row = column < s ? extents.row(Norm::project, unit) + j : extents.row(Norm::shortcut, unit) + j;
  const Storage* z = view.z_of(segment) + pool.window.first * extents.rows + row;
  Storage* d =
      view.d_of(segment) + pool.window.first * extents.gradient_rows + extents.gradient_row(Norm::project, unit) + j;
  const Wide* from = g.data + (static_cast<int64_t>(segment) * s + j) * g.channel;
  Wide sum = 0, product = 0;
  if (share.active) {
    const Wide mean = view.affine_of(segment, row)->mean;
    for (int m = share.half; m < pool.window.count; m += 2) {
      Storage gradient;
      if (from_g) {
        gradient = from_float<Storage>(from[offset(g, pool.window, m)]);
        if (column < s) d[m * static_cast<int64_t>(extents.gradient_rows)] = gradient;
      } else {
        gradient = d[m * static_cast<int64_t>(extents.gradient_rows)];
      }
      sum += to_float(gradient);
      product += to_float(gradient) * (to_float(z[m * static_cast<int64_t>(extents.rows)]) - mean);
    }
  }
  if (out.exchange.partials == nullptr) return;
  publish_sums(pool, view, share, segment, row, columns.first, {static_cast<double>(sum), static_cast<double>(product)},
               out);
}

// The finished tile through the ReLU behind batch norm `norm`, into d; and its sums.
template <class Precision>
GUNN_DEVICE void write_gradients(Pool<Precision>& pool, const View<Precision>& view, int segment, int unit, Norm norm,
                                 const Columns& columns, const SumsOut<typename Precision::Wide>& out) {
  using Wide = typename Precision::Wide;
  using Storage = typename Precision::Storage;
  const Share share(columns.count);
  const Extents& extents = view.extents;
  const int channel = columns.first + share.column;
  const int64_t rows = extents.rows, gradient_rows = extents.gradient_rows;
  Wide sum = 0, product = 0;
  if (share.active) {
    const Affine<Wide> affine = *view.affine_of(segment, extents.row(norm, unit) + channel);
    const Storage* z = view.z_of(segment) + pool.window.first * rows + extents.row(norm, unit) + channel;
    Storage* d = view.d_of(segment) + pool.window.first * gradient_rows + extents.gradient_row(norm, unit) + channel;
    for (int m = share.half; m < pool.window.count; m += 2) {
      const Wide pre_activation = to_float(z[m * rows]);
      const bool stopped = pre_activation * affine.scale + affine.shift <= 0;
      const Storage gradient =
          from_float<Storage>(stopped ? 0 : pool.tile.out[m * Pool<Precision>::kOutStride + share.column]);
      d[m * gradient_rows] = gradient;
      sum += to_float(gradient);
      product += to_float(gradient) * (pre_activation - affine.mean);
    }
  }
  if (out.exchange.partials == nullptr) return;
  publish_sums(pool, view, share, segment, extents.row(norm, unit) + channel, columns.first,
               {static_cast<double>(sum), static_cast<double>(product)}, out);
}

template <class Precision>
__global__ void __launch_bounds__(kThreads)
    project_backward(View<Precision> view, int segment, int unit, const typename Precision::Wide* weight,
                     SumsOut<typename Precision::Wide> out) {
  using Source = GradientOfInput<Precision, Norm::project>;
  using Wide = typename Precision::Wide;
  Pool<Precision>& pool = open_pool(view);
  const int k = view.extents.hidden, s = view.extents.segment;
  const Columns columns(k);
  const Source source(view, pool.window, segment, unit);
  const Matrix<Wide, true> weights{
      weight + static_cast<int64_t>(segment) * s * k, nullptr, s, k, columns.first, columns.count};
  Product<Precision> product;
  accumulate(pool, product, PixelsByChannels<Source>(source), weights, s, columns.count);
  leave(pool, product);
  write_gradients(pool, view, segment, unit, Norm::spatial, columns, out);
}

template <class Precision>
__global__ void __launch_bounds__(kThreads)
    spatial_backward(View<Precision> view, int segment, int unit, const typename Precision::Wide* weight,
                     SumsOut<typename Precision::Wide> out) {
  using Source = GradientOfInput<Precision, Norm::spatial, 9>;
  Pool<Precision>& pool = open_pool(view);
  const int k = view.extents.hidden;
  const Columns columns(k);
  const Source source(view, pool.window, segment, unit);
  const Kernel3x3<typename Precision::Wide, true> weights{weight + static_cast<int64_t>(segment) * k * k * 9, k,
                                                          columns.first, columns.count};
  Product<Precision> product;
  accumulate(pool, product, PixelsByChannels<Source>(source), weights, static_cast<int64_t>(9) * k, columns.count);
  leave(pool, product);
  write_gradients(pool, view, segment, unit, Norm::reduce, columns, out);
}

// Unit 0 adds to g, whose segment is replaced where the layer does; a later unit leaves d3 of the one before.
template <class Precision>
__global__ void __launch_bounds__(kThreads)
    input_backward(View<Precision> view, FeatureMap<typename Precision::Wide> g, int segment, int unit,
                   const typename Precision::Wide* weight, const typename Precision::Wide* shortcut) {
  using Source = GradientOfInput<Precision, Norm::reduce>;
  using Wide = typename Precision::Wide;
  using Storage = typename Precision::Storage;
  Pool<Precision>& pool = open_pool(view);
  const Extents& extents = view.extents;
  const int k = extents.hidden, s = extents.segment, n = extents.inputs(unit);
  const Columns columns(n);
  const Source source(view, pool.window, segment, unit);
  const Matrix<Wide, true> weights{weight + static_cast<int64_t>(segment) * k * n,
                                   shortcut ? shortcut + static_cast<int64_t>(segment) * s * n : nullptr,
                                   k,
                                   n,
                                   columns.first,
                                   columns.count};
  Product<Precision> product;
  accumulate(pool, product, PixelsByChannels<Source>(source), weights, extents.reduce_rows(unit), columns.count);
  leave(pool, product);

  const PixelWindow& window = pool.window;
  const bool pixels_fast = unit == 0 && g.column < g.channel;
  const int total = columns.count * window.count;
  for (int e = threadIdx.x; e < total; e += kThreads) {
    const int m = pixels_fast ? e % window.count : e / columns.count;
    const int column = pixels_fast ? e / window.count : e % columns.count;
    const int channel = columns.first + column;
    const Wide value = pool.tile.out[m * Pool<Precision>::kOutStride + column];
    if (unit == 0) {
      Wide* to = g.data + offset(g, window, m) + channel * g.channel;
      const bool replaced = !extents.residual && channel / s == segment;
      *to = replaced ? value : *to + value;
    } else {
      Storage* d = view.d_of(segment) + (window.first + m) * extents.gradient_rows + channel;
      const Wide own = to_float(d[extents.gradient_row(Norm::project, unit)]);
      d[extents.gradient_row(Norm::project, unit - 1)] = from_float<Storage>(own + value);
    }
  }
}

// to = from, in another dtype or layout.
template <class Precision, class From, class To>
__global__ void __launch_bounds__(kThreads) copy_map(Extents extents, FeatureMap<const From> from, FeatureMap<To> to) {
  GUNN_SHARED(PixelWindow, windows, [1]);
  PixelWindow& window = windows[0];
  set_window(window, extents, static_cast<int64_t>(blockIdx.x) * kRows, extents.pixels);
  __syncthreads();
  const Columns columns(extents.channels);
  const bool pixels_fast = from.column < from.channel;
  const int total = columns.count * window.count;
  for (int e = threadIdx.x; e < total; e += kThreads) {
    const int m = pixels_fast ? e % window.count : e / columns.count;
    const int64_t channel = columns.first + (pixels_fast ? e / window.count : e % columns.count);
    to.data[offset(to, window, m) + channel * to.channel] =
        from_float<To>(to_float(from.data[offset(from, window, m) + channel * from.channel]));
  }
}

// ---- Gradients of weights: all segments of a block of segments at once, for no order binds them.

enum class Which { reduce, spatial, project };

// Owns:      block (tile of weight rows x tile of weight columns, range of pixels, segment).
// Barriers:  three a chunk of pixels: the window moves with it.
// Leaves:    partial sums of its range; sum_partials adds the ranges in order.
// Costs:     2*pixels*rows*columns FLOPs; reads rows + columns values a pixel once for each tile of the other.
template <class Precision, Which which, bool first_unit>
__global__ void __launch_bounds__(kThreads) weight_gradient(View<Precision> view, int first_segment, int unit,
                                                            int64_t range, typename Precision::Wide* partials) {
  using Rows = std::conditional_t<which == Which::reduce, GradientOfInput<Precision, Norm::reduce>,
                                  std::conditional_t<which == Which::spatial, GradientOfInput<Precision, Norm::spatial>,
                                                     GradientOfInput<Precision, Norm::project>>>;
  using Inputs =
      std::conditional_t<which == Which::reduce, std::conditional_t<first_unit, State<Precision>, UnitInput<Precision>>,
                         Activated<Precision, which == Which::spatial ? 9 : 1>>;
  GUNN_DYNAMIC_SHARED(Pool<Precision>, shared);
  Pool<Precision>& pool = *shared;
  const Extents& extents = view.extents;
  const int i = first_segment + blockIdx.z, k = extents.hidden;
  const int rows = which == Which::reduce ? extents.reduce_rows(unit) : which == Which::spatial ? k : extents.segment;
  const int width = which == Which::reduce ? extents.inputs(unit) : which == Which::spatial ? 9 * k : k;
  const int across = (width + kColumns - 1) / kColumns;
  const int row = blockIdx.x / across * kRows, column = blockIdx.x % across * kColumns;
  const int columns = min(width - column, kColumns);
  const int64_t begin = blockIdx.y * range, end = min(begin + range, extents.pixels);
  const Rows row_source(view, pool.window, i, unit);
  const Inputs input_source(view, pool.window, i, unit);
  const ChannelsByPixels<Rows> a(row_source, row, min(rows - row, kRows));
  const ChannelsByPixels<Inputs> b(input_source, column, columns);
  Product<Precision> product;
  for (int64_t first = begin; first < end; first += Pool<Precision>::kDepth) {
    __syncthreads();  // the chunk before has been multiplied, its window is free
    set_window(pool.window, extents, first, min(first + Pool<Precision>::kDepth, end));
    accumulate(pool, product, a, b, Pool<Precision>::kDepth, columns);
  }
  typename Precision::Wide* to = partials + (static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y) * rows * width;
  product.visit([&](int m, int n, typename Precision::Wide value) {
    if (row + m < rows && n < columns) to[static_cast<int64_t>(row + m) * width + column + n] = value;
  });
}

// Where the sum of all ranges goes: rows from `split` on to the shortcut's gradient; 3x3 weights from tap-major order.
template <class Wide>
struct WeightGradients {
  Wide *upper, *lower;  // (P, …)
  int rows, width, split, taps;
};

template <class Wide>
__global__ void sum_partials(const Wide* partials, int64_t ranges, int first_segment, int segments,
                             WeightGradients<Wide> to) {
  const int64_t size = static_cast<int64_t>(to.rows) * to.width;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, slot = at / size;
  if (slot >= segments) return;
  const int64_t in_segment = at - slot * size;
  Wide sum = 0;
  for (int64_t r = 0; r < ranges; ++r) sum += partials[(slot * ranges + r) * size + in_segment];
  const int64_t row = in_segment / to.width, column = in_segment % to.width, segment = first_segment + slot;
  const int64_t channels = to.width / to.taps, place = column % channels * to.taps + column / channels;
  if (row < to.split) {
    to.upper[(segment * to.split + row) * to.width + place] = sum;
  } else {
    to.lower[(segment * (to.rows - to.split) + row - to.split) * to.width + place] = sum;
  }
}

}  // namespace gunn
