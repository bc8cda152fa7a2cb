// The forward of a layer with batch statistics that has more bands than blocks find room for at once: as
// persistent_forward.cuh, but a block has several bands, and does a step for all of them before it exchanges.
//
// Owns:      block b has bands b, b + blocks, … (pixel_block.cuh). A band's state, all of it streamed, and its
//            pre-activations lie in memory; every word of them is read by the lane that wrote it, but for the state's,
//            which its warp reads.
// Exchanges: reduce with shortcut, spatial, project, of all bands of a block at once.
// Edges:     rows of z1, as words. They have come when the reduce's exchange is over, or soon.
// Costs:     a segment reads the state and writes s channels of it; pre-activations are written once and read once,
//            edges twice as many bytes. Weights in shared memory come once a segment, through a ring once a band.
//
// Sums in the order of persistent_forward.cuh: z has the bits of a recomputation.
#pragma once

#include "cuda/exchange.cuh"
#include "cuda/persistent_forward.cuh"

namespace gunn {

template <class Precision, int KT, int ST, int WARPS, int MT>
class ForwardTurns : ForwardBlock<Precision, KT, ST, WARPS, MT, true, true> {
  using Block = ForwardBlock<Precision, KT, ST, WARPS, MT, true, true>;
  using Base = typename Block::Base;
  template <int tiles>
  using Sums = typename Base::template Sums<tiles>;
  template <int pieces>
  using Packed = typename Base::template Packed<pieces>;
  using Base::KP;
  using Base::RP;
  using Base::RT;
  using Base::SP;
  using Block::chain_;
  using Block::kRing;

 public:
  using Block::Block;

  GUNN_DEVICE void run() {
    const int last = chain_.last_segment;
    this->fetch(Kind::reduce, 0);
    this->fetch(Kind::spatial, 0);
    this->fetch(Kind::project, 0);
    if (kRing) this->start_ring(true);
    this->each_band([&](bool) { this->load_map(chain_.x, chain_.x, 0); });
    copy_async_wait<0>();
    for (int i = 0; i <= last; ++i) {
      const bool more = i < last;
      const unsigned epoch = i + 1;
      this->each_band([&](bool at_end) { reduce(i, epoch, at_end); });
      if (more) this->fetch(Kind::reduce, i + 1);
      this->settle(Kind::reduce, i, epoch);
      this->each_band([&](bool at_end) { spatial(i, epoch, at_end); });
      if (more) this->fetch(Kind::spatial, i + 1);
      this->settle(Kind::spatial, i, epoch);
      this->each_band([&](bool at_end) { project(i, epoch, at_end); });
      if (more) this->fetch(Kind::project, i + 1);
      if (!kRing) copy_async_wait<0>();
      this->settle(Kind::project, i, epoch);
    }
    this->each_band([&](bool) {
      Packed<SP> z3, zs = {};
      load_outputs(last, z3, zs);
      this->template write_back<0>(last, z3, zs);
      __syncthreads();
      this->store_map(chain_.y);
    });
  }

 private:
  // The segment before is written back when the channels that it does not change have been summed.
  GUNN_DEVICE void reduce(int segment, unsigned epoch, bool at_end) {
    const Extents& extents = chain_.extents;
    const int steps = (extents.channels + Base::kStep - 1) / Base::kStep;
    const auto late = this->late_steps(segment);
    Packed<SP> z3 = {}, zs = {};
    if (segment > 0) load_outputs(segment - 1, z3, zs);
    Sums<RT> sums = {};
    this->reduce_steps(sums, 0, steps, late.first, late.last);
    if (segment > 0) {
      __syncwarp();  // what was asked for ahead has been read
      this->template write_back<0>(segment - 1, z3, zs);
      __syncwarp();  // a warp reads the state of its own pixels only
      this->reduce_steps_of(sums, late.first, late.last);
    }
    Packed<RP> z1;
    Base::round(sums, z1);
    this->template keep<KP, RP>(segment, Norm::reduce, z1, 0);
    if constexpr (!kRing) {
      if (extents.shortcut) this->template keep<SP, RP>(segment, Norm::shortcut, z1, KP);
    }
    this->send_edges(z1, epoch);
    gather(Kind::reduce, z1, epoch, at_end);
  }
  GUNN_DEVICE void spatial(int segment, unsigned epoch, bool at_end) {
    Packed<KP> z;
    load(segment, Norm::reduce, z);
    this->activate(segment, Kind::reduce, z);
    this->store_hidden(z);
    this->clear_border();
    this->receive_edges(
        epoch, [&](int64_t, int column, uint32_t raw) { return this->activated(segment, Kind::reduce, column, raw); });
    __syncthreads();
    Sums<KT> sums = {};
    this->spatial_steps(sums);
    Base::round(sums, z);
    this->template keep<KP, KP>(segment, Norm::spatial, z, 0);
    gather(Kind::spatial, z, epoch, at_end);
  }
  GUNN_DEVICE void project(int segment, unsigned epoch, bool at_end) {
    Packed<KP> z2;
    load(segment, Norm::spatial, z2);
    this->activate(segment, Kind::spatial, z2);
    Sums<ST> sums = {};
    this->project_steps(z2, sums);
    Packed<SP> z3;
    Base::round(sums, z3);
    this->template keep<SP, SP>(segment, Norm::project, z3, 0);
    gather(Kind::project, z3, epoch, at_end);
  }

  template <int pieces>
  GUNN_DEVICE void load(int segment, Norm norm, Packed<pieces>& z) const {
    const Extents& extents = chain_.extents;
    this->template load_rows<pieces>(this->z_of(segment), extents.z_rows(), extents.z_row(norm, 0), z);
  }
  GUNN_DEVICE void load_outputs(int segment, Packed<SP>& z3, Packed<SP>& zs) const {
    load(segment, Norm::project, z3);
    if (this->has_shortcut()) load(segment, Norm::shortcut, zs);
  }
  // The band's moments to those of the bands before; all of them, sent to the clerks.
  template <int pieces>
  GUNN_DEVICE void gather(Kind kind, const Packed<pieces>& z, unsigned epoch, bool at_end) {
    float mean, squares;
    if (!this->moments(kind, z, &mean, &squares)) return;
    moments_.merge({mean, squares}, this->count_);
    if (!at_end) return;
    this->send_pair(kind, threadIdx.x, static_cast<float>(moments_.mean), static_cast<float>(moments_.squares), epoch);
    moments_ = {};
  }

  Moments moments_;
};

template <class Precision, int KT, int ST, int WARPS, int MT>
__global__ void __launch_bounds__(32 * WARPS, 1) forward_turns(ForwardChain<Precision> chain) {
  if (static_cast<int>(blockIdx.x) >= chain.blocks) return combine_statistics<Precision, KT, ST>(chain);
  GUNN_DYNAMIC_SHARED(typename Precision::Storage, shared);
  ForwardTurns<Precision, KT, ST, WARPS, MT>(chain, shared).run();
}

}  // namespace gunn
