// The persistent driver: which layers it takes, with which template, and its launch.
#pragma once

#include <algorithm>

#include "cuda/host.cuh"
#include "cuda/persistent.cuh"

namespace gunn {

template <class Precision>
class PersistentForward {
  using Storage = typename Precision::Storage;
  using Wide = typename Precision::Wide;
  using Tensors = ForwardTensors<Storage, Wide>;
  using Kernel = void (*)(Chain<Precision>);

 public:
  PersistentForward(const LayerShape& shape, const Options& options, bool keep)
      : shape_(shape), options_(options), launcher_(shape, options) {
    if (keep || options.stepwise || shape.units != 1) return;
    chain_.extents = extents_of(shape);
    choose();
  }

  bool takes() const { return kernel_ != nullptr; }

  int64_t workspace_bytes() {
    Arena arena(nullptr);
    take(arena);
    return arena.bytes();
  }

  void run(const Tensors& tensors) {
    Arena arena(tensors.workspace);
    take(arena);
    for (int k = 0; k < kKinds; ++k) {
      pack_unit<Precision>(launcher_, chain_.extents, pack_of(static_cast<Kind>(k)), 0, tensors.units[0], packed_[k]);
    }
    chain_.x = tensors.x, chain_.y = tensors.y;
    chain_.unit = tensors.units[0];
    chain_.mean = tensors.statistics, chain_.var = tensors.statistics + shape_.segments * shape_.rows();
    chain_.eps = options_.eps;
    if (how_.cooperative) {
      launch(launcher_.by_element("clear", clear_words_), clear, reinterpret_cast<unsigned*>(words_), clear_words_);
    }
    if (!options_.batch_statistics) {
      fill_tables(launcher_, chain_.extents, tensors.units, const_cast<const float*>(tensors.statistics), chain_.tables,
                  options_.eps);
    }
    launch(how_, kernel_, chain_);
  }

 private:
  // A block of 16 * WARPS * MT pixels, if the layer has its k and s, and all its blocks are resident at once; `spread`:
  // if moreover each has a processor to itself. Channels that find no room are streamed, at most half of them.
  template <int KT, int ST, int WARPS, int MT, bool streams>
  void consider(bool spread) {
    const Extents& e = chain_.extents;
    constexpr int kPixels = 16 * WARPS * MT;
    if (kernel_ != nullptr || e.k() != 8 * KT || e.s() != 8 * ST || e.width > kPixels) return;
    const Kernel kernel = persistent_forward<Precision, KT, ST, WARPS, MT, streams>;
    how_ = {"persistent_forward", dim3(1), dim3(32 * WARPS), 0, launcher_.stream, &shape_};
    const size_t most = ask(how_, kernel).shared;
    Chain<Precision> chain = chain_;
    chain.band_rows = std::min(e.height, kPixels / e.width);
    chain.bands = (e.height + chain.band_rows - 1) / chain.band_rows;
    chain.band_rows = (e.height + chain.bands - 1) / chain.bands;  // as equal as may be
    chain.resident = (e.channels + 15) / 16 * 16;
    const auto shared = [&] {
      return ChainLayout(e, kPixels, chain.band_rows, chain.resident).bytes + sizeof(ChainFloats<WARPS>);
    };
    while (streams && shared() > most && 2 * chain.resident > e.channels) chain.resident -= 16;
    if (shared() > most) return;
    how_.shared = shared();
    const Room room = ask(how_, kernel);
    const int64_t places = spread ? std::min<int64_t>(room.blocks, room.processors) : room.blocks;
    const int64_t blocks = shape_.batch * chain.bands;
    int64_t clerks = 0;
    if (options_.batch_statistics) {
      clerks = std::min<int64_t>((8 * (KT + ST) + WARPS - 1) / WARPS, places - blocks);
      if (clerks < 1) return;
    } else if (chain.bands > 1 && blocks > places) {
      return;
    }
    if (blocks + clerks > INT32_MAX) return;
    how_.cooperative = clerks > 0 || chain.bands > 1;
    how_.grid = dim3(static_cast<unsigned>(blocks + clerks));
    chain.blocks = static_cast<int>(blocks);
    chain.batch_statistics = options_.batch_statistics;
    chain_ = chain;
    kernel_ = kernel;
    tiles_of_warp_ = MT;
  }
  // Small blocks first: more of them share the work.
  void choose() {
    if (shape_.channels > 4096 || shape_.width > 512 || shape_.height > 4096) return;
    for (const bool spread : {true, false}) {
      consider<3, 2, 4, 1, false>(spread);
      consider<3, 2, 8, 1, false>(spread);
      consider<3, 2, 8, 2, false>(spread);
      consider<3, 2, 8, 4, true>(spread);
      consider<1, 1, 4, 1, false>(spread);
      consider<1, 1, 8, 2, false>(spread);
    }
  }

  void take(Arena& arena) {
    const Extents& e = chain_.extents;
    for (int k = 0; k < kKinds; ++k) {
      packed_[k] = arena.take<Storage>(packed_size<Precision>(e, pack_of(static_cast<Kind>(k)), 0));
      chain_.packed[k] = packed_[k];
    }
    const int64_t table = static_cast<int64_t>(e.segments) * e.z_rows();
    Tables<float>& tables = chain_.tables;
    for (float** each : {&tables.mean, &tables.scale, &tables.shift, &tables.inverse}) *each = arena.take<float>(table);
    const int64_t columns[kKinds] = {e.reduce_columns(0), e.k(), e.s()};
    int64_t words = 0;
    for (const int64_t each : columns) words += 2 * each * (chain_.blocks + 1);
    if (chain_.bands > 1) words += int64_t{4} * chain_.blocks * e.width * e.k() / 2;
    words_ = arena.take<Word>(words);
    clear_words_ = 2 * words;
    Word* next = words_;
    for (int k = 0; k < kKinds; ++k) {
      chain_.words[k] = next, next += 2 * columns[k] * chain_.blocks;
      chain_.results[k] = next, next += 2 * columns[k];
    }
    chain_.edges = next;
    const int64_t pixels = int64_t{16} * tiles_of_warp_ * how_.block.x / 32;
    chain_.streamed = arena.take<Storage>(chain_.blocks * pixels * chain_.streamed_channels());
  }

  const LayerShape& shape_;
  const Options& options_;
  const Launcher launcher_;
  Chain<Precision> chain_{};
  Launch how_{};
  Kernel kernel_ = nullptr;
  Storage* packed_[kKinds] = {};
  Word* words_ = nullptr;
  int64_t clear_words_ = 0;
  int tiles_of_warp_ = 0;  // MT
};

}  // namespace gunn
