// The forward of a layer, or the recomputation of some of its segments, in one launch (pixel_block.cuh): a block's
// state stays in shared memory from the first segment to the last.
//
// Exchanges: reduce with shortcut, spatial, project: means and squared deviations up, scales and shifts back. None
//            where statistics are given.
// Waits:     are filled with the next segment's reduce: its product over all channels but those about to be written
//            back. After the write-back only the steps of depth with these channels remain.
// Edges:     rows of z1.
// Registers: MT * (KT + ST) * 4 sums of the reduce ahead, MT * KT * 4 of the 3x3. With a ring there is no shortcut, but
//            16 * MT words of the state are on their way beside the reduce's sums.
// Costs:     x and y cross memory once, pre-activations where they are kept. Weights, and streamed channels, come from
//            L2 once a block and segment; every warp reads all weights from shared memory, for its 16 * MT pixels.
//
// z is rounded to storage before its moments are taken, as everywhere.
#pragma once

#include "cuda/pixel_block.cuh"

namespace gunn {

template <class Precision>
struct ForwardChain : Chain<Precision> {
  using Storage = typename Precision::Storage;

  FeatureMap<const Storage> x, before;         // the state: `before` in the channels written before the first segment
  FeatureMap<Storage> y;                       // the state behind the last segment, or null
  Storage* z;                                  // (segments of the launch, pixels, z_rows), or null; in turns that or
  bool one_segment;                            // (pixels, z_rows), every segment's
  Storage* inputs;                             // (pixels, padded s), of the second unit
  UnitTensors<const float*> unit[kMostUnits];  // batch norms
  Tables<float> tables;                        // with given statistics
  float *mean, *var;                           // (P, rows), with batch statistics
  double eps;
};

// Behind the layout's elements.
template <int KT, int ST, int warps, int fragments, int units = 1>
struct ForwardTables : BlockTables<KT, ST, warps, fragments, units> {
  static constexpr int kColumns = BlockTables<KT, ST, warps, fragments, units>::kColumns;
  alignas(16) float scale[2][kKinds][kColumns], shift[2][kKinds][kColumns];  // units take turns
};

template <class Precision, int KT, int ST, int WARPS, int MT, bool streams, bool turns = false, int units = 1>
class ForwardBlock : protected PixelBlock<Precision, KT, ST, WARPS, MT, streams, false, turns, units> {
 protected:
  using Base = PixelBlock<Precision, KT, ST, WARPS, MT, streams, false, turns, units>;
  using typename Base::Bits;
  using typename Base::Storage;
  template <int tiles>
  using Sums = typename Base::template Sums<tiles>;
  template <int pieces>
  using Packed = typename Base::template Packed<pieces>;
  using Base::count_;
  using Base::kEach;
  using Base::KP;
  using Base::kPiece;
  using Base::kStep;
  using Base::lane_;
  using Base::layout_;
  using Base::RP;
  using Base::RT;
  using Base::shared_;
  using Base::SP;
  using Base::warp_;
  static constexpr bool kRing = Base::kRing;
  static constexpr bool kAhead = kRing || turns;  // the state's registers are asked for some steps ahead
  using Tables = ForwardTables<KT, ST, WARPS, MT, units>;

 public:
  GUNN_DEVICE ForwardBlock(const ForwardChain<Precision>& chain, Storage* shared)
      : Base(chain, shared), chain_(chain), tables_(static_cast<Tables&>(Base::tables_)) {}

  GUNN_DEVICE void run() {
    const Extents& extents = chain_.extents;
    const int begin = chain_.first_segment, last = chain_.last_segment;
    fetch(Kind::reduce, begin);
    fetch(Kind::spatial, begin);
    fetch(Kind::project, begin);
    if (kRing) this->start_ring(true);
    this->load_map(chain_.before, chain_.x, begin * extents.segment);
    this->clear_hidden();
    copy_async_wait<0>();
    __syncthreads();
    const int steps = (extents.channels + kStep - 1) / kStep;
    const int half = kRing ? steps / (2 * kSlotSteps) * kSlotSteps : steps / 2;  // in whole slots
    Sums<RT> ahead = {};
    // In the order in which the segments behind the first are summed, so that z has the same bits wherever one begins.
    const int first_before = begin == 0 ? steps : (begin - 1) * extents.segment / kStep;
    const int before = begin == 0 ? 0 : (begin * extents.segment - 1) / kStep - first_before + 1;
    if constexpr (kRing) {
      reduce_steps(ahead, 0, steps, first_before, first_before + before - 1);
      if (before > 0) reduce_steps_of(ahead, first_before, first_before + before - 1);
    } else {
      GUNN_ROLLED
      for (int at = 0; at < steps; ++at) {
        const bool late = at >= steps - before;
        reduce_step(ahead, late ? at - (steps - before) + first_before : at < first_before ? at : at + before);
      }
    }
    for (int i = begin; i <= last; ++i) {
      const bool more = i < last;
      const int first_late = i * extents.segment / kStep, last_late = ((i + 1) * extents.segment - 1) / kStep;
      const unsigned epoch = i + 1;

      // z1 into the padded image, raw; zs stays in registers.
      Packed<RP> z1;
      Base::round(ahead, z1);
      this->store_hidden(z1);
      this->send_edges(z1, epoch);
      exchange(Kind::reduce, z1, epoch);
      keep<KP, RP>(i, Norm::reduce, z1, 0);
      if constexpr (!kRing) {
        if (extents.shortcut) keep<SP, RP>(i, Norm::shortcut, z1, KP);
      }
      if (more) fetch(Kind::reduce, i + 1);
      settle(Kind::reduce, i, epoch);
      activate_hidden(i);
      this->receive_edges(epoch,
                          [&](int64_t, int column, uint32_t raw) { return activated(i, Kind::reduce, column, raw); });
      __syncthreads();

      Sums<KT> sums = {};
      this->spatial_steps(sums);
      Packed<KP> z2;
      Base::round(sums, z2);
      exchange(Kind::spatial, z2, epoch);
      keep<KP, KP>(i, Norm::spatial, z2, 0);
      Base::clear(ahead);
      if (more) {
        fetch(Kind::spatial, i + 1);
        if (!kRing) {
          copy_async_wait<1>();  // the reduce's, not the spatial's
          __syncthreads();
        }
        reduce_steps(ahead, 0, half, first_late, last_late);
      }
      settle(Kind::spatial, i, epoch);
      activate(i, Kind::spatial, z2);

      Sums<ST> outputs = {};
      this->project_steps(z2, outputs);
      Packed<SP> z3;
      Base::round(outputs, z3);
      if (!more && chain_.y.data == nullptr) {  // recomputed for its pre-activations: nobody reads what is behind
        keep<SP, SP>(i, Norm::project, z3, 0);
        return;
      }
      exchange(Kind::project, z3, epoch);
      keep<SP, SP>(i, Norm::project, z3, 0);
      if (more) {
        fetch(Kind::project, i + 1);
        reduce_steps(ahead, half, steps, first_late, last_late);
      }
      settle(Kind::project, i, epoch);
      write_back<(RP > KP ? KP : 0)>(i, z3, z1);
      // A warp reads the state of its own pixels only.
      __syncwarp();
      if (more) {
        if (!kRing) copy_async_wait<0>();
        reduce_steps_of(ahead, first_late, last_late);
      }
    }
    __syncthreads();
    this->store_map(chain_.y);
  }

 protected:
  static GUNN_DEVICE int columns_of(Kind kind) {
    return 8 * (kind == Kind::reduce ? RT : kind == Kind::spatial ? KT : ST);
  }
  // Weights and, where they are given, scales and shifts.
  GUNN_DEVICE void fetch(Kind kind, int number) const {
    Base::fetch(kind, number);
    if (!chain_.exchanges) {
      const Extents& extents = chain_.extents;
      const int columns = kind == Kind::reduce ? extents.reduce_columns(0) : columns_of(kind);
      const int64_t from = static_cast<int64_t>(number) * extents.z_rows() + extents.z_row(norm_of(kind), 0);
      const int turn = number % 2, k = static_cast<int>(kind);
      for (int column = 4 * threadIdx.x; column < columns; column += 4 * Base::kThreadCount) {
        copy_async<16>(tables_.scale[turn][k] + column, chain_.tables.scale + from + column);
        copy_async<16>(tables_.shift[turn][k] + column, chain_.tables.shift + from + column);
      }
    }
    if (!kRing) copy_async_commit();  // with a slot of the ring, where there is one
  }
  // Pre-activations into memory, where they are kept.
  template <int pieces, int of>
  GUNN_DEVICE void keep(int number, Norm norm, const Packed<of>& values, int first_piece) const {
    if (chain_.z == nullptr) return;
    this->template store_rows<pieces, of>(z_of(number), chain_.extents.z_rows(), row_of(norm, number), values,
                                          first_piece);
  }
  GUNN_DEVICE Storage* z_of(int number) const {
    const int at = turns && chain_.one_segment ? 0 : segment_of<units>(number) - chain_.first_segment;
    return chain_.z + at * chain_.extents.pixels * chain_.extents.z_rows();
  }
  GUNN_DEVICE int row_of(Norm norm, int number) const { return chain_.extents.z_row(norm, unit_of<units>(number)); }

  // Steps of channels in [from, to), but for those in [first_late, last_late].
  GUNN_DEVICE void reduce_steps(Sums<RT>& sums, int from, int to, int first_late, int last_late) {
    if constexpr (kAhead) {
      reduce_ahead(sums, from, to, [&](int step) { return step < first_late || step > last_late; });
    } else {
      GUNN_ROLLED
      for (int step = from; step < to && !this->is_idle(); ++step) {
        if (step < first_late || step > last_late) reduce_step(sums, step);
      }
    }
  }
  GUNN_DEVICE void reduce_steps_of(Sums<RT>& sums, int first, int last) {
    if constexpr (kAhead) {
      reduce_ahead(sums, kRing ? first / kSlotSteps * kSlotSteps : first, last + 1,
                   [&](int step) { return step >= first; });
    } else {
      GUNN_ROLLED
      for (int step = first; step <= last && !this->is_idle(); ++step) reduce_step(sums, step);
    }
  }
  template <class Wanted>
  GUNN_DEVICE void reduce_ahead(Sums<RT>& sums, int from, int to, const Wanted& wanted) {
    this->each_step(from, to, [&](int step, uint32_t (&a)[MT][4], const Storage* slot, int in_slot) {
      if (!wanted(step)) return;
      GUNN_UNROLL
      for (int mt = 0; mt < MT; ++mt) make_operand(a[mt]);
      if constexpr (kRing) {
        this->template multiply<RT, kSlotSteps / 2>(sums, a, slot, in_slot);
      } else {
        multiply_step(sums, 0, a, step);
      }
    });
  }
  // Two fragments of pixels at a time: with all four of the largest block the registers would not do.
  GUNN_DEVICE void reduce_step(Sums<RT>& sums, int step) const {
    constexpr int kTogether = MT < 2 ? MT : 2;
    GUNN_UNROLL
    for (int first = 0; first < MT; first += kTogether) {
      uint32_t a[kTogether][4];
      GUNN_UNROLL
      for (int j = 0; j < kTogether; ++j) load_pixels(a[j], first + j, step);
      multiply_step(sums, first, a, step);
    }
  }
  // The fragments from `first` on.
  template <int count>
  GUNN_DEVICE void multiply_step(Sums<RT>& sums, int first, const uint32_t (&a)[count][4], int step) const {
    const int rows = chain_.extents.reduce_columns(0);
    GUNN_UNROLL
    for (int n = 0; n < RT; n += 2) {
      if (8 * n >= rows) break;
      uint32_t b[4];
      this->load_weights(b, this->weights(Kind::reduce), rows, n, step);
      GUNN_UNROLL
      for (int j = 0; j < count; ++j) {
        Precision::multiply(sums[first + j][n], a[j], {b[0], b[1]});
        if (n + 1 >= RT) continue;
        Precision::multiply(sums[first + j][n + 1 < RT ? n + 1 : n], a[j], {b[2], b[3]});
      }
    }
  }
  GUNN_DEVICE void load_pixels(uint32_t (&a)[4], int mt, int step) const {
    if (!streams || (!turns && kStep * step < chain_.resident)) {
      const int matrix = lane_ / 8, row = this->first_row(mt) + matrix % 2 * 8 + lane_ % 8;
      load_matrices<false>(a, shared_ + row * layout_.map_stride + step * kStep + matrix / 2 * kPiece);
    } else {
      GUNN_UNROLL
      for (int r = 0; r < 4; ++r) {
        const int m = this->first_row(mt) + 8 * (r % 2) + lane_ / 4;
        a[r] = this->bits_at(m, this->column(2 * step + r / 2));
      }
    }
    make_operand(a);
  }
  static GUNN_DEVICE void make_operand(uint32_t (&a)[4]) {
    GUNN_UNROLL
    for (int r = 0; r < 4; ++r) a[r] = Bits::operand(a[r]);
  }

  GUNN_DEVICE void activate_hidden(int number) const {
    this->each_row([&](int, int, int m) {
      if (m >= count_) return;
      uint32_t* bits = this->hidden_bits(m);
      GUNN_UNROLL
      for (int p = 0; p < KP; ++p) bits[4 * p] = activated(number, Kind::reduce, this->column(p), bits[4 * p]);
    });
  }
  template <int pieces>
  GUNN_DEVICE void activate(int number, Kind kind, Packed<pieces>& values) const {
    GUNN_UNROLL
    for (int p = 0; p < pieces; ++p) {
      const int column = this->pinned(this->column(p));
      this->each_row(
          [&](int mt, int half, int) { values[mt][p][half] = activated(number, kind, column, values[mt][p][half]); });
    }
  }
  GUNN_DEVICE float normed(int number, Kind kind, int column, float value) const {
    const int k = static_cast<int>(kind);
    return value * tables_.scale[number % 2][k][column] + tables_.shift[number % 2][k][column];
  }
  // A register as an operand of the next product.
  GUNN_DEVICE uint32_t activated(int number, Kind kind, int column, uint32_t bits) const {
    return Bits::operand(
        Base::pack([&](int v) { return relu(normed(number, kind, column + v, Bits::value(bits, v))); }));
  }

  // Mean and squared deviations of every column, sent to the clerks.
  template <int pieces>
  GUNN_DEVICE void exchange(Kind kind, const Packed<pieces>& z, unsigned epoch) {
    if (!chain_.exchanges) return __syncthreads();
    float mean = 0, squares = 0;
    if (moments(kind, z, &mean, &squares)) this->send_pair(kind, threadIdx.x, mean, squares, epoch);
  }
  // Those of the band, of the thread's column; false where it has none.
  template <int pieces>
  GUNN_DEVICE bool moments(Kind kind, const Packed<pieces>& z, float* mean_out, float* squares_out) {
    constexpr int tiles = pieces / Bits::kOfTile;
    // The lane's two columns of a tile.
    const auto each_value = [&](int n, const auto& visit) {
      this->each_row([&](int mt, int half, int m) {
        if (m >= count_) return;
        GUNN_UNROLL
        for (int p = 0; p < Bits::kOfTile; ++p) {
          const uint32_t bits = this->pinned(z[mt][n * Bits::kOfTile + p][half]);
          GUNN_UNROLL
          for (int v = 0; v < kEach; ++v) visit(kEach * p + v, Bits::value(bits, v));
        }
      });
    };
    const int in_warp = max(0, min(count_ - this->first_row(0), 16 * MT));
    GUNN_UNROLL
    for (int n = 0; n < tiles; ++n) {
      float sum[2] = {};
      each_value(n, [&](int which, float value) { sum[which] += value; });
      // The lane's column is one of two, its mean and the other's.
      const float mine = in_warp > 0 ? Base::over_rows(sum) / static_cast<float>(in_warp) : 0;
      const float other = __shfl_xor_sync(~0u, mine, 4);
      const int odd = lane_ / 4 % 2;
      const float mean[2] = {odd ? other : mine, odd ? mine : other};
      float squares[2] = {};
      each_value(n, [&](int which, float value) {
        const float apart = value - mean[which];
        squares[which] += apart * apart;
      });
      const float all = Base::over_rows(squares);
      if (lane_ >= 8) continue;
      tables_.a[warp_][this->column_of(n, odd)] = mine;
      tables_.b[warp_][this->column_of(n, odd)] = all;
    }
    __syncthreads();
    const int mine = threadIdx.x;
    if (mine >= 8 * tiles || place_of(chain_.extents, 0, kind, Kind::reduce, mine).row < 0) return false;
    float mean = 0, squares = 0;
    const int count = this->pinned(count_);
    const auto values = [&](int warp) { return static_cast<float>(max(0, min(count - warp * 16 * MT, 16 * MT))); };
    for (int warp = 0; warp < WARPS; ++warp) mean += values(warp) * tables_.a[warp][mine];
    mean /= static_cast<float>(count_);
    for (int warp = 0; warp < WARPS; ++warp) {
      const float apart = tables_.a[warp][mine] - mean;
      squares += tables_.b[warp][mine] + values(warp) * (apart * apart);
    }
    *mean_out = mean, *squares_out = squares;
    return true;
  }
  // Scale and shift of the stage, for every thread.
  GUNN_DEVICE void settle(Kind kind, int number, unsigned epoch) const {
    const int mine = threadIdx.x, k = static_cast<int>(kind);
    if (chain_.exchanges && mine < columns_of(kind)) {
      float scale = 0, shift = 0;
      if (place_of(chain_.extents, unit_of<units>(number), kind, Kind::reduce, mine).row >= 0) {
        this->receive_pair(kind, mine, epoch, &scale, &shift);
      }
      tables_.scale[number % 2][k][mine] = scale, tables_.shift[number % 2][k][mine] = shift;
    }
    __syncthreads();
  }

  // What is added to the last unit's z3 (output_of) are the pieces of `beside` from `first` on.
  template <int first, int of>
  GUNN_DEVICE void write_back(int number, const Packed<SP>& z3, const Packed<of>& beside) const {
    const Extents& extents = chain_.extents;
    const int s = extents.segment, segment = segment_of<units>(number);
    this->each_row([&](int mt, int half, int m) {
      if (m >= count_) return;
      GUNN_UNROLL
      for (int p = 0; p < SP; ++p) {
        const int channel = this->column(p), in_state = segment * s + channel;
        if (channel >= s) continue;
        const uint32_t own = z3[mt][p][half], other = beside[mt][first + p][half];
        const bool all = this->even_segments();
        uint32_t before = 0;
        if (all && extents.residual) before = this->bits_at(m, in_state);
        float out[kEach];
        GUNN_UNROLL
        for (int v = 0; v < kEach; ++v) {
          out[v] = output_of(number, channel + v, Bits::value(own, v), Bits::value(other, v)) + Bits::value(before, v);
        }
        if (all) {
          this->bits_at(m, in_state) = Base::pack([&](int v) { return out[v]; });
          continue;
        }
        // Odd segments: a channel at a time, the state added here.
        GUNN_UNROLL
        for (int v = 0; v < kEach; ++v) {
          if (channel + v >= s) break;
          Storage* to = this->at(m, in_state + v);
          *to = from_float<Storage>(extents.residual ? out[v] + to_float(*to) : out[v]);
        }
      }
    });
  }
  // A channel of a unit's output, rounded: beside its z3 it is made of the shortcut's pre-activation, or of the input
  // of a second unit.
  GUNN_DEVICE float output_of(int number, int channel, float own, float beside) const {
    float out = normed(number, Kind::project, channel, own);
    if (unit_of<units>(number) > 0) {
      out += beside;
    } else if (this->has_shortcut()) {
      out += normed(number, Kind::reduce, 8 * KT + channel, beside);
    }
    return to_float(from_float<Storage>(out));
  }

  const ForwardChain<Precision>& chain_;
  Tables& tables_;
};

// A clerk's warp: its columns of every exchange, in order.
template <class Precision, int KT, int ST, int units = 1>
GUNN_DEVICE void combine_statistics(const ForwardChain<Precision>& chain) {
  const Extents& extents = chain.extents;
  const int lane = threadIdx.x % 32, blocks = chain.blocks;
  const ClerkWarp warp(blocks);
  const float all = static_cast<float>(extents.pixels);
  const LanePixels values(chain);
  for (int number = units * chain.first_segment; number < units * (chain.last_segment + 1); ++number) {
    const int i = segment_of<units>(number), unit = unit_of<units>(number);
    const unsigned epoch = number + 1;
    GUNN_UNROLL
    for (int k = 0; k < kKinds; ++k) {
      const int columns = 8 * (k == 0 ? KT + ST : k == 1 ? KT : ST);
      for (int column = warp.mine; column < columns; column += warp.all) {
        const ColumnPlace place = place_of(extents, unit, static_cast<Kind>(k), Kind::reduce, column);
        if (place.row < 0) continue;  // nobody's column
        const int64_t in_norm = static_cast<int64_t>(i) * extents.channels_of(place.norm) + place.channel;
        const float weight = norm_weight(chain.unit[unit], place.norm)[in_norm];  // read before the wait
        const float bias = norm_bias(chain.unit[unit], place.norm)[in_norm];
        const Word* words = chain.words[k] + 2 * column * blocks;
        const LanePairs pairs(words, blocks, epoch);
        float sum = 0, squares = 0;
        GUNN_UNROLL
        for (int j = 0; j < LanePairs::kEach; ++j) {
          if (j < pairs.count) sum += values.of[j] * pairs.a(j);
        }
        const float mean = over_lanes(sum) / all;
        GUNN_UNROLL
        for (int j = 0; j < LanePairs::kEach; ++j) {
          if (j >= pairs.count) break;
          const float apart = pairs.a(j) - mean;
          squares += pairs.b(j) + values.of[j] * (apart * apart);
        }
        const float var = over_lanes(squares) / all;
        if (lane != 0) continue;
        const float inverse = inverse_deviation(var, chain.eps), scale = weight * inverse;
        send(chain.results[k] + 2 * column, scale, epoch);
        send(chain.results[k] + 2 * column + 1, bias - mean * scale, epoch);
        const int64_t row = static_cast<int64_t>(i) * extents.row(Norm::reduce, units) + place.row;
        chain.mean[row] = mean, chain.var[row] = var;
      }
    }
  }
}

template <class Precision, int KT, int ST, int WARPS, int MT, bool streams>
__global__ void __launch_bounds__(32 * WARPS, 1) persistent_forward(ForwardChain<Precision> chain) {
  if (static_cast<int>(blockIdx.x) >= chain.blocks) return combine_statistics<Precision, KT, ST>(chain);
  GUNN_DYNAMIC_SHARED(typename Precision::Storage, shared);
  ForwardBlock<Precision, KT, ST, WARPS, MT, streams>(chain, shared).run();
}

}  // namespace gunn
