// The three stages of an update unit on one image, shared by the forward and by the backward's recomputation.
//
//   reduce    emit the update before it, then z1 = W1 · state (and the shortcut's rows, in the same product)
//   spatial   z2 = conv3x3(relu(bn(z1)))
//   project   z3 = W3 · relu(bn(z2))
//   emit      h = bn(z3) [+ bn(shortcut)] [+ h before it]; after the last unit: state[c_i] (+)= h
//
// Threads deal out the bands of all images in contiguous pieces: whole images where the batch divides by the threads. A
// stage touches its own tiles only, but for the 3x3, which reads z1 (and in the backward dz2) of the rows next to a
// piece; a thread activates those once more in an image of its own.
//
// A segment of few channels has few rows in the reduce stage, and a product of 3 rows with a state of hundreds of
// channels takes as long as the state takes to stream. Consecutive segments with few rows therefore make a panel: the
// columns of the state that none of them changes are multiplied for all their rows at once, when the panel is entered;
// the panel's own columns are added segment by segment, as they then are. A panel of one segment is one product.
//
// z1, z2, z3 lie in one buffer as [panel][slot][unit row][tile][row][pixel], the reduce rows of unit 0 of a panel's
// segments side by side: a slot is an image where they are needed again, a thread where they are not; keeping them for
// the backward is only a stride.
#pragma once

#include "cpu/batch_norm.h"
#include "cpu/convolution.h"
#include "cpu/gemm.h"
#include "cpu/team.h"
#include "cpu/tiles.h"

namespace gunn {
namespace {

// Threads beyond the bands of a batch would have nothing to do.
template <class Factor>
Options with_useful_threads(const LayerShape& shape, Options options) {
  const int64_t bands = shape.batch * Geometry<Sum<Factor>>(shape, kDepth<Factor>).bands;
  options.threads = static_cast<int>(smaller(options.threads, bands));
  return options;
}

// Segments [first, first + count) whose reduce stages of unit 0 are computed together.
struct Panel {
  int64_t first, count;
  int64_t last() const { return first + count - 1; }
};

// A block of the reduce weights of unit 0: all rows of some segments, some columns of the state.
struct WeightBlock {
  int64_t first, segments;
  int64_t column, columns;
  int64_t at, padded_at;  // where it begins among its panel's, and where if rows were padded
};

// How segments make panels: as many as fill three row blocks, where one alone fills less than two, and an even number
// of channels, for the state may hold these in pairs.
struct Panels {
  int64_t segments, channels, width, rows;  // of the layer, of its state, of a segment: its channels, its reduce rows
  int64_t size;                             // segments of a panel, but of the last

  explicit Panels(const LayerShape& shape)
      : segments(shape.segments), channels(shape.channels), width(shape.segment()), rows(shape.reduce_rows(0)) {
    const int64_t enough = (36 + rows - 1) / rows, even = enough + enough * width % 2;
    size = rows >= 24 || even >= segments ? 1 : even;
  }
  int64_t count() const { return (segments + size - 1) / size; }
  int64_t index(int64_t segment) const { return segment / size; }
  Panel at(int64_t index) const { return {index * size, smaller(size, segments - index * size)}; }
  Panel of(int64_t segment) const { return at(index(segment)); }

  // Calls visit(WeightBlock) for what no segment of the panel changes: columns to the left and to the right of its own.
  // Rows may be padded to a multiple of `lanes`.
  template <class Visit>
  GUNN_INLINE void for_outside(const Panel& panel, int64_t lanes, Visit visit) const {
    const int64_t begin = size == 1 ? channels : panel.first * width,
                  end = begin + (size == 1 ? 0 : panel.count * width);
    const int64_t all = panel.count * rows;
    if (begin > 0) visit(WeightBlock{panel.first, panel.count, 0, begin, 0, 0});
    if (end < channels) {
      visit(WeightBlock{panel.first, panel.count, end, channels - end, all * begin, round_up(all, lanes) * begin});
    }
  }
  bool has_inside() const { return size > 1; }
  // The panel's own columns, for one of its segments.
  WeightBlock inside(const Panel& panel, int64_t segment, int64_t lanes) const {
    const int64_t begin = panel.first * width, columns = panel.count * width, rest = channels - begin - columns;
    const int64_t all = panel.count * rows, before = (segment - panel.first) * rows;
    return {segment,
            1,
            begin,
            columns,
            all * (begin + rest) + before * columns,
            round_up(all, lanes) * (begin + rest) + (segment - panel.first) * round_up(rows, lanes) * columns};
  }
  template <class Visit>
  GUNN_INLINE void for_blocks(const Panel& panel, int64_t lanes, Visit visit) const {
    for_outside(panel, lanes, visit);
    for (int64_t i = panel.first; has_inside() && i <= panel.last(); ++i) visit(inside(panel, i, lanes));
  }
  // Values of all blocks of a panel, their rows padded.
  int64_t padded_size(int64_t lanes) const {
    return round_up(size * rows, lanes) * channels + (has_inside() ? size * round_up(rows, lanes) * size * width : 0);
  }
};

// Where the packed weights of one panel lie: the reduce weights of unit 0 of all its segments, then segment by segment.
struct PackedLayout {
  int64_t reduce;
  int64_t unit[2][3] = {};  // [first unit or a later one][reduce, spatial, project], from the start of the unit
  int64_t unit_size[2] = {};
  int64_t segment, size;

  // A 3x3 weight is packed as `values_of_weight` numbers.
  PackedLayout(const LayerShape& shape, const Panels& panels, int64_t values_of_weight) {
    const int64_t k = shape.hidden(), s = shape.segment();
    for (int64_t m = 0; m < 2; ++m) {
      unit[m][1] = m == 0 ? 0 : s * k;
      unit[m][2] = unit[m][1] + k * k * values_of_weight;
      unit_size[m] = round_up(unit[m][2] + s * k, 16);
    }
    reduce = round_up(panels.size * panels.rows * panels.channels, 16);
    segment = unit_size[0] + (shape.units - 1) * unit_size[1];
    size = reduce + panels.size * segment;
  }
  // Segments are counted from the panel's first.
  int64_t at(int64_t i, int64_t m, int64_t stage) const {
    if (m == 0 && stage == 0) return 0;
    return reduce + i * segment + (m == 0 ? 0 : unit_size[0] + (m - 1) * unit_size[1]) + unit[m > 0][stage];
  }
};

// z1 | shortcut | z2 | z3 of all units, in the row order of the statistics.
template <class Scalar>
struct PreActivations {
  Scalar* data = nullptr;
  int64_t panels = 1;      // kept at once: panel p overwrites panel p - panels
  bool compact = false;    // a short panel takes no more than it needs
  int64_t panel_step = 0;  // of a panel that is not short
  int64_t slot_step = 0;   // of one segment
  int64_t pixels = 0;
};

// What one thread needs for itself.
template <class Factor>
struct Scratch {
  using Scalar = Sum<Factor>;

  Convolution<Factor> convolution;
  Factor* hidden;  // k rows of one tile
  Affine<Scalar> affine;

  Scratch(const LayerShape& shape, const Geometry<Scalar>& geometry) : convolution(geometry, shape.hidden()) {}
  void take(const LayerShape& shape, Arena& arena) {
    convolution.take(arena);
    hidden = arena.take<Factor>(shape.hidden() * Simd<Scalar>::tile);
    affine.take(arena, shape.rows());
  }
};

template <class Precision>
struct Stages {
  using Scalar = typename Precision::Scalar;
  using Factor = typename Precision::Factor;
  static constexpr int64_t T = Simd<Scalar>::tile, L = Simd<Scalar>::lanes;
  using Int = typename Simd<Scalar>::Int;

  const LayerShape& shape;
  const UnitTensors<const Scalar*>* parameters;
  Geometry<Scalar> geometry;
  Panels panels;
  PackedLayout packed_layout;
  Int* mask;
  Factor* state;    // [slot][tile][N][T]
  Factor* outputs;  // h after units 0 … M-2: [unit][slot][tile][s][T]
  int64_t slots = 0;
  PreActivations<Scalar> z;

  Stages(const LayerShape& shape_, const UnitTensors<const Scalar*>* parameters_)
      : shape(shape_),
        parameters(parameters_),
        geometry(shape_, kDepth<Factor>),
        panels(shape_),
        packed_layout(shape_, panels, Convolution<Factor>::values_of_weight(geometry, shape_.hidden())) {}

  // Pre-activations of `panels_kept` panels, or of all of them where `saved` is.
  void take(Arena& arena, int64_t slots_, int64_t panels_kept, Scalar* saved) {
    slots = slots_;
    mask = arena.take<Int>(geometry.pixels);
    state = arena.take<Factor>(slots * state_size());
    outputs = arena.take<Factor>((shape.units - 1) * slots * output_size());
    z.panels = saved ? panels.count() : panels_kept;
    z.compact = saved;
    z.pixels = geometry.pixels;
    z.slot_step = shape.rows() * z.pixels;
    z.panel_step = panels.size * slots * z.slot_step;
    z.data = saved ? saved : arena.take<Scalar>(z.panels * z.panel_step);
  }

  // Calls visit(Piece) for this thread's pieces of the batch.
  template <class Visit>
  GUNN_INLINE void for_own_pieces(const Team& team, Visit visit) const {
    const int64_t bands = shape.batch * geometry.bands;
    for_each_piece(geometry, team.begin(bands), team.end(bands), visit);
  }
  template <class Visit>
  GUNN_INLINE void for_own_tiles(const Team& team, Visit visit) const {
    for_own_pieces(team, [&](const Piece& piece) {
      for (int64_t tile = piece.first; tile < piece.last; ++tile) visit(piece.slot, tile);
    });
  }
  // Whether threads share images.
  bool cuts_images(const Team& team) const { return shape.batch % team.size != 0; }

  // Of an odd number of channels the last pair's second half is never written, but multiplied with zero.
  void clear_outputs() const {
    if (shape.segment() % kDepth<Factor> == 0) return;
    for (int64_t j = 0; j < (shape.units - 1) * slots * output_size(); ++j) outputs[j] = Factor{};
  }

  int64_t state_size() const { return geometry.pixels * factors<Factor>(shape.channels); }
  int64_t output_size() const { return geometry.pixels * factors<Factor>(shape.segment()); }
  Factor* state_tile(int64_t slot, int64_t tile) const {
    return state + slot * state_size() + tile * factors<Factor>(shape.channels) * T;
  }
  Factor* output_tile(int64_t unit, int64_t slot, int64_t tile) const {
    return outputs + (unit * slots + slot) * output_size() + tile * factors<Factor>(shape.segment()) * T;
  }
  // What unit m of a segment reads.
  Factor* input_tile(int64_t m, int64_t slot, int64_t tile) const {
    return m == 0 ? state_tile(slot, tile) : output_tile(m - 1, slot, tile);
  }

  // Rows of the statistics where the batch norms of unit m begin.
  int64_t reduce_row(int64_t m) const { return shape.unit_row(m); }
  int64_t reduce_rows(int64_t m) const { return shape.reduce_rows(m); }
  int64_t shortcut_row() const { return shape.hidden(); }
  int64_t spatial_row(int64_t m) const { return reduce_row(m) + reduce_rows(m); }
  int64_t project_row(int64_t m) const { return spatial_row(m) + shape.hidden(); }

  // Segments that a panel has room for: the next panel may overwrite it tile by tile, so all have the same.
  int64_t room(const Panel& panel) const { return z.compact ? panel.count : panels.size; }
  Scalar* panel_z(const Panel& panel, int64_t slot) const {
    return z.data + panels.index(panel.first) % z.panels * z.panel_step + slot * room(panel) * z.slot_step;
  }
  // Reduce rows of unit 0, of all segments of a panel.
  Scalar* panel_tile(const Panel& panel, int64_t slot, int64_t tile) const {
    return panel_z(panel, slot) + tile * room(panel) * panels.rows * T;
  }
  // Any later row of one segment.
  Scalar* row_z(int64_t i, int64_t slot, int64_t row) const {
    const Panel panel = panels.of(i);
    const int64_t together = panels.rows * z.pixels;
    return panel_z(panel, slot) + room(panel) * together + (i - panel.first) * (z.slot_step - together) +
           (row - panels.rows) * z.pixels;
  }

  Scalar* reduce_tile(int64_t i, int64_t m, int64_t slot, int64_t tile) const {
    if (m > 0) return row_z(i, slot, reduce_row(m)) + tile * reduce_rows(m) * T;
    const Panel panel = panels.of(i);
    return panel_tile(panel, slot, tile) + (i - panel.first) * panels.rows * T;
  }
  Scalar* shortcut_tile(int64_t i, int64_t slot, int64_t tile) const {
    return reduce_tile(i, 0, slot, tile) + shape.hidden() * T;
  }
  Scalar* spatial_tile(int64_t i, int64_t m, int64_t slot, int64_t tile) const {
    return row_z(i, slot, spatial_row(m)) + tile * shape.hidden() * T;
  }
  Scalar* project_tile(int64_t i, int64_t m, int64_t slot, int64_t tile) const {
    return row_z(i, slot, project_row(m)) + tile * shape.segment() * T;
  }

  // Row `row` of the reduce weights (or their gradients) from segment i on, the shortcut's after the hidden ones.
  template <class Pointer>
  Pointer reduce_weights(const UnitTensors<Pointer>& unit, int64_t i, int64_t m, int64_t row) const {
    const int64_t k = shape.hidden(), s = shape.segment(), n = shape.inputs(m);
    i += row / reduce_rows(m);
    row %= reduce_rows(m);
    return row < k ? unit.reduce + (i * k + row) * n : unit.shortcut + (i * s + row - k) * n;
  }

  // This part's share of packing the forward weights of a panel.
  void pack(const Panel& panel, Factor* dst, int64_t part, int64_t parts) const {
    const int64_t k = shape.hidden(), s = shape.segment();
    panels.for_blocks(panel, T, [&](const WeightBlock& block) {
      pack_rows(dst + block.at, block.segments * panels.rows, block.columns, part, parts,
                [&](int64_t r) { return reduce_weights(parameters[0], block.first, 0, r) + block.column; });
    });
    for (int64_t i = panel.first; i <= panel.last(); ++i) {
      for (int64_t m = 0; m < shape.units; ++m) {
        const auto& unit = parameters[m];
        if (m > 0) {
          pack_rows(packed(dst, i, m, 0), k, s, part, parts, [&](int64_t r) { return reduce_weights(unit, i, m, r); });
        }
        Convolution<Factor>::pack(geometry, packed(dst, i, m, 1), unit.spatial + i * k * k * 9, k, false, part, parts);
        const Scalar* project = unit.project + i * s * k;
        pack_rows(packed(dst, i, m, 2), s, k, part, parts, [&](int64_t r) { return project + r * k; });
      }
    }
  }
  // Weights of segment i among its panel's; those of the reduce stage of unit 0 are the panel's.
  Factor* packed(Factor* panel, int64_t i, int64_t m, int64_t stage) const {
    return panel + packed_layout.at(i % panels.size, m, stage);
  }

  // Weight and bias (or their gradients) of the batch norm behind row `row` of the statistics of segment i, in unit m.
  template <class Pointer>
  struct BatchNorm {
    Pointer weight, bias;
  };
  template <class Pointer>
  BatchNorm<Pointer> batch_norm(const UnitTensors<Pointer>& unit, int64_t i, int64_t m, int64_t row) const {
    const int64_t k = shape.hidden(), s = shape.segment();
    if (row >= project_row(m)) {
      const int64_t at = i * s + row - project_row(m);
      return {unit.project_weight + at, unit.project_bias + at};
    }
    if (row >= spatial_row(m)) {
      const int64_t at = i * k + row - spatial_row(m);
      return {unit.spatial_weight + at, unit.spatial_bias + at};
    }
    if (row >= reduce_row(m) + k) {
      const int64_t at = i * s + row - reduce_row(m) - k;
      return {unit.shortcut_weight + at, unit.shortcut_bias + at};
    }
    const int64_t at = i * k + row - reduce_row(m);
    return {unit.reduce_weight + at, unit.reduce_bias + at};
  }

  // Row `row` of segment i's statistics from mean and variance.
  void set_affine(const Affine<Scalar>& affine, int64_t i, int64_t row, Scalar mean, Scalar var, double eps) const {
    const int64_t m = row < shape.unit_rows(0) ? 0 : 1 + (row - shape.unit_rows(0)) / shape.unit_rows(1);
    const auto norm = batch_norm(parameters[m], i, m, row);
    affine.set(row, mean, var, *norm.weight, *norm.bias, eps);
  }

  // Unit m's output on one tile: into `outputs`, or after the last unit into the state.
  void emit_tile(int64_t i, int64_t m, int64_t slot, int64_t tile, const Affine<Scalar>& affine) const {
    const int64_t s = shape.segment();
    const bool last = m == shape.units - 1, accumulate = last && shape.residual;
    const Affine<Scalar> norm = affine.at(project_row(m)), shortcut_norm = affine.at(shortcut_row());
    const Scalar* z3 = project_tile(i, m, slot, tile);
    const Factor* through = m > 0 ? output_tile(m - 1, slot, tile) : nullptr;
    const Scalar* shortcut = shape.projects(m) ? shortcut_tile(i, slot, tile) : nullptr;
    Factor* to = last ? state_tile(slot, tile) : output_tile(m, slot, tile);
    const int64_t first = last ? i * s : 0;
    for (int64_t v = 0; v < 2; ++v) {
      const Mask<Scalar> inside = load_mask<Scalar>(mask + tile * T + v * L);
      for (int64_t r = 0; r < s; ++r) {
        const int64_t at = r * T + v * L;
        Vector<Scalar> h = load<Scalar>(z3 + at) * norm.scale[r] + norm.shift[r];
        if (shortcut) h += load<Scalar>(shortcut + at) * shortcut_norm.scale[r] + shortcut_norm.shift[r];
        if (through) h += load_channel(through, r, v * L);
        if (accumulate) h += load_channel(to, first + r, v * L);
        if constexpr (std::is_same_v<Factor, Scalar>) h = rounded<typename Precision::Storage>(h);
        store_channel(to, first + r, v * L, keep<Scalar>(h, inside));
      }
    }
  }
  void emit(int64_t i, int64_t m, const Piece& piece, const Affine<Scalar>& affine) const {
    for (int64_t tile = piece.first; tile < piece.last; ++tile) emit_tile(i, m, piece.slot, tile, affine);
  }

  // All reduce rows of a panel on one tile, but for the panel's own columns.
  GUNN_NOINLINE void enter_panel(const Panel& panel, const Factor* from, const Factor* w, bool half, Scalar* z1) const {
    bool first = true;
    panels.for_outside(panel, T, [&](const WeightBlock& block) {
      if (first) {
        multiply_block<Into::store>(block, from, w, half, z1);
      } else {
        multiply_block<Into::add>(block, from, w, half, z1);
      }
      first = false;
    });
  }
  template <Into into>
  GUNN_INLINE void multiply_block(const WeightBlock& block, const Factor* from, const Factor* w, bool half,
                                  Scalar* z1) const {
    gemm_rows<Factor, into>(w + block.at, block.segments * panels.rows, from + block.column / kDepth<Factor> * T,
                            factors<Factor>(block.columns), half, z1);
  }

  // `moments`, where given, take in what the stage computes.
  // `enters`: this is the first segment of its panel to be computed, from the left or from the right.
  void reduce_tile_stage(int64_t i, int64_t m, int64_t slot, int64_t tile, const Factor* w, bool enters,
                         const Moments<Scalar>* moments) const {
    Scalar* z1 = reduce_tile(i, m, slot, tile);
    const int64_t rows = reduce_rows(m);
    const bool half = geometry.half(tile);
    if (m > 0) {
      gemm_rows<Factor, Into::store>(w, rows, input_tile(m, slot, tile), factors<Factor>(shape.inputs(m)), half, z1);
    } else {
      const Panel panel = panels.of(i);
      const Factor* from = state_tile(slot, tile);
      if (enters) enter_panel(panel, from, w, half, panel_tile(panel, slot, tile));
      if (panels.has_inside()) {
        multiply_block<Into::add>(panels.inside(panel, i, T), from, w, half, z1);
      }
    }
    if (moments) moments->add(z1, rows, mask + tile * T);
  }

  // relu(bn(z1)) of one tile, for the 3x3 convolution; of a piece, with the rows around it.
  void put_hidden(int64_t i, int64_t m, int64_t slot, int64_t tile, const Affine<Scalar>& affine,
                  const Convolution<Factor>& convolution) const {
    const auto place = convolution.place(tile);
    for_activated<Factor>(
        reduce_tile(i, m, slot, tile), affine.at(reduce_row(m)), shape.hidden(), mask + tile * T,
        [&](int64_t c, Vector<Factor> first, Vector<Factor> second) { convolution.put(place, c, first, second); });
  }
  void put_hidden(int64_t i, int64_t m, const Piece& piece, const Affine<Scalar>& affine,
                  const Convolution<Factor>& convolution) const {
    const Piece around = with_neighbours(geometry, piece);
    for (int64_t tile = around.first; tile < around.last; ++tile) {
      put_hidden(i, m, piece.slot, tile, affine, convolution);
    }
  }

  // z2 of a piece whose hidden tiles are put; done(tile) follows where a tile is ready.
  template <class Done>
  void convolve(int64_t i, int64_t m, const Piece& piece, const Factor* w, const Convolution<Factor>& convolution,
                const Done& done) const {
    const auto z2 = [&](int64_t tile) { return spatial_tile(i, m, piece.slot, tile); };
    convolution.run(w, piece, z2, done);
  }

  void reduce(int64_t i, int64_t m, const Piece& piece, const Factor* w, bool enters) const {
    for (int64_t tile = piece.first; tile < piece.last; ++tile) {
      reduce_tile_stage(i, m, piece.slot, tile, w, enters, nullptr);
    }
  }

  void spatial(int64_t i, int64_t m, const Piece& piece, const Factor* w, const Affine<Scalar>& affine,
               const Scratch<Factor>& scratch, const Moments<Scalar>* moments) const {
    put_hidden(i, m, piece, affine, scratch.convolution);
    convolve(i, m, piece, w, scratch.convolution, [&](int64_t tile) {
      if (moments) moments->add(spatial_tile(i, m, piece.slot, tile), shape.hidden(), mask + tile * T);
    });
  }

  void project_tile_stage(int64_t i, int64_t m, int64_t slot, int64_t tile, const Factor* w,
                          const Affine<Scalar>& affine, const Scratch<Factor>& scratch,
                          const Moments<Scalar>* moments) const {
    const int64_t k = shape.hidden(), s = shape.segment();
    Scalar* z3 = project_tile(i, m, slot, tile);
    activate<Factor>(spatial_tile(i, m, slot, tile), affine.at(spatial_row(m)), k, mask + tile * T, scratch.hidden);
    gemm_rows<Factor, Into::store>(w, s, scratch.hidden, factors<Factor>(k), geometry.half(tile), z3);
    if (moments) moments->add(z3, s, mask + tile * T);
  }
  void project(int64_t i, int64_t m, const Piece& piece, const Factor* w, const Affine<Scalar>& affine,
               const Scratch<Factor>& scratch, const Moments<Scalar>* moments) const {
    for (int64_t tile = piece.first; tile < piece.last; ++tile) {
      project_tile_stage(i, m, piece.slot, tile, w, affine, scratch, moments);
    }
  }
};

}  // namespace
}  // namespace gunn
