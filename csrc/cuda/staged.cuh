// The staged driver: launches of stages, where the end of a kernel is the barrier. Any shape, any option.
//
// Forward, of a segment: reduce, spatial, project for each unit, then write_back: 3·M + 1 launches.
//
// Backward: only the chain of gradients is sequential. The state before segment i is known from the start, [y_<i,
// x_≥i], so blocks of segments are recomputed at once, and their weight gradients taken at once:
//
//     for blocks of segments, last to first:
//         recompute   3·M launches for the block                  (none where the forward kept the pre-activations)
//         chain       4·M launches a segment, last to first
//         weights     2 · 3·M launches for the block
//
// A block's pre-activations and gradients cost about as much memory as x (kLeastBudget where x is small), whatever P
// is.
#pragma once

#include <algorithm>
#include <vector>

#include "core/arena.h"
#include "cuda/backward.cuh"

namespace gunn {

// What both passes hold: geometry, launches, tables, the exchange.
template <class Precision>
class StagedPass {
 protected:
  using Storage = typename Precision::Storage;
  using Wide = typename Precision::Wide;
  using Units = UnitTensors<const Wide*>;

  StagedPass(const LayerShape& shape, const Options& options) : shape_(shape), options_(options) {
    // Single sizes are 32-bit on the device, offsets 64-bit.
    constexpr int64_t kMost = INT32_MAX;
    require(shape.batch <= kMost && shape.height * shape.width <= kMost && shape.channels <= kMost &&
                9 * shape.hidden() <= kMost && shape.rows() <= kMost && shape.segments <= kMost,
            "the CUDA kernels take sizes below 2^31: batch ", shape.batch, ", pixels of an image ",
            shape.height * shape.width, ", channels ", shape.channels, ", hidden channels ", shape.hidden(), ".");
    static_assert(sizeof(Pool<Precision>) <= 48 * 1024, "more shared memory has to be asked for");
    Extents& e = view_.extents;
    e.pixels = shape.batch * shape.height * shape.width;
    e.height = static_cast<int>(shape.height), e.width = static_cast<int>(shape.width);
    e.channels = static_cast<int>(shape.channels), e.segment = static_cast<int>(shape.segment());
    e.hidden = static_cast<int>(shape.hidden()), e.segments = static_cast<int>(shape.segments);
    e.units = static_cast<int>(shape.units), e.rows = static_cast<int>(shape.rows());
    e.gradient_rows = static_cast<int>(shape.units * (2 * shape.hidden() + shape.segment()));
    e.shortcut = shape.shortcut, e.residual = shape.residual;
    exchange_.tiles = tiles();
    exchange_.groups = Exchange::count_groups(tiles());
  }

  // Tables and the exchange's memory, for stages of at most `columns` columns.
  void take(Arena& arena, int64_t columns) {
    const int64_t table = shape_.segments * shape_.rows();
    view_.affine = arena.take<Affine<Wide>>(table);
    view_.slopes = arena.take<Slope<Wide>>(table);
    counters_ = exchange_.groups * column_tiles(columns);
    exchange_.partials = arena.take<Pair>(std::max<int64_t>(1, Exchange::count_entries(tiles())) * columns);
    exchange_.counters = arena.take<unsigned>(counters_);
  }

  int64_t tiles() const { return (view_.extents.pixels + kRows - 1) / kRows; }
  static int64_t column_tiles(int64_t columns) { return (columns + kColumns - 1) / kColumns; }
  int64_t reduce_rows(int64_t unit) const { return shape_.hidden() + (shape_.projects(unit) ? shape_.segment() : 0); }

  template <class Maps>
  void set_maps(const Maps& x, const Maps& y) {
    view_.x = x, view_.y = y;
    view_.pixels_fast = x.column < x.channel;
  }

  Exchange exchange(int64_t columns) const {
    Exchange exchange = exchange_;
    exchange.columns = static_cast<int>(columns);
    return exchange;
  }

  // One thread for each of `count` things.
  Launch by_element(const char* name, int64_t count) const {
    return {name, dim3(static_cast<unsigned>((count + 127) / 128)), dim3(128), 0, stream(), &shape_};
  }
  // Pixels x columns x segments in tiles.
  Launch by_tile(const char* name, int64_t columns, int64_t segments = 1, bool pool = true) const {
    const dim3 grid(static_cast<unsigned>(tiles()), static_cast<unsigned>(column_tiles(columns)),
                    static_cast<unsigned>(segments));
    return {name, grid, dim3(kThreads), pool ? sizeof(Pool<Precision>) : 0, stream(), &shape_};
  }
  Stream stream() const { return {options_.device, options_.stream}; }

  void clear_counters() const {
    if (counters_ > 0) launch(by_element("clear", counters_), clear, exchange_.counters, counters_);
  }

  RowRange range(Norm norm, int64_t unit) const {
    const Extents& e = view_.extents;
    const bool wide = norm == Norm::reduce || norm == Norm::spatial;
    return {host_row(norm, unit), wide ? e.hidden : e.segment, e.rows, e.segments};
  }
  int host_row(Norm norm, int64_t unit) const {
    const int64_t before = shape_.unit_row(unit);
    const int64_t row = norm == Norm::reduce     ? before
                        : norm == Norm::shortcut ? before + shape_.hidden()
                        : norm == Norm::spatial  ? before + reduce_rows(unit)
                                                 : before + reduce_rows(unit) + shape_.hidden();
    return static_cast<int>(row);
  }
  template <class Pointer>
  static std::pair<Pointer, Pointer> norm_tensors(const UnitTensors<Pointer>& unit, Norm norm) {
    switch (norm) {
      case Norm::reduce:
        return {unit.reduce_weight, unit.reduce_bias};
      case Norm::shortcut:
        return {unit.shortcut_weight, unit.shortcut_bias};
      case Norm::spatial:
        return {unit.spatial_weight, unit.spatial_bias};
      default:
        return {unit.project_weight, unit.project_bias};
    }
  }
  // One segment's part of the batch norms behind a stage.
  template <class Pointer>
  StageNorms<Pointer> stage_norms(const UnitTensors<Pointer>& unit, Norm norm, Norm behind, bool has_behind,
                                  int64_t segment) const {
    const auto one = [&](Norm which) -> typename StageNorms<Pointer>::One {
      const auto [weight, bias] = norm_tensors(unit, which);
      if (weight == nullptr) return {nullptr, nullptr};
      const int64_t channels = range(which, 0).channels;
      return {weight + segment * channels, bias + segment * channels};
    };
    StageNorms<Pointer> norms{one(norm), {nullptr, nullptr}, range(norm, 0).channels};
    if (has_behind) norms.second = one(behind);
    return norms;
  }

  template <class Work>
  void for_each_norm(const Work& work) const {
    for (int64_t m = 0; m < shape_.units; ++m) {
      for (const Norm norm : {Norm::reduce, Norm::shortcut, Norm::spatial, Norm::project}) {
        if (norm != Norm::shortcut || shape_.projects(m)) work(norm, m);
      }
    }
  }
  void set_affine_tables(const Units* units, const Wide* statistics) const {
    for_each_norm([&](Norm norm, int64_t m) {
      const auto [weight, bias] = norm_tensors(units[m], norm);
      const RowRange rows = range(norm, m);
      launch(by_element("set_affine", static_cast<int64_t>(rows.segments) * rows.channels), set_affine<Wide>, rows,
             weight, bias, statistics, statistics + shape_.segments * shape_.rows(), view_.affine, options_.eps);
    });
  }

  // Pre-activations of one stage in segments [first, first + count).
  void launch_reduce(const Units& unit, int64_t first, int64_t count, int64_t m, const StatisticsOut<Wide>& out) const {
    const auto kernel = m == 0 ? reduce<Precision, State<Precision>> : reduce<Precision, UnitInput<Precision>>;
    launch(by_tile("reduce", reduce_rows(m), count), kernel, view_, static_cast<int>(first), static_cast<int>(m),
           unit.reduce, unit.shortcut, out);
  }
  void launch_spatial(const Units& unit, int64_t first, int64_t count, int64_t m,
                      const StatisticsOut<Wide>& out) const {
    launch(by_tile("spatial", shape_.hidden(), count), spatial<Precision>, view_, static_cast<int>(first),
           static_cast<int>(m), unit.spatial, out);
  }
  void launch_project(const Units& unit, int64_t first, int64_t count, int64_t m,
                      const StatisticsOut<Wide>& out) const {
    launch(by_tile("project", shape_.segment(), count), project<Precision>, view_, static_cast<int>(first),
           static_cast<int>(m), unit.project, out);
  }

  const LayerShape& shape_;
  const Options& options_;
  View<Precision> view_{};
  Exchange exchange_{};
  int64_t counters_ = 0;
};

template <class Precision>
class StagedForward : StagedPass<Precision> {
  using Pass = StagedPass<Precision>;
  using typename Pass::Storage;
  using typename Pass::Units;
  using typename Pass::Wide;
  using Tensors = ForwardTensors<Storage, Wide>;

 public:
  StagedForward(const LayerShape& shape, const Options& options, const Tensors& tensors)
      : Pass(shape, options), tensors_(tensors) {
    Arena arena(tensors.workspace);
    take(arena, tensors.saved);
    const FeatureMap<Storage>& y = tensors.y;
    this->set_maps(tensors.x, FeatureMap<const Storage>{y.data, y.batch, y.channel, y.row, y.column});
  }

  static int64_t workspace_bytes(const LayerShape& shape, const Options& options, bool keep) {
    StagedForward pass(shape, options);
    Arena arena(nullptr);
    Storage pretend;
    pass.take(arena, keep ? &pretend : nullptr);
    return arena.bytes();
  }

  void run() {
    begin();
    for (int64_t i = 0; i < this->shape_.segments; ++i) {
      for (int64_t m = 0; m < this->shape_.units; ++m) {
        reduce_stage(i, m);
        spatial_stage(i, m);
        project_stage(i, m);
      }
      write_back_stage(i);
    }
  }

  // A caller may have changed the statistics since the step before: scales and shifts are made anew. The write-back
  // needs them and comes with the next step.
  void step(Forward which, int64_t i, int64_t m) {
    if (which == Forward::begin) return begin();
    this->set_affine_tables(tensors_.units, tensors_.statistics);
    if (which == Forward::reduce) {
      if (m == 0 && i > 0) write_back_stage(i - 1);
      reduce_stage(i, m);
    }
    if (which == Forward::spatial) spatial_stage(i, m);
    if (which == Forward::project) project_stage(i, m);
    if (which == Forward::finish) write_back_stage(this->shape_.segments - 1);
  }

 private:
  StagedForward(const LayerShape& shape, const Options& options) : Pass(shape, options) {}

  void take(Arena& arena, Storage* saved) {
    Pass::take(arena, this->shape_.hidden() + this->shape_.segment());
    const int64_t size = this->view_.extents.pixels * this->shape_.rows();
    slots_ = saved ? this->shape_.segments : 1;
    this->view_.z = saved ? saved : arena.take<Storage>(size);
  }
  // A single slot is every segment's.
  void use_slot_of(int64_t segment) { this->view_.first_segment = static_cast<int>(slots_ == 1 ? segment : 0); }

  void begin() const {
    if (this->options_.batch_statistics) {
      this->clear_counters();
    } else {
      this->set_affine_tables(tensors_.units, tensors_.statistics);
    }
  }

  StatisticsOut<Wide> statistics(int64_t i, int64_t m, Norm norm, int64_t columns) const {
    StatisticsOut<Wide> out{};
    if (!this->options_.batch_statistics) return out;
    out.exchange = this->exchange(columns);
    out.norms =
        this->stage_norms(tensors_.units[m], norm, Norm::shortcut, norm == Norm::reduce && this->shape_.projects(m), i);
    out.mean = tensors_.statistics;
    out.var = tensors_.statistics + this->shape_.segments * this->shape_.rows();
    out.eps = this->options_.eps;
    return out;
  }
  void reduce_stage(int64_t i, int64_t m) {
    use_slot_of(i);
    this->launch_reduce(tensors_.units[m], i, 1, m, statistics(i, m, Norm::reduce, this->reduce_rows(m)));
  }
  void spatial_stage(int64_t i, int64_t m) {
    use_slot_of(i);
    this->launch_spatial(tensors_.units[m], i, 1, m, statistics(i, m, Norm::spatial, this->shape_.hidden()));
  }
  void project_stage(int64_t i, int64_t m) {
    use_slot_of(i);
    this->launch_project(tensors_.units[m], i, 1, m, statistics(i, m, Norm::project, this->shape_.segment()));
  }
  void write_back_stage(int64_t i) {
    use_slot_of(i);
    launch(this->by_tile("write_back", this->shape_.segment(), 1, false), write_back<Precision>, this->view_,
           tensors_.y, static_cast<int>(i));
  }

  Tensors tensors_{};
  int64_t slots_ = 1;
};

template <class Precision>
class StagedBackward : StagedPass<Precision> {
  using Pass = StagedPass<Precision>;
  using typename Pass::Storage;
  using typename Pass::Units;
  using typename Pass::Wide;
  using Tensors = BackwardTensors<Storage, Wide>;

 public:
  StagedBackward(const LayerShape& shape, const Options& options, const Tensors& tensors)
      : Pass(shape, options), tensors_(tensors) {
    Arena arena(tensors.workspace);
    // The saved pre-activations are only read; one buffer type serves both cases.
    take(arena, const_cast<Storage*>(tensors.saved));
    this->set_maps(tensors.x, tensors.y);
    if constexpr (std::is_same_v<Storage, Wide>) {
      if (options.need_input) g_ = tensors.grad_x;
    }
  }

  static int64_t workspace_bytes(const LayerShape& shape, const Options& options, bool kept) {
    StagedBackward pass(shape, options);
    Arena arena(nullptr);
    Storage pretend;
    pass.take(arena, kept ? &pretend : nullptr);
    return arena.bytes();
  }

  void run() {
    begin();
    for (int64_t end = this->shape_.segments; end > 0; end -= std::min(end, block_)) {
      const int64_t first = std::max<int64_t>(0, end - block_);
      open_block(first, end - first);
      for (int64_t i = end - 1; i >= first; --i) {
        for (int64_t m = this->shape_.units - 1; m >= 0; --m) {
          project_sums(i, m);
          spatial_sums(i, m);
          reduce_sums(i, m);
          input(i, m);
        }
      }
      weights(first, end - first);
    }
    finish();
  }

  void step(Backward which, int64_t i, int64_t m) {
    if (which == Backward::begin) return begin();
    if (which == Backward::finish) return finish();
    if (which == Backward::project && m == this->shape_.units - 1) open_block(i, 1);
    use_block(i);
    if (which != Backward::project) set_slope_tables();
    if (which == Backward::project) project_sums(i, m);
    if (which == Backward::spatial) spatial_sums(i, m);
    if (which == Backward::reduce) reduce_sums(i, m);
    if (which == Backward::input) {
      input(i, m);
      if (m == 0) weights(i, 1);
    }
  }

 private:
  StagedBackward(const LayerShape& shape, const Options& options) : Pass(shape, options) {}

  static constexpr int64_t kLeastBudget = int64_t{32} << 20;  // bytes
  static constexpr int64_t kMostSegments = 65535;             // of one launch: its grid's depth
  static constexpr int64_t kLeastRange = 1024;                // pixels of one partial sum of weights
  static constexpr int64_t kMostRanges = 64;
  static constexpr int64_t kMostPartials = int64_t{4} << 20;  // elements, of one segment

  void take(Arena& arena, Storage* saved) {
    const LayerShape& shape = this->shape_;
    const Extents& e = this->view_.extents;
    Pass::take(arena, std::max(shape.hidden() + shape.segment(), 2 * shape.segment()));
    kept_ = saved != nullptr;
    const int64_t rows = (kept_ ? 0 : e.rows) + e.gradient_rows;
    const int64_t budget =
        std::max<int64_t>(kLeastBudget, shape.channels * e.pixels * static_cast<int64_t>(sizeof(Storage)));
    const int64_t each = rows * e.pixels * static_cast<int64_t>(sizeof(Storage));
    block_ = std::clamp<int64_t>(budget / each, 1, std::min(shape.segments, kMostSegments));
    if (this->options_.stepwise) block_ = 1;
    this->view_.z = kept_ ? saved : arena.take<Storage>(block_ * e.pixels * e.rows);
    this->view_.d = arena.take<Storage>(block_ * e.pixels * e.gradient_rows);
    saved_ = saved;
    const bool in_place = std::is_same_v<Storage, Wide> && this->options_.need_input;
    if (!in_place) {
      const int64_t n = shape.channels;
      g_ = {arena.take<Wide>(e.pixels * n), shape.height * shape.width * n, 1, shape.width * n, n};
    }
    if (!this->options_.need_parameters) return;
    int64_t most = 0;
    for (int64_t m = 0; m < shape.units; ++m) {
      for (const Which which : {Which::reduce, Which::spatial, Which::project}) {
        const auto [height, width] = weight_size(which, m);
        most = std::max(most, ranges(height * width) * height * width);
      }
    }
    partials_ = arena.take<Wide>(block_ * most);
  }

  std::pair<int64_t, int64_t> weight_size(Which which, int64_t m) const {
    const LayerShape& shape = this->shape_;
    if (which == Which::reduce) return {this->reduce_rows(m), shape.inputs(m)};
    if (which == Which::spatial) return {shape.hidden(), 9 * shape.hidden()};
    return {shape.segment(), shape.hidden()};
  }
  int64_t ranges(int64_t size) const {
    const int64_t wanted = std::min((this->view_.extents.pixels + kLeastRange - 1) / kLeastRange, kMostRanges);
    return std::max<int64_t>(1, std::min(wanted, kMostPartials / size));
  }

  void begin() const {
    const Extents& e = this->view_.extents;
    this->clear_counters();
    this->set_affine_tables(tensors_.units, tensors_.statistics);
    if (!this->options_.batch_statistics) set_slope_tables();
    launch(this->by_tile("copy_map", this->shape_.channels, 1, false), copy_map<Precision, Storage, Wide>, e,
           tensors_.grad_y, g_);
  }
  void finish() const {
    if (std::is_same_v<Storage, Wide> || !this->options_.need_input) return;
    const FeatureMap<const Wide> g{g_.data, g_.batch, g_.channel, g_.row, g_.column};
    launch(this->by_tile("copy_map", this->shape_.channels, 1, false), copy_map<Precision, Wide, Storage>,
           this->view_.extents, g, tensors_.grad_x);
  }

  void set_slope_tables() const {
    const double* sums = this->options_.batch_statistics ? tensors_.sums : nullptr;
    this->for_each_norm([&](Norm norm, int64_t m) {
      const RowRange rows = this->range(norm, m);
      const double* products = sums ? sums + this->shape_.segments * this->shape_.rows() : nullptr;
      launch(this->by_element("set_slopes", static_cast<int64_t>(rows.segments) * rows.channels), set_slopes<Wide>,
             rows, this->view_.affine, sums, products, static_cast<double>(this->options_.count), this->view_.slopes);
    });
  }

  void use_block(int64_t first) {
    const Extents& e = this->view_.extents;
    this->view_.first_segment = static_cast<int>(first);
    if (kept_) this->view_.z = saved_ + first * e.pixels * e.rows;
  }
  void open_block(int64_t first, int64_t count) {
    use_block(first);
    if (kept_) return;
    for (int64_t m = 0; m < this->shape_.units; ++m) {
      const Units& unit = tensors_.units[m];
      this->launch_reduce(unit, first, count, m, {});
      this->launch_spatial(unit, first, count, m, {});
      this->launch_project(unit, first, count, m, {});
    }
  }

  SumsOut<Wide> sums(int64_t i, int64_t m, Norm norm, Norm behind, bool has_behind, int64_t columns) const {
    SumsOut<Wide> out{};
    if (!this->options_.batch_statistics && !this->options_.need_parameters) return out;
    out.exchange = this->exchange(columns);
    if (this->options_.need_parameters) {
      out.gradients = this->stage_norms(tensors_.grads[m], norm, behind, has_behind, i);
    }
    out.batch_statistics = this->options_.batch_statistics;
    out.sum = tensors_.sums;
    out.product = tensors_.sums ? tensors_.sums + this->shape_.segments * this->shape_.rows() : nullptr;
    out.count = static_cast<double>(this->options_.count);
    return out;
  }
  void project_sums(int64_t i, int64_t m) const {
    const bool projects = this->shape_.projects(m);
    const int64_t columns = this->shape_.segment() * (projects ? 2 : 1);
    const FeatureMap<const Wide> g{g_.data, g_.batch, g_.channel, g_.row, g_.column};
    launch(this->by_tile("unit_gradient", columns), unit_gradient<Precision>, this->view_, g, static_cast<int>(i),
           static_cast<int>(m), sums(i, m, Norm::project, Norm::shortcut, projects, columns));
  }
  void spatial_sums(int64_t i, int64_t m) const {
    launch(this->by_tile("project_backward", this->shape_.hidden()), project_backward<Precision>, this->view_,
           static_cast<int>(i), static_cast<int>(m), tensors_.units[m].project,
           sums(i, m, Norm::spatial, Norm::spatial, false, this->shape_.hidden()));
  }
  // The shortcut's sums came with the project's.
  void reduce_sums(int64_t i, int64_t m) const {
    launch(this->by_tile("spatial_backward", this->shape_.hidden()), spatial_backward<Precision>, this->view_,
           static_cast<int>(i), static_cast<int>(m), tensors_.units[m].spatial,
           sums(i, m, Norm::reduce, Norm::reduce, false, this->shape_.hidden()));
  }
  void input(int64_t i, int64_t m) const {
    if (i == 0 && m == 0 && !this->options_.need_input) return;  // nobody will read it
    const Units& unit = tensors_.units[m];
    launch(this->by_tile("input_backward", this->shape_.inputs(m)), input_backward<Precision>, this->view_, g_,
           static_cast<int>(i), static_cast<int>(m), unit.reduce, unit.shortcut);
  }

  template <Which which, bool first_unit>
  void launch_weights(int64_t first, int64_t count, int64_t m, WeightGradients<Wide> to) const {
    const auto [rows, width] = weight_size(which, m);
    const int64_t parts = ranges(rows * width), pixels = this->view_.extents.pixels;
    constexpr int64_t kDepth = Pool<Precision>::kDepth;
    const int64_t range = round_up((pixels + parts - 1) / parts, kDepth), used = (pixels + range - 1) / range;
    const dim3 grid(static_cast<unsigned>(((rows + kRows - 1) / kRows) * this->column_tiles(width)),
                    static_cast<unsigned>(used), static_cast<unsigned>(count));
    launch(Launch{"weight_gradient", grid, dim3(kThreads), sizeof(Pool<Precision>), this->stream(), &this->shape_},
           weight_gradient<Precision, which, first_unit>, this->view_, static_cast<int>(first), static_cast<int>(m),
           range, partials_);
    to.rows = static_cast<int>(rows), to.width = static_cast<int>(width);
    to.taps = which == Which::spatial ? 9 : 1;
    launch(this->by_element("sum_partials", count * rows * width), sum_partials<Wide>, partials_, used,
           static_cast<int>(first), static_cast<int>(count), to);
  }
  void weights(int64_t first, int64_t count) const {
    if (!this->options_.need_parameters) return;
    const int k = this->view_.extents.hidden, s = this->view_.extents.segment;
    for (int64_t m = 0; m < this->shape_.units; ++m) {
      const UnitTensors<Wide*>& grads = tensors_.grads[m];
      const WeightGradients<Wide> reduce{grads.reduce, grads.shortcut, 0, 0, k, 1};
      if (m == 0) {
        launch_weights<Which::reduce, true>(first, count, m, reduce);
      } else {
        launch_weights<Which::reduce, false>(first, count, m, reduce);
      }
      launch_weights<Which::spatial, true>(first, count, m, {grads.spatial, nullptr, 0, 0, k, 1});
      launch_weights<Which::project, true>(first, count, m, {grads.project, nullptr, 0, 0, s, 1});
    }
  }

  Tensors tensors_{};
  bool kept_ = false;
  int64_t block_ = 1;
  Storage* saved_ = nullptr;
  FeatureMap<Wide> g_{};
  Wide* partials_ = nullptr;
};

template <class Precision>
constexpr Kernels<typename Precision::Storage, typename Precision::Wide> staged_kernels() {
  using Storage = typename Precision::Storage;
  using Wide = typename Precision::Wide;
  Kernels<Storage, Wide> table{};
  table.sizes = [](const LayerShape& shape, const Options& options, bool keep) -> Sizes {
    return {shape.height * shape.width, StagedForward<Precision>::workspace_bytes(shape, options, keep),
            StagedBackward<Precision>::workspace_bytes(shape, options, keep)};
  };
  table.forward = [](const LayerShape& shape, const Options& options, const ForwardTensors<Storage, Wide>& tensors) {
    StagedForward<Precision>(shape, options, tensors).run();
  };
  table.forward_step = [](const LayerShape& shape, const Options& options, const ForwardTensors<Storage, Wide>& tensors,
                          Forward which, int64_t segment, int64_t unit) {
    StagedForward<Precision>(shape, options, tensors).step(which, segment, unit);
  };
  table.backward = [](const LayerShape& shape, const Options& options, const BackwardTensors<Storage, Wide>& tensors) {
    StagedBackward<Precision>(shape, options, tensors).run();
  };
  table.backward_step = [](const LayerShape& shape, const Options& options,
                           const BackwardTensors<Storage, Wide>& tensors, Backward which, int64_t segment,
                           int64_t unit) {
    StagedBackward<Precision>(shape, options, tensors).step(which, segment, unit);
  };
  return table;
}

}  // namespace gunn
