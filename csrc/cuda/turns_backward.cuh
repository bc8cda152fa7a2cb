// The chain of gradients of some segments, with an exchange, where a layer has more bands than blocks find room for at
// once: as persistent_backward.cuh, but a block has several bands, and does a step for all of them before it exchanges.
//
// Owns:      block b has bands b, b + blocks, … (pixel_block.cuh). A band's gradient of the state, all of it streamed,
//            lies in memory. So do gradients behind batch norms, where those of pre-activations will be: every word of
//            them is read by the lane that wrote it.
// Exchanges: project with shortcut, spatial, reduce, of all bands of a block at once. The spread of a segment comes in
//            one step with the project's sums of the one before.
// Edges:     rows of d2, as words.
// Costs:     a segment reads and writes the gradient of the state; reads z (2k + 2s, and s more), writes dz (2k + s)
//            twice and reads it once. Weights in shared memory come once a segment, through a ring once a band.
#pragma once

#include "cuda/persistent_backward.cuh"

namespace gunn {

template <class Precision, int KT, int ST, int WARPS, int MT>
class BackwardTurns : BackwardBlock<Precision, KT, ST, WARPS, MT, true, true> {
  using Block = BackwardBlock<Precision, KT, ST, WARPS, MT, true, true>;
  using Base = typename Block::Base;
  template <int tiles>
  using Sums = typename Base::template Sums<tiles>;
  template <int pieces>
  using Packed = typename Base::template Packed<pieces>;
  using Base::KP;
  using Base::RP;
  using Base::SP;
  using Block::chain_;
  using Block::kRing;

 public:
  using Block::Block;

  GUNN_DEVICE void run() {
    const int begin = chain_.first_segment, last = chain_.last_segment;
    this->fetch(Kind::spatial, last);
    this->fetch(Kind::project, last);
    this->fetch_tables(last);
    if (kRing) {
      this->start_ring(chain_.g_before.data != nullptr);
    } else {
      copy_async_commit();
    }
    this->each_band([&](bool) { this->load_map(chain_.g, chain_.g, 0); });
    copy_async_wait<0>();
    for (int i = last; i >= begin; --i) {
      const bool more = i > begin;
      const unsigned epoch = chain_.extents.segments - i;
      this->each_band([&](bool at_end) {
        if (i < last) finish(i + 1, true);
        outputs(i, epoch, at_end);
      });
      this->fetch(Kind::reduce, i);
      this->settle(Kind::project, epoch);
      this->each_band([&](bool at_end) { project(i, epoch, at_end); });
      if (more) this->fetch(Kind::project, i - 1), this->fetch_tables(i - 1);
      this->settle(Kind::spatial, epoch);
      this->each_band([&](bool at_end) { spatial(i, epoch, at_end); });
      if (more) this->fetch(Kind::spatial, i - 1);
      if constexpr (!kRing) {
        copy_async_commit();
        copy_async_wait<0>();
      }
      this->settle(Kind::reduce, epoch);
    }
    const bool wanted = chain_.g_before.data != nullptr;
    this->each_band([&](bool) {
      finish(begin, wanted);
      __syncthreads();
      if (wanted) this->store_map(chain_.g_before);
    });
  }

 private:
  // d3 and its sums.
  GUNN_DEVICE void outputs(int segment, unsigned epoch, bool at_end) {
    Packed<SP> d3, z3, zs = {};
    this->load_outputs(segment, z3, zs);
    this->read_gradient(segment, d3);
    GUNN_UNROLL
    for (int n = 0; n < ST; ++n) {
      this->template add_sums<SP>(segment, n, n, Norm::project, d3, z3);
      if (this->has_shortcut()) this->template add_sums<SP>(segment, ST + n, n, Norm::shortcut, d3, zs);
    }
    gather(Kind::project, epoch, at_end);
  }
  // dz3 and dzs; d2 and its sums.
  GUNN_DEVICE void project(int segment, unsigned epoch, bool at_end) {
    Packed<SP> d3, z3, zs = {};
    this->load_outputs(segment, z3, zs);
    this->read_gradient(segment, d3);
    Packed<KP> z2, d2;
    this->template slope<SP>(segment, Norm::project, d3, z3, z3);
    this->template leave<SP>(segment, Norm::project, z3);
    if (this->has_shortcut()) {
      this->template slope<SP>(segment, Norm::shortcut, d3, zs, zs);
      this->template leave<SP>(segment, Norm::shortcut, zs);
    }
    this->load(segment, Norm::spatial, z2);
    Sums<KT> sums = {};
    Base::make_operands(z3);
    this->project_steps(z3, sums);
    this->stop(segment, Norm::spatial, sums, z2, d2);
    this->template leave<KP>(segment, Norm::spatial, d2);
    this->send_edges(d2, epoch);
    gather(Kind::spatial, epoch, at_end);
  }
  // dz2; d1 and its sums.
  GUNN_DEVICE void spatial(int segment, unsigned epoch, bool at_end) {
    Packed<KP> d, z;
    left(segment, Norm::spatial, d);
    this->load(segment, Norm::spatial, z);
    this->store_hidden(d);
    this->finish_hidden(segment, z);
    this->template leave<KP>(segment, Norm::spatial, z);
    this->load(segment, Norm::reduce, z);
    this->clear_border();
    this->receive_edges(segment, epoch);
    __syncthreads();
    Sums<KT> sums = {};
    this->spatial_steps(sums);
    this->stop(segment, Norm::reduce, sums, z, d);
    this->template leave<KP>(segment, Norm::reduce, d);
    gather(Kind::reduce, epoch, at_end);
  }
  // dz1, and where it is wanted the spread.
  GUNN_DEVICE void finish(int segment, bool spreads) {
    Packed<KP> d1, z1;
    left(segment, Norm::reduce, d1);
    this->load(segment, Norm::reduce, z1);
    this->template slope<KP>(segment, Norm::reduce, d1, z1, z1);
    this->template leave<KP>(segment, Norm::reduce, z1);
    if (!spreads) return;
    Packed<SP> dzs = {};
    if (this->has_shortcut()) left(segment, Norm::shortcut, dzs);
    Packed<RP> dz;
    Block::join(z1, dzs, dz);
    this->spread_of(dz, segment, 0, this->all_steps().last);
    __syncwarp();  // a warp reads the gradients of its own pixels only
  }

  // What was left.
  template <int pieces>
  GUNN_DEVICE void left(int segment, Norm norm, Packed<pieces>& d) const {
    this->load(chain_.dz, segment, norm, d);
  }
  // The band's sums to those of the bands before; all of them, sent to the clerks.
  GUNN_DEVICE void gather(Kind kind, unsigned epoch, bool at_end) {
    if (!this->add_warps(kind, &sum_, &product_) || !at_end) return;
    this->send_pair(kind, threadIdx.x, sum_, product_, epoch);
    sum_ = product_ = 0;
  }

  float sum_ = 0, product_ = 0;
};

template <class Precision, int KT, int ST, int WARPS, int MT>
__global__ void __launch_bounds__(32 * WARPS, 1) backward_turns(BackwardChain<Precision> chain) {
  if (static_cast<int>(blockIdx.x) >= chain.blocks) return combine_gradients<Precision, KT, ST>(chain);
  GUNN_DYNAMIC_SHARED(typename Precision::Storage, shared);
  BackwardTurns<Precision, KT, ST, WARPS, MT>(chain, shared).run();
}

}  // namespace gunn
