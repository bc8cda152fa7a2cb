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
// is. Weights are packed once a pass. A state that is not pixel-major, in eights of channels, is copied into that form.
//
// Which tile a product takes is a function of sizes and dtype: TileChoice.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "cuda/backward.cuh"
#include "cuda/prepare.cuh"
#include "cuda/state.cuh"

namespace gunn {

// Large tiles serve 16-bit products of more columns than a small one has, where they occupy most of a large GPU's
// multiprocessors. GUNN_CUDA_TILE, where it is set, has the last word.
template <class Precision>
class TileChoice {
 public:
  static constexpr bool kLarge = sizeof(typename Precision::Storage) == 2;  // there are any

  TileChoice() {
    const char* wanted = std::getenv("GUNN_CUDA_TILE");
    if (wanted == nullptr || *wanted == '\0') return;
    always_ = std::strcmp(wanted, "large") == 0, never_ = std::strcmp(wanted, "small") == 0;
    require(always_ || never_, "GUNN_CUDA_TILE=", wanted,
            ": unknown tile; expected small or large, or nothing for a choice by size.");
  }
  bool large(int64_t columns, int64_t tiles) const {
    if (!kLarge || never_) return false;
    return always_ || (columns > kColumns && tiles >= kEnough);
  }

  static constexpr int64_t kEnough = 99;  // of 132 multiprocessors

 private:
  bool always_ = false, never_ = false;
};

// What both passes hold: geometry, launches, tables, the exchange, packed weights.
template <class Precision>
class StagedPass {
 protected:
  using Storage = typename Precision::Storage;
  using Wide = typename Precision::Wide;
  using Element = typename Precision::Element;
  using Units = UnitTensors<const Wide*>;

  StagedPass(const LayerShape& shape, const Options& options)
      : shape_(shape), options_(options), launcher_(shape, options) {
    view_.extents = extents_of(shape);
    view_.batch_statistics = options.batch_statistics;
  }

  // Tables, packed weights, and the exchange's memory for stages of at most `columns` columns.
  void take(Arena& arena, int64_t columns, const std::vector<Pack>& packs) {
    const Extents& e = view_.extents;
    const int64_t table = static_cast<int64_t>(e.segments) * e.z_rows();
    for (Wide** each : {&view_.tables.mean, &view_.tables.scale, &view_.tables.shift, &view_.tables.inverse,
                        &view_.tables.a, &view_.tables.b, &view_.tables.c}) {
      *each = arena.take<Wide>(table);
    }
    // Large tiles need less.
    const int64_t tiles = pixel_tiles<SmallTile>();
    counters_ = Exchange::count_groups(tiles) * tiles_of(columns);
    exchange_.partials = arena.take<Pair>(std::max<int64_t>(1, Exchange::count_entries(tiles)) * columns);
    exchange_.counters = arena.take<unsigned>(counters_);
    packs_ = packs;
    packed_.clear();
    for (int m = 0; m < e.units; ++m) {
      for (const Pack pack : packs_) {
        packed_.push_back(arena.take<Element>(packed_size<Precision>(e, pack, m)));
      }
    }
  }
  // A pixel-major copy of a map, or nothing where the map is pixel-major.
  template <class Scalar>
  Scalar* take_copy(Arena& arena, bool needed) const {
    return needed ? arena.take<Scalar>(view_.extents.pixels * pixel_step()) : nullptr;
  }
  int64_t pixel_step() const { return padded(view_.extents.channels); }

  template <class Tile>
  int64_t pixel_tiles() const {
    return (view_.extents.pixels + Tile::kRows - 1) / Tile::kRows;
  }
  static int64_t tiles_of(int64_t columns) { return column_tiles<SmallTile>(static_cast<int>(columns)); }

  // Calls work(tile) with the tile that serves a product of pixels.
  template <class Work>
  void with_tile(int columns, const Work& work) const {
    if constexpr (TileChoice<Precision>::kLarge) {
      if (takes_large(columns)) return work(LargeTile());
    }
    work(SmallTile());
  }
  bool takes_large(int columns) const {
    return choice_.large(columns, pixel_tiles<LargeTile>() * column_tiles<LargeTile>(columns));
  }

  // The tree of a stage: `wanted` says whether there is one.
  template <class Tile>
  Exchange exchange(const Exchange& wanted, int columns) const {
    Exchange exchange = wanted;
    exchange.tiles = pixel_tiles<Tile>(), exchange.groups = Exchange::count_groups(exchange.tiles);
    exchange.columns = columns;
    return exchange;
  }

  // Pixels x columns x segments in tiles.
  template <class Tile>
  Launch by_tile(const char* name, int columns, int64_t segments = 1, bool pool = true) const {
    const dim3 grid(static_cast<unsigned>(pixel_tiles<Tile>()), static_cast<unsigned>(column_tiles<Tile>(columns)),
                    static_cast<unsigned>(segments));
    const size_t shared = pool ? sizeof(Pool<Precision, Tile>) : 0;
    return {name, grid, dim3(Tile::kThreads), shared, launcher_.stream, &shape_};
  }

  template <class From, class To>
  void copy(const FeatureMap<From>& from, const FeatureMap<To>& to, int64_t channels) const {
    const FeatureMap<const From> source{from.data, from.batch, from.channel, from.row, from.column};
    launch(by_tile<SmallTile>("copy_map", static_cast<int>(channels), 1, false),
           copy_map<std::remove_const_t<From>, To>, view_.extents, FeatureMap<const std::remove_const_t<From>>(source),
           to, static_cast<int>(channels));
  }

  Element* packed(Pack pack, int64_t m) const {
    const auto at = std::find(packs_.begin(), packs_.end(), pack) - packs_.begin();
    return packed_[m * packs_.size() + at];
  }
  Preparation<Precision> preparation() const { return {launcher_, view_.extents}; }
  void pack(Preparation<Precision>& preparation, const Units* units) const {
    for (int m = 0; m < view_.extents.units; ++m) {
      for (const Pack pack : packs_) preparation.pack(pack, m, units[m], packed(pack, m));
    }
  }
  void clear_counters(Preparation<Precision>& preparation) const { preparation.clear(exchange_.counters, counters_); }

  // One segment's part of the batch norms behind a stage; `unit` null: their places only.
  template <class Pointer>
  StageNorms<Pointer> stage_norms(const UnitTensors<Pointer>* unit, int64_t segment, int64_t m, Norm norm) const {
    const Extents& e = view_.extents;
    const auto one = [&](Norm which) -> typename StageNorms<Pointer>::One {
      const int channels = e.channels_of(which), row = e.row(which, static_cast<int>(m));
      if (unit == nullptr) return {nullptr, nullptr, channels, row};
      const auto [weight, bias] = norm_tensors(*unit, which);
      return {weight + segment * channels, bias + segment * channels, channels, row};
    };
    StageNorms<Pointer> norms{one(norm), {}, padded(e.channels_of(norm))};
    const bool has_shortcut = norm == Norm::reduce || norm == Norm::project;
    if (has_shortcut && e.projects(static_cast<int>(m))) norms.second = one(Norm::shortcut);
    return norms;
  }

  // `statistics` null: only zeros.
  TableSource<Wide> affine(const Wide* statistics) const { return {true, false, statistics, options_.eps, nullptr, 0}; }
  void fill_tables(const Units* units, const TableSource<Wide>& source) const {
    Preparation<Precision> tables = preparation();
    tables.tables(units, source, view_.tables);
    tables.run();
  }

  // Pre-activations of one stage in segments [first, first + count).
  void launch_reduce(int64_t first, int64_t count, int64_t m, StatisticsOut<Wide> out) const {
    const int columns = view_.extents.reduce_columns(static_cast<int>(m));
    if (m > 0) {
      return launch_forward<SmallTile>("reduce", reduce<Precision, SmallTile, UnitInput<Precision>>, columns, first,
                                       count, m, Pack::reduce, out);
    }
    with_tile(columns, [&](auto tile) {
      using Tile = decltype(tile);
      launch_forward<Tile>("reduce", reduce<Precision, Tile, State<Precision>>, columns, first, count, m, Pack::reduce,
                           out);
    });
  }
  void launch_spatial(int64_t first, int64_t count, int64_t m, StatisticsOut<Wide> out) const {
    const int columns = view_.extents.k();
    with_tile(columns, [&](auto tile) {
      using Tile = decltype(tile);
      launch_forward<Tile>("spatial", spatial<Precision, Tile>, columns, first, count, m, Pack::spatial, out);
    });
  }
  void launch_project(int64_t first, int64_t count, int64_t m, StatisticsOut<Wide> out) const {
    launch_forward<SmallTile>("project", project<Precision>, view_.extents.s(), first, count, m, Pack::project, out);
  }
  template <class Tile, class Kernel>
  void launch_forward(const char* name, Kernel kernel, int columns, int64_t first, int64_t count, int64_t m, Pack pack,
                      StatisticsOut<Wide> out) const {
    out.exchange = exchange<Tile>(out.exchange, columns);
    launch(by_tile<Tile>(name, columns, count), kernel, view_, static_cast<int>(first), static_cast<int>(m),
           packed(pack, m), out);
  }

  const LayerShape& shape_;
  const Options& options_;
  const Launcher launcher_;
  View<Precision> view_{};
  const TileChoice<Precision> choice_;
  Exchange exchange_{};
  int64_t counters_ = 0;
  std::vector<Pack> packs_;
  std::vector<Element*> packed_;  // [unit][pack]
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
    take(arena, tensors.saved, lies_ready(tensors.x, shape, options), lies_ready(tensors.y, shape, options));
  }

  static int64_t workspace_bytes(const LayerShape& shape, const Options& options, bool keep) {
    StagedForward pass(shape, options);
    Arena arena(nullptr);
    Storage pretend;
    pass.take(arena, keep ? &pretend : nullptr, options.pixel_major, options.pixel_major);
    return arena.bytes();
  }

  // Of one pixel and segment, as they are kept.
  static int64_t saved_rows(const LayerShape& shape, const Options& options) {
    return StagedForward(shape, options).view_.extents.z_rows();
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
    this->fill_tables(tensors_.units, this->affine(tensors_.statistics));
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

  void take(Arena& arena, Storage* saved, bool x_as_it_is, bool y_as_it_is) {
    const Extents& e = this->view_.extents;
    Pass::take(arena, e.reduce_columns(0), {Pack::reduce, Pack::spatial, Pack::project});
    slots_ = saved ? this->shape_.segments : 1;
    this->view_.z = saved ? saved : arena.take<Storage>(e.pixels * e.z_rows());
    x_copy_ = this->template take_copy<Storage>(arena, !x_as_it_is);
    y_copy_ = this->template take_copy<Storage>(arena, !y_as_it_is);
    this->view_.x = x_copy_ ? x_copy_ : tensors_.x.data;
    this->view_.y = y_copy_ ? y_copy_ : tensors_.y.data;
    this->view_.x_step = this->view_.y_step = this->pixel_step();
  }
  // A single slot is every segment's.
  void use_slot_of(int64_t segment) { this->view_.first_segment = static_cast<int>(slots_ == 1 ? segment : 0); }

  void begin() const {
    const bool given = !this->options_.batch_statistics;
    Preparation<Precision> preparation = this->preparation();
    this->pack(preparation, tensors_.units);
    preparation.tables(tensors_.units, this->affine(given ? tensors_.statistics : nullptr), this->view_.tables);
    if (!given) this->clear_counters(preparation);
    preparation.run();
    if (x_copy_) this->copy(tensors_.x, pixel_major(x_copy_, this->shape_, this->pixel_step()), this->pixel_step());
  }

  StatisticsOut<Wide> statistics(int64_t i, int64_t m, Norm norm) const {
    StatisticsOut<Wide> out{};
    if (!this->options_.batch_statistics) return out;
    out.exchange = this->exchange_;
    out.norms = this->stage_norms(&tensors_.units[m], i, m, norm);
    // The project's shortcut was the reduce stage's.
    out.mean = tensors_.statistics + i * this->shape_.rows();
    out.var = out.mean + this->shape_.segments * this->shape_.rows();
    out.eps = this->options_.eps;
    return out;
  }
  void reduce_stage(int64_t i, int64_t m) {
    use_slot_of(i);
    this->launch_reduce(i, 1, m, statistics(i, m, Norm::reduce));
  }
  void spatial_stage(int64_t i, int64_t m) {
    use_slot_of(i);
    this->launch_spatial(i, 1, m, statistics(i, m, Norm::spatial));
  }
  void project_stage(int64_t i, int64_t m) {
    use_slot_of(i);
    this->launch_project(i, 1, m, statistics(i, m, Norm::project));
  }
  void write_back_stage(int64_t i) {
    use_slot_of(i);
    Storage* y = y_copy_ ? y_copy_ : tensors_.y.data;
    const FeatureMap<Storage> to = y_copy_ ? tensors_.y : FeatureMap<Storage>{};
    launch(this->template by_tile<SmallTile>("write_back", this->view_.extents.segment, 1, false),
           write_back<Precision>, this->view_, y, to, static_cast<int>(i));
  }

  Tensors tensors_{};
  int64_t slots_ = 1;
  Storage *x_copy_ = nullptr, *y_copy_ = nullptr;
};

template <class Precision>
class StagedBackward : protected StagedPass<Precision> {
  using Pass = StagedPass<Precision>;
  using typename Pass::Storage;
  using typename Pass::Units;
  using typename Pass::Wide;
  using Tensors = BackwardTensors<Storage, Wide>;

 public:
  StagedBackward(const LayerShape& shape, const Options& options, const Tensors& tensors)
      : Pass(shape, options), tensors_(tensors) {
    g_in_place_ = options.need_input && lies_ready(tensors.grad_x, shape, options);
    if (g_in_place_) g_ = tensors.grad_x.data;
    Arena arena(tensors.workspace);
    // The saved pre-activations are only read; one buffer type serves both cases.
    take(arena, const_cast<Storage*>(tensors.saved), lies_ready(tensors.x, shape, options),
         lies_ready(tensors.y, shape, options), own_chain());
  }

  static int64_t workspace_bytes(const LayerShape& shape, const Options& options, bool kept) {
    StagedBackward pass(shape, options);
    Arena arena(nullptr);
    Storage pretend;
    pass.g_in_place_ = options.need_input && options.pixel_major;
    pass.take(arena, kept ? &pretend : nullptr, options.pixel_major, options.pixel_major, pass.own_chain());
    return arena.bytes();
  }

  // Those of both passes in a layer's first unit that take large tiles.
  static std::string large_kernels(const LayerShape& shape, const Options& options, bool kept) {
    StagedBackward pass(shape, options);
    Arena arena(nullptr);
    Storage pretend;
    pass.take(arena, kept ? &pretend : nullptr, options.pixel_major, options.pixel_major, pass.own_chain());
    const Extents& e = pass.view_.extents;
    std::string names;
    const auto add = [&](const char* name, bool large) {
      if (large) names += (names.empty() ? "" : ", ") + std::string(name);
    };
    add("reduce", pass.takes_large(e.reduce_columns(0)));
    add("spatial", pass.takes_large(e.k()));
    add("spatial_backward", pass.takes_large(e.k()));
    add("input_backward", pass.takes_large(padded(e.channels)));
    add("weight_gradient of reduce", pass.large_weights(Which::reduce, 0));
    add("weight_gradient of spatial", pass.large_weights(Which::spatial, 0));
    return names;
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
    if (which != Backward::project) this->fill_tables(tensors_.units, slopes());
    if (which == Backward::project) project_sums(i, m);
    if (which == Backward::spatial) spatial_sums(i, m);
    if (which == Backward::reduce) reduce_sums(i, m);
    if (which == Backward::input) {
      input(i, m);
      if (m == 0) weights(i, 1);
    }
  }

 protected:
  StagedBackward(const LayerShape& shape, const Options& options) : Pass(shape, options) {}

  // Who runs the chain of gradients. `ready`: a driver of its own, which keeps the gradient of the state to itself and
  // leaves gradients of pre-activations instead of those behind the batch norms.
  struct ChainOwner {
    int64_t budget;  // bytes of a block of segments
    bool ready;
    bool makes_reduce, makes_rest;  // it makes the gradients of dW1; of dW2 and dW3
  };
  ChainOwner own_chain() const {
    const int64_t x = this->shape_.channels * this->view_.extents.pixels * static_cast<int64_t>(sizeof(Storage));
    return {std::max<int64_t>(kLeastBudget, x), false, false, false};
  }

  static constexpr int64_t kLeastBudget = int64_t{32} << 20;  // bytes
  static constexpr int64_t kLeastRange = 1024;                // pixels of one partial sum of weights
  static constexpr int64_t kLeastLargeRange = 512;            // the same in large tiles, of which there are fewer
  static constexpr int64_t kMostRanges = 64;
  static constexpr int64_t kMostPartials = int64_t{4} << 20;  // elements, of one segment

  void take(Arena& arena, Storage* saved, bool x_as_it_is, bool y_as_it_is, const ChainOwner& owner) {
    const LayerShape& shape = this->shape_;
    const Extents& e = this->view_.extents;
    kept_ = saved != nullptr;
    ready_ = owner.ready;
    std::vector<Pack> packs{Pack::reduce_transposed, Pack::spatial_transposed, Pack::project_transposed};
    if (!kept_) packs.insert(packs.end(), {Pack::reduce, Pack::spatial, Pack::project});
    Pass::take(arena, std::max(e.reduce_columns(0), 2 * e.s()), packs);
    const int64_t d_rows = ready_ ? e.z_rows() : e.d_rows(), rows = (kept_ ? 0 : e.z_rows()) + d_rows;
    const int64_t each = rows * e.pixels * static_cast<int64_t>(sizeof(Storage));
    const int64_t most = std::clamp<int64_t>(owner.budget / each, 1, shape.segments);
    const int64_t blocks = (shape.segments + most - 1) / most;
    usual_block_ = (shape.segments + blocks - 1) / blocks;  // as equal as may be
    block_ = this->options_.block > 0 ? std::min(this->options_.block, shape.segments) : usual_block_;
    if (this->options_.stepwise) block_ = 1;
    this->view_.z = kept_ ? saved : arena.take<Storage>(block_ * e.pixels * e.z_rows());
    this->view_.d = arena.take<Storage>(block_ * e.pixels * d_rows);
    saved_ = saved;
    x_copy_ = this->template take_copy<Storage>(arena, !x_as_it_is);
    y_copy_ = this->template take_copy<Storage>(arena, !y_as_it_is);
    this->view_.x = x_copy_ ? x_copy_ : tensors_.x.data;
    this->view_.y = y_copy_ ? y_copy_ : tensors_.y.data;
    this->view_.x_step = this->view_.y_step = this->pixel_step();
    if (!g_in_place_ && !ready_) g_ = this->template take_copy<Storage>(arena, true);
    if (!this->options_.need_parameters) return;
    int64_t elements = 0;
    for (int m = 0; m < e.units; ++m) {
      for (const Which which : {Which::reduce, Which::spatial, Which::project}) {
        if (which == Which::reduce ? owner.makes_reduce : owner.makes_rest) continue;
        const GradientShape size = gradient_shape(e, which, m);
        elements = std::max(elements, ranges(which, m) * size.rows * size.width);
      }
    }
    if (elements > 0) partials_ = arena.take<Wide>(block_ * elements);
  }

  // How a unit's weight gradients are computed: the product's tiles, and the ranges that pixels are split over. Large
  // tiles have as many as fill a large GPU twice with the usual block of segments.
  int64_t large_ranges(const GradientShape& size) const {
    const int64_t wanted = 2 * 132 / (gradient_tiles<LargeTile>(size) * usual_block_) + 1;
    return most_ranges(size, std::min(wanted, (this->view_.extents.pixels + kLeastLargeRange - 1) / kLeastLargeRange));
  }
  bool large_weights(Which which, int m) const {
    if (which == Which::project || (which == Which::reduce && m > 0)) return false;
    const GradientShape size = gradient_shape(this->view_.extents, which, m);
    return this->choice_.large(size.rows, large_ranges(size) * gradient_tiles<LargeTile>(size) * usual_block_);
  }
  int64_t ranges(Which which, int m) const {
    const GradientShape size = gradient_shape(this->view_.extents, which, m);
    if (large_weights(which, m)) return large_ranges(size);
    return most_ranges(size, (this->view_.extents.pixels + kLeastRange - 1) / kLeastRange);
  }
  static int64_t most_ranges(const GradientShape& size, int64_t wanted) {
    const int64_t room = kMostPartials / (static_cast<int64_t>(size.rows) * size.width);
    return std::max<int64_t>(1, std::min({wanted, kMostRanges, room}));
  }
  template <class Tile>
  static int64_t gradient_tiles(const GradientShape& size) {
    return static_cast<int64_t>((size.width + Tile::kRows - 1) / Tile::kRows) * column_tiles<Tile>(size.rows);
  }

  FeatureMap<Storage> g_map() const { return pixel_major(g_, this->shape_, this->pixel_step()); }

  void begin() const {
    Preparation<Precision> preparation = this->preparation();
    prepare(preparation);
    preparation.run();
    copy_maps();
  }
  // The chain of another driver has slopes of its own, and no counters.
  void prepare(Preparation<Precision>& preparation) const {
    this->pack(preparation, tensors_.units);
    if (!ready_) this->clear_counters(preparation);
    TableSource<Wide> source = slopes();
    source.affine = true, source.slopes = !ready_;
    preparation.tables(tensors_.units, source, this->view_.tables);
  }
  void copy_maps() const {
    if (x_copy_) this->copy(tensors_.x, pixel_major(x_copy_, this->shape_, this->pixel_step()), this->pixel_step());
    if (y_copy_) this->copy(tensors_.y, pixel_major(y_copy_, this->shape_, this->pixel_step()), this->pixel_step());
    if (!ready_) this->copy(tensors_.grad_y, g_map(), this->shape_.channels);
  }
  void finish() const {
    if (this->options_.need_input && !g_in_place_) this->copy(g_map(), tensors_.grad_x, this->shape_.channels);
  }

  TableSource<Wide> slopes() const {
    const double* sums = this->options_.batch_statistics ? tensors_.sums : nullptr;
    return {false, true, tensors_.statistics, this->options_.eps, sums, static_cast<double>(this->options_.count)};
  }

  void use_block(int64_t first) {
    const Extents& e = this->view_.extents;
    this->view_.first_segment = static_cast<int>(first);
    if (kept_) this->view_.z = saved_ + first * e.pixels * e.z_rows();
  }
  void open_block(int64_t first, int64_t count) {
    use_block(first);
    if (kept_) return;
    for (int64_t m = 0; m < this->shape_.units; ++m) {
      this->launch_reduce(first, count, m, {});
      this->launch_spatial(first, count, m, {});
      this->launch_project(first, count, m, {});
    }
  }

  template <class Tile>
  SumsOut<Wide> sums(int64_t i, int64_t m, Norm norm, int columns) const {
    SumsOut<Wide> out{};
    if (!this->options_.batch_statistics && !this->options_.need_parameters) return out;
    out.exchange = this->template exchange<Tile>(this->exchange_, columns);
    out.need_gradients = this->options_.need_parameters;
    out.gradients = this->template stage_norms<Wide*>(out.need_gradients ? &tensors_.grads[m] : nullptr, i, m, norm);
    out.batch_statistics = this->options_.batch_statistics;
    if (tensors_.sums) {
      out.sum = tensors_.sums + i * this->shape_.rows();
      out.product = out.sum + this->shape_.segments * this->shape_.rows();
    }
    out.count = static_cast<double>(this->options_.count);
    return out;
  }
  void project_sums(int64_t i, int64_t m) const {
    const Extents& e = this->view_.extents;
    const int columns = e.s() * (e.projects(static_cast<int>(m)) ? 2 : 1);
    launch(this->template by_tile<SmallTile>("unit_gradient", columns), unit_gradient<Precision>, this->view_, g_,
           this->pixel_step(), static_cast<int>(i), static_cast<int>(m), sums<SmallTile>(i, m, Norm::project, columns));
  }
  void spatial_sums(int64_t i, int64_t m) const {
    const int k = this->view_.extents.k();
    launch(this->template by_tile<SmallTile>("project_backward", k), project_backward<Precision>, this->view_,
           static_cast<int>(i), static_cast<int>(m), this->packed(Pack::project_transposed, m),
           sums<SmallTile>(i, m, Norm::spatial, k));
  }
  // The shortcut's sums came with the project's.
  void reduce_sums(int64_t i, int64_t m) const {
    const int k = this->view_.extents.k();
    this->with_tile(k, [&](auto tile) {
      using Tile = decltype(tile);
      launch(this->template by_tile<Tile>("spatial_backward", k), spatial_backward<Precision, Tile>, this->view_,
             static_cast<int>(i), static_cast<int>(m), this->packed(Pack::spatial_transposed, m),
             sums<Tile>(i, m, Norm::reduce, k));
    });
  }
  void input(int64_t i, int64_t m) const {
    if (i == 0 && m == 0 && !this->options_.need_input) return;  // nobody will read it
    const int columns = padded(this->view_.extents.inputs(static_cast<int>(m)));
    this->with_tile(columns, [&](auto tile) {
      using Tile = decltype(tile);
      launch(this->template by_tile<Tile>("input_backward", columns), input_backward<Precision, Tile>, this->view_, g_,
             this->pixel_step(), static_cast<int>(i), static_cast<int>(m), this->packed(Pack::reduce_transposed, m));
    });
  }

  // Where the gradients of a unit's weights go.
  WeightGradients<Wide> destination(Which which, int64_t m) const {
    const Extents& e = this->view_.extents;
    const int unit = static_cast<int>(m);
    const UnitTensors<Wide*>& grads = tensors_.grads[m];
    switch (which) {
      case Which::reduce:
        return {grads.reduce, grads.shortcut, e.hidden, e.projects(unit) ? e.segment : 0, e.inputs(unit), e.k(), 1};
      case Which::spatial:
        return {grads.spatial, nullptr, e.hidden, 0, 9 * e.hidden, 0, 9};
      default:
        return {grads.project, nullptr, e.segment, 0, e.hidden, 0, 1};
    }
  }
  PartialSums<Wide> sums_of(const Wide* partials, int64_t ranges, Which which, int64_t m) const {
    return {partials, ranges, gradient_shape(this->view_.extents, which, static_cast<int>(m)), destination(which, m)};
  }
  void launch_sums(const std::vector<PartialSums<Wide>>& of, int64_t first, int64_t count) const {
    if (of.empty()) return;
    SumsOfUnit<Wide> sums{};
    std::copy(of.begin(), of.end(), sums.of);
    int64_t most = 0;
    for (const PartialSums<Wide>& each : of) {
      most = std::max<int64_t>(most, count * (each.to.upper_rows + each.to.lower_rows) * each.to.width);
    }
    Launch how = this->launcher_.by_element("sum_partials", most);
    how.grid.y = static_cast<unsigned>(of.size());
    launch(how, sum_partials<Wide>, sums, static_cast<int>(first), static_cast<int>(count));
  }
  template <Which which, bool first_unit>
  void launch_weights(int64_t first, int64_t count, int64_t m) const {
    if constexpr (TileChoice<Precision>::kLarge && first_unit && which != Which::project) {
      if (large_weights(which, static_cast<int>(m))) return launch_weights<LargeTile, which, true>(first, count, m);
    }
    launch_weights<SmallTile, which, first_unit>(first, count, m);
  }
  template <class Tile, Which which, bool first_unit>
  void launch_weights(int64_t first, int64_t count, int64_t m) const {
    const int64_t parts = ranges(which, static_cast<int>(m)), pixels = this->view_.extents.pixels;
    constexpr int64_t kDepth = Pool<Precision>::kDepth;
    const int64_t range = round_up((pixels + parts - 1) / parts, kDepth), used = (pixels + range - 1) / range;
    const int64_t tiles = gradient_tiles<Tile>(gradient_shape(this->view_.extents, which, static_cast<int>(m)));
    const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(used), static_cast<unsigned>(count));
    auto kernel = weight_gradient<Precision, Tile, which, first_unit, false>;
    if constexpr (Precision::kTensorCores) {
      if (ready_) kernel = weight_gradient<Precision, Tile, which, first_unit, true>;
    }
    launch(Launch{"weight_gradient", grid, dim3(Tile::kThreads), sizeof(Pool<Precision, Tile>), this->launcher_.stream,
                  &this->shape_},
           kernel, this->view_, static_cast<int>(first), static_cast<int>(m), range, partials_);
    launch_sums({sums_of(partials_, used, which, m)}, first, count);
  }
  void weights(int64_t first, int64_t count) const {
    if (!this->options_.need_parameters) return;
    for (int m = 0; m < this->view_.extents.units; ++m) {
      if (m == 0) {
        launch_weights<Which::reduce, true>(first, count, m);
      } else {
        launch_weights<Which::reduce, false>(first, count, m);
      }
      launch_weights<Which::spatial, true>(first, count, m);
      launch_weights<Which::project, true>(first, count, m);
    }
  }

  Tensors tensors_{};
  bool kept_ = false, ready_ = false, g_in_place_ = false;
  int64_t block_ = 1, usual_block_ = 1;
  Storage *saved_ = nullptr, *x_copy_ = nullptr, *y_copy_ = nullptr, *g_ = nullptr;
  Wide* partials_ = nullptr;
};

}  // namespace gunn
