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

// Sets the window to as many pixels as it takes from `first` on, before `end`. Visible to others after a barrier.
template <int rows>
GUNN_DEVICE void set_window(PixelWindow<rows>& window, const Extents& extents, int64_t first, int64_t end) {
  const int thread = threadIdx.x;
  if (thread == 0) {
    window.first = first;
    window.count = static_cast<int>(min(end - first, static_cast<int64_t>(rows)));
  }
  if (thread < rows) {
    const int64_t pixel = min(first + thread, end - 1), in_image = static_cast<int64_t>(extents.height) * extents.width;
    const int inside = static_cast<int>(pixel % in_image);
    window.image[thread] = static_cast<int>(pixel / in_image);
    window.row[thread] = inside / extents.width;
    window.column[thread] = inside % extents.width;
  }
}

template <class Scalar, int rows>
GUNN_DEVICE int64_t offset(const FeatureMap<Scalar>& map, const PixelWindow<rows>& window, int m) {
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
// A Column is what is known of kVector neighbouring channels before any pixel is. `load` brings what lies in memory for
// one pixel of a window, Loaded; `values` makes operands of it, so that something else may be done while it comes.
// Channels are padded like what they index; those of a 3x3 convolution are tap * padded channels + channel.

template <class Precision>
using Values = typename Precision::Wide[Pool<Precision>::kVector];
template <class Precision>
using Stored = Vector<typename Precision::Storage>;

template <class Precision>
GUNN_DEVICE void read(const Stored<Precision>& from, Values<Precision>& out) {
  GUNN_UNROLL
  for (int v = 0; v < Pool<Precision>::kVector; ++v) out[v] = to_float(from.values[v]);
}
template <class Precision>
GUNN_DEVICE void read(const typename Precision::Storage* from, Values<Precision>& out) {
  read<Precision>(load_vector(from), out);
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
  using Loaded = Stored<Precision>;
  const View<Precision>& view;
  int written;  // channels

  GUNN_DEVICE State(const View<Precision>& view_, int segment, int /*unit*/)
      : view(view_), written(segment * view_.extents.segment) {}
  GUNN_DEVICE Column column(int channel) const { return channel; }
  template <class Window>
  GUNN_DEVICE Loaded load(const Window& window, int m, Column channel) const {
    constexpr int V = Pool<Precision>::kVector;
    const int64_t pixel = window.first + m;
    const auto* x = view.x + pixel * view.x_step + channel;
    const auto* y = view.y + pixel * view.y_step + channel;
    const bool all = channel + V <= written, none = channel >= written;
    Loaded loaded = load_vector(all ? y : x);
    if (all || none) return loaded;
    const Loaded before = load_vector(y);
    GUNN_UNROLL
    for (int v = 0; v < V; ++v) {
      if (channel + v < written) loaded.values[v] = before.values[v];
    }
    return loaded;
  }
  GUNN_DEVICE void values(const Loaded& loaded, Column, Values<Precision>& out) const { read<Precision>(loaded, out); }
};

// The input of a unit after the first; it has been rounded as if it were stored.
template <class Precision>
struct UnitInput {
  using Column = int;
  using Loaded = Stored<Precision>;
  const View<Precision>& view;
  int segment, unit;

  GUNN_DEVICE UnitInput(const View<Precision>& view_, int segment_, int unit_)
      : view(view_), segment(segment_), unit(unit_) {}
  GUNN_DEVICE Column column(int channel) const { return channel; }
  template <class Window>
  GUNN_DEVICE Loaded load(const Window& window, int m, Column channel) const {
    using Storage = typename Precision::Storage;
    Loaded loaded;
    GUNN_UNROLL
    for (int v = 0; v < Pool<Precision>::kVector; ++v) {
      loaded.values[v] = from_float<Storage>(unit_output(view, segment, unit - 1, window.first + m, channel + v));
    }
    return loaded;
  }
  GUNN_DEVICE void values(const Loaded& loaded, Column, Values<Precision>& out) const { read<Precision>(loaded, out); }
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
  template <class Window>
  GUNN_DEVICE bool lead(const Extents& extents, const Window& window, int m, int64_t* pixel) const {
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
  struct Loaded {
    Stored<Precision> z;
    bool inside = false;
  };
  const View<Precision>& view;
  const typename Precision::Storage* z;
  int64_t table;

  GUNN_DEVICE Activated(const View<Precision>& view_, int segment, int unit) : view(view_) {
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
  template <class Window>
  GUNN_DEVICE Loaded load(const Window& window, int m, const Column& column) const {
    int64_t pixel;
    Loaded loaded;
    loaded.inside = column.tap.lead(view.extents, window, m, &pixel);
    if (loaded.inside) loaded.z = load_vector(z + pixel * view.extents.z_rows() + column.tap.channel);
    return loaded;
  }
  GUNN_DEVICE void values(const Loaded& loaded, const Column& column, Values<Precision>& out) const {
    if (!loaded.inside) return set_zero<Precision>(out);
    read<Precision>(loaded.z, out);
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
  struct Loaded {
    Stored<Precision> d, z;
    bool inside = false;
  };
  const View<Precision>& view;
  const typename Precision::Storage *z, *d;
  int64_t table;
  int channels, to_shortcut;

  GUNN_DEVICE GradientOfInput(const View<Precision>& view_, int segment, int unit) : view(view_) {
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
  template <class Window>
  GUNN_DEVICE Loaded load(const Window& window, int m, const Column& column) const {
    int64_t pixel;
    Loaded loaded;
    loaded.inside = column.tap.lead(view.extents, window, m, &pixel);
    if (!loaded.inside) return loaded;
    loaded.d = load_vector(d + pixel * view.extents.d_rows() + column.d_row);
    // Else z has no part in it, nor has a NaN there.
    if (view.batch_statistics) loaded.z = load_vector(z + pixel * view.extents.z_rows() + column.tap.channel);
    return loaded;
  }
  GUNN_DEVICE void values(const Loaded& loaded, const Column& column, Values<Precision>& out) const {
    if (!loaded.inside) return set_zero<Precision>(out);
    Values<Precision> gradient;
    read<Precision>(loaded.d, gradient);
    if (!view.batch_statistics) {
      GUNN_UNROLL
      for (int v = 0; v < Pool<Precision>::kVector; ++v) out[v] = gradient[v] * column.a[v];
      return;
    }
    read<Precision>(loaded.z, out);
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
  using Loaded = Stored<Precision>;
  const typename Precision::Storage* dz;
  int64_t step;

  GUNN_DEVICE ReadyGradient(const View<Precision>& view, int segment, int unit) : step(view.extents.z_rows()) {
    dz = view.d + (segment - view.first_segment) * view.extents.pixels * step + view.extents.z_row(norm, unit);
  }
  GUNN_DEVICE Column column(int channel) const { return channel; }
  template <class Window>
  GUNN_DEVICE Loaded load(const Window& window, int m, Column channel) const {
    return load_vector(dz + (window.first + m) * step + channel);
  }
  GUNN_DEVICE void values(const Loaded& loaded, Column, Values<Precision>& out) const { read<Precision>(loaded, out); }
};

// ---- Staging a chunk

template <class Precision>
GUNN_DEVICE void put(typename Precision::Element* to, const Values<Precision>& values) {
  Vector<typename Precision::Element> vector;
  GUNN_UNROLL
  for (int v = 0; v < Pool<Precision>::kVector; ++v) vector.values[v] = Precision::element(values[v]);
  store_vector(to, vector);
}

// by_row: pixels of the window are rows, channels [first, first + kDepth) are depth; zeros beyond either. What has been
// loaded waits in registers until it is stored, two pixels a thread at once; all are loaded in kTurns turns.
template <class Precision, class Tile, class Source>
class StagedPixels {
  using P = Pool<Precision, Tile>;
  using Element = typename Precision::Element;
  using Column = typename Source::Column;
  using Loaded = typename Source::Loaded;
  static constexpr int kPieces = P::kDepth / P::kVector, kStep = Tile::kThreads / kPieces;
  static constexpr int kLoads = 2;

 public:
  static constexpr int kTurns = Tile::kRows / (kLoads * kStep);

  GUNN_DEVICE StagedPixels(const Source& source, int channels) : source_(source), channels_(channels) {}

  GUNN_DEVICE void load(const PixelWindow<Tile::kRows>& window, int first, int turn = 0) {
    channel_ = first + threadIdx.x % kPieces * P::kVector;
    count_ = channel_ < channels_ ? window.count : 0;
    if (count_ == 0) return;
    const Column column = source_.column(channel_);
    GUNN_UNROLL
    for (int j = 0; j < kLoads; ++j) {
      if (row(turn, j) < count_) loaded_[j] = source_.load(window, row(turn, j), column);
    }
  }
  GUNN_DEVICE void store(Element* to, int turn = 0) const {
    Column column{};
    if (count_ > 0) column = source_.column(channel_);
    GUNN_UNROLL
    for (int j = 0; j < kLoads; ++j) {
      Values<Precision> values;
      if (row(turn, j) < count_) {
        source_.values(loaded_[j], column, values);
      } else {
        set_zero<Precision>(values);
      }
      put<Precision>(to + row(turn, j) * P::kRowStride + threadIdx.x % kPieces * P::kVector, values);
    }
  }

 private:
  static GUNN_DEVICE int row(int turn, int j) { return threadIdx.x / kPieces + (kLoads * turn + j) * kStep; }

  const Source& source_;
  const int channels_;
  int channel_ = 0, count_ = 0;
  Loaded loaded_[kLoads];
};

// by_depth: `rows` channels from `first` on, before `end`, are rows; kDepth pixels of a window, from its pixel `offset`
// on, are depth; zeros beyond either. `stage` loads and stores one pixel after another, in fewer registers.
template <class Precision, class Tile, class Source, int rows>
class StagedChannels {
  using P = Pool<Precision, Tile>;
  using Element = typename Precision::Element;
  using Loaded = typename Source::Loaded;
  static constexpr int kPieces = rows / P::kVector;
  // Pieces of a pixel that are no power of two are a warp's, which has some lanes to spare.
  static constexpr int kLanes = (kPieces & (kPieces - 1)) == 0 ? kPieces : 32;
  static constexpr int kStep = Tile::kThreads / kLanes, kLoads = P::kDepth / kStep;
  static_assert(kPieces <= kLanes, "a pixel is at most a warp's");

 public:
  GUNN_DEVICE StagedChannels(const Source& source, int first, int end) : source_(source) {
    inside_ = lane() < kPieces && first + lane() * P::kVector < end;
    if (inside_) column_ = source.column(first + lane() * P::kVector);
  }
  GUNN_DEVICE void load(const PixelWindow<Tile::kRows>& window, int offset) {
    open(window, offset);
    GUNN_UNROLL
    for (int j = 0; j < kLoads; ++j) {
      if (depth(j) < count_) loaded_[j] = source_.load(window, offset + depth(j), column_);
    }
  }
  GUNN_DEVICE void store(Element* to) const {
    GUNN_UNROLL
    for (int j = 0; j < kLoads; ++j) put_pixel(to, j, loaded_[j]);
  }
  GUNN_DEVICE void stage(Element* to, const PixelWindow<Tile::kRows>& window) {
    open(window, 0);
    GUNN_UNROLL
    for (int j = 0; j < kLoads; ++j) {
      Loaded loaded{};
      if (depth(j) < count_) loaded = source_.load(window, depth(j), column_);
      put_pixel(to, j, loaded);
    }
  }

 private:
  static GUNN_DEVICE int lane() { return threadIdx.x % kLanes; }
  static GUNN_DEVICE int depth(int j) { return threadIdx.x / kLanes + j * kStep; }
  GUNN_DEVICE void open(const PixelWindow<Tile::kRows>& window, int offset) {
    count_ = inside_ ? window.count - offset : 0;
  }
  GUNN_DEVICE void put_pixel(Element* to, int j, const Loaded& loaded) const {
    if (lane() >= kPieces) return;
    Values<Precision> values;
    if (depth(j) < count_) {
      source_.values(loaded, column_, values);
    } else {
      set_zero<Precision>(values);
    }
    put<Precision>(to + depth(j) * (rows + 8) + lane() * P::kVector, values);
  }

  const Source& source_;
  bool inside_;
  int count_ = 0;
  typename Source::Column column_{};
  Loaded loaded_[kLoads];
};

}  // namespace gunn
