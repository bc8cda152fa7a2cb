// The backward pass: the segments in reverse order, each restored, recomputed and differentiated.
//
// Keeps only the layer's input, output and statistics (paper, algorithm 1). For i = P-1 … 0: state[c_i] ← x[c_i];
// recompute the pre-activations (or take the saved ones); then per unit, last to first:
//
//   project   d = gradient of the unit's output; sums of d and d·(z3 - mean)                          | exchange
//   spatial   dz3; dh2 = W3ᵀ dz3 through the ReLU; dW3; sums for z2's batch norm                      | exchange
//   reduce    dz2; dW2; dh1 = its transposed convolution through the ReLU; sums for z1's batch norm   | exchange
//   input     dz1 (and the shortcut's dz); G += W1ᵀ dz1; dW1
//
// Every exchange is one barrier; none is needed after `input`, which touches the thread's own tiles only. Where threads
// share images, the recomputed 3x3 needs one more, for its neighbours' z1. The transposed convolution reads its
// neighbours' dh2, so dh1 lies elsewhere. Gradients of the weights are summed by each thread over its pieces (channels
// of the result in lanes, so no horizontal sums), and over threads in order after the next barrier; two sets of buffers
// take turns.
//
// A panel of segments (stages.h) is left when its first segment is: until then dz1 of all its segments is kept, G and
// dW1 of the panel's own columns are made segment by segment, and those of all others then in one product each.
#pragma once

#include "cpu/outer.h"
#include "cpu/stages.h"
#include "cpu/winograd_weights.h"

namespace gunn {
namespace {

template <class Precision>
class BackwardPass {
  using Scalar = typename Precision::Scalar;
  using Factor = typename Precision::Factor;
  using Tensors = typename Precision::Backward;

 public:
  BackwardPass(const LayerShape& shape, const Options& options, const Tensors& tensors)
      : shape_(shape),
        options_(with_useful_threads<Factor>(shape, options)),
        tensors_(tensors),
        stages_(shape, tensors.units) {
    Arena arena(tensors.workspace);
    // The saved pre-activations are only read; one buffer type serves both cases.
    take(arena, const_cast<Scalar*>(tensors.saved));
  }

  static int64_t workspace_bytes(const LayerShape& shape, const Options& options, bool kept) {
    BackwardPass pass(shape, options);
    Arena arena(nullptr);
    Scalar pretend;
    pass.take(arena, kept ? &pretend : nullptr);
    return arena.bytes();
  }

  int threads() const { return options_.threads; }

  void run(const Team& team) {
    begin(team);
    pack(panels().count() - 1, team.index, team.size);
    team.barrier();
    for (int64_t i = shape_.segments - 1; i >= 0; --i) {
      for (int64_t m = shape_.units - 1; m >= 0; --m) {
        project(team, i, m);
        team.barrier();
        if (m == shape_.units - 1 && enters_panel(i)) {
          combine_weights(team, panels().index(i) + 1);
          pack(panels().index(i) - 1, team.index, team.size);
        }
        spatial(team, i, m);
        team.barrier();
        reduce(team, i, m);
        team.barrier();
        input(team, i, m);
      }
    }
    finish(team);
  }

  void step(const Team& team, Backward which, int64_t i, int64_t m) {
    if (which == Backward::begin) begin(team);
    if (which == Backward::finish) finish(team);
    if (which == Backward::project) {
      if (m == shape_.units - 1 && enters_panel(i)) {
        pack(panels().index(i), team.index, team.size);
        team.barrier();
        combine_weights(team, panels().index(i) + 1);
      }
      project(team, i, m);
      publish(team, 0, i, m);
    }
    if (which == Backward::spatial) {
      spatial(team, i, m);
      publish(team, 1, i, m);
    }
    if (which == Backward::reduce) {
      reduce(team, i, m);
      publish(team, 2, i, m);
    }
    if (which == Backward::input) input(team, i, m);
  }

 private:
  static constexpr int64_t T = Simd<Scalar>::tile, L = Simd<Scalar>::lanes, D = kDepth<Factor>;
  static constexpr int64_t kRowLanes = padded_rows<Scalar>(1);

  // One thread's weight gradients of one panel: dW1 of unit 0 by blocks, each [column][padded rows]; then segment by
  // segment, per unit: dW1 [s][padded k], dW2 [dy][o][lanes] or Winograd's sums, dW3 [k][padded s].
  struct GradientLayout {
    int64_t spatial_lanes;
    int64_t reduce;
    int64_t spatial[2], project[2], unit_size[2];
    int64_t segment, size;
    GradientLayout(const LayerShape& shape, const Panels& panels, bool winograd) {
      const int64_t k = shape.hidden(), s = shape.segment();
      spatial_lanes = round_up(3 * k, L);
      for (int64_t m = 0; m < 2; ++m) {
        spatial[m] = m == 0 ? 0 : s * padded_rows<Scalar>(k);
        project[m] = spatial[m] + (winograd ? WinogradWeights<Scalar>::sums_size(k) : 3 * k * spatial_lanes);
        unit_size[m] = round_up(project[m] + k * padded_rows<Scalar>(s), 16);
      }
      reduce = round_up(panels.padded_size(kRowLanes), 16);
      segment = unit_size[0] + (shape.units - 1) * unit_size[1];
      size = reduce + panels.size * segment;
    }
    // Where unit m begins; segments are counted from the panel's first.
    int64_t at(int64_t i, int64_t m) const {
      return reduce + i * segment + (m == 0 ? 0 : unit_size[0] + (m - 1) * unit_size[1]);
    }
  };

  struct Own {
    Scratch<Factor> scratch;
    Scalar* image;                   // all tiles of one image, to convert it in place
    Convolution<Factor> transposed;  // of dz2
    GradientSums<Scalar> sums;
    Slope<Scalar> slope;    // of the exchange just settled
    Scalar* gradient;       // rows of a few tiles
    Scalar* activation;     // relu(bn(z)), too
    Factor* gradient_rows;  // the gradient as factors over rows, where that takes a copy
    WinogradWeights<Scalar> spatial_weights;
    Scalar* hidden_lines;   // relu(bn(z1)) with pixels outermost, zero border: [rows + 2][row + 2][k]; not for Winograd
    Factor* hidden_pixels;  // the same as factors over pixels, one from every pixel on, where that takes a copy
    Factor* gradient_pixels;  // dz as factors over pixels, which are outermost, and its rows padded
    Factor* input_rows;       // a few tiles of an input as factors over pixels, where that takes a copy
    Scalar* weights[2];       // gradients of the weights, for even and odd panels

    Own(const LayerShape& shape, const Geometry<Scalar>& geometry)
        : scratch(shape, geometry), transposed(geometry, shape.hidden()), spatial_weights(shape.hidden()) {}
  };

  BackwardPass(const LayerShape& shape, const Options& options)
      : shape_(shape), options_(with_useful_threads<Factor>(shape, options)), stages_(shape, nullptr) {}

  void take_own(Own& own, Arena& arena) const {
    const auto& geometry = stages_.geometry;
    const int64_t k = shape_.hidden(), s = shape_.segment();
    own.scratch.take(shape_, arena);
    own.image = arena.take<Scalar>(in_place_ ? geometry.pixels * shape_.channels : 0);
    own.transposed.take(arena);
    own.sums.take(arena, k + 2 * s);
    own.slope.take(arena, k + 2 * s, options_.batch_statistics);
    own.gradient = arena.take<Scalar>(chunk_tiles_ * (k + s) * T);
    own.activation = arena.take<Scalar>(k * T);
    own.gradient_rows = arena.take<Factor>(D > 1 ? factors<Factor>(panels().size * (k + s)) * T : 0);
    if (winograd_) own.spatial_weights.take(arena);
    own.hidden_lines = arena.take<Scalar>(hidden_lines_size());
    own.hidden_pixels = arena.take<Factor>(D > 1 ? hidden_lines_size() : 0);
    own.gradient_pixels = arena.take<Factor>(gradient_pixels_size());
    own.input_rows = arena.take<Factor>(D > 1 ? chunk_tiles_ * T / D * larger(shape_.channels, k) : 0);
    for (auto& weights : own.weights) weights = arena.take<Scalar>(gradients_.size);
  }
  Own own(int thread) const {
    Own own(shape_, stages_.geometry);
    Arena arena(own_ + thread * own_step_);
    take_own(own, arena);
    return own;
  }
  int64_t hidden_lines_size() const {
    // One vector beyond the end: the last window is rounded up to whole vectors.
    return winograd_ ? 0 : (stages_.geometry.rows + 2) * hidden_line() + L;
  }
  int64_t gradient_pixels_size() const {
    const int64_t rows = panels().size * (shape_.hidden() + shape_.segment());
    const int64_t image = stages_.geometry.pixels * padded_rows<Scalar>(shape_.hidden());
    return larger(image, chunk_tiles_ * T * padded_rows<Scalar>(rows)) / D + L;
  }
  int64_t hidden_line() const { return (stages_.geometry.row + 2) * shape_.hidden(); }

  void take(Arena& arena, Scalar* saved) {
    const int64_t threads = options_.threads, slots = shape_.batch, pixels = stages_.geometry.pixels;
    const int64_t k = shape_.hidden(), s = shape_.segment();
    kept_ = saved != nullptr;
    stages_.take(arena, slots, 1, saved);
    // Where images have no padding and the same type, the gradient of the state lies in grad_x until the end.
    const bool whole = pixels == shape_.height * shape_.width;
    in_place_ = std::is_same_v<typename Precision::Storage, Scalar> && options_.need_input && whole;
    gradient_ = in_place_ ? reinterpret_cast<Scalar*>(tensors_.grad_x.data)
                          : arena.take<Scalar>(slots * pixels * shape_.channels);
    update_ = arena.take<Scalar>(slots * pixels * s);
    hidden_ = arena.take<Scalar>(slots * pixels * k);
    inner_ = arena.take<Scalar>(slots * pixels * k);
    shortcut_ = arena.take<Scalar>(shape_.shortcut ? slots * pixels * s : 0);
    panel_ = arena.take<Scalar>(panels().has_inside() ? slots * pixels * panels().size * panels().rows : 0);
    packed_step_ = stages_.packed_layout.size;
    packed_ = arena.take<Factor>(2 * packed_step_);
    transposed_ = arena.take<Factor>(2 * packed_step_);
    for (auto& slot : partials_) slot = arena.take<double>(threads * 2 * (k + 2 * s));
    // As many tiles as keep the input within a fraction of the second-level cache.
    constexpr int64_t kChunkBytes = 128 * 1024;
    const int64_t tile_bytes = shape_.channels * T * static_cast<int64_t>(sizeof(Factor)) / D;
    chunk_tiles_ = smaller(stages_.geometry.tiles, larger(1, kChunkBytes / tile_bytes));
    Arena one(nullptr);
    Own own(shape_, stages_.geometry);
    take_own(own, one);
    own_step_ = one.bytes();
    own_ = arena.take<std::byte>(threads * own_step_);
  }

  Scalar* gradient_tile(int64_t image, int64_t tile) const {
    return gradient_ + (image * stages_.geometry.tiles + tile) * shape_.channels * T;
  }
  Scalar* update_tile(int64_t image, int64_t tile) const {
    return update_ + (image * stages_.geometry.tiles + tile) * shape_.segment() * T;
  }
  Scalar* hidden_tile(int64_t image, int64_t tile) const {
    return hidden_ + (image * stages_.geometry.tiles + tile) * shape_.hidden() * T;
  }
  Scalar* inner_tile(int64_t image, int64_t tile) const {
    return inner_ + (image * stages_.geometry.tiles + tile) * shape_.hidden() * T;
  }
  Scalar* shortcut_tile(int64_t image, int64_t tile) const {
    return shortcut_ + (image * stages_.geometry.tiles + tile) * shape_.segment() * T;
  }
  Scalar* panel_tile(int64_t image, int64_t tile) const {
    return panel_ + (image * stages_.geometry.tiles + tile) * panels().size * panels().rows * T;
  }
  const Panels& panels() const { return stages_.panels; }
  bool enters_panel(int64_t i) const { return i == panels().of(i).last(); }
  bool leaves_panel(int64_t i) const { return i == panels().of(i).first; }
  Factor* packed(int64_t i, int64_t m, int64_t stage) const {
    return stages_.packed(packed_ + panels().index(i) % 2 * packed_step_, i, m, stage);
  }
  // Packed for the gradients, in the layout of the forward's: W1ᵀ (and the shortcut's), the rotated 3x3, W3ᵀ.
  Factor* transposed(int64_t i, int64_t m, int64_t stage) const {
    return stages_.packed(transposed_ + panels().index(i) % 2 * packed_step_, i, m, stage);
  }
  Scalar* weights(const Own& mine, int64_t i, int64_t m) const {
    return mine.weights[panels().index(i) % 2] + gradients_.at(i % panels().size, m);
  }
  const typename Simd<Scalar>::Int* mask(int64_t tile) const { return stages_.mask + tile * T; }

  void pack(int64_t index, int64_t part, int64_t parts) const {
    if (index < 0) return;
    const Panel panel = panels().at(index);
    if (!kept_) stages_.pack(panel, packed(panel.first, 0, 0), part, parts);
    const int64_t k = shape_.hidden(), s = shape_.segment();
    panels().for_blocks(panel, T, [&](const WeightBlock& block) {
      pack_columns(
          transposed(panel.first, 0, 0) + block.at, block.columns, block.segments * panels().rows, part, parts,
          [&](int64_t c) { return stages_.reduce_weights(tensors_.units[0], block.first, 0, c) + block.column; });
    });
    for (int64_t i = panel.first; i <= panel.last(); ++i) {
      for (int64_t m = 0; m < shape_.units; ++m) {
        const auto& unit = tensors_.units[m];
        if (m > 0) {
          pack_columns(transposed(i, m, 0), s, k, part, parts,
                       [&](int64_t c) { return stages_.reduce_weights(unit, i, m, c); });
        }
        Convolution<Factor>::pack(stages_.geometry, transposed(i, m, 1), unit.spatial + i * k * k * 9, k, true, part,
                                  parts);
        const Scalar* project = unit.project + i * s * k;
        pack_columns(transposed(i, m, 2), k, s, part, parts, [&](int64_t c) { return project + c * k; });
      }
    }
  }

  void begin(const Team& team) const {
    if (team.index == 0) {
      fill_mask(stages_.geometry, stages_.mask);
      stages_.clear_outputs();
    }
    for (int thread = team.index; thread < options_.threads; thread += team.size) {
      const Own mine = own(thread);
      mine.scratch.convolution.clear();
      mine.transposed.clear();
      for (int64_t j = 0; j < hidden_lines_size(); ++j) mine.hidden_lines[j] = 0;
      // Lanes beyond the channels are multiplied though nobody reads them: zeros are faster than denormals or NaN.
      for (int64_t j = 0; D > 1 && j < hidden_lines_size(); ++j) mine.hidden_pixels[j] = Factor{};
      for (int64_t j = 0; j < gradient_pixels_size(); ++j) mine.gradient_pixels[j] = Factor{};
    }
    stages_.for_own_tiles(team, [&](int64_t image, int64_t tile) {
      load_tile(stages_.geometry, tensors_.y, image, tile, shape_.channels, stages_.state_tile(image, tile));
      load_tile(stages_.geometry, tensors_.grad_y, image, tile, shape_.channels, gradient_tile(image, tile));
    });
  }

  void set_affine(const Own& mine, int64_t i) const {
    const int64_t rows = shape_.rows();
    const Scalar *mean = tensors_.statistics + i * rows, *var = tensors_.statistics + (shape_.segments + i) * rows;
    for (int64_t row = 0; row < rows; ++row) {
      stages_.set_affine(mine.scratch.affine, i, row, mean[row], var[row], options_.eps);
    }
  }

  // Segment i as its update saw it: the state before it, and everything the update computed from that.
  void restore(const Team& team, const Own& mine, int64_t i) const {
    const int64_t s = shape_.segment();
    const auto& affine = mine.scratch.affine;
    stages_.for_own_tiles(team, [&](int64_t image, int64_t tile) {
      load_channels(stages_.geometry, tensors_.x, image, tile, i * s, s, stages_.state_tile(image, tile));
    });
    for (int64_t m = 0; m < shape_.units; ++m) {
      if (!kept_) {
        stages_.for_own_pieces(
            team, [&](const Piece& piece) { stages_.reduce(i, m, piece, packed(i, m, 0), enters_panel(i)); });
        if (stages_.cuts_images(team)) team.barrier();
      }
      stages_.for_own_pieces(team, [&](const Piece& piece) {
        if (!kept_) {
          stages_.spatial(i, m, piece, packed(i, m, 1), affine, mine.scratch, nullptr);
          stages_.project(i, m, piece, packed(i, m, 2), affine, mine.scratch, nullptr);
        }
        if (m < shape_.units - 1) stages_.emit(i, m, piece, affine);
      });
    }
  }

  // Threads whose weight gradients count: in steps all that any call's team may have had.
  int writers(const Team& team) const { return options_.stepwise ? options_.threads : team.size; }

  // The rows of an exchange: `project` is followed by the shortcut's.
  struct Exchange {
    int64_t row[2], rows[2];
    int64_t total() const { return rows[0] + rows[1]; }
    int64_t statistics_row(int64_t r) const { return r < rows[0] ? row[0] + r : row[1] + r - rows[0]; }
  };
  Exchange exchange(int slot, int64_t m) const {
    const int64_t k = shape_.hidden(), s = shape_.segment();
    if (slot == 0) return {{stages_.project_row(m), stages_.shortcut_row()}, {s, shape_.projects(m) ? s : 0}};
    if (slot == 1) return {{stages_.spatial_row(m), 0}, {k, 0}};
    return {{stages_.reduce_row(m), 0}, {k, 0}};
  }
  double* partial(int slot, int thread) const {
    return partials_[slot] + thread * 2 * (shape_.hidden() + 2 * shape_.segment());
  }
  void post(const Team& team, int slot, const GradientSums<Scalar>& sums, int64_t rows) const {
    sums.merge(rows);
    double* to = partial(slot, team.index);
    for (int64_t r = 0; r < rows; ++r) {
      to[2 * r] = sums.sum[r];
      to[2 * r + 1] = sums.product[r];
    }
  }
  void combine(const Team& team, int slot, int64_t r, double* sum, double* product) const {
    *sum = *product = 0;
    for (int thread = 0; thread < team.size; ++thread) {
      *sum += partial(slot, thread)[2 * r];
      *product += partial(slot, thread)[2 * r + 1];
    }
  }
  double* shared_sum(int64_t i, int64_t row) const { return tensors_.sums + i * shape_.rows() + row; }
  double* shared_product(int64_t i, int64_t row) const {
    return tensors_.sums + (shape_.segments + i) * shape_.rows() + row;
  }

  // Every thread takes over the sums of an exchange: from the posts, or in steps from where they were left.
  void settle(const Team& team, const Own& mine, int slot, int64_t i, int64_t m) const {
    if (options_.stepwise) set_affine(mine, i);  // another team's threads may have made it last
    const Exchange rows = exchange(slot, m);
    for (int64_t r = 0; r < rows.total(); ++r) {
      const int64_t row = rows.statistics_row(r);
      double sum, product;
      if (options_.stepwise) {
        sum = *shared_sum(i, row), product = *shared_product(i, row);
      } else {
        combine(team, slot, r, &sum, &product);
        if (team.index == 0) write_batch_norm_gradient(mine, i, m, row, sum, product);
      }
      mine.slope.set(r, mine.scratch.affine, row, sum, product, static_cast<double>(options_.count));
    }
  }
  // In steps: gradients from this process's own sums, and the sums where the caller may share them.
  void publish(const Team& team, int slot, int64_t i, int64_t m) const {
    team.barrier();
    if (team.index != 0) return;
    const Own mine = own(team.index);
    set_affine(mine, i);
    const Exchange rows = exchange(slot, m);
    for (int64_t r = 0; r < rows.total(); ++r) {
      const int64_t row = rows.statistics_row(r);
      combine(team, slot, r, shared_sum(i, row), shared_product(i, row));
      write_batch_norm_gradient(mine, i, m, row, *shared_sum(i, row), *shared_product(i, row));
    }
  }
  void write_batch_norm_gradient(const Own& mine, int64_t i, int64_t m, int64_t row, double sum, double product) const {
    if (!options_.need_parameters) return;
    const auto grads = stages_.batch_norm(tensors_.grads[m], i, m, row);
    *grads.weight = static_cast<Scalar>(product * static_cast<double>(mine.scratch.affine.inverse[row]));
    *grads.bias = static_cast<Scalar>(sum);
  }

  void project(const Team& team, int64_t i, int64_t m) const {
    const Own mine = own(team.index);
    const int64_t s = shape_.segment();
    const bool enters = m == shape_.units - 1;
    if (enters || options_.stepwise) set_affine(mine, i);
    if (enters && enters_panel(i) && options_.need_parameters) {
      for (int thread = team.index; thread < writers(team); thread += team.size) {
        Scalar* weights = own(thread).weights[panels().index(i) % 2];
        for (int64_t j = 0; j < gradients_.size; ++j) weights[j] = 0;
      }
    }
    const Exchange rows = exchange(0, m);
    const auto& sums = mine.sums;
    const Scalar *mean = mine.scratch.affine.mean + rows.row[0],
                 *shortcut_mean = mine.scratch.affine.mean + rows.row[1];
    sums.clear(rows.total());
    if (enters) restore(team, mine, i);
    stages_.for_own_tiles(team, [&](int64_t image, int64_t tile) {
      Scalar* d = update_tile(image, tile);
      if (enters) take_gradient(i, image, tile, d);
      sums.add(0, d, stages_.project_tile(i, m, image, tile), mean, s);
      if (shape_.projects(m)) {
        sums.add(s, d, stages_.shortcut_tile(i, image, tile), shortcut_mean, s);
      }
      sums.finish_tile(rows.total());
    });
    post(team, 0, sums, rows.total());
  }

  // d = G[c_i], the gradient of the update. NoRes: the segment itself was replaced and gets nothing of it.
  void take_gradient(int64_t i, int64_t image, int64_t tile, Scalar* d) const {
    const int64_t s = shape_.segment();
    Scalar* from = gradient_tile(image, tile) + i * s * T;
    for (int64_t j = 0; j < s * T; ++j) d[j] = from[j];
    if (shape_.residual) return;
    for (int64_t j = 0; j < s * T; ++j) from[j] = 0;
  }

  void spatial(const Team& team, int64_t i, int64_t m) const {
    const Own mine = own(team.index);
    settle(team, mine, 0, i, m);
    const int64_t k = shape_.hidden(), s = shape_.segment();
    const Affine<Scalar> affine = mine.scratch.affine, norm = affine.at(stages_.spatial_row(m));
    const Factor* w = transposed(i, m, 2);
    const auto& sums = mine.sums;
    Scalar* weights = this->weights(mine, i, m) + gradients_.project[m > 0];
    sums.clear(k);
    stages_.for_own_tiles(team, [&](int64_t image, int64_t tile) {
      const Scalar *d = update_tile(image, tile), *z2 = stages_.spatial_tile(i, m, image, tile);
      Scalar* d2 = hidden_tile(image, tile);
      batch_norm_backward<Scalar>(d, stages_.project_tile(i, m, image, tile), affine.mean + stages_.project_row(m),
                                  mine.slope, 0, s, mask(tile), mine.gradient);
      if (shape_.projects(m)) {
        batch_norm_backward<Scalar>(d, stages_.shortcut_tile(i, image, tile), affine.mean + stages_.shortcut_row(),
                                    mine.slope, s, s, mask(tile), shortcut_tile(image, tile));
      }
      gemm_rows<Factor, Into::store>(w, k, row_factors<Factor>(mine.gradient, s, mine.gradient_rows),
                                     factors<Factor>(s), stages_.geometry.half(tile), d2);
      activate_backward<Scalar>(d2, z2, norm, k, mask(tile));
      sums.add(0, d2, z2, norm.mean, k);
      sums.finish_tile(k);
      if (!options_.need_parameters) return;
      activate<Scalar>(z2, norm, k, mask(tile), mine.activation);
      transpose_rows<Factor>(mine.gradient, s,
                             [&](int64_t pixel) { return mine.gradient_pixels + pixel * padded_rows<Scalar>(s); });
      outer_product<Factor, T>({1, T / D, 0, 0}, pixel_elements<Factor>(mine.activation, k, mine.input_rows), k,
                               mine.gradient_pixels, s, weights);
    });
    post(team, 1, sums, k);
  }

  void reduce(const Team& team, int64_t i, int64_t m) const {
    const Own mine = own(team.index);
    settle(team, mine, 1, i, m);
    const auto& geometry = stages_.geometry;
    const int64_t k = shape_.hidden(), row = geometry.row, pitch = padded_rows<Scalar>(k);
    const Affine<Scalar> affine = mine.scratch.affine, norm = affine.at(stages_.reduce_row(m));
    const Factor* w = transposed(i, m, 1);
    const auto& sums = mine.sums;
    Scalar* weights = this->weights(mine, i, m) + gradients_.spatial[m > 0];
    sums.clear(k);
    stages_.for_own_pieces(team, [&](const Piece& piece) {
      const int64_t image = piece.slot, first_row = piece.first * T / row;
      const Piece around = with_neighbours(geometry, piece);
      for (int64_t tile = around.first; tile < around.last; ++tile) {
        batch_norm_backward<Scalar>(hidden_tile(image, tile), stages_.spatial_tile(i, m, image, tile),
                                    affine.mean + stages_.spatial_row(m), mine.slope, 0, k, mask(tile), mine.gradient);
        const Factor* dz = row_factors<Factor>(mine.gradient, k, mine.gradient_rows);
        const auto place = mine.transposed.place(tile);
        for (int64_t c = 0; c < factors<Factor>(k); ++c, dz += T) {
          mine.transposed.put(place, c, load<Factor>(dz), load<Factor>(dz + L));
        }
        if (!options_.need_parameters) continue;
        transpose_rows<Factor>(mine.gradient, k,
                               [&](int64_t pixel) { return mine.gradient_pixels + (tile * T / D + pixel) * pitch; });
        if (winograd_) {
          stages_.put_hidden(i, m, image, tile, affine, mine.scratch.convolution);
          continue;
        }
        activate<Scalar>(stages_.reduce_tile(i, m, image, tile), norm, k, mask(tile), mine.activation);
        transpose_tile<Scalar>(mine.activation, k, [&](int64_t pixel) {
          const int64_t at = tile * T + pixel;
          return mine.hidden_lines + (at / row + 1) * hidden_line() + (at % row + 1) * k;
        });
      }
      if (options_.need_parameters && winograd_) {
        if constexpr (D == 1) {
          mine.spatial_weights.add(mine.scratch.convolution.patches, piece, mine.gradient_pixels, weights);
        }
      } else if (options_.need_parameters) {
        // The three taps of a row are neighbours in memory, so lanes run over (dx, input channel).
        const int64_t last_row = smaller((piece.last * T + row - 1) / row, geometry.height);
        const auto clear_pixels = [&](int64_t from, int64_t to) {  // of another piece, in a row that both have
          for (int64_t j = from * pitch; j < to * pitch; ++j) mine.gradient_pixels[j] = Factor{};
        };
        if (geometry.dense) {
          clear_pixels(first_row * row, piece.first * T);
          clear_pixels(piece.last * T, last_row * row);
        }
        const PixelRuns runs{last_row - first_row, row / D, row / D * pitch, pitch, hidden_line(), D * k};
        const int64_t begin = first_row * hidden_line();
        const Factor* hidden = pixel_factors<Factor>(
            mine.hidden_lines + begin, k, (last_row + 2) * hidden_line() - begin, mine.hidden_pixels + begin);
        for (int64_t dy = 0; dy < 3; ++dy) {
          outer_rows<Factor>(runs, mine.gradient_pixels + first_row * row / D * pitch, k, hidden + dy * hidden_line(),
                             gradients_.spatial_lanes, weights + dy * k * gradients_.spatial_lanes,
                             gradients_.spatial_lanes);
        }
      }
      const auto d1_of = [&](int64_t tile) { return inner_tile(image, tile); };
      mine.transposed.run(w, piece, d1_of, [&](int64_t tile) {
        Scalar* d1 = d1_of(tile);
        const Scalar* z1 = stages_.reduce_tile(i, m, image, tile);
        activate_backward<Scalar>(d1, z1, norm, k, mask(tile));
        sums.add(0, d1, z1, norm.mean, k);
        sums.finish_tile(k);
      });
    });
    post(team, 2, sums, k);
  }

  void input(const Team& team, int64_t i, int64_t m) const {
    const Own mine = own(team.index);
    settle(team, mine, 2, i, m);
    const int64_t k = shape_.hidden(), s = shape_.segment(), rows = stages_.reduce_rows(m);
    const Scalar* mean = mine.scratch.affine.mean + stages_.reduce_row(m);
    const bool kept = m == 0 && panels().has_inside();
    const Panel panel = panels().of(i);
    stages_.for_own_pieces(team, [&](const Piece& piece) {
      for (int64_t first = piece.first; first < piece.last; first += chunk_tiles_) {
        const Piece chunk{piece.slot, first, smaller(first + chunk_tiles_, piece.last)};
        // dz1 of one tile, from segment j's on.
        const auto gradient = [&](int64_t tile, int64_t j) {
          return kept ? panel_tile(chunk.slot, tile) + (j - panel.first) * rows * T
                      : mine.gradient + (tile - first) * rows * T;
        };
        for (int64_t tile = chunk.first; tile < chunk.last; ++tile) {
          Scalar* dz = gradient(tile, i);
          batch_norm_backward<Scalar>(inner_tile(chunk.slot, tile), stages_.reduce_tile(i, m, chunk.slot, tile), mean,
                                      mine.slope, 0, k, mask(tile), dz);
          if (shape_.projects(m)) {
            const Scalar* from = shortcut_tile(chunk.slot, tile);
            for (int64_t j = 0; j < s * T; ++j) dz[k * T + j] = from[j];
          }
        }
        const auto differentiate_block = [&](const WeightBlock& block) {
          differentiate(mine, m, block, chunk, transposed(i, 0, 0) + block.at,
                        mine.weights[panels().index(i) % 2] + block.padded_at,
                        [&](int64_t tile) { return gradient(tile, block.first); });
        };
        if (m > 0) {
          differentiate(mine, m, {i, 1, 0, s, 0, 0}, chunk, transposed(i, m, 0), weights(mine, i, m),
                        [&](int64_t tile) { return gradient(tile, i); });
        } else {
          if (kept) differentiate_block(panels().inside(panel, i, kRowLanes));
          if (leaves_panel(i)) panels().for_outside(panel, kRowLanes, differentiate_block);
        }
      }
    });
  }

  // G += Wᵀ dz and dW += dz ⊗ input for one block of the reduce stage's weights, on a few tiles.
  template <class Gradient>
  void differentiate(const Own& mine, int64_t m, const WeightBlock& block, const Piece& chunk, const Factor* w,
                     Scalar* weights, const Gradient& gradient) const {
    const int64_t rows = block.segments * stages_.reduce_rows(m), pitch = padded_rows<Scalar>(rows);
    for (int64_t tile = chunk.first; tile < chunk.last; ++tile) {
      const Scalar* dz = gradient(tile);
      const Factor *factors_of_dz = row_factors<Factor>(dz, rows, mine.gradient_rows),
                   *input = stages_.input_tile(m, chunk.slot, tile) + block.column / D * T;
      Scalar* to = (m == 0 ? gradient_tile(chunk.slot, tile) : update_tile(chunk.slot, tile)) + block.column * T;
      constexpr int64_t kTogether = 2 * kBlockRows;
      for (int64_t c = 0; c < block.columns; c += kTogether) {
        const int64_t columns = smaller(kTogether, block.columns - c);
        // dW1 reads the input next: by then it is here.
        if (options_.need_parameters) prefetch(input + c / D * T, columns * T / D);
        gemm_rows<Factor, Into::add>(w + c * factors<Factor>(rows), columns, factors_of_dz, factors<Factor>(rows),
                                     stages_.geometry.half(tile), to + c * T);
      }
      if (!options_.need_parameters) continue;
      const int64_t at = (tile - chunk.first) * T / D;
      transpose_rows<Factor>(dz, rows, [&](int64_t pixel) { return mine.gradient_pixels + (at + pixel) * pitch; });
    }
    if (!options_.need_parameters) return;
    const auto input = input_elements(mine, m, block, chunk);
    outer_product<Factor, T>({chunk.last - chunk.first, T / D, input.tile, T / D * pitch}, input.first, block.columns,
                             mine.gradient_pixels, rows, weights);
  }

  static void prefetch(const Factor* from, int64_t count) {
    constexpr int64_t kLine = 64 / sizeof(Factor);
    for (int64_t j = 0; j < count; j += kLine) __builtin_prefetch(from + j, 0, 2);
  }

  // Some columns of the reduce stage's input on a few tiles, for products over pixels: [tile][column][pixel].
  struct InputElements {
    const Element<Factor>* first;
    int64_t tile;  // step from one to the next
  };
  InputElements input_elements(const Own& mine, int64_t m, const WeightBlock& block, const Piece& chunk) const {
    const auto tile = [&](int64_t at) { return stages_.input_tile(m, chunk.slot, at) + block.column / D * T; };
    if constexpr (D == 1) {
      return {tile(chunk.first), shape_.inputs(m) * T};
    } else {
      const int64_t step = block.columns * T;
      for (int64_t at = chunk.first; at < chunk.last; ++at) {
        channels_to_pixels<Factor>(tile(at), block.columns, mine.input_rows + (at - chunk.first) * step / D);
      }
      return {reinterpret_cast<const Element<Factor>*>(mine.input_rows), step};
    }
  }

  // Writes a panel's weight gradients: sums over the threads, in order, of which each takes a share.
  void combine_weights(const Team& team, int64_t index) const {
    if (!options_.need_parameters || index >= panels().count()) return;
    const int64_t k = shape_.hidden(), s = shape_.segment();
    const Panel panel = panels().at(index);
    const Buffers buffers{own(0).weights[index % 2], own_step_ / static_cast<int64_t>(sizeof(Scalar)), writers(team)};
    const auto reduce = [&](const WeightBlock& block, int64_t m, int64_t base) {
      write_rows(team, buffers, base, block.segments * stages_.reduce_rows(m), block.columns, [&](int64_t r) {
        return stages_.reduce_weights(tensors_.grads[m], block.first, m, r) + block.column;
      });
    };
    panels().for_blocks(panel, kRowLanes, [&](const WeightBlock& block) { reduce(block, 0, block.padded_at); });
    for (int64_t i = panel.first; i <= panel.last(); ++i) {
      for (int64_t m = 0; m < shape_.units; ++m) {
        const auto& grads = tensors_.grads[m];
        const int64_t base = gradients_.at(i - panel.first, m), kind = m > 0;
        if (m > 0) reduce({i, 1, 0, s, 0, 0}, m, base);
        write_taps(team, buffers, base + gradients_.spatial[kind], grads.spatial + i * k * k * 9);
        Scalar* project = grads.project + i * s * k;
        write_rows(team, buffers, base + gradients_.project[kind], s, k, [&](int64_t r) { return project + r * k; });
      }
    }
  }

  // What each thread has of a panel's weight gradients.
  struct Buffers {
    Scalar* first;
    int64_t step;  // from one thread's to the next
    int threads;

    // `count` numbers from `at` on, summed in the first buffer.
    const Scalar* total(int64_t at, int64_t count) const {
      Scalar* to = first + at;
      for (int thread = 1; thread < threads; ++thread) {
        const Scalar* from = to + thread * step;
        for (int64_t j = 0; j < count; ++j) to[j] += from[j];
      }
      return to;
    }
  };

  // to(row)[column] of sums [column][padded rows], a line of the cache at a time.
  template <class To>
  static void write_rows(const Team& team, const Buffers& buffers, int64_t base, int64_t rows, int64_t columns,
                         const To& to) {
    constexpr int64_t kLine = 64 / sizeof(Scalar);
    const int64_t pitch = padded_rows<Scalar>(rows), lines = (columns + kLine - 1) / kLine;
    for (int64_t line = team.begin(lines); line < team.end(lines); ++line) {
      const int64_t c = line * kLine, count = smaller(kLine, columns - c);
      const Scalar* sums = buffers.total(base + c * pitch, count * pitch);
      for (int64_t r = 0; r < rows; ++r) {
        Scalar* row = to(r) + c;
        for (int64_t j = 0; j < count; ++j) row[j] = sums[j * pitch + r];
      }
    }
  }

  // The 3x3's, from Winograd's sums [16][input channel][padded channels], or from [dy][channel][lanes].
  void write_taps(const Team& team, const Buffers& buffers, int64_t base, Scalar* taps) const {
    const int64_t k = shape_.hidden(), pitch = padded_rows<Scalar>(k);
    if (winograd_) {
      for (int64_t c = team.begin(k); c < team.end(k); ++c) {
        const Scalar* sums[16];
        for (int64_t at = 0; at < 16; ++at) sums[at] = buffers.total(base + (at * k + c) * pitch, k);
        for (int64_t o = 0; o < k; ++o) {
          Scalar all[16];
          for (int64_t at = 0; at < 16; ++at) all[at] = sums[at][o];
          WinogradWeights<Scalar>::finish(all, taps + (o * k + c) * 9);
        }
      }
      return;
    }
    for (int64_t o = team.begin(k); o < team.end(k); ++o) {
      for (int64_t dy = 0; dy < 3; ++dy) {
        const Scalar* sums = buffers.total(base + (dy * k + o) * gradients_.spatial_lanes, gradients_.spatial_lanes);
        for (int64_t c = 0; c < k; ++c) {
          for (int64_t dx = 0; dx < 3; ++dx) taps[(o * k + c) * 9 + dy * 3 + dx] = sums[dx * k + c];
        }
      }
    }
  }

  void finish(const Team& team) const {
    team.barrier();
    combine_weights(team, 0);
    if (!options_.need_input) return;
    const auto store = [&](int64_t image, int64_t tile, const Scalar* from) {
      store_tile(stages_.geometry, tensors_.grad_x, image, tile, shape_.channels, from);
    };
    if (!in_place_) {
      stages_.for_own_tiles(team, [&](int64_t image, int64_t tile) { store(image, tile, gradient_tile(image, tile)); });
      return;
    }
    const Own mine = own(team.index);
    const int64_t tiles = stages_.geometry.tiles, size = shape_.channels * T;
    for (int64_t image = team.begin(shape_.batch); image < team.end(shape_.batch); ++image) {
      const Scalar* from = gradient_tile(image, 0);
      for (int64_t j = 0; j < tiles * size; ++j) mine.image[j] = from[j];
      for (int64_t tile = 0; tile < tiles; ++tile) store(image, tile, mine.image + tile * size);
    }
  }

  const LayerShape& shape_;
  const Options options_;
  Tensors tensors_{};
  Stages<Precision> stages_;
  // dW2 takes Winograd's form, which wants padded rows.
  const bool winograd_ =
      !stages_.geometry.dense && Convolution<Factor>::suits_winograd(stages_.geometry, shape_.hidden());
  GradientLayout gradients_{shape_, stages_.panels, winograd_};
  bool kept_ = false;
  bool in_place_ = false;
  Scalar* gradient_ = nullptr;  // G: the gradient of the state
  Scalar* update_ = nullptr;    // d: the gradient of a unit's output
  Scalar* hidden_ = nullptr;    // gradient of z2, before its batch norm
  Scalar* inner_ = nullptr;     // the same of z1
  Scalar* shortcut_ = nullptr;  // dz of the shortcut, made before its turn
  Scalar* panel_ = nullptr;     // dz of all reduce rows of a panel
  Factor *packed_ = nullptr, *transposed_ = nullptr;
  int64_t packed_step_ = 0;
  double* partials_[3] = {};
  int64_t chunk_tiles_ = 1;
  std::byte* own_ = nullptr;
  int64_t own_step_ = 0;
};

}  // namespace
}  // namespace gunn
