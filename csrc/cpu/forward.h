// The forward pass: drivers over the stages.
//
// Batch statistics: segments outside, pieces of images inside, three exchanges of statistics per segment and unit, each
// one barrier. Given statistics: nothing to exchange, so images outside and segments inside: an image stays in the
// cache. Images that are left when every thread has had as many are shared: one barrier per segment and unit, before
// the 3x3 reads its neighbours' z1, of which two sets take turns.
#pragma once

#include "cpu/stages.h"

namespace gunn {
namespace {

template <class Precision>
class ForwardPass {
  using Scalar = typename Precision::Scalar;
  using Factor = typename Precision::Factor;
  using Tensors = typename Precision::Forward;

 public:
  ForwardPass(const LayerShape& shape, const Options& options, const Tensors& tensors)
      : shape_(shape),
        options_(with_useful_threads<Factor>(shape, options)),
        tensors_(tensors),
        stages_(shape, tensors.units) {
    Arena arena(tensors.workspace);
    take(arena, tensors.saved);
  }

  static int64_t workspace_bytes(const LayerShape& shape, const Options& options, bool keep) {
    ForwardPass pass(shape, options);
    Arena arena(nullptr);
    Scalar pretend;
    pass.take(arena, keep ? &pretend : nullptr);
    return arena.bytes();
  }

  int threads() const { return options_.threads; }

  void run(const Team& team) {
    begin(team);
    team.barrier();
    if (by_image()) {
      evaluate(team);
      return;
    }
    for (int64_t i = 0; i < shape_.segments; ++i) {
      for (int64_t m = 0; m < shape_.units; ++m) {
        reduce(team, i, m);
        team.barrier();
        if (m == 0 && enters_panel(i)) pack(panels().index(i) + 1, team.index, team.size);
        spatial(team, i, m);
        team.barrier();
        project(team, i, m);
        team.barrier();
      }
    }
    finish(team);
  }

  void step(const Team& team, Forward which, int64_t i, int64_t m) {
    if (which == Forward::begin) begin(team);
    if (which == Forward::finish) finish(team);
    if (which == Forward::reduce) {
      if (m == 0 && enters_panel(i)) pack(panels().index(i), team.index, team.size);
      team.barrier();
      reduce(team, i, m);
      publish(team, 0, i, stages_.reduce_row(m), stages_.reduce_rows(m));
    }
    if (which == Forward::spatial) {
      spatial(team, i, m);
      publish(team, 1, i, stages_.spatial_row(m), shape_.hidden());
    }
    if (which == Forward::project) {
      project(team, i, m);
      publish(team, 2, i, stages_.project_row(m), shape_.segment());
    }
  }

 private:
  struct Own : Scratch<Factor> {
    Moments<Scalar> moments;

    using Scratch<Factor>::Scratch;
    void take(const LayerShape& shape, Arena& arena) {
      Scratch<Factor>::take(shape, arena);
      moments.take(arena, shape.hidden() + shape.segment());
    }
  };

  ForwardPass(const LayerShape& shape, const Options& options)
      : shape_(shape), options_(with_useful_threads<Factor>(shape, options)), stages_(shape, nullptr) {}

  bool by_image() const { return !options_.batch_statistics && !options_.stepwise; }

  void take(Arena& arena, Scalar* saved) {
    const int64_t threads = options_.threads;
    const bool reuses_slots = by_image() && !saved;
    const int64_t slots = reuses_slots ? smaller(threads, shape_.batch) : shape_.batch;
    stages_.take(arena, slots, reuses_slots && threads > 1 ? 2 : 1, saved);
    kept_ = saved != nullptr;
    packed_step_ = stages_.packed_layout.size;
    packed_count_ = by_image() ? panels().count() : 2;
    packed_ = arena.take<Factor>(packed_count_ * packed_step_);
    table_.take(arena, by_image() ? shape_.segments * shape_.rows() : 0);
    for (auto& slot : partials_) {
      slot = arena.take<double>(threads * partial_size());
    }
    // Threads' own pieces come last, at a fixed step.
    Arena one(nullptr);
    Own own(shape_, stages_.geometry);
    own.take(shape_, one);
    own_step_ = one.bytes();
    own_ = arena.take<std::byte>(threads * own_step_);
  }

  Own own(int thread) const {
    Own own(shape_, stages_.geometry);
    Arena arena(own_ + thread * own_step_);
    own.take(shape_, arena);
    return own;
  }

  const Panels& panels() const { return stages_.panels; }
  bool enters_panel(int64_t i) const { return i % panels().size == 0; }
  Factor* packed_panel(int64_t panel) const { return packed_ + panel % packed_count_ * packed_step_; }
  const Factor* packed(int64_t i, int64_t m, int64_t stage) const {
    return stages_.packed(packed_panel(panels().index(i)), i, m, stage);
  }
  void pack(int64_t panel, int64_t part, int64_t parts) const {
    if (panel < panels().count()) stages_.pack(panels().at(panel), packed_panel(panel), part, parts);
  }
  Scalar mean(int64_t i, int64_t row) const { return tensors_.statistics[i * shape_.rows() + row]; }
  Scalar var(int64_t i, int64_t row) const { return tensors_.statistics[(shape_.segments + i) * shape_.rows() + row]; }

  void begin(const Team& team) const {
    if (team.index == 0) {
      fill_mask(stages_.geometry, stages_.mask);
      stages_.clear_outputs();
    }
    for (int thread = team.index; thread < options_.threads; thread += team.size) {
      own(thread).convolution.clear();
    }
    if (by_image()) {
      for (int64_t panel = team.begin(panels().count()); panel < team.end(panels().count()); ++panel) pack(panel, 0, 1);
      for (int64_t i = team.begin(shape_.segments); i < team.end(shape_.segments); ++i) {
        for (int64_t row = 0; row < shape_.rows(); ++row) {
          stages_.set_affine(table_.at(i * shape_.rows()), i, row, mean(i, row), var(i, row), options_.eps);
        }
      }
      return;
    }
    stages_.for_own_pieces(team, [&](const Piece& piece) { load(piece, piece.slot); });
    if (!options_.stepwise) pack(0, team.index, team.size);
  }

  void load(const Piece& piece, int64_t image) const {
    for (int64_t tile = piece.first; tile < piece.last; ++tile) {
      load_tile(stages_.geometry, tensors_.x, image, tile, shape_.channels, stages_.state_tile(piece.slot, tile));
    }
  }
  void store(const Piece& piece, int64_t image) const {
    for (int64_t tile = piece.first; tile < piece.last; ++tile) {
      store_tile(stages_.geometry, tensors_.y, image, tile, shape_.channels,
                 static_cast<const Factor*>(stages_.state_tile(piece.slot, tile)));
    }
  }

  void evaluate(const Team& team) const {
    const int64_t bands = stages_.geometry.bands;
    const int64_t shared = shape_.batch % team.size, whole = shape_.batch - shared;
    for (int64_t image = team.begin(whole); image < team.end(whole); ++image) {
      const int64_t slot = kept_ ? image : team.index;
      evaluate(team, slot * bands, (slot + 1) * bands, image - slot, false);
    }
    if (shared == 0) return;
    team.barrier();  // slots change hands
    const int64_t slot = kept_ ? whole : 0, first = slot * bands;
    evaluate(team, first + team.begin(shared * bands), first + team.end(shared * bands), whole - slot, true);
  }
  // Takes bands [first, last) of the slots through all segments; slot 0 holds image `image`.
  void evaluate(const Team& team, int64_t first, int64_t last, int64_t image, bool shared) const {
    const Own mine = own(team.index);
    const auto for_pieces = [&](auto visit) { for_each_piece(stages_.geometry, first, last, visit); };
    for_pieces([&](const Piece& piece) { load(piece, image + piece.slot); });
    for (int64_t i = 0; i < shape_.segments; ++i) {
      const Affine<Scalar> affine = table_.at(i * shape_.rows());
      for (int64_t m = 0; m < shape_.units; ++m) {
        const Factor *reduce = packed(i, m, 0), *spatial = packed(i, m, 1), *project = packed(i, m, 2);
        for_pieces([&](const Piece& piece) {
          for (int64_t tile = piece.first; tile < piece.last; ++tile) {
            stages_.reduce_tile_stage(i, m, piece.slot, tile, reduce, enters_panel(i), nullptr);
            if (!shared) stages_.put_hidden(i, m, piece.slot, tile, affine, mine.convolution);
          }
        });
        if (shared) team.barrier();
        for_pieces([&](const Piece& piece) {
          if (shared) stages_.put_hidden(i, m, piece, affine, mine.convolution);
          // The rest tile by tile, while z2 is in the first cache.
          stages_.convolve(i, m, piece, spatial, mine.convolution, [&](int64_t tile) {
            stages_.project_tile_stage(i, m, piece.slot, tile, project, affine, mine, nullptr);
            stages_.emit_tile(i, m, piece.slot, tile, affine);
          });
        });
      }
    }
    for_pieces([&](const Piece& piece) { store(piece, image + piece.slot); });
  }

  // Posts this thread's count, means and sums of squared deviations; combined once all threads have posted.
  int64_t partial_size() const { return 1 + 2 * (shape_.hidden() + shape_.segment()); }
  double* partial(int slot, int thread) const { return partials_[slot] + thread * partial_size(); }
  void post(const Team& team, int slot, const Moments<Scalar>& moments, int64_t rows) const {
    moments.merge(rows);
    double* to = partial(slot, team.index);
    *to++ = moments.counts->merged;
    for (int64_t r = 0; r < rows; ++r) to[2 * r] = moments.mean[r], to[2 * r + 1] = moments.squares[r];
  }
  void combine(const Team& team, int slot, int64_t r, Scalar* mean, Scalar* var) const {
    const double total = static_cast<double>(shape_.batch * shape_.height * shape_.width);
    double centre = 0, squares = 0;
    for (int thread = 0; thread < team.size; ++thread) {
      const double* of = partial(slot, thread);
      centre += of[0] / total * of[1 + 2 * r];
    }
    for (int thread = 0; thread < team.size; ++thread) {
      const double* of = partial(slot, thread);
      const double apart = of[1 + 2 * r] - centre;
      squares += of[2 + 2 * r] + of[0] * apart * apart;
    }
    *mean = static_cast<Scalar>(centre);
    *var = static_cast<Scalar>(squares < 0 ? 0 : squares / total);  // rounding may go below 0; NaN passes
  }
  void write_statistics(int64_t i, int64_t row, Scalar mean, Scalar var) const {
    tensors_.statistics[i * shape_.rows() + row] = mean;
    tensors_.statistics[(shape_.segments + i) * shape_.rows() + row] = var;
  }
  // Every thread takes over the statistics of rows [row, row + rows): from the posts, or in steps from the tensor.
  void settle(const Team& team, const Own& mine, int slot, int64_t i, int64_t row, int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r) {
      Scalar mean_, var_;
      if (options_.stepwise) {
        mean_ = mean(i, row + r), var_ = var(i, row + r);
      } else {
        combine(team, slot, r, &mean_, &var_);
        if (team.index == 0) write_statistics(i, row + r, mean_, var_);
      }
      stages_.set_affine(mine.affine, i, row + r, mean_, var_, options_.eps);
    }
  }
  // In steps: leaves the statistics in the tensor, for the caller to change before the next step.
  void publish(const Team& team, int slot, int64_t i, int64_t row, int64_t rows) const {
    team.barrier();
    if (team.index != 0 || !options_.batch_statistics) return;
    for (int64_t r = 0; r < rows; ++r) {
      Scalar mean_, var_;
      combine(team, slot, r, &mean_, &var_);
      write_statistics(i, row + r, mean_, var_);
    }
  }

  // What the unit before (i, m) still has to write: settles its statistics, says which unit it was.
  bool previous(const Team& team, const Own& mine, int64_t i, int64_t m, int64_t* pi, int64_t* pm) const {
    if (i == 0 && m == 0) return false;
    *pi = m > 0 ? i : i - 1;
    *pm = m > 0 ? m - 1 : shape_.units - 1;
    settle(team, mine, 2, *pi, stages_.project_row(*pm), shape_.segment());
    if (options_.stepwise && shape_.projects(*pm)) settle(team, mine, 0, *pi, stages_.shortcut_row(), shape_.segment());
    return true;
  }

  void reduce(const Team& team, int64_t i, int64_t m) const {
    const Own mine = own(team.index);
    int64_t pi = 0, pm = 0;
    const bool pending = previous(team, mine, i, m, &pi, &pm);
    const Factor* w = packed(i, m, 0);
    const int64_t rows = stages_.reduce_rows(m);
    mine.moments.clear(rows);
    stages_.for_own_tiles(team, [&](int64_t image, int64_t tile) {
      if (pending) stages_.emit_tile(pi, pm, image, tile, mine.affine);
      stages_.reduce_tile_stage(i, m, image, tile, w, enters_panel(i), &mine.moments);
    });
    post(team, 0, mine.moments, rows);
  }

  void spatial(const Team& team, int64_t i, int64_t m) const {
    const Own mine = own(team.index);
    settle(team, mine, 0, i, stages_.reduce_row(m), stages_.reduce_rows(m));
    const int64_t rows = shape_.hidden();
    mine.moments.clear(rows);
    stages_.for_own_pieces(team, [&](const Piece& piece) {
      stages_.spatial(i, m, piece, packed(i, m, 1), mine.affine, mine, &mine.moments);
    });
    post(team, 1, mine.moments, rows);
  }

  void project(const Team& team, int64_t i, int64_t m) const {
    const Own mine = own(team.index);
    settle(team, mine, 1, i, stages_.spatial_row(m), shape_.hidden());
    const int64_t rows = shape_.segment();
    mine.moments.clear(rows);
    stages_.for_own_pieces(team, [&](const Piece& piece) {
      stages_.project(i, m, piece, packed(i, m, 2), mine.affine, mine, &mine.moments);
    });
    post(team, 2, mine.moments, rows);
  }

  void finish(const Team& team) const {
    const Own mine = own(team.index);
    int64_t pi = 0, pm = 0;
    previous(team, mine, shape_.segments, 0, &pi, &pm);
    stages_.for_own_pieces(team, [&](const Piece& piece) {
      stages_.emit(pi, pm, piece, mine.affine);
      store(piece, piece.slot);
    });
  }

  const LayerShape& shape_;
  const Options options_;
  Tensors tensors_{};
  Stages<Precision> stages_;
  bool kept_ = false;
  Factor* packed_ = nullptr;
  int64_t packed_step_ = 0, packed_count_ = 0;
  Affine<Scalar> table_{};  // given statistics: all segments
  double* partials_[3] = {};
  std::byte* own_ = nullptr;
  int64_t own_step_ = 0;
};

}  // namespace
}  // namespace gunn
