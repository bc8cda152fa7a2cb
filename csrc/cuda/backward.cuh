// The backward's chain of gradients, one kernel a stage, segments and units in reverse order. The pre-activations z of
// the segment are at hand; g is the gradient of the state, rounded to storage once a segment. For one unit:
//
//   unit_gradient     d3 = gradient of the unit's output (the last unit's: g[c_i]); sums of d3, d3 * (z3 - mean)
//   project_backward  d2 = W3ᵀ dz3 through the ReLU; sums of d2, d2 * (z2 - mean)
//   spatial_backward  d1 = transposed conv3x3 of dz2 through the ReLU; sums of d1, d1 * (z1 - mean)
//   input_backward    g += W1ᵀ dz1 + Wsᵀ dzs; in a later unit the gradient of the one before: d3 + W1ᵀ dz1
//
// dz of a batch norm's input is computed where it is loaded, from d, z and three numbers a channel (view.cuh).
//
// Owns:      as in forward.cuh: tile of pixels x tile of channels of the result.
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
  StageNorms<Wide*> gradients;  // of the batch norm's weight and bias
  double *sum, *product;        // (rows) of the segment, or null
  bool need_gradients;
  bool batch_statistics;  // so that gradients flow through them
  double count;
};

// From the tile's pair of the thread's column to table and gradients; `z_row` is the column's.
template <class Precision, class Tile>
GUNN_DEVICE void publish_sums(Pool<Precision, Tile>& pool, const View<Precision>& view, const Share& share, int columns,
                              int segment, int z_row, int first_column, Pair mine,
                              const SumsOut<typename Precision::Wide>& out) {
  using Wide = typename Precision::Wide;
  Pair sums = add_parts(pool, share, columns, mine);
  if (!climb<Sums>(pool, out.exchange, share, columns, first_column, view.extents.pixels, &sums)) return;
  if (!share.leads()) return;
  const auto norm = out.gradients.at(first_column + share.column);
  if (!norm.real) return;
  const int64_t at = view.in_tables(segment, z_row);
  if (out.sum != nullptr) {
    out.sum[norm.row] = sums.a;
    out.product[norm.row] = sums.b;
  }
  if (out.batch_statistics) set_slope(view.tables, at, sums.a, sums.b, out.count);
  if (out.need_gradients) {
    *norm.weight = static_cast<Wide>(sums.b * view.tables.inverse[at]);
    *norm.bias = static_cast<Wide>(sums.a);
  }
}

// Gradient of a unit's output. Columns [0, s) belong to the project's batch norm, those behind to the shortcut's: the
// same d, another z. From g where the unit is the last one, else as input_backward left it.
template <class Precision>
__global__ void __launch_bounds__(kThreads, kResident<Precision>)
    unit_gradient(View<Precision> view, const typename Precision::Storage* g, int64_t g_step, int segment, int unit,
                  SumsOut<typename Precision::Wide> out) {
  using Wide = typename Precision::Wide;
  using Storage = typename Precision::Storage;
  auto& pool = open_pool<Precision, SmallTile>(view);
  __syncthreads();
  const Extents& extents = view.extents;
  const int s = extents.s(), first_column = blockIdx.y * kColumns;
  const int columns = min(extents.projects(unit) ? 2 * s : s, first_column + kColumns) - first_column;
  const Share share(columns, kThreads);
  const int column = first_column + share.column, j = column < s ? column : column - s;
  const bool from_g = unit == extents.units - 1;
  const int row = extents.z_row(column < s ? Norm::project : Norm::shortcut, unit) + j;
  const int64_t z_step = extents.z_rows(), d_step = extents.d_rows(), first = pool.window[0].first;
  const Storage* z = view.z_of(segment) + first * z_step + row;
  Storage* d = view.d_of(segment) + first * d_step + extents.d_row(Norm::project, unit) + j;
  const Storage* from = g + first * g_step + static_cast<int64_t>(segment) * extents.segment + j;
  Wide sum = 0, product = 0;
  if (share.active) {
    const Wide mean = view.tables.mean[view.in_tables(segment, row)];
    for (int m = share.part; m < pool.window[0].count; m += share.parts) {
      Storage gradient;
      if (from_g) {
        gradient = j < extents.segment ? from[m * g_step] : from_float<Storage>(0);
        if (column < s) d[m * d_step] = gradient;
      } else {
        gradient = d[m * d_step];
      }
      sum += to_float(gradient);
      product += to_float(gradient) * (to_float(z[m * z_step]) - mean);
    }
  }
  if (out.exchange.partials == nullptr) return;
  publish_sums(pool, view, share, columns, segment, row, first_column,
               {static_cast<double>(sum), static_cast<double>(product)}, out);
}

// The finished tile through the ReLU behind batch norm `norm`, into d; and its sums.
template <class Precision, class Tile>
GUNN_DEVICE void write_gradients(Pool<Precision, Tile>& pool, const View<Precision>& view, int segment, int unit,
                                 Norm norm, int first_column, int columns,
                                 const SumsOut<typename Precision::Wide>& out) {
  using Wide = typename Precision::Wide;
  using Storage = typename Precision::Storage;
  const Share share(columns, Tile::kThreads);
  const Extents& extents = view.extents;
  const int column = first_column + share.column, z_row = extents.z_row(norm, unit) + column;
  const int64_t z_step = extents.z_rows(), d_step = extents.d_rows();
  Wide sum = 0, product = 0;
  if (share.active) {
    const int64_t at = view.in_tables(segment, z_row);
    const Wide scale = view.tables.scale[at], shift = view.tables.shift[at], mean = view.tables.mean[at];
    const Storage* z = view.z_of(segment) + pool.window[0].first * z_step + z_row;
    Storage* d = view.d_of(segment) + pool.window[0].first * d_step + extents.d_row(norm, unit) + column;
    for (int m = share.part; m < pool.window[0].count; m += share.parts) {
      const Wide pre_activation = to_float(z[m * z_step]);
      const bool stopped = pre_activation * scale + shift <= 0;
      const Storage gradient =
          from_float<Storage>(stopped ? 0 : pool.tile.out[m * Pool<Precision, Tile>::kOutStride + share.column]);
      d[m * d_step] = gradient;
      sum += to_float(gradient);
      product += to_float(gradient) * (pre_activation - mean);
    }
  }
  if (out.exchange.partials == nullptr) return;
  publish_sums(pool, view, share, columns, segment, z_row, first_column,
               {static_cast<double>(sum), static_cast<double>(product)}, out);
}

template <class Precision, class Tile, class Source>
GUNN_DEVICE void hidden_backward(const View<Precision>& view, int segment, int unit, Pack pack, Norm norm,
                                 const typename Precision::Element* packed,
                                 const SumsOut<typename Precision::Wide>& out) {
  auto& pool = open_pool<Precision, Tile>(view);
  const PackShape shape = pack_shape(view.extents, pack, unit);
  const int step = column_step<Tile>(shape.rows), column = blockIdx.y * step;
  const PackedRows<Precision> weights(shape, packed, segment, column, step);
  const Source source(view, segment, unit);
  Product<Precision, Tile> product(weights.rows);
  multiply_pixels(pool, product, source, shape, weights);
  leave(pool, product);
  write_gradients(pool, view, segment, unit, norm, column, weights.rows, out);
}

template <class Precision>
__global__ void __launch_bounds__(kThreads, kResident<Precision>)
    project_backward(View<Precision> view, int segment, int unit, const typename Precision::Element* packed,
                     SumsOut<typename Precision::Wide> out) {
  using Source = GradientOfInput<Precision, Norm::project>;
  hidden_backward<Precision, SmallTile, Source>(view, segment, unit, Pack::project_transposed, Norm::spatial, packed,
                                                out);
}

template <class Precision, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, kResident<Precision, Tile>)
    spatial_backward(View<Precision> view, int segment, int unit, const typename Precision::Element* packed,
                     SumsOut<typename Precision::Wide> out) {
  using Source = GradientOfInput<Precision, Norm::spatial, 9>;
  hidden_backward<Precision, Tile, Source>(view, segment, unit, Pack::spatial_transposed, Norm::reduce, packed, out);
}

// Unit 0 adds to g, whose segment is replaced where the layer does; a later unit leaves d3 of the one before.
template <class Precision, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, kResident<Precision, Tile>)
    input_backward(View<Precision> view, typename Precision::Storage* g, int64_t g_step, int segment, int unit,
                   const typename Precision::Element* packed) {
  using Source = GradientOfInput<Precision, Norm::reduce>;
  using Wide = typename Precision::Wide;
  using Storage = typename Precision::Storage;
  auto& pool = open_pool<Precision, Tile>(view);
  const Extents& extents = view.extents;
  const PackShape shape = pack_shape(extents, Pack::reduce_transposed, unit);
  const int step = column_step<Tile>(shape.rows), first = blockIdx.y * step;
  const PackedRows<Precision> weights(shape, packed, segment, first, step);
  const Source source(view, segment, unit);
  Product<Precision, Tile> product(weights.rows);
  multiply_pixels(pool, product, source, shape, weights);
  leave(pool, product);

  // Padding of g is nobody's.
  constexpr int V = Vector<Storage>::kSize;
  const int pieces = weights.rows / V, total = pieces * pool.window[0].count;
  const int64_t d_step = extents.d_rows();
  for (int e = threadIdx.x; e < total; e += Tile::kThreads) {
    const int m = e / pieces, column = e % pieces * V, channel = first + column;
    Values<Precision> sums;
    read_table<Precision>(pool.tile.out + m * Pool<Precision, Tile>::kOutStride + column, sums);
    const int64_t pixel = pool.window[0].first + m;
    if (unit == 0) {
      Storage* to = g + pixel * g_step + channel;
      Vector<Storage> values = load_vector(to);
      GUNN_UNROLL
      for (int v = 0; v < V; ++v) {
        const bool replaced = !extents.residual && (channel + v) / extents.segment == segment;
        values.values[v] = from_float<Storage>(replaced ? sums[v] : to_float(values.values[v]) + sums[v]);
      }
      store_vector(to, values);
    } else {
      Storage* d = view.d_of(segment) + pixel * d_step + channel;
      GUNN_UNROLL
      for (int v = 0; v < V; ++v) {
        const Wide own = to_float(d[extents.d_row(Norm::project, unit) + v]);
        d[extents.d_row(Norm::project, unit - 1) + v] = from_float<Storage>(own + sums[v]);
      }
    }
  }
}

// ---- Gradients of weights: all segments of a block of segments at once, for no order binds them.

enum class Which { reduce, spatial, project };

// Rows x width of the gradient, padded like the channels they stand for.
struct GradientShape {
  int rows, width;
};
__host__ GUNN_DEVICE GradientShape gradient_shape(const Extents& extents, Which which, int unit) {
  if (which == Which::reduce) return {extents.reduce_columns(unit), padded(extents.inputs(unit))};
  if (which == Which::spatial) return {extents.k(), 9 * extents.k()};
  return {extents.s(), extents.k()};
}

// Owns:      block (tile of inputs x tile of weight rows, range of pixels, segment).
// Leaves:    partial sums of its range; sum_partials adds the ranges in order.
// Rows:      computed from d and z, or `ready` in memory (view.cuh).
// Costs:     2*pixels*rows*width FLOPs; reads rows + width values a pixel once for each tile of the other.
template <class Precision, class Tile, Which which, bool first_unit, bool ready>
__global__ void __launch_bounds__(Tile::kThreads, kResident<Precision, Tile, which == Which::reduce && !first_unit>)
    weight_gradient(View<Precision> view, int first_segment, int unit, int64_t range,
                    typename Precision::Wide* partials) {
  constexpr Norm kNorm = which == Which::reduce    ? Norm::reduce
                         : which == Which::spatial ? Norm::spatial
                                                   : Norm::project;
  using Rows = std::conditional_t<ready, ReadyGradient<Precision, kNorm>, GradientOfInput<Precision, kNorm>>;
  using Inputs =
      std::conditional_t<which == Which::reduce, std::conditional_t<first_unit, State<Precision>, UnitInput<Precision>>,
                         Activated<Precision, which == Which::spatial ? 9 : 1>>;
  using Of = Pool<Precision, Tile>;
  GUNN_DYNAMIC_SHARED(Of, pool);
  const Extents& extents = view.extents;
  const int i = first_segment + blockIdx.z;
  const GradientShape shape = gradient_shape(extents, which, unit);
  const int step = column_step<Tile>(shape.rows), across = column_tiles<Tile>(shape.rows);
  const int input = blockIdx.x / across * Tile::kRows, row = blockIdx.x % across * step;
  const int64_t begin = blockIdx.y * range, end = min(begin + range, extents.pixels);
  const Rows rows(view, i, unit);
  const Inputs inputs(view, i, unit);
  const int count = min(shape.rows - row, step);
  Product<Precision, Tile> product(count);
  multiply_channels(*pool, product, extents, inputs, input, shape.width, rows, row, row + count, begin, end);
  typename Precision::Wide* to = partials + (static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y) *
                                                static_cast<int64_t>(shape.rows) * shape.width;
  product.visit([&](int m, int n, typename Precision::Wide value) {
    if (input + m < shape.width && n < count) to[static_cast<int64_t>(row + n) * shape.width + input + m] = value;
  });
}

// Where the sum of all ranges goes, without padding: `lower` takes the shortcut's rows; 3x3 weights have been
// tap-major.
template <class Wide>
struct WeightGradients {
  Wide *upper, *lower;                // (P, …)
  int upper_rows, lower_rows, width;  // as parameters: width is channels * taps
  int lower_from;                     // padded row of the first lower one
  int taps;
};

// Partial sums (segments, ranges, shape) of one convolution's weights.
template <class Wide>
struct PartialSums {
  const Wide* partials;
  int64_t ranges;
  GradientShape shape;
  WeightGradients<Wide> to;
};
template <class Wide>
struct SumsOfUnit {
  PartialSums<Wide> of[3];
};

// Those of blockIdx.y.
template <class Wide>
__global__ void sum_partials(GUNN_PARAMETER SumsOfUnit<Wide> sums, int first_segment, int segments) {
  const Wide* partials = sums.of[blockIdx.y].partials;
  const int64_t ranges = sums.of[blockIdx.y].ranges;
  const GradientShape shape = sums.of[blockIdx.y].shape;
  const WeightGradients<Wide>& to = sums.of[blockIdx.y].to;
  const int64_t rows = to.upper_rows + to.lower_rows, size = rows * to.width;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, slot = at / size;
  if (slot >= segments) return;
  const int64_t row = at % size / to.width, place = at % to.width, segment = first_segment + slot;
  const bool upper = row < to.upper_rows;
  const int64_t channel = place / to.taps, tap = place % to.taps;
  const int64_t column = tap * (shape.width / to.taps) + channel;
  const int64_t padded_row = upper ? row : to.lower_from + row - to.upper_rows;
  const int64_t step = static_cast<int64_t>(shape.rows) * shape.width;
  const Wide* from = partials + slot * ranges * step + padded_row * shape.width + column;
  Wide sum = 0;
  for (int64_t r = 0; r < ranges; ++r) sum += from[r * step];
  if (upper) {
    to.upper[(segment * to.upper_rows + row) * to.width + place] = sum;
  } else {
    to.lower[(segment * to.lower_rows + row - to.upper_rows) * to.width + place] = sum;
  }
}

}  // namespace gunn
