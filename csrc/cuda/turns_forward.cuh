// The forward of a layer with batch statistics that has more bands than blocks find room for at once: as
// persistent_forward.cuh, but a block has several bands, and does a step for all of them before it exchanges.
//
// Owns:      block b has bands b, b + blocks, … (pixel_block.cuh). A band's state, all of it streamed, and its
//            pre-activations lie in memory; every word of them is read by the lane that wrote it, but for the state's,
//            which its warp reads.
// Exchanges: reduce with shortcut, spatial, project, of all bands of a block at once.
// Edges:     rows of z1, as words. They have come when the reduce's exchange is over, or soon.
// Units:     a second one's reduce has the output of the first as operand in registers. What it takes of weights comes
//            through the ring. The segment before is written back before all steps of the reduce, not before the last:
//            the second unit's outputs are at hand where the first one's are not, and z has the bits of the staged
//            driver's recomputation.
// Costs:     a segment reads the state and writes s channels of it; pre-activations are written once and read once,
//            edges twice as many bytes. Weights in shared memory come once a segment, through a ring once a band.
//
// Sums in the order of persistent_forward.cuh: z has the bits of a recomputation.
#pragma once

#include "cuda/exchange.cuh"
#include "cuda/persistent_forward.cuh"

namespace gunn {

// Behind the layout's elements.
template <int KT, int ST, int warps, int fragments, int units = 1>
struct ForwardTurnsTables : ForwardTables<KT, ST, warps, fragments, units> {
  Moments moments[ForwardTables<KT, ST, warps, fragments, units>::kColumns];  // of bands so far; a thread's own
};

template <class Precision, int KT, int ST, int WARPS, int MT, int units>
class ForwardTurns : ForwardBlock<Precision, KT, ST, WARPS, MT, true, true, units> {
  using Block = ForwardBlock<Precision, KT, ST, WARPS, MT, true, true, units>;
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
  using Tables = ForwardTurnsTables<KT, ST, WARPS, MT, units>;
  using typename Base::Bits;
  using typename Base::Storage;

 public:
  using Block::Block;

  GUNN_DEVICE void run() {
    const int last = this->last_number();
    this->fetch(Kind::reduce, 0);
    this->fetch(Kind::spatial, 0);
    this->fetch(Kind::project, 0);
    if (kRing) this->start_ring(true);
    this->clear_hidden();
    this->each_band([&] { this->load_map(chain_.x, chain_.x, 0); });
    copy_async_wait<0>();
    for (int i = 0; i <= last; ++i) {
      const bool more = i < last;
      const unsigned epoch = i + 1;
      this->each_band([&] {
        if (unit_of<units>(i) == 0) {
          reduce(i, epoch);
        } else {
          reduce_outputs(i, epoch);
        }
      });
      if (more) this->fetch(Kind::reduce, i + 1);
      this->settle(Kind::reduce, i, epoch);
      this->each_band([&] { spatial(i, epoch); });
      if (more) this->fetch(Kind::spatial, i + 1);
      this->settle(Kind::spatial, i, epoch);
      this->each_band([&] { project(i, epoch); });
      if (more) this->fetch(Kind::project, i + 1);
      if (!kRing) copy_async_wait<0>();
      this->settle(Kind::project, i, epoch);
    }
    this->each_band([&] {
      update_state(last);
      __syncthreads();
      this->store_map(chain_.y);
    });
  }

 private:
  // Of a first unit. The segment before is written back when the channels that it does not change have been summed.
  GUNN_DEVICE void reduce(int number, unsigned epoch) {
    const Extents& extents = chain_.extents;
    const int steps = this->all_steps().last + 1, segment = segment_of<units>(number);
    Sums<RT> sums = {};
    if constexpr (units == 1) {
      const auto late = this->late_steps(segment);
      Packed<SP> z3 = {}, zs = {};
      if (segment > 0) load_outputs(number - 1, z3, zs);
      this->reduce_steps(sums, 0, steps, late.first, late.last);
      if (segment > 0) {
        __syncwarp();  // what was asked for ahead has been read
        this->template write_back<0>(number - 1, z3, zs);
        __syncwarp();  // a warp reads the state of its own pixels only
        this->reduce_steps_of(sums, late.first, late.last);
      }
    } else {
      if (segment > 0) update_state(number - 1);
      __syncwarp();  // a warp reads the state of its own pixels only
      this->reduce_steps_of(sums, 0, steps - 1);
    }
    Packed<RP> z1;
    Base::round(sums, z1);
    gather(Kind::reduce, z1, epoch);
    this->template keep<KP, RP>(number, Norm::reduce, z1, 0);
    if constexpr (RP > KP) {
      if (extents.shortcut) this->template keep<SP, RP>(number, Norm::shortcut, z1, KP);
    }
    this->send_edges(z1, epoch);
  }
  // Of a second unit, whose input is left for its output.
  GUNN_DEVICE void reduce_outputs(int number, unsigned epoch) {
    Packed<SP> h, zs;
    load_outputs(number - 1, h, zs);
    GUNN_UNROLL
    for (int p = 0; p < SP; ++p) {
      const int channel = this->pinned(this->column(p));
      this->each_row([&](int mt, int half, int) {
        h[mt][p][half] = Base::pack([&](int v) {
          return this->output_of(number - 1, channel + v, Bits::value(h[mt][p][half], v),
                                 Bits::value(zs[mt][p][half], v));
        });
      });
    }
    this->template store_rows<SP, SP>(chain_.inputs, chain_.extents.s(), 0, h);
    Base::make_operands(h);
    Sums<KT> sums = {};
    const Storage* slot = this->next_slot();
    GUNN_UNROLL
    for (int step = 0; step < (SP + 1) / 2; ++step) {
      uint32_t a[MT][4];
      GUNN_UNROLL
      for (int mt = 0; mt < MT; ++mt) Base::template fragment<SP>(a[mt], h, mt, step);
      this->template multiply<KT, kSlotSteps / 2>(sums, a, slot, step);
    }
    Packed<KP> z1;
    Base::round(sums, z1);
    this->template keep<KP, KP>(number, Norm::reduce, z1, 0);
    this->send_edges(z1, epoch);
    gather(Kind::reduce, z1, epoch);
  }
  GUNN_DEVICE void spatial(int number, unsigned epoch) {
    Packed<KP> z;
    load(number, Norm::reduce, z);
    this->activate(number, Kind::reduce, z);
    this->store_hidden(z);
    this->clear_border();
    this->receive_edges(
        epoch, [&](int64_t, int column, uint32_t raw) { return this->activated(number, Kind::reduce, column, raw); });
    __syncthreads();
    Sums<KT> sums = {};
    this->spatial_steps(sums);
    Base::round(sums, z);
    this->template keep<KP, KP>(number, Norm::spatial, z, 0);
    gather(Kind::spatial, z, epoch);
  }
  GUNN_DEVICE void project(int number, unsigned epoch) {
    Packed<KP> z2;
    load(number, Norm::spatial, z2);
    this->activate(number, Kind::spatial, z2);
    Sums<ST> sums = {};
    this->project_steps(z2, sums);
    Packed<SP> z3;
    Base::round(sums, z3);
    this->template keep<SP, SP>(number, Norm::project, z3, 0);
    gather(Kind::project, z3, epoch);
  }
  GUNN_DEVICE void update_state(int number) const {
    Packed<SP> z3, beside = {};
    load_outputs(number, z3, beside);
    this->template write_back<0>(number, z3, beside);
  }

  template <int pieces>
  GUNN_DEVICE void load(int number, Norm norm, Packed<pieces>& z) const {
    this->template load_rows<pieces>(this->z_of(number), chain_.extents.z_rows(), this->row_of(norm, number), z);
  }
  // What a unit's output is made of (output_of).
  GUNN_DEVICE void load_outputs(int number, Packed<SP>& z3, Packed<SP>& beside) const {
    load(number, Norm::project, z3);
    if (unit_of<units>(number) > 0) {
      this->template load_rows<SP>(chain_.inputs, chain_.extents.s(), 0, beside);
    } else if (this->has_shortcut()) {
      load(number, Norm::shortcut, beside);
    }
  }
  // The band's moments to those of the bands before; all of them, sent to the clerks.
  template <int pieces>
  GUNN_DEVICE void gather(Kind kind, const Packed<pieces>& z, unsigned epoch) {
    float mean, squares;
    if (!this->moments(kind, z, &mean, &squares)) return;
    Moments& sum = static_cast<Tables&>(this->tables_).moments[threadIdx.x];
    if (this->band_ == static_cast<int>(blockIdx.x)) sum = {};
    sum.merge({mean, squares}, this->count_);
    if (this->is_last_band()) {
      this->send_pair(kind, threadIdx.x, static_cast<float>(sum.mean), static_cast<float>(sum.squares), epoch);
    }
  }
};

template <class Precision, int KT, int ST, int WARPS, int MT, int units = 1>
__global__ void __launch_bounds__(32 * WARPS, 1) forward_turns(ForwardChain<Precision> chain) {
  if (static_cast<int>(blockIdx.x) >= chain.blocks) return combine_statistics<Precision, KT, ST, units>(chain);
  GUNN_DYNAMIC_SHARED(typename Precision::Storage, shared);
  ForwardTurns<Precision, KT, ST, WARPS, MT, units>(chain, shared).run();
}

}  // namespace gunn
