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
      pack_unit<Precision>(launcher_, chain_.extents, kPacks[k], 0, tensors.units[0], packed_[k]);
    }
    chain_.x = tensors.x, chain_.y = tensors.y;
    chain_.unit = tensors.units[0];
    chain_.mean = tensors.statistics, chain_.var = tensors.statistics + shape_.segments * shape_.rows();
    chain_.eps = options_.eps;
    if (options_.batch_statistics) {
      launch(launcher_.by_element("clear", clear_words_), clear, reinterpret_cast<unsigned*>(words_), clear_words_);
    } else {
      fill_tables(launcher_, chain_.extents, tensors.units, const_cast<const float*>(tensors.statistics), chain_.tables,
                  options_.eps);
    }
    launch(how_, kernel_, chain_);
  }

 private:
  static constexpr Pack kPacks[kKinds] = {Pack::reduce, Pack::spatial, Pack::project};

  template <int KT, int ST, int WARPS, int MT>
  void consider() {
    const Extents& e = chain_.extents;
    if (kernel_ != nullptr || e.k() != 8 * KT || e.s() != 8 * ST) return;
    if (shape_.height * shape_.width > 16 * WARPS * MT) return;
    const size_t shared = ChainLayout(e, 16 * WARPS * MT).bytes + sizeof(ChainFloats<WARPS>);
    how_ = {"persistent_forward", dim3(static_cast<unsigned>(shape_.batch)),
            dim3(32 * WARPS),     shared,
            launcher_.stream,     &shape_};
    const Kernel kernel = persistent_forward<Precision, KT, ST, WARPS, MT>;
    const int64_t resident = resident_blocks(how_, kernel);
    if (resident == 0) return;
    chain_.images = static_cast<int>(shape_.batch);
    chain_.batch_statistics = options_.batch_statistics;
    if (options_.batch_statistics) {
      const int64_t wanted = (8 * (KT + ST) + WARPS - 1) / WARPS, clerks = std::min(wanted, resident - shape_.batch);
      if (clerks < 1) return;
      how_.grid = dim3(static_cast<unsigned>(shape_.batch + clerks));
      how_.cooperative = true;
    }
    kernel_ = kernel;
  }
  // The smallest block that holds an image. Large images never fit, and their sizes not either.
  void choose() {
    if (shape_.height * shape_.width > 256 || shape_.channels > 4096 || shape_.batch > INT32_MAX) return;
    consider<3, 2, 4, 1>();
    consider<3, 2, 8, 2>();
    consider<1, 1, 4, 1>();
    consider<1, 1, 8, 2>();
  }

  void take(Arena& arena) {
    const Extents& e = chain_.extents;
    for (int k = 0; k < kKinds; ++k) {
      packed_[k] = arena.take<Storage>(packed_size<Precision>(e, kPacks[k], 0));
      chain_.packed[k] = packed_[k];
    }
    const int64_t table = static_cast<int64_t>(e.segments) * e.z_rows();
    Tables<float>& tables = chain_.tables;
    for (float** each : {&tables.mean, &tables.scale, &tables.shift, &tables.inverse}) *each = arena.take<float>(table);
    const int64_t columns[kKinds] = {e.reduce_columns(0), e.k(), e.s()};
    int64_t words = 0;
    for (const int64_t each : columns) words += 2 * each * (chain_.images + 1);
    words_ = arena.take<Word>(words);
    clear_words_ = 2 * words;
    Word* next = words_;
    for (int k = 0; k < kKinds; ++k) {
      chain_.words[k] = next, next += 2 * columns[k] * chain_.images;
      chain_.results[k] = next, next += 2 * columns[k];
    }
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
};

}  // namespace gunn
