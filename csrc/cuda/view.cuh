// What every kernel is told: sizes, where tensors lie, and batch norms as tables; and the sources of operands.
//
// In the kernels everything is pixel-major: one pixel's channels are neighbours, padded with zeros to a multiple of 8,
// so that 16 bytes at a time can be read anywhere (state.cuh brings tensors of other layouts into this form):
//
//   state x, y   (pixels, N)
//   z            (segments, pixels, z_rows)   pre-activations; per unit reduce (k), shortcut (s, unit 0), spatial (k),
//   d            (segments, pixels, d_rows)   project (s), each padded; gradients of batch-norm outputs: reduce,
//   spatial,
//                                             project
//   tables       (P, z_rows)                  a batch norm's mean, scale, shift, inverse; and its backward's a, b, c
#pragma once

#include "cuda/tile.cuh"

namespace gunn {

// The four batch norms of a unit; the second exists in unit 0 of layers with a projection shortcut.
enum class Norm { reduce, shortcut, spatial, project };

// bn(z) = z * scale + shift = (z - mean) * inverse * weight + bias; for the backward dz = d * a + (z - mean) * b + c.
template <class Wide>
struct Tables {
  Wide *mean, *scale, *shift, *inverse;
  Wide *a, *b, *c;
};

__host__ GUNN_DEVICE int padded(int channels) { return (channels + 7) / 8 * 8; }

// Sizes, and where in z and d a batch norm's rows begin. Statistics and parameters know no padding: `row`, channels.
struct Extents {
  int64_t pixels;  // of the whole batch
  int height, width;
  int channels, segment, hidden, segments, units;
  bool shortcut, residual;

  __host__ GUNN_DEVICE bool projects(int unit) const { return shortcut && unit == 0; }
  __host__ GUNN_DEVICE int inputs(int unit) const { return unit == 0 ? channels : segment; }
  __host__ GUNN_DEVICE int channels_of(Norm norm) const {
    return norm == Norm::reduce || norm == Norm::spatial ? hidden : segment;
  }
  __host__ GUNN_DEVICE int k() const { return padded(hidden); }
  __host__ GUNN_DEVICE int s() const { return padded(segment); }
  // Columns of the reduce product: its own, and the shortcut's behind them.
  __host__ GUNN_DEVICE int reduce_columns(int unit) const { return k() + (projects(unit) ? s() : 0); }
  __host__ GUNN_DEVICE int z_rows() const { return z_row(Norm::reduce, units); }
  __host__ GUNN_DEVICE int d_rows() const { return units * (2 * k() + s()); }
  __host__ GUNN_DEVICE int z_row(Norm norm, int unit) const { return place(norm, unit, k(), s()); }
  __host__ GUNN_DEVICE int row(Norm norm, int unit) const { return place(norm, unit, hidden, segment); }
  // The shortcut's output has the gradient of the unit's.
  __host__ GUNN_DEVICE int d_row(Norm norm, int unit) const {
    const int before = unit * (2 * k() + s());
    return norm == Norm::reduce ? before : norm == Norm::spatial ? before + k() : before + 2 * k();
  }

 private:
  __host__ GUNN_DEVICE int place(Norm norm, int unit, int wide, int narrow) const {
    const int before = unit == 0 ? 0 : unit * (2 * wide + narrow) + (shortcut ? narrow : 0);
    const int behind_reduce = before + wide + (projects(unit) ? narrow : 0);
    switch (norm) {
      case Norm::reduce:
        return before;
      case Norm::shortcut:
        return before + wide;
      case Norm::spatial:
        return behind_reduce;
      default:
        return behind_reduce + wide;
    }
  }
};

// One launch's view of the layer. Segments `first_segment`… of z and d follow each other.
template <class Precision>
struct View {
  using Storage = typename Precision::Storage;
  using Wide = typename Precision::Wide;

  Extents extents;
  const Storage *x, *y;  // the state's pixels
  int64_t x_step, y_step;
  int first_segment;
  bool batch_statistics;  // so that gradients flow through them
  Storage *z, *d;
  Tables<Wide> tables;

  GUNN_DEVICE Storage* z_of(int segment) const {
    return z + (segment - first_segment) * extents.pixels * extents.z_rows();
  }
  GUNN_DEVICE Storage* d_of(int segment) const {
    return d + (segment - first_segment) * extents.pixels * extents.d_rows();
  }
  GUNN_DEVICE int64_t in_tables(int segment, int z_row) const {
    return static_cast<int64_t>(segment) * extents.z_rows() + z_row;
  }
};

// Sets the window to at most 64 pixels from `first` on, before `end`. Visible to others after a barrier.
GUNN_DEVICE void set_window(PixelWindow& window, const Extents& extents, int64_t first, int64_t end) {
  const int thread = threadIdx.x;
  if (thread == 0) {
    window.first = first;
    window.count = static_cast<int>(min(end - first, static_cast<int64_t>(kRows)));
  }
  if (thread < kRows) {
    const int64_t pixel = min(first + thread, end - 1), in_image = static_cast<int64_t>(extents.height) * extents.width;
    const int inside = static_cast<int>(pixel % in_image);
    window.image[thread] = static_cast<int>(pixel / in_image);
    window.row[thread] = inside / extents.width;
    window.column[thread] = inside % extents.width;
  }
}

template <class Scalar>
GUNN_DEVICE int64_t offset(const FeatureMap<Scalar>& map, const PixelWindow& window, int m) {
  return window.image[m] * map.batch + window.row[m] * map.row + window.column[m] * map.column;
}

// torch's ReLU lets NaN pass, and its gradient too.
template <class Wide>
GUNN_DEVICE Wide relu(Wide value) {
  return value < 0 ? 0 : value;
}

// Unit `unit`'s output in channel `channel` of its segment: a sum over the units so far, each rounded as it is stored.
template <class Precision>
GUNN_DEVICE typename Precision::Wide unit_output(const View<Precision>& view, int segment, int unit, int64_t pixel,
                                                 int channel) {
  using Wide = typename Precision::Wide;
  const Extents& extents = view.extents;
  const auto* z = view.z_of(segment) + pixel * extents.z_rows();
  const auto norm = [&](int row) -> Wide {
    const int64_t at = view.in_tables(segment, row);
    return to_float(z[row]) * view.tables.scale[at] + view.tables.shift[at];
  };
  Wide out = 0;
  for (int m = 0; m <= unit; ++m) {
    out += norm(extents.z_row(Norm::project, m) + channel);
    if (extents.projects(m)) out += norm(extents.z_row(Norm::shortcut, m) + channel);
    out = to_float(from_float<typename Precision::Storage>(out));
  }
  return out;
}

// ---- Sources of operands
//
// A Column is what is known of kVector neighbouring channels before any pixel is; `values` reads one pixel's. Channels
// are padded like what they index; those of a 3x3 convolution are tap * padded channels + channel.

template <class Precision>
using Values = typename Precision::Wide[Pool<Precision>::kVector];

template <class Precision>
GUNN_DEVICE void read(const typename Precision::Storage* from, Values<Precision>& out) {
  const auto vector = load_vector(from);
  GUNN_UNROLL
  for (int v = 0; v < Pool<Precision>::kVector; ++v) out[v] = to_float(vector.values[v]);
}
template <class Precision>
GUNN_DEVICE void read_table(const typename Precision::Wide* from, Values<Precision>& out) {
  constexpr int V = Pool<Precision>::kVector, W = Vector<typename Precision::Wide>::kSize;
  GUNN_UNROLL
  for (int first = 0; first < V; first += W) {
    const auto vector = load_vector(from + first);
    GUNN_UNROLL
    for (int v = 0; v < W; ++v) out[first + v] = vector.values[v];
  }
}

// The state before segment i: y where written, x where not.
template <class Precision>
struct State {
  using Column = int;
  const View<Precision>& view;
  const PixelWindow& window;
  int written;  // channels

  GUNN_DEVICE State(const View<Precision>& view_, const PixelWindow& window_, int segment, int /*unit*/)
      : view(view_), window(window_), written(segment * view_.extents.segment) {}
  GUNN_DEVICE Column column(int channel) const { return channel; }
  GUNN_DEVICE void values(int m, Column channel, Values<Precision>& out) const {
    constexpr int V = Pool<Precision>::kVector;
    const int64_t pixel = window.first + m;
    const auto* x = view.x + pixel * view.x_step + channel;
    const auto* y = view.y + pixel * view.y_step + channel;
    const bool all = channel + V <= written, none = channel >= written;
    read<Precision>(all ? y : x, out);
    if (all || none) return;
    Values<Precision> before;
    read<Precision>(y, before);
    GUNN_UNROLL
    for (int v = 0; v < V; ++v) out[v] = channel + v < written ? before[v] : out[v];
  }
};

// The input of a unit after the first.
template <class Precision>
struct UnitInput {
  using Column = int;
  const View<Precision>& view;
  const PixelWindow& window;
  int segment, unit;

  GUNN_DEVICE UnitInput(const View<Precision>& view_, const PixelWindow& window_, int segment_, int unit_)
      : view(view_), window(window_), segment(segment_), unit(unit_) {}
  GUNN_DEVICE Column column(int channel) const { return channel; }
  GUNN_DEVICE void values(int m, Column channel, Values<Precision>& out) const {
    GUNN_UNROLL
    for (int v = 0; v < Pool<Precision>::kVector; ++v) {
      out[v] = unit_output(view, segment, unit - 1, window.first + m, channel + v);
    }
  }
};

// How a 3x3 convolution moves the pixel: a tap is the offset (tap / 3 - 1, tap % 3 - 1); -1 in `direction` takes the
// opposite one, as the transposed convolution does.
template <int taps, int direction>
struct Tap {
  int channel = 0, down = 0, right = 0;

  GUNN_DEVICE Tap() {}
  GUNN_DEVICE Tap(int at, int channels) : channel(at) {
    if (taps == 1) return;
    const int tap = at / channels;
    channel = at - tap * channels;
    down = direction * (tap / 3 - 1), right = direction * (tap % 3 - 1);
  }
  // The pixel it leads to from the window's; false outside the image.
  GUNN_DEVICE bool lead(const Extents& extents, const PixelWindow& window, int m, int64_t* pixel) const {
    *pixel = window.first + m;
    if (taps == 1) return true;
    const int row = window.row[m] + down, column = window.column[m] + right;
    *pixel += static_cast<int64_t>(down) * extents.width + right;
    return row >= 0 && row < extents.height && column >= 0 && column < extents.width;
  }
};

template <class Precision>
GUNN_DEVICE void set_zero(Values<Precision>& out) {
  GUNN_UNROLL
  for (int v = 0; v < Pool<Precision>::kVector; ++v) out[v] = 0;
}

// relu(bn(z)) behind the reduce or spatial convolution, zero outside the image.
template <class Precision, int taps>
struct Activated {
  struct Column {
    Tap<taps, 1> tap;
    Values<Precision> scale, shift;
  };
  const View<Precision>& view;
  const PixelWindow& window;
  const typename Precision::Storage* z;
  int64_t table;

  GUNN_DEVICE Activated(const View<Precision>& view_, const PixelWindow& window_, int segment, int unit)
      : view(view_), window(window_) {
    const int row = view.extents.z_row(taps == 9 ? Norm::reduce : Norm::spatial, unit);
    z = view.z_of(segment) + row;
    table = view.in_tables(segment, row);
  }
  GUNN_DEVICE Column column(int channel) const {
    Column column;
    column.tap = Tap<taps, 1>(channel, view.extents.k());
    read_table<Precision>(view.tables.scale + table + column.tap.channel, column.scale);
    read_table<Precision>(view.tables.shift + table + column.tap.channel, column.shift);
    return column;
  }
  GUNN_DEVICE void values(int m, const Column& column, Values<Precision>& out) const {
    int64_t pixel;
    if (!column.tap.lead(view.extents, window, m, &pixel)) return set_zero<Precision>(out);
    read<Precision>(z + pixel * view.extents.z_rows() + column.tap.channel, out);
    GUNN_UNROLL
    for (int v = 0; v < Pool<Precision>::kVector; ++v) out[v] = relu(out[v] * column.scale[v] + column.shift[v]);
  }
};

// Gradient of the input of one batch norm; of the reduce's, with those of the shortcut's behind it.
template <class Precision, Norm norm, int taps = 1>
struct GradientOfInput {
  struct Column {
    Tap<taps, -1> tap;
    int d_row;
    Values<Precision> mean, a, b, c;
  };
  const View<Precision>& view;
  const PixelWindow& window;
  const typename Precision::Storage *z, *d;
  int64_t table;
  int channels, to_shortcut;

  GUNN_DEVICE GradientOfInput(const View<Precision>& view_, const PixelWindow& window_, int segment, int unit)
      : view(view_), window(window_) {
    const Extents& extents = view.extents;
    const int row = extents.z_row(norm, unit), d_row = extents.d_row(norm, unit);
    z = view.z_of(segment) + row;
    d = view.d_of(segment) + d_row;
    table = view.in_tables(segment, row);
    channels = norm == Norm::project ? extents.s() : extents.k();
    // From the place right behind the reduce's gradients to the unit output's.
    to_shortcut = extents.d_row(Norm::project, unit) - d_row - extents.k();
  }
  GUNN_DEVICE Column column(int channel) const {
    Column column;
    column.tap = Tap<taps, -1>(channel, channels);
    const bool shortcut = norm == Norm::reduce && column.tap.channel >= channels;
    column.d_row = column.tap.channel + (shortcut ? to_shortcut : 0);
    const int64_t at = table + column.tap.channel;
    read_table<Precision>(view.tables.mean + at, column.mean);
    read_table<Precision>(view.tables.a + at, column.a);
    read_table<Precision>(view.tables.b + at, column.b);
    read_table<Precision>(view.tables.c + at, column.c);
    return column;
  }
  GUNN_DEVICE void values(int m, const Column& column, Values<Precision>& out) const {
    int64_t pixel;
    if (!column.tap.lead(view.extents, window, m, &pixel)) return set_zero<Precision>(out);
    Values<Precision> gradient;
    read<Precision>(d + pixel * view.extents.d_rows() + column.d_row, gradient);
    if (!view.batch_statistics) {  // z has no part in it, nor has a NaN there
      GUNN_UNROLL
      for (int v = 0; v < Pool<Precision>::kVector; ++v) out[v] = gradient[v] * column.a[v];
      return;
    }
    read<Precision>(z + pixel * view.extents.z_rows() + column.tap.channel, out);
    GUNN_UNROLL
    for (int v = 0; v < Pool<Precision>::kVector; ++v) {
      out[v] = gradient[v] * column.a[v] + ((out[v] - column.mean[v]) * column.b[v] + column.c[v]);
    }
  }
};

// The same where it lies in memory: `d` then has the rows of z.
template <class Precision, Norm norm>
struct ReadyGradient {
  using Column = int;
  const PixelWindow& window;
  const typename Precision::Storage* dz;
  int64_t step;

  GUNN_DEVICE ReadyGradient(const View<Precision>& view, const PixelWindow& window_, int segment, int unit)
      : window(window_), step(view.extents.z_rows()) {
    dz = view.d + (segment - view.first_segment) * view.extents.pixels * step + view.extents.z_row(norm, unit);
  }
  GUNN_DEVICE Column column(int channel) const { return channel; }
  GUNN_DEVICE void values(int m, Column channel, Values<Precision>& out) const {
    read<Precision>(dz + (window.first + m) * step + channel, out);
  }
};

// ---- Staging a chunk

template <class Precision>
GUNN_DEVICE void put(typename Precision::Element* to, const Values<Precision>& values) {
  Vector<typename Precision::Element> vector;
  GUNN_UNROLL
  for (int v = 0; v < Pool<Precision>::kVector; ++v) vector.values[v] = Precision::element(values[v]);
  store_vector(to, vector);
}

// by_row: pixels of the window are rows, channels [first, first + kDepth) are depth; zeros beyond either.
template <class Precision, class Source>
GUNN_DEVICE void stage_pixels(typename Precision::Element* to, const Source& source, int first, int channels,
                              int count) {
  using P = Pool<Precision>;
  constexpr int kAcross = P::kDepth / P::kVector;
  const int across = threadIdx.x % kAcross * P::kVector;
  const bool inside = first + across < channels;
  typename Source::Column column{};
  if (inside) column = source.column(first + across);
  GUNN_UNROLL
  for (int j = 0; j < kRows * kAcross / kThreads; ++j) {
    const int m = threadIdx.x / kAcross + j * (kThreads / kAcross);
    Values<Precision> values;
    if (inside && m < count) {
      source.values(m, column, values);
    } else {
      set_zero<Precision>(values);
    }
    put<Precision>(to + m * P::kRowStride + across, values);
  }
}

// by_depth: 64 channels are rows (the thread's `column` of them, if `inside`), kDepth pixels of the window are depth.
template <class Precision>
GUNN_DEVICE int channel_of_thread() {
  return threadIdx.x % (kRows / Pool<Precision>::kVector) * Pool<Precision>::kVector;
}
template <class Precision, class Source>
GUNN_DEVICE void stage_channels(typename Precision::Element* to, const Source& source,
                                const typename Source::Column& column, bool inside, int count) {
  using P = Pool<Precision>;
  constexpr int kAcross = kRows / P::kVector;
  GUNN_UNROLL
  for (int j = 0; j < P::kDepth * kAcross / kThreads; ++j) {
    const int m = threadIdx.x / kAcross + j * (kThreads / kAcross);
    Values<Precision> values;
    if (inside && m < count) {
      source.values(m, column, values);
    } else {
      set_zero<Precision>(values);
    }
    put<Precision>(to + m * P::kDepthStride + channel_of_thread<Precision>(), values);
  }
}

}  // namespace gunn
