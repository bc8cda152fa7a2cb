// The forward's stages, one kernel each; the recomputation of the backward runs the first three for many segments.
//
//   reduce      z1 = W1 * state, and the shortcut's zs = Ws * state          (unit 0; later units read the one before)
//   spatial     z2 = conv3x3(relu(bn(z1)))
//   project     z3 = W3 * relu(bn(z2))
//   write_back  y[c_i] = x[c_i] + unit output
//
// Owns:      block (tile of 64 pixels, tile of 64 output channels, segment) writes those channels of z.
// Barriers:  none between blocks, for each kernel reads what the one before it wrote. A stage's statistics are complete
//            when its kernel is: the last block (exchange.cuh) writes them, and with them scale and shift for the next.
// Costs:     reduce 2*pixels*n*(k + s), spatial 2*pixels*9*k^2, project 2*pixels*k*s FLOPs. Reads n, 9k (cached: k), k
//            and writes k + s, k, s values a pixel. Every 64 columns read their input once more.
// Rounding:  z is rounded to storage before its statistics are taken, so they do not depend on the tiling.
#pragma once

#include "cuda/exchange.cuh"
#include "cuda/tables.cuh"
#include "cuda/weights.cuh"

namespace gunn {

// The batch norms behind one stage: channels [0, split) belong to `first`, those behind to `second` (the shortcut's).
template <class Pointer>
struct StageNorms {
  struct One {
    Pointer weight, bias;  // of the segment
  };
  One first, second;
  int split;

  GUNN_DEVICE One at(int channel) const {
    return channel < split ? One{first.weight + channel, first.bias + channel}
                           : One{second.weight + (channel - split), second.bias + (channel - split)};
  }
};

// What is done with a stage's statistics. `exchange.partials` null: they are given.
template <class Wide>
struct StatisticsOut {
  Exchange exchange;
  StageNorms<const Wide*> norms;
  Wide *mean, *var;  // (P, rows)
  double eps;
};

// The finished tile, from shared memory into channels [row, row + …) of z; and its statistics.
template <class Precision>
GUNN_DEVICE void write_pre_activations(Pool<Precision>& pool, const View<Precision>& view, int segment, int row,
                                       int first_column, int columns,
                                       const StatisticsOut<typename Precision::Wide>& out) {
  using Wide = typename Precision::Wide;
  using Storage = typename Precision::Storage;
  constexpr int S = Pool<Precision>::kOutStride;
  const Share share(columns);
  const int64_t stride = view.extents.rows;
  const int count = pool.window.count;
  Storage* z = view.z_of(segment) + pool.window.first * stride + row + first_column + share.column;
  Wide* tile = pool.tile.out + share.column;
  Wide sum = 0;
  if (share.active) {
    for (int m = share.half; m < count; m += 2) {
      const Storage stored = from_float<Storage>(tile[m * S]);
      z[m * stride] = stored;
      tile[m * S] = to_float(stored);
      sum += to_float(stored);
    }
  }
  if (out.exchange.partials == nullptr) return;
  const Wide mean = static_cast<Wide>(add_halves(pool, share, {static_cast<double>(sum), 0}).a / count);
  Wide squares = 0, rest = 0;
  if (share.active) {
    for (int m = share.half; m < count; m += 2) {
      const Wide apart = tile[m * S] - mean;
      squares += apart * apart;
      rest += apart;
    }
  }
  // `mean` is rounded: what it missed is taken from both.
  const Pair missed = add_halves(pool, share, {static_cast<double>(squares), static_cast<double>(rest)});
  Pair moments{static_cast<double>(mean) + missed.b / count, missed.a - missed.b * (missed.b / count)};
  if (!climb<Moments>(pool, out.exchange, share, first_column, view.extents.pixels, &moments)) return;
  if (share.half != 0 || !share.active) return;
  const int channel = first_column + share.column;
  const Wide whole_mean = static_cast<Wide>(moments.a);
  // Rounding may go below 0; NaN passes.
  const Wide var = static_cast<Wide>(moments.b < 0 ? 0 : moments.b / static_cast<double>(view.extents.pixels));
  const auto norm = out.norms.at(channel);
  const int64_t at = static_cast<int64_t>(segment) * view.extents.rows + row + channel;
  out.mean[at] = whole_mean;
  out.var[at] = var;
  view.affine[at] = make_affine(whole_mean, var, *norm.weight, *norm.bias, out.eps);
}

// What all kernels of tiles begin with: the pool, and the window of the block's pixels.
template <class Precision>
GUNN_DEVICE Pool<Precision>& open_pool(const View<Precision>& view) {
  GUNN_DYNAMIC_SHARED(Pool<Precision>, pool);
  set_window(pool->window, view.extents, static_cast<int64_t>(blockIdx.x) * kRows, view.extents.pixels);
  return *pool;
}

// The tile's columns of `total`.
struct Columns {
  int first, count;
  GUNN_DEVICE explicit Columns(int total) : first(blockIdx.y * kColumns), count(min(total - first, kColumns)) {}
};

template <class Precision, class Source>
__global__ void __launch_bounds__(kThreads)
    reduce(View<Precision> view, int first_segment, int unit, const typename Precision::Wide* weight,
           const typename Precision::Wide* shortcut, StatisticsOut<typename Precision::Wide> out) {
  using Wide = typename Precision::Wide;
  Pool<Precision>& pool = open_pool(view);
  const Extents& extents = view.extents;
  const int i = first_segment + blockIdx.z, n = extents.inputs(unit), k = extents.hidden, s = extents.segment;
  const Columns columns(extents.reduce_rows(unit));
  const Source source(view, pool.window, i, unit);
  const Matrix<Wide, false> weights{weight + static_cast<int64_t>(i) * k * n,
                                    shortcut ? shortcut + static_cast<int64_t>(i) * s * n : nullptr,
                                    k,
                                    n,
                                    columns.first,
                                    columns.count};
  Product<Precision> product;
  accumulate(pool, product, PixelsByChannels<Source>(source), weights, n, columns.count);
  leave(pool, product);
  write_pre_activations(pool, view, i, extents.row(Norm::reduce, unit), columns.first, columns.count, out);
}

template <class Precision>
__global__ void __launch_bounds__(kThreads)
    spatial(View<Precision> view, int first_segment, int unit, const typename Precision::Wide* weight,
            StatisticsOut<typename Precision::Wide> out) {
  using Source = Activated<Precision, 9>;
  Pool<Precision>& pool = open_pool(view);
  const Extents& extents = view.extents;
  const int i = first_segment + blockIdx.z, k = extents.hidden;
  const Columns columns(k);
  const Source source(view, pool.window, i, unit);
  const Kernel3x3<typename Precision::Wide, false> weights{weight + static_cast<int64_t>(i) * k * k * 9, k,
                                                           columns.first, columns.count};
  Product<Precision> product;
  accumulate(pool, product, PixelsByChannels<Source>(source), weights, static_cast<int64_t>(9) * k, columns.count);
  leave(pool, product);
  write_pre_activations(pool, view, i, extents.row(Norm::spatial, unit), columns.first, columns.count, out);
}

template <class Precision>
__global__ void __launch_bounds__(kThreads)
    project(View<Precision> view, int first_segment, int unit, const typename Precision::Wide* weight,
            StatisticsOut<typename Precision::Wide> out) {
  using Source = Activated<Precision, 1>;
  using Wide = typename Precision::Wide;
  Pool<Precision>& pool = open_pool(view);
  const Extents& extents = view.extents;
  const int i = first_segment + blockIdx.z, k = extents.hidden, s = extents.segment;
  const Columns columns(s);
  const Source source(view, pool.window, i, unit);
  const Matrix<Wide, false> weights{
      weight + static_cast<int64_t>(i) * s * k, nullptr, s, k, columns.first, columns.count};
  Product<Precision> product;
  accumulate(pool, product, PixelsByChannels<Source>(source), weights, k, columns.count);
  leave(pool, product);
  write_pre_activations(pool, view, i, extents.row(Norm::project, unit), columns.first, columns.count, out);
}

// y[c_i] = [x[c_i] +] the last unit's output; x is untouched, so column tiles do not disturb each other.
template <class Precision>
__global__ void __launch_bounds__(kThreads)
    write_back(View<Precision> view, FeatureMap<typename Precision::Storage> y, int segment) {
  using Wide = typename Precision::Wide;
  GUNN_SHARED(PixelWindow, windows, [1]);
  PixelWindow& window = windows[0];
  const Extents& extents = view.extents;
  set_window(window, extents, static_cast<int64_t>(blockIdx.x) * kRows, extents.pixels);
  __syncthreads();
  const Columns columns(extents.segment);
  const int total = columns.count * window.count;
  for (int e = threadIdx.x; e < total; e += kThreads) {
    const int m = view.pixels_fast ? e % window.count : e / columns.count;
    const int j = columns.first + (view.pixels_fast ? e / window.count : e % columns.count);
    const int64_t channel = static_cast<int64_t>(segment) * extents.segment + j;
    Wide value = unit_output(view, segment, extents.units - 1, window.first + m, j);
    if (extents.residual) value += to_float(view.x.data[offset(view.x, window, m) + channel * view.x.channel]);
    y.data[offset(y, window, m) + channel * y.channel] = from_float<typename Precision::Storage>(value);
  }
}

}  // namespace gunn
