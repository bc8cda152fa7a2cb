// The forward's stages, one kernel each; the recomputation of the backward runs the first three for many segments.
//
//   reduce      z1 = W1 * state, and the shortcut's zs = Ws * state          (unit 0; later units read the one before)
//   spatial     z2 = conv3x3(relu(bn(z1)))
//   project     z3 = W3 * relu(bn(z2))
//   write_back  y[c_i] = x[c_i] + unit output
//
// Owns:      block (tile of pixels, tile of output channels, segment) writes those channels of z.
// Barriers:  none between blocks, for each kernel reads what the one before it wrote. A stage's statistics are complete
//            when its kernel is: the last block (exchange.cuh) writes them, and with them scale and shift for the next.
// Costs:     reduce 2*pixels*n*(k + s), spatial 2*pixels*9*k^2, project 2*pixels*k*s FLOPs. Reads n, 9k (cached: k), k
//            and writes k + s, k, s values a pixel. Every tile of columns reads its input once more.
// Rounding:  z is rounded to storage before its statistics are taken, so they do not depend on the tiling.
#pragma once

#include "cuda/exchange.cuh"
#include "cuda/products.cuh"
#include "cuda/tables.cuh"

namespace gunn {

// The batch norms behind one stage's columns: one, and the shortcut's behind the reduce's padded channels.
template <class Pointer>
struct StageNorms {
  struct One {
    Pointer weight, bias;  // of the segment
    int channels, row;     // in statistics
  };
  One first, second;
  int split;  // columns of the first

  // What a column stands for.
  struct Channel {
    Pointer weight, bias;
    int row;
    bool real;
  };
  GUNN_DEVICE Channel at(int column) const {
    const bool behind = column >= split;
    const One norm = behind ? second : first;  // a reference to one of two would put both in local memory
    const int channel = behind ? column - split : column;
    const bool real = channel < norm.channels;
    if (!real || norm.weight == nullptr) return {nullptr, nullptr, norm.row + channel, real};
    return {norm.weight + channel, norm.bias + channel, norm.row + channel, true};
  }
};

// What is done with a stage's statistics. `exchange.partials` null: they are given.
template <class Wide>
struct StatisticsOut {
  Exchange exchange;
  StageNorms<const Wide*> norms;
  Wide *mean, *var;  // (rows), of the segment
  double eps;
};

// The finished tile, from shared memory into channels [row, row + …) of z; and its statistics.
template <class Precision, class Tile>
GUNN_DEVICE void write_pre_activations(Pool<Precision, Tile>& pool, const View<Precision>& view, int segment, int row,
                                       int first_column, int columns,
                                       const StatisticsOut<typename Precision::Wide>& out) {
  using Wide = typename Precision::Wide;
  using Storage = typename Precision::Storage;
  constexpr int S = Pool<Precision, Tile>::kOutStride;
  const Share share(columns, Tile::kThreads);
  const int64_t stride = view.extents.z_rows();
  const int count = pool.window[0].count;
  Storage* z = view.z_of(segment) + pool.window[0].first * stride + row + first_column + share.column;
  Wide* tile = pool.tile.out + share.column;
  Wide sum = 0;
  if (share.active) {
    for (int m = share.part; m < count; m += share.parts) {
      const Storage stored = from_float<Storage>(tile[m * S]);
      z[m * stride] = stored;
      tile[m * S] = to_float(stored);
      sum += to_float(stored);
    }
  }
  if (out.exchange.partials == nullptr) return;
  const Wide mean = static_cast<Wide>(add_parts(pool, share, columns, {static_cast<double>(sum), 0}).a / count);
  Wide squares = 0, rest = 0;
  if (share.active) {
    for (int m = share.part; m < count; m += share.parts) {
      const Wide apart = tile[m * S] - mean;
      squares += apart * apart;
      rest += apart;
    }
  }
  // `mean` is rounded: what it missed is taken from both.
  const Pair missed = add_parts(pool, share, columns, {static_cast<double>(squares), static_cast<double>(rest)});
  Pair moments{static_cast<double>(mean) + missed.b / count, missed.a - missed.b * (missed.b / count)};
  if (!climb<Moments>(pool, out.exchange, share, columns, first_column, view.extents.pixels, &moments)) return;
  if (!share.leads()) return;
  const auto norm = out.norms.at(first_column + share.column);
  if (!norm.real) return;
  const Wide whole_mean = static_cast<Wide>(moments.a);
  // Rounding may go below 0; NaN passes.
  const Wide var = static_cast<Wide>(moments.b < 0 ? 0 : moments.b / static_cast<double>(view.extents.pixels));
  out.mean[norm.row] = whole_mean;
  out.var[norm.row] = var;
  set_affine(view.tables, view.in_tables(segment, row + first_column + share.column), whole_mean, var, *norm.weight,
             *norm.bias, out.eps);
}

// What all kernels of tiles begin with: the pool, and the window of the block's pixels.
template <class Precision, class Tile>
GUNN_DEVICE Pool<Precision, Tile>& open_pool(const View<Precision>& view) {
  using Of = Pool<Precision, Tile>;
  GUNN_DYNAMIC_SHARED(Of, pool);
  set_window(pool->window[0], view.extents, static_cast<int64_t>(blockIdx.x) * Tile::kRows, view.extents.pixels);
  return *pool;
}

// One stage of segments first_segment + blockIdx.z.
template <class Precision, class Tile, class Source>
GUNN_DEVICE void forward_stage(const View<Precision>& view, int first_segment, int unit, Pack pack, Norm norm,
                               const typename Precision::Element* packed,
                               const StatisticsOut<typename Precision::Wide>& out) {
  auto& pool = open_pool<Precision, Tile>(view);
  const PackShape shape = pack_shape(view.extents, pack, unit);
  const int i = first_segment + blockIdx.z, step = column_step<Tile>(shape.rows), column = blockIdx.y * step;
  const PackedRows<Precision> weights(shape, packed, i, column, step);
  const Source source(view, i, unit);
  Product<Precision, Tile> product(weights.rows);
  multiply_pixels(pool, product, source, shape, weights);
  leave(pool, product);
  write_pre_activations(pool, view, i, view.extents.z_row(norm, unit), column, weights.rows, out);
}

template <class Precision, class Tile, class Source>
__global__ void __launch_bounds__(Tile::kThreads,
                                  kResident<Precision, Tile, std::is_same_v<Source, UnitInput<Precision>>>)
    reduce(View<Precision> view, int first_segment, int unit, const typename Precision::Element* packed,
           StatisticsOut<typename Precision::Wide> out) {
  forward_stage<Precision, Tile, Source>(view, first_segment, unit, Pack::reduce, Norm::reduce, packed, out);
}

template <class Precision, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, kResident<Precision, Tile>)
    spatial(View<Precision> view, int first_segment, int unit, const typename Precision::Element* packed,
            StatisticsOut<typename Precision::Wide> out) {
  using Source = Activated<Precision, 9>;
  forward_stage<Precision, Tile, Source>(view, first_segment, unit, Pack::spatial, Norm::spatial, packed, out);
}

template <class Precision>
__global__ void __launch_bounds__(kThreads, kResident<Precision>)
    project(View<Precision> view, int first_segment, int unit, const typename Precision::Element* packed,
            StatisticsOut<typename Precision::Wide> out) {
  using Source = Activated<Precision, 1>;
  forward_stage<Precision, SmallTile, Source>(view, first_segment, unit, Pack::project, Norm::project, packed, out);
}

// y[c_i] = [x[c_i] +] the last unit's output, pixel-major, and in `to` where y is laid out differently.
template <class Precision>
__global__ void __launch_bounds__(kThreads) write_back(View<Precision> view, typename Precision::Storage* y,
                                                       FeatureMap<typename Precision::Storage> to, int segment) {
  using Wide = typename Precision::Wide;
  using Storage = typename Precision::Storage;
  GUNN_SHARED(PixelWindow<kRows>, windows, [1]);
  PixelWindow<kRows>& window = windows[0];
  const Extents& extents = view.extents;
  set_window(window, extents, static_cast<int64_t>(blockIdx.x) * kRows, extents.pixels);
  __syncthreads();
  const int first = blockIdx.y * kColumns, columns = min(extents.segment - first, kColumns);
  const int total = columns * window.count;
  for (int e = threadIdx.x; e < total; e += kThreads) {
    const int m = e / columns, j = first + e % columns;
    const int64_t channel = static_cast<int64_t>(segment) * extents.segment + j, pixel = window.first + m;
    Wide value = unit_output(view, segment, extents.units - 1, pixel, j);
    if (extents.residual) value += to_float(view.x[pixel * view.x_step + channel]);
    const Storage stored = from_float<Storage>(value);
    y[pixel * view.y_step + channel] = stored;
    if (to.data != nullptr) to.data[offset(to, window, m) + channel * to.channel] = stored;
  }
}

}  // namespace gunn
