// The chain of gradients of some segments, with an exchange, where a layer has more bands than blocks find room for at
// once: as persistent_backward.cuh, but a block has several bands, and does a step for all of them before it exchanges.
//
// Owns:      block b has bands b, b + blocks, … (pixel_block.cuh). A band's gradient of the state, all of it streamed,
//            lies in memory. So do gradients behind batch norms, where those of pre-activations will be: every word of
//            them is read by the lane that wrote it.
// Exchanges: project with shortcut, spatial, reduce, of all bands of a block at once. The spread of a segment comes in
//            one step with the project's sums of the one before.
// Edges:     rows of d2, as words.
// Units:     the gradient of a second one's input, which is also that of the first one's output, is made of the product
//            and of the gradient of the second one's output; it waits where the first one's dz3 will be.
// Costs:     a segment reads and writes the gradient of the state; reads z (2k + 2s, and s more), writes dz (2k + s)
//            twice and reads it once. Weights in shared memory come once a segment, through a ring once a band.
#pragma once

#include "cuda/persistent_backward.cuh"

namespace gunn {

template <class Precision, int KT, int ST, int WARPS, int MT, int units>
class BackwardTurns : BackwardBlock<Precision, KT, ST, WARPS, MT, true, true, units> {
  using Block = BackwardBlock<Precision, KT, ST, WARPS, MT, true, true, units>;
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
  using typename Base::Bits;
  using typename Base::Storage;

 public:
  using Block::Block;

  GUNN_DEVICE void run() {
    const int begin = this->first_number(), last = this->last_number();
    this->fetch(Kind::spatial, last);
    this->fetch(Kind::project, last);
    this->fetch_tables(chain_.last_segment);
    if (kRing) {
      this->start_ring(chain_.wanted);
    } else {
      copy_async_commit();
    }
    this->clear_hidden();
    if (chain_.g.data != nullptr) this->each_band([&] { this->load_map(chain_.g, chain_.g, 0); });
    copy_async_wait<0>();
    for (int i = last; i >= begin; --i) {
      const bool more = i > begin;
      const unsigned epoch = units * chain_.extents.segments - i;
      this->each_band([&] {
        if (i < last) finish(i + 1, true);
        outputs(i, epoch);
      });
      this->fetch(Kind::reduce, i);
      this->settle(Kind::project, i, epoch);
      this->each_band([&] { project(i, epoch); });
      if (more) this->fetch(Kind::project, i - 1);
      if (more && unit_of<units>(i) == 0) this->fetch_tables(segment_of<units>(i) - 1);
      this->settle(Kind::spatial, i, epoch);
      this->each_band([&] { spatial(i, epoch); });
      if (more) this->fetch(Kind::spatial, i - 1);
      if constexpr (!kRing) {
        copy_async_commit();
        copy_async_wait<0>();
      }
      this->settle(Kind::reduce, i, epoch);
    }
    this->each_band([&] {
      finish(begin, chain_.wanted);
      if (chain_.g_before.data == nullptr) return;
      __syncthreads();
      this->store_map(chain_.g_before);
    });
  }

 private:
  // d3 and its sums.
  GUNN_DEVICE void outputs(int number, unsigned epoch) {
    Packed<SP> d3, z3, zs = {};
    this->load_outputs(number, z3, zs);
    output_gradient(number, d3);
    GUNN_UNROLL
    for (int n = 0; n < ST; ++n) {
      this->template add_sums<SP>(number, n, n, Norm::project, d3, z3);
      if (this->has_shortcut(number)) this->template add_sums<SP>(number, ST + n, n, Norm::shortcut, d3, zs);
    }
    gather(Kind::project, number, epoch);
  }
  // dz3 and dzs; d2 and its sums.
  GUNN_DEVICE void project(int number, unsigned epoch) {
    Packed<SP> d3, z3, zs = {};
    this->load_outputs(number, z3, zs);
    output_gradient(number, d3);
    Packed<KP> z2, d2;
    this->template slope<SP>(number, Norm::project, d3, z3, z3);
    this->template leave<SP>(number, Norm::project, z3);
    if (this->has_shortcut(number)) {
      this->template slope<SP>(number, Norm::shortcut, d3, zs, zs);
      this->template leave<SP>(number, Norm::shortcut, zs);
    }
    this->load(number, Norm::spatial, z2);
    Sums<KT> sums = {};
    Base::make_operands(z3);
    this->project_steps(z3, sums);
    this->stop(number, Norm::spatial, sums, z2, d2);
    this->template leave<KP>(number, Norm::spatial, d2);
    this->send_edges(d2, epoch);
    gather(Kind::spatial, number, epoch);
  }
  // dz2; d1 and its sums.
  GUNN_DEVICE void spatial(int number, unsigned epoch) {
    Packed<KP> d, z;
    left(number, Norm::spatial, d);
    this->load(number, Norm::spatial, z);
    this->store_hidden(d);
    this->finish_hidden(number, z);
    this->template leave<KP>(number, Norm::spatial, z);
    this->load(number, Norm::reduce, z);
    this->clear_border();
    this->receive_edges(number, epoch);
    __syncthreads();
    Sums<KT> sums = {};
    this->spatial_steps(sums);
    this->stop(number, Norm::reduce, sums, z, d);
    this->template leave<KP>(number, Norm::reduce, d);
    gather(Kind::reduce, number, epoch);
  }
  // dz1; of a first unit the spread, where it is wanted, of a second one the gradient of its input.
  GUNN_DEVICE void finish(int number, bool spreads) {
    Packed<KP> d1, z1;
    left(number, Norm::reduce, d1);
    this->load(number, Norm::reduce, z1);
    this->template slope<KP>(number, Norm::reduce, d1, z1, z1);
    this->template leave<KP>(number, Norm::reduce, z1);
    if (unit_of<units>(number) > 0) return hand_down(number, z1);
    if (!spreads) return;
    Packed<SP> dzs = {};
    if (this->has_shortcut(number)) left(number, Norm::shortcut, dzs);
    Packed<RP> dz;
    Block::join(z1, dzs, dz);
    this->spread_of(dz, segment_of<units>(number), 0, this->all_steps().last);
    __syncwarp();  // a warp reads the gradients of its own pixels only
  }

  GUNN_DEVICE void hand_down(int number, Packed<KP>& dz1) {
    Base::make_operands(dz1);
    Sums<ST> sums = {};
    const Storage* slot = this->next_slot();
    GUNN_UNROLL
    for (int step = 0; step < (KP + 1) / 2; ++step) {
      GUNN_UNROLL
      for (int n = 0; n < ST; n += 2) {
        uint32_t b[4];
        this->load_weights(b, slot, Base::kSlotChannels, n, step);
        GUNN_UNROLL
        for (int mt = 0; mt < MT; ++mt) {
          uint32_t a[4];
          Base::template fragment<KP>(a, dz1, mt, step);
          Precision::multiply(sums[mt][n], a, {b[0], b[1]});
          if (n + 1 < ST) Precision::multiply(sums[mt][n + 1 < ST ? n + 1 : n], a, {b[2], b[3]});
        }
      }
    }
    Packed<SP> d;
    output_gradient(number, d);
    GUNN_UNROLL
    for (int p = 0; p < SP; ++p) {
      this->each_row([&](int mt, int half, int) {
        d[mt][p][half] = Base::pack([&](int v) {
          return Base::sum_of(sums[mt][p / Bits::kOfTile], p, half, v) + Bits::value(d[mt][p][half], v);
        });
      });
    }
    this->template leave<SP>(number - 1, Norm::project, d);
  }
  // Behind the last unit the state's.
  GUNN_DEVICE void output_gradient(int number, Packed<SP>& d) const {
    if (unit_of<units>(number) < units - 1) return left(number, Norm::project, d);
    this->read_gradient(segment_of<units>(number), d);
  }

  // What was left.
  template <int pieces>
  GUNN_DEVICE void left(int number, Norm norm, Packed<pieces>& d) const {
    this->load(chain_.dz, number, norm, d);
  }
  // The band's sums to those of the bands before; all of them, sent to the clerks.
  GUNN_DEVICE void gather(Kind kind, int number, unsigned epoch) {
    if (!this->add_warps(kind, number, &sum_, &product_) || !this->is_last_band()) return;
    this->send_pair(kind, threadIdx.x, sum_, product_, epoch);
    sum_ = product_ = 0;
  }

  float sum_ = 0, product_ = 0;
};

template <class Precision, int KT, int ST, int WARPS, int MT, int units = 1>
__global__ void __launch_bounds__(32 * WARPS, 1) backward_turns(BackwardChain<Precision> chain) {
  if (static_cast<int>(blockIdx.x) >= chain.blocks) return combine_gradients<Precision, KT, ST, units>(chain);
  GUNN_DYNAMIC_SHARED(typename Precision::Storage, shared);
  BackwardTurns<Precision, KT, ST, WARPS, MT, units>(chain, shared).run();
}

}  // namespace gunn
