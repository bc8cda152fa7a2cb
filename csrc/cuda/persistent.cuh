// The persistent driver: which layers it takes, with which template and how many blocks, and its launches.
//
// Forward: one launch. Backward: the staged driver's, but the chain of a block of segments is one launch, and so is
// their recomputation, which is the forward's kernel with given statistics. Chains leave gradients of pre-activations
// ready for the products that follow, where the staged driver leaves gradients behind the batch norms.
//
// What is resident at once is asked of the driver, never assumed. Where not all of a layer's bands are, blocks take
// turns (pixel_block.cuh). What does not fit goes to the staged driver.
#pragma once

#include <algorithm>
#include <vector>

#include "cuda/staged.cuh"
#include "cuda/turns_backward.cuh"
#include "cuda/turns_forward.cuh"
#include "cuda/weight_products.cuh"

namespace gunn {

// A persistent kernel for one layer: the candidate that serves it, its blocks, its words.
template <class Precision, class ChainType, bool transposed>
class PersistentKernel {
 public:
  using Storage = typename Precision::Storage;
  using Kernel = void (*)(ChainType);

  static constexpr bool kWide = sizeof(Storage) == 4;  // a state of twice the bytes is streamed sooner
  // Channels are streamed while more than one in so many finds its place on the chip.
  static constexpr int kLeastShare = kWide ? 8 : 2;

  // A template: its k and s in tiles of 8 channels, its warps with fragments of 16 pixels each.
  struct Candidate {
    Kernel kernel;
    int k_tiles, s_tiles, warps, fragments;
    bool streams;
    size_t tables;  // bytes behind the layout's
    bool turns;     // with exchanges, a step for all of a block's bands before each
    int units;

    int pixels() const { return 16 * warps * fragments; }
    bool rings() const { return through_ring(k_tiles); }
  };

  PersistentKernel(const Launcher& launcher, const Extents& extents, const char* name, bool exchanges,
                   const std::vector<Candidate>& candidates)
      : launcher_(launcher), name_(name) {
    chain.extents = extents;
    chain.exchanges = exchanges;
    chain.first_segment = 0, chain.last_segment = extents.segments - 1;
    if (extents.channels > 4096 || extents.width > 512 || extents.height > 4096) return;
    // Small blocks first: more of them share the work; and if it can be, each has a processor to itself. In turns large
    // ones first: they read weights less often. Smaller ones where a block then has far fewer pixels in all.
    for (const Fit fit : {Fit::spread, Fit::at_once}) {
      for (const Candidate& candidate : candidates) {
        if (consider(candidate, fit)) return;
      }
    }
    for (auto candidate = candidates.rbegin(); candidate != candidates.rend(); ++candidate) {
      consider(*candidate, Fit::in_turns);
    }
  }

  bool takes() const { return chosen_.kernel != nullptr; }
  // Whether its blocks have several bands, with exchanges between steps.
  bool turns() const { return chosen_.turns; }
  // Whether not all bands find room at once, so that or in several launches.
  bool takes_turns() const { return chain.blocks < chain.all_bands; }

  void take(Arena& arena) {
    const Extents& e = chain.extents;
    const int64_t columns[kKinds] = {e.k() + (transposed ? 0 : e.s()), e.k(), e.s() * (transposed ? 2 : 1)};
    words_ = 0;
    for (const int64_t each : columns) words_ += 2 * each * (chain.blocks + 1);
    if (chain.bands > 1) words_ += int64_t{4} * chain.all_bands * e.width * e.k() / Registers<Precision>::kEach;
    Word* next = arena.take<Word>(words_);
    for (int k = 0; k < kKinds; ++k) {
      chain.words[k] = next, next += 2 * columns[k] * chain.blocks;
      chain.results[k] = next, next += 2 * columns[k];
    }
    chain.edges = next;
    const int64_t copies = turns() ? chain.all_bands : chain.blocks;
    chain.streamed = arena.take<Storage>(copies * chosen_.pixels() * chain.streamed_channels());
  }
  // Before the first launch of a pass: no word has an epoch.
  void clear_words(Preparation<Precision>& preparation) const {
    if (how_.cooperative) preparation.clear(reinterpret_cast<unsigned*>(chain.words[0]), 2 * words_);
  }
  void run() const {
    Launch how = how_;
    ChainType part = chain;
    const int step = chain.exchanges ? chain.all_bands : chain.blocks;
    for (part.first_band = 0; part.first_band < chain.all_bands; part.first_band += step) {
      if (!chain.exchanges) how.grid.x = std::min(step, chain.all_bands - part.first_band);
      launch(how, chosen_.kernel, part);
    }
  }

  ChainType chain{};

 private:
  // How bands become blocks, all resident at once: each is one, with a processor to itself; each is one; a block has
  // several, or is launched for several.
  enum class Fit { spread, at_once, in_turns };

  // If the layer has its k and s, and fits. Channels that find no room are streamed, 16 at a time; beside a ring as
  // many as need be, in turns with exchanges all.
  bool consider(const Candidate& candidate, Fit fit) {
    if (candidate.turns != (fit == Fit::in_turns && chain.exchanges)) return false;
    const Extents& e = chain.extents;
    const int pixels = candidate.pixels();
    if (e.k() != 8 * candidate.k_tiles || e.s() != 8 * candidate.s_tiles || e.units != candidate.units) return false;
    if (candidate.rings() && (e.shortcut != (e.units > 1) || e.segment % 2 != 0)) return false;
    if (e.width > pixels) return false;
    Launch how{name_, dim3(1), dim3(32 * candidate.warps), 0, launcher_.stream, &launcher_.shape};
    const size_t room_for_shared = ask(how, candidate.kernel).shared;
    int band_rows = std::min(e.height, pixels / e.width);
    const int bands = (e.height + band_rows - 1) / band_rows;
    band_rows = (e.height + bands - 1) / bands;  // as equal as may be
    int resident = candidate.turns ? 0 : (e.channels + 15) / 16 * 16;
    const auto shared = [&] {
      return ChainLayout<Precision>(e, pixels, band_rows, resident, transposed, candidate.rings()).bytes +
             candidate.tables;
    };
    const int least = candidate.rings() ? 0 : e.channels / kLeastShare;
    while (candidate.streams && shared() > room_for_shared && resident > least) resident -= 16;
    if (shared() > room_for_shared) return false;
    how.shared = shared();
    const Room room = ask(how, candidate.kernel);
    const int64_t places = fit == Fit::spread ? std::min<int64_t>(room.blocks, room.processors) : room.blocks;
    const int64_t all_bands = launcher_.shape.batch * bands;
    const bool whole = bands == 1 && !chain.exchanges;  // nobody waits for anybody
    int64_t most = places, clerks = 0;                  // blocks with bands
    if (chain.exchanges) {
      const int columns = std::max(e.k() + (transposed ? 0 : e.s()), 2 * e.s());
      clerks = (columns + candidate.warps - 1) / candidate.warps;
      // In turns a clerk's time is short beside that of a step: few do.
      clerks = all_bands < places ? std::min<int64_t>(clerks, places - all_bands)
                                  : std::clamp<int64_t>(places / 16, 1, clerks);
      most = std::min<int64_t>(places - clerks, kMostBlocks);
    }
    int64_t blocks = all_bands;
    if (fit == Fit::in_turns && !whole) {
      // As equal as may be; bands of an image wait for each other, so without exchanges it is one launch's.
      const int64_t together = chain.exchanges ? 1 : bands, groups = most / together, all = all_bands / together;
      if (groups < 1) return false;
      const int64_t rounds = (all + groups - 1) / groups;
      blocks = (all + rounds - 1) / rounds * together;
      if (takes() && 4 * rounds * pixels > 3 * in_turn_) return false;
      in_turn_ = rounds * pixels;
    }
    if ((!whole && blocks > most) || all_bands > INT32_MAX / 2) return false;
    how.cooperative = !whole;
    how.grid = dim3(static_cast<unsigned>(blocks + clerks));
    chain.bands = bands, chain.band_rows = band_rows;
    chain.all_bands = static_cast<int>(all_bands), chain.blocks = static_cast<int>(blocks);
    chain.resident = resident;
    how_ = how, chosen_ = candidate;
    return true;
  }

  const Launcher& launcher_;
  const char* name_;
  Candidate chosen_{};
  Launch how_{};
  int64_t in_turn_ = 0;  // pixels that a block has in all
  int64_t words_ = 0;
};

template <class Precision>
class ForwardKernel : public PersistentKernel<Precision, ForwardChain<Precision>, false> {
  using Base = PersistentKernel<Precision, ForwardChain<Precision>, false>;
  template <int KT, int ST, int WARPS, int MT, bool streams>
  static typename Base::Candidate candidate() {
    return {persistent_forward<Precision, KT, ST, WARPS, MT, streams>,
            KT,
            ST,
            WARPS,
            MT,
            streams,
            sizeof(ForwardTables<KT, ST, WARPS, MT>),
            false,
            1};
  }
  template <int KT, int ST, int WARPS, int MT, int units = 1>
  static typename Base::Candidate with_turns() {
    constexpr size_t kTables = sizeof(ForwardTurnsTables<KT, ST, WARPS, MT, units>);
    return {forward_turns<Precision, KT, ST, WARPS, MT, units>, KT, ST, WARPS, MT, true, kTables, true, units};
  }
  static std::vector<typename Base::Candidate> candidates() {
    constexpr bool kWide = Base::kWide;
    std::vector<typename Base::Candidate> all{
        candidate<3, 2, 4, 1, false>(), candidate<3, 2, 8, 1, kWide>(), candidate<3, 2, 8, 2, kWide>(),
        candidate<3, 2, 8, 4, true>(),  candidate<1, 1, 4, 1, false>(), candidate<1, 1, 8, 2, kWide>(),
        candidate<1, 1, 8, 4, true>(),  candidate<10, 5, 4, 1, true>(), candidate<10, 5, 8, 1, true>(),
        with_turns<3, 2, 8, 2>(),       with_turns<1, 1, 8, 2>(),       with_turns<10, 5, 8, 2>()};
    if constexpr (!kWide) {  // of four bytes have not enough registers
      all.insert(all.end(),
                 {candidate<10, 5, 8, 2, true>(), with_turns<14, 5, 8, 1, 2>(), with_turns<14, 5, 8, 2, 2>()});
    }
    return all;
  }

 public:
  ForwardKernel(const Launcher& launcher, const Extents& extents, bool exchanges)
      : Base(launcher, extents, "persistent_forward", exchanges, candidates()) {}
};

template <class Precision>
class BackwardKernel : public PersistentKernel<Precision, BackwardChain<Precision>, true> {
  using Base = PersistentKernel<Precision, BackwardChain<Precision>, true>;
  template <int KT, int ST, int WARPS, int MT, bool streams>
  static typename Base::Candidate candidate() {
    return {persistent_backward<Precision, KT, ST, WARPS, MT, streams>,
            KT,
            ST,
            WARPS,
            MT,
            streams,
            sizeof(BackwardTables<KT, ST, WARPS, MT>),
            false,
            1};
  }
  template <int KT, int ST, int WARPS, int MT, int units = 1>
  static typename Base::Candidate with_turns() {
    constexpr size_t kTables = sizeof(BackwardTables<KT, ST, WARPS, MT, units>);
    return {backward_turns<Precision, KT, ST, WARPS, MT, units>, KT, ST, WARPS, MT, true, kTables, true, units};
  }
  static std::vector<typename Base::Candidate> candidates() {
    constexpr bool kWide = Base::kWide;
    std::vector<typename Base::Candidate> all{
        candidate<3, 2, 4, 1, false>(), candidate<3, 2, 8, 1, kWide>(), candidate<3, 2, 8, 2, kWide>(),
        candidate<1, 1, 4, 1, false>(), candidate<1, 1, 8, 2, kWide>(), candidate<1, 1, 8, 4, true>(),
        candidate<10, 5, 4, 1, true>(), candidate<10, 5, 8, 1, true>(), with_turns<3, 2, 8, 2>(),
        with_turns<1, 1, 8, 2>(),       with_turns<10, 5, 8, 2>()};
    if constexpr (!kWide) {  // of four bytes have not enough registers
      all.insert(all.end(), {candidate<3, 2, 8, 4, true>(), candidate<10, 5, 8, 2, true>(),
                             with_turns<14, 5, 8, 1, 2>(), with_turns<14, 5, 8, 2, 2>()});
    }
    return all;
  }

 public:
  BackwardKernel(const Launcher& launcher, const Extents& extents, bool exchanges)
      : Base(launcher, extents, "persistent_backward", exchanges, candidates()) {}
};

// Gradients of weights from what chains leave, for blocks of segments; those that are not taken are the staged
// driver's.
template <class Precision>
class WeightProducts {
  using Storage = typename Precision::Storage;

 public:
  WeightProducts(const Launcher& launcher, const Extents& extents) : launcher_(launcher), extents_(extents) {
    if constexpr (sizeof(Storage) == 2) {
      const bool one_unit = extents.units == 1;
      if (one_unit && extents.k() == 24 && extents.s() == 16) choose<3, 2>();
      if (one_unit && extents.k() == 8 && extents.s() == 8) choose<1, 1>();
      if (extents.k() == 80 && extents.s() == 40) hidden_ = hidden_weights<Precision, 10, 5>;
      if (extents.k() == 112 && extents.s() == 40) hidden_ = hidden_weights<Precision, 14, 5>;
    }
    input_how_ = {"input_weights", dim3(1), dim3(InputWeights::kThreadCount), 0, launcher.stream, &launcher.shape};
    hidden_how_ = {"hidden_weights", dim3(1), dim3(HiddenWeights::kThreadCount), 0, launcher.stream, &launcher.shape};
    if (input_ != nullptr) {
      input_how_.shared = InputWeights::shared_bytes<Storage>(extents);
      input_places_ = ask(input_how_, input_).blocks;
    }
    if (hidden_ != nullptr && extents.width <= HiddenWeights::most_pixels(extents.k()) && hidden_bands() <= 1 << 30) {
      hidden_how_.shared = HiddenWeights::shared_bytes<Storage>(extents);
      hidden_places_ = ask(hidden_how_, hidden_).blocks;
    }
  }

  bool takes(Which which) const { return which == Which::reduce ? input_places_ > 0 : hidden_places_ > 0; }

  // For blocks of at most `block` segments. Ranges, and with them the order of sums, are such that `usual` ones fill
  // the device once.
  void take(Arena& arena, int64_t block, int64_t usual) {
    const int64_t pairs = (usual + 1) / 2;
    const auto range_of = [](int64_t all, int64_t ranges, int64_t multiple) {
      return round_up((all + ranges - 1) / ranges, multiple);
    };
    if (takes(Which::reduce)) {
      const int64_t ranges = std::clamp<int64_t>(input_places_ / pairs, 1, kMostRanges);
      input_range_ = range_of(extents_.pixels, ranges, kLeastRange);
      ranges_[0] = (extents_.pixels + input_range_ - 1) / input_range_;
    }
    if (takes(Which::spatial)) {
      const int64_t bands = hidden_bands(), ranges = hidden_places_ / (usual * HiddenWeights::parts(extents_));
      hidden_range_ = range_of(bands, std::clamp<int64_t>(ranges, 1, kMostRanges), 1);
      ranges_[1] = ranges_[2] = (bands + hidden_range_ - 1) / hidden_range_;
    }
    for (const Which which : {Which::reduce, Which::spatial, Which::project}) {
      if (!takes(which)) continue;
      const GradientShape size = gradient_shape(extents_, which, 0);
      const int w = static_cast<int>(which);
      partials_[w] = arena.take<float>(block * ranges_[w] * size.rows * size.width);
    }
  }
  void run(const View<Precision>& view, int unit, int64_t first, int64_t count) const {
    const int segment = static_cast<int>(first);
    if (takes(Which::reduce)) {
      Launch how = input_how_;
      how.grid = dim3(static_cast<unsigned>((count + 1) / 2), static_cast<unsigned>(ranges_[0]));
      launch(how, input_, view, segment, static_cast<int>(count), input_range_, partials_[0]);
    }
    if (takes(Which::spatial)) {
      Launch how = hidden_how_;
      how.grid = dim3(static_cast<unsigned>(ranges_[1]), static_cast<unsigned>(count),
                      static_cast<unsigned>(HiddenWeights::parts(extents_)));
      launch(how, hidden_, view, unit, segment, static_cast<int>(hidden_range_), static_cast<int>(hidden_bands()),
             partials_[1], partials_[2]);
    }
  }
  const float* partials(Which which) const { return partials_[static_cast<int>(which)]; }
  int64_t ranges(Which which) const { return ranges_[static_cast<int>(which)]; }

 private:
  // Of all images; the width is one that fits.
  int64_t hidden_bands() const { return launcher_.shape.batch * HiddenWeights::bands(extents_); }

  static constexpr int64_t kMostRanges = 64, kLeastRange = 4 * InputWeights::kChunk;

  template <int KT, int ST>
  void choose() {
    const int tiles = InputWeights::tiles_of_warp(extents_);
    hidden_ = hidden_weights<Precision, KT, ST>;
    if (tiles <= 5) {
      input_ = input_weights<Precision, KT + ST, 5>;
    } else if (tiles <= 7) {
      input_ = input_weights<Precision, KT + ST, 7>;
    }
  }

  const Launcher& launcher_;
  const Extents& extents_;
  void (*input_)(View<Precision>, int, int, int64_t, float*) = nullptr;
  void (*hidden_)(View<Precision>, int, int, int, int, float*, float*) = nullptr;
  Launch input_how_{}, hidden_how_{};
  int64_t input_places_ = 0, hidden_places_ = 0, input_range_ = 0, hidden_range_ = 0, ranges_[3] = {};
  float* partials_[3] = {};
};

template <class Precision>
class PersistentForward {
  using Storage = typename Precision::Storage;
  using Wide = typename Precision::Wide;
  using Tensors = ForwardTensors<Storage, Wide>;

 public:
  PersistentForward(const LayerShape& shape, const Options& options)
      : shape_(shape),
        options_(options),
        launcher_(shape, options),
        kernel_(launcher_, extents_of(shape), options.batch_statistics) {}

  bool takes() const { return !options_.stepwise && kernel_.takes(); }
  bool takes_turns() const { return kernel_.takes_turns(); }

  int64_t workspace_bytes(bool keep) {
    Arena arena(nullptr);
    take(arena, keep);
    return arena.bytes();
  }

  void run(const Tensors& tensors) {
    const bool keep = tensors.saved != nullptr;
    Arena arena(tensors.workspace);
    take(arena, keep);
    ForwardChain<Precision>& chain = kernel_.chain;
    Preparation<Precision> preparation(launcher_, chain.extents);
    for (int m = 0; m < chain.extents.units; ++m) {
      chain.unit[m] = tensors.units[m];
      for (int k = 0; k < kKinds; ++k) {
        preparation.pack(pack_of(static_cast<Kind>(k), false), m, tensors.units[m], packed_[m][k]);
      }
    }
    chain.x = chain.before = tensors.x, chain.y = tensors.y, chain.z = keep ? tensors.saved : z_;
    chain.one_segment = !keep;
    chain.mean = tensors.statistics, chain.var = tensors.statistics + shape_.segments * shape_.rows();
    chain.eps = options_.eps;
    kernel_.clear_words(preparation);
    if (!options_.batch_statistics) {
      preparation.tables(tensors.units, {true, false, tensors.statistics, options_.eps, nullptr, 0}, chain.tables);
    }
    preparation.run();
    kernel_.run();
  }

 private:
  void take(Arena& arena, bool keep) {
    ForwardChain<Precision>& chain = kernel_.chain;
    const Extents& e = chain.extents;
    if (kernel_.turns() && !keep) z_ = arena.take<Storage>(e.pixels * e.z_rows());
    if (e.units > 1) chain.inputs = arena.take<Storage>(e.pixels * e.s());
    for (int m = 0; m < e.units; ++m) {
      for (int k = 0; k < kKinds; ++k) {
        packed_[m][k] = arena.take<Storage>(packed_size<Precision>(e, pack_of(static_cast<Kind>(k), false), m));
        chain.packed[m][k] = packed_[m][k];
      }
    }
    const int64_t table = static_cast<int64_t>(e.segments) * e.z_rows();
    Tables<float>& tables = chain.tables;
    for (float** each : {&tables.mean, &tables.scale, &tables.shift, &tables.inverse}) *each = arena.take<float>(table);
    kernel_.take(arena);
  }

  const LayerShape& shape_;
  const Options& options_;
  const Launcher launcher_;
  ForwardKernel<Precision> kernel_;
  Storage* packed_[kMostUnits][kKinds] = {};
  Storage* z_ = nullptr;  // of one segment, in turns
};

template <class Precision>
class PersistentBackward : StagedBackward<Precision> {
  using Staged = StagedBackward<Precision>;
  using Storage = typename Precision::Storage;
  using Tensors = BackwardTensors<Storage, typename Precision::Wide>;

 public:
  PersistentBackward(const LayerShape& shape, const Options& options, bool kept)
      : Staged(shape, options),
        kept_(kept),
        chain_(this->launcher_, this->view_.extents, options.batch_statistics || options.need_parameters),
        recompute_(this->launcher_, this->view_.extents, false),
        products_(this->launcher_, this->view_.extents) {}

  bool takes() const { return !this->options_.stepwise && chain_.takes(); }
  bool takes_turns() const { return chain_.takes_turns(); }

  int64_t workspace_bytes() {
    Arena arena(nullptr);
    Storage pretend;
    take(arena, kept_ ? &pretend : nullptr, this->options_.pixel_major, this->options_.pixel_major);
    return arena.bytes();
  }

  void run(const Tensors& tensors) {
    this->tensors_ = tensors;
    Arena arena(tensors.workspace);
    take(arena, const_cast<Storage*>(tensors.saved), lies_ready(tensors.x, this->shape_, this->options_),
         lies_ready(tensors.y, this->shape_, this->options_));
    Preparation<Precision> preparation = this->preparation();
    this->prepare(preparation);
    chain_.clear_words(preparation);
    if (recomputes()) recompute_.clear_words(preparation);
    preparation.run();
    this->copy_maps();
    const int64_t segments = this->shape_.segments;
    for (int64_t end = segments; end > 0; end -= std::min(end, this->block_)) {
      const int64_t first = std::max<int64_t>(0, end - this->block_);
      if (recomputes()) {
        this->use_block(first);
        recompute(first, end - 1);
      } else {
        this->open_block(first, end - first);
      }
      chain(first, end - 1);
      weights(first, end - first);
    }
  }

 private:
  // Bytes for pre-activations and their gradients: a few segments of the largest layers, all of the small ones.
  int64_t budget() const {
    const int64_t x = this->shape_.channels * this->view_.extents.pixels * static_cast<int64_t>(sizeof(Storage));
    return std::max(int64_t{64} << 20, 3 * x);
  }
  bool recomputes() const { return !kept_ && recompute_.takes(); }

  void take(Arena& arena, Storage* saved, bool x_as_it_is, bool y_as_it_is) {
    Staged::take(arena, saved, x_as_it_is, y_as_it_is,
                 {budget(), true, products_.takes(Which::reduce), products_.takes(Which::spatial)});
    if (this->options_.need_parameters) products_.take(arena, this->block_, this->usual_block_);
    if (!this->options_.need_input && !chain_.turns()) g_between_ = this->template take_copy<Storage>(arena, true);
    for (int m = 0; m < this->view_.extents.units; ++m) {
      for (int k = 0; k < kKinds; ++k) {
        const Kind kind = static_cast<Kind>(k);
        chain_.chain.packed[m][k] = this->packed(pack_of(kind, true), m);
        if (recomputes()) recompute_.chain.packed[m][k] = this->packed(pack_of(kind, false), m);
      }
    }
    chain_.chain.tables = recompute_.chain.tables = this->view_.tables;
    chain_.take(arena);
    if (recomputes()) recompute_.take(arena);
  }

  void recompute(int64_t first, int64_t last) {
    ForwardChain<Precision>& chain = recompute_.chain;
    chain.x = this->tensors_.x, chain.before = this->tensors_.y;
    chain.z = this->view_.z;
    chain.first_segment = static_cast<int>(first), chain.last_segment = static_cast<int>(last);
    recompute_.run();
  }
  void chain(int64_t first, int64_t last) {
    BackwardChain<Precision>& chain = chain_.chain;
    // Between launches the gradient of the state waits where the input's will be; in turns it stays where it is.
    const FeatureMap<Storage> between = chain_.turns() ? FeatureMap<Storage>{}
                                        : this->options_.need_input
                                            ? this->tensors_.grad_x
                                            : pixel_major(g_between_, this->shape_, this->pixel_step());
    const FeatureMap<const Storage> left{between.data, between.batch, between.channel, between.row, between.column};
    chain.g = last + 1 == this->shape_.segments ? this->tensors_.grad_y : left;
    chain.g_before = between;
    if (first == 0) chain.g_before = this->options_.need_input ? this->tensors_.grad_x : FeatureMap<Storage>{};
    chain.wanted = first > 0 || this->options_.need_input;
    chain.z = this->view_.z, chain.dz = this->options_.need_parameters || chain_.turns() ? this->view_.d : nullptr;
    if (this->options_.need_parameters) std::copy_n(this->tensors_.grads, this->shape_.units, chain.gradients);
    chain.need_gradients = this->options_.need_parameters;
    chain.batch_statistics = this->options_.batch_statistics;
    chain.count = static_cast<double>(this->options_.count);
    chain.first_segment = static_cast<int>(first), chain.last_segment = static_cast<int>(last);
    chain_.run();
  }

  void weights(int64_t first, int64_t count) const {
    if (!this->options_.need_parameters) return;
    for (int m = 0; m < this->view_.extents.units; ++m) weights(m, first, count);
  }
  void weights(int m, int64_t first, int64_t count) const {
    products_.run(this->view_, m, first, count);
    if (!products_.takes(Which::reduce)) {
      m == 0 ? this->template launch_weights<Which::reduce, true>(first, count, m)
             : this->template launch_weights<Which::reduce, false>(first, count, m);
    }
    if (!products_.takes(Which::spatial)) {
      this->template launch_weights<Which::spatial, true>(first, count, m);
      this->template launch_weights<Which::project, true>(first, count, m);
    }
    std::vector<PartialSums<typename Precision::Wide>> sums;
    for (const Which which : {Which::reduce, Which::spatial, Which::project}) {
      if (!products_.takes(which)) continue;
      sums.push_back(this->sums_of(products_.partials(which), products_.ranges(which), which, m));
    }
    this->launch_sums(sums, first, count);
  }

  const bool kept_;
  BackwardKernel<Precision> chain_;
  ForwardKernel<Precision> recompute_;
  WeightProducts<Precision> products_;
  Storage* g_between_ = nullptr;
};

}  // namespace gunn
