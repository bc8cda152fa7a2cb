// What every kernel is told: sizes, where tensors lie, and one segment's batch norms as numbers.
#pragma once

#include "cuda/tile.cuh"

namespace gunn {

// The four batch norms of a unit; the second exists in unit 0 of layers with a projection shortcut.
enum class Norm { reduce, shortcut, spatial, project };

// A batch norm's channel: bn(z) = z * scale + shift = (z - mean) * inverse * weight + bias.
template <class Wide>
struct Affine {
  Wide mean, scale, shift, inverse;
};

// Its backward: dz = d * a + (z - mean) * b + c.
template <class Wide>
struct Slope {
  Wide a, b, c;
};

// Sizes. n, s, k, rows as LayerShape says; one pixel's pre-activations are `rows` neighbours, one pixel's gradients
// of batch-norm outputs `gradient_rows`: reduce (k), spatial (k), project (s) of every unit.
struct Extents {
  int64_t pixels;  // of the whole batch
  int height, width;
  int channels, segment, hidden, segments, units;
  int rows, gradient_rows;
  bool shortcut, residual;

  GUNN_DEVICE bool projects(int unit) const { return shortcut && unit == 0; }
  GUNN_DEVICE int inputs(int unit) const { return unit == 0 ? channels : segment; }
  GUNN_DEVICE int reduce_rows(int unit) const { return hidden + (projects(unit) ? segment : 0); }
  GUNN_DEVICE int row(Norm norm, int unit) const {
    const int plain = 2 * hidden + segment, before = unit == 0 ? 0 : unit * plain + (shortcut ? segment : 0);
    switch (norm) {
      case Norm::reduce:
        return before;
      case Norm::shortcut:
        return before + hidden;
      case Norm::spatial:
        return before + reduce_rows(unit);
      default:
        return before + reduce_rows(unit) + hidden;
    }
  }
  // The shortcut's output has the gradient of the unit's.
  GUNN_DEVICE int gradient_row(Norm norm, int unit) const {
    const int before = unit * (2 * hidden + segment);
    return norm == Norm::reduce ? before : norm == Norm::spatial ? before + hidden : before + 2 * hidden;
  }
};

// One launch's view of the layer. Segments `first_segment`… of `z` and `d` follow each other at a fixed step.
template <class Precision>
struct View {
  using Storage = typename Precision::Storage;
  using Wide = typename Precision::Wide;

  Extents extents;
  FeatureMap<const Storage> x, y;
  bool pixels_fast;  // neighbouring pixels of x and y are neighbours in memory, rather than neighbouring channels
  int first_segment;
  Storage* z;            // (segments, pixels, rows)
  Storage* d;            // (segments, pixels, gradient_rows)
  Affine<Wide>* affine;  // (P, rows)
  Slope<Wide>* slopes;   // (P, rows)

  GUNN_DEVICE Storage* z_of(int segment) const { return z + (segment - first_segment) * extents.pixels * extents.rows; }
  GUNN_DEVICE Storage* d_of(int segment) const {
    return d + (segment - first_segment) * extents.pixels * extents.gradient_rows;
  }
  GUNN_DEVICE const Affine<Wide>* affine_of(int segment, int row) const {
    return affine + static_cast<int64_t>(segment) * extents.rows + row;
  }
  GUNN_DEVICE const Slope<Wide>* slopes_of(int segment, int row) const {
    return slopes + static_cast<int64_t>(segment) * extents.rows + row;
  }
};

// Sets the window to the 64 pixels from `first` on, at most to `end`. Visible to others after a barrier.
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
  const auto* z = view.z_of(segment) + pixel * extents.rows;
  const auto norm = [&](int row) -> Wide {
    const Affine<Wide> affine = *view.affine_of(segment, row);
    return to_float(z[row]) * affine.scale + affine.shift;
  };
  Wide out = 0;
  for (int m = 0; m <= unit; ++m) {
    out += norm(extents.row(Norm::project, m) + channel);
    if (extents.projects(m)) out += norm(extents.row(Norm::shortcut, m) + channel);
    out = to_float(from_float<typename Precision::Storage>(out));
  }
  return out;
}

// ---- Sources of operands: pixels of the window x channels

// The state before segment i: y where written, x where not.
template <class Precision>
struct State {
  using Wide = typename Precision::Wide;
  struct Pixel {
    bool valid;
    int64_t x, y;
  };
  struct Channel {
    const typename Precision::Storage* data;
    bool written;
  };
  const View<Precision>& view;
  const PixelWindow& window;
  int written;  // channels

  GUNN_DEVICE State(const View<Precision>& view_, const PixelWindow& window_, int segment, int /*unit*/)
      : view(view_), window(window_), written(segment * view_.extents.segment) {}
  GUNN_DEVICE bool pixels_fast() const { return view.pixels_fast; }
  GUNN_DEVICE Pixel pixel(int m) const {
    return {m < window.count, offset(view.x, window, m), offset(view.y, window, m)};
  }
  GUNN_DEVICE Channel channel(int64_t c) const {
    return c < written ? Channel{view.y.data + c * view.y.channel, true}
                       : Channel{view.x.data + c * view.x.channel, false};
  }
  GUNN_DEVICE Wide value(const Pixel& pixel, const Channel& channel) const {
    return to_float(channel.data[channel.written ? pixel.y : pixel.x]);
  }
};

// The input of a unit after the first.
template <class Precision>
struct UnitInput {
  using Wide = typename Precision::Wide;
  struct Pixel {
    bool valid;
    int64_t index;
  };
  using Channel = int;
  const View<Precision>& view;
  const PixelWindow& window;
  int segment, unit;

  GUNN_DEVICE UnitInput(const View<Precision>& view_, const PixelWindow& window_, int segment_, int unit_)
      : view(view_), window(window_), segment(segment_), unit(unit_) {}
  GUNN_DEVICE bool pixels_fast() const { return false; }
  GUNN_DEVICE Pixel pixel(int m) const { return {m < window.count, window.first + m}; }
  GUNN_DEVICE Channel channel(int64_t c) const { return static_cast<int>(c); }
  GUNN_DEVICE Wide value(const Pixel& pixel, Channel channel) const {
    return unit_output(view, segment, unit - 1, pixel.index, channel);
  }
};

// How a 3x3 convolution moves the pixel: channel c at tap t is depth t * channels + c. A tap is the offset (t / 3 - 1,
// t % 3 - 1); -1 in `direction` takes the opposite one, as the transposed convolution does.
template <int taps, int direction>
struct Tap {
  int channel = 0, down = 0, right = 0;

  GUNN_DEVICE Tap() {}
  GUNN_DEVICE Tap(int64_t depth, int channels) {
    if (taps == 1) {
      channel = static_cast<int>(depth), down = 0, right = 0;
    } else {
      const int at = static_cast<int>(depth), tap = at / channels;
      channel = at - tap * channels;
      down = direction * (tap / 3 - 1), right = direction * (tap % 3 - 1);
    }
  }
};

// A pixel of the window that taps may leave.
struct Place {
  bool valid;
  int row, column;
  int64_t index;
};
GUNN_DEVICE Place place(const PixelWindow& window, int m) {
  return {m < window.count, window.row[m], window.column[m], window.first + m};
}
template <class AnyTap>
GUNN_DEVICE bool reach(const Extents& extents, const Place& place, const AnyTap& tap, int64_t* pixel) {
  const int row = place.row + tap.down, column = place.column + tap.right;
  *pixel = place.index + static_cast<int64_t>(tap.down) * extents.width + tap.right;
  return row >= 0 && row < extents.height && column >= 0 && column < extents.width;
}

// relu(bn(z)) behind the reduce or spatial convolution, zero outside the image.
template <class Precision, int taps>
struct Activated {
  using Wide = typename Precision::Wide;
  using Pixel = Place;
  struct Channel {
    Tap<taps, 1> tap;
    Wide scale, shift;
  };
  const Extents& extents;
  const PixelWindow& window;
  const typename Precision::Storage* z;
  const Affine<Wide>* affine;

  GUNN_DEVICE Activated(const View<Precision>& view, const PixelWindow& window_, int segment, int unit)
      : extents(view.extents), window(window_) {
    const int row = extents.row(taps == 9 ? Norm::reduce : Norm::spatial, unit);
    z = view.z_of(segment) + row;
    affine = view.affine_of(segment, row);
  }
  GUNN_DEVICE bool pixels_fast() const { return false; }
  GUNN_DEVICE Pixel pixel(int m) const { return place(window, m); }
  GUNN_DEVICE Channel channel(int64_t depth) const {
    const Tap<taps, 1> tap(depth, extents.hidden);
    return {tap, affine[tap.channel].scale, affine[tap.channel].shift};
  }
  GUNN_DEVICE Wide value(const Pixel& place, const Channel& channel) const {
    int64_t pixel;
    if (!reach(extents, place, channel.tap, &pixel)) return 0;
    return relu(to_float(z[pixel * extents.rows + channel.tap.channel]) * channel.scale + channel.shift);
  }
};

// Gradient of the input of one batch norm; of the reduce's, with those of the shortcut's behind it.
template <class Precision, Norm norm, int taps = 1>
struct GradientOfInput {
  using Wide = typename Precision::Wide;
  using Pixel = Place;
  struct Channel {
    Tap<taps, -1> tap;
    int gradient;  // its row in d
    Wide mean;
    Slope<Wide> slope;
  };
  const Extents& extents;
  const PixelWindow& window;
  const typename Precision::Storage *z, *d;
  const Affine<Wide>* affine;
  const Slope<Wide>* slopes;
  int channels, to_shortcut;

  GUNN_DEVICE GradientOfInput(const View<Precision>& view, const PixelWindow& window_, int segment, int unit)
      : extents(view.extents), window(window_) {
    const int row = extents.row(norm, unit), gradient_row = extents.gradient_row(norm, unit);
    z = view.z_of(segment) + row;
    d = view.d_of(segment) + gradient_row;
    affine = view.affine_of(segment, row);
    slopes = view.slopes_of(segment, row);
    channels = norm == Norm::project ? extents.segment : extents.hidden;
    // From the place right behind the reduce's gradients to the unit output's.
    to_shortcut = extents.gradient_row(Norm::project, unit) - gradient_row - extents.hidden;
  }
  GUNN_DEVICE bool pixels_fast() const { return false; }
  GUNN_DEVICE Pixel pixel(int m) const { return place(window, m); }
  GUNN_DEVICE Channel channel(int64_t depth) const {
    const Tap<taps, -1> tap(depth, channels);
    const bool shortcut = norm == Norm::reduce && tap.channel >= extents.hidden;
    return {tap, tap.channel + (shortcut ? to_shortcut : 0), affine[tap.channel].mean, slopes[tap.channel]};
  }
  GUNN_DEVICE Wide value(const Pixel& place, const Channel& channel) const {
    int64_t pixel;
    if (!reach(extents, place, channel.tap, &pixel)) return 0;
    const Wide gradient = to_float(d[pixel * extents.gradient_rows + channel.gradient]);
    const Wide centred = to_float(z[pixel * extents.rows + channel.tap.channel]) - channel.mean;
    return gradient * channel.slope.a + (centred * channel.slope.b + channel.slope.c);
  }
};

// ---- Sources as loaders of a product

// Rows are pixels, depth is channels: forward and gradient products.
template <class Source>
struct PixelsByChannels {
  using Column = typename Source::Channel;
  const Source& source;
  bool rows_fast;

  GUNN_DEVICE explicit PixelsByChannels(const Source& source_) : source(source_), rows_fast(source_.pixels_fast()) {}
  GUNN_DEVICE auto row(int m) const { return source.pixel(m); }
  GUNN_DEVICE Column column(int64_t k) const { return source.channel(k); }
  template <class Row>
  GUNN_DEVICE auto value(const Row& row, const Column& column) const {
    return source.value(row, column);
  }
};

// Rows are channels from `first` on, depth is the window's pixels: gradients of weights.
template <class Source>
struct ChannelsByPixels {
  using Column = typename Source::Pixel;
  struct Row {
    bool valid;
    typename Source::Channel channel;
  };
  const Source& source;
  int64_t first;
  int count;
  bool rows_fast;

  GUNN_DEVICE ChannelsByPixels(const Source& source_, int64_t first_, int count_)
      : source(source_), first(first_), count(count_), rows_fast(!source_.pixels_fast()) {}
  GUNN_DEVICE Row row(int m) const {
    if (m >= count) return {false, {}};
    return {true, source.channel(first + m)};
  }
  GUNN_DEVICE Column column(int64_t k) const { return source.pixel(static_cast<int>(k)); }
  GUNN_DEVICE auto value(const Row& row, const Column& column) const {
    return column.valid ? source.value(column, row.channel) : 0;
  }
};

}  // namespace gunn
