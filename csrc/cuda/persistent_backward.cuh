// The chain of gradients of some segments, last to first, in one launch (pixel_block.cuh). Their pre-activations are at
// hand; what the weights' gradients need is left in memory, to be summed over pixels afterwards. A block's gradient of
// the state stays in shared memory:
//
//   project  d3 = g[c_i]; sums of d3, d3 * (z3 - mean), and for the shortcut d3 * (zs - mean)
//   spatial  d2 = W3ᵀ dz3 through the ReLU; sums of d2, d2 * (z2 - mean)
//   reduce   d1 = transposed conv3x3 of dz2 through the ReLU; sums of d1, d1 * (z1 - mean)
//   spread   g += W1ᵀ dz1 + Wsᵀ dzs
//
// Exchanges: those sums up, a batch norm's b and c (view.cuh) back; clerks also write the gradients of its weight and
//            bias. None where nobody needs the sums.
// Waits:     are filled with the spread of the segment before, over all channels but those of this segment, which went
//            first: its operand, [dz1, dzs], stays in registers.
// Edges:     rows of d2; the neighbour makes dz2 of them with z2, which lies in memory.
// Rounding:  every gradient to storage, as torch does; g after every segment.
// Costs:     reads z (2k + 2s) and writes dz (2k + 2s) once a pixel and segment; g crosses memory once a launch.
//            Streamed channels of g are read and written once a segment, a slot of the ring ahead where there is one.
#pragma once

#include "cuda/pixel_block.cuh"

namespace gunn {

template <class Precision>
struct BackwardChain : Chain<Precision> {
  using Storage = typename Precision::Storage;

  // Gradient of the state behind the last segment, and before the first. Null: to be kept where it is from launch to
  // launch, in turns; or not wanted by anybody.
  FeatureMap<const Storage> g;
  FeatureMap<Storage> g_before;
  bool wanted;       // the gradient before the first segment
  const Storage* z;  // (segments of the launch, pixels, z_rows)
  Storage* dz;       // the same of their gradients, or null; in turns never null
  Tables<float> tables;
  UnitTensors<float*> gradients[kMostUnits];  // of batch norms
  double count;
  bool need_gradients, batch_statistics;
};

// Behind the layout's elements.
template <int KT, int ST, int warps, int fragments, int units = 1>
struct BackwardTables : BlockTables<KT, ST, warps, fragments, units> {
  static constexpr int kOfUnits = 8 * (units * (2 * KT + ST) + (units > 1 ? ST : 0));
  static constexpr int kRows = KT > 8 ? kOfUnits : 128;                // of z, at most
  alignas(16) float mean[2][kRows], scale[2][kRows], shift[2][kRows];  // take turns
  float slope[kRows], constant[kRows];
};

template <class Precision, int KT, int ST, int WARPS, int MT, bool streams, bool turns = false, int units = 1>
class BackwardBlock : protected PixelBlock<Precision, KT, ST, WARPS, MT, streams, true, turns, units> {
 protected:
  using Base = PixelBlock<Precision, KT, ST, WARPS, MT, streams, true, turns, units>;
  using typename Base::Bits;
  using typename Base::Storage;
  template <int tiles>
  using Sums = typename Base::template Sums<tiles>;
  template <int pieces>
  using Packed = typename Base::template Packed<pieces>;
  using Base::count_;
  using Base::kEach;
  using Base::KP;
  using Base::kStep;
  using Base::lane_;
  using Base::layout_;
  using Base::RP;
  using Base::SP;
  using Base::warp_;
  static constexpr bool kRing = Base::kRing;
  using Tables = BackwardTables<KT, ST, WARPS, MT, units>;

 public:
  GUNN_DEVICE BackwardBlock(const BackwardChain<Precision>& chain, Storage* shared)
      : Base(chain, shared), chain_(chain), tables_(static_cast<Tables&>(Base::tables_)) {}

  GUNN_DEVICE void run() {
    const Extents& extents = chain_.extents;
    const int begin = chain_.first_segment, last = chain_.last_segment;
    const auto steps = [&] { return (this->pinned(extents.channels) + kStep - 1) / kStep; };
    const auto half = [&] { return kRing ? steps() / (2 * kSlotSteps) * kSlotSteps : steps() / 2; };  // in whole slots
    this->fetch(Kind::spatial, last);
    this->fetch(Kind::project, last);
    fetch_tables(last);
    if (kRing) {
      this->start_ring(chain_.wanted);
    } else {
      copy_async_commit();
    }
    this->load_map(chain_.g, chain_.g, 0);
    this->clear_hidden();
    Packed<SP> z3, zs = {};
    load_outputs(last, z3, zs);
    copy_async_wait<0>();
    __syncthreads();

    Packed<RP> dz;  // of the segment before, whose spread is not complete, as operand
    for (int i = last; i >= begin; --i) {
      const bool spreads = i < last;
      const int first_late = i * extents.segment / kStep, last_late = ((i + 1) * extents.segment - 1) / kStep;
      const unsigned epoch = extents.segments - i;

      Packed<SP> d3;
      read_gradient(i, d3);
      GUNN_UNROLL
      for (int n = 0; n < ST; ++n) {
        add_sums<SP>(i, n, n, Norm::project, d3, z3);
        if (this->has_shortcut()) add_sums<SP>(i, ST + n, n, Norm::shortcut, d3, zs);
      }
      exchange(Kind::project, i, epoch);
      if (spreads) spread(dz, i + 1, 0, half(), first_late, last_late);
      Packed<KP> z2;
      load(i, Norm::spatial, z2);
      if (!kRing) copy_async_wait<0>();
      settle(Kind::project, i, epoch);

      slope<SP>(i, Norm::project, d3, z3, z3);
      leave<SP>(i, Norm::project, z3);
      Packed<SP> dzs = {};
      if (this->has_shortcut()) {
        slope<SP>(i, Norm::shortcut, d3, zs, dzs);
        leave<SP>(i, Norm::shortcut, dzs);
      }
      Sums<KT> sums = {};
      Base::make_operands(z3);
      this->project_steps(z3, sums);
      Packed<KP> d2;
      stop(i, Norm::spatial, sums, z2, d2);
      this->send_edges(d2, epoch);
      this->store_hidden(d2);  // as it is, until its batch norm's sums are back
      exchange(Kind::spatial, i, epoch);
      if (spreads) spread(dz, i + 1, half(), steps(), first_late, last_late);
      Packed<KP> z1;
      load(i, Norm::reduce, z1);
      if (kRing) {
        if (i > begin) this->fetch(Kind::project, i - 1), fetch_tables(i - 1);  // with a slot of the ring
      } else {
        __syncthreads();  // the weights of the spread have been read
        this->fetch(Kind::reduce, i);
        if (i > begin) fetch_tables(i - 1);
        copy_async_commit();
      }
      settle(Kind::spatial, i, epoch);

      finish_hidden(i, z2);
      leave<KP>(i, Norm::spatial, z2);
      receive_edges(i, epoch);
      __syncthreads();
      Base::clear(sums);
      this->spatial_steps(sums);
      stop(i, Norm::reduce, sums, z1, d2);
      exchange(Kind::reduce, i, epoch);
      if (i > begin) load_outputs(i - 1, z3, zs);
      if (!kRing) {
        if (i > begin) this->fetch(Kind::spatial, i - 1), this->fetch(Kind::project, i - 1);
        copy_async_commit();
        copy_async_wait<1>();  // the reduce's weights and the tables
      }
      settle(Kind::reduce, i, epoch);

      slope<KP>(i, Norm::reduce, d2, z1, z1);
      leave<KP>(i, Norm::reduce, z1);
      join(z1, dzs, dz);
      if (i > begin) {
        const int next = i - 1;
        spread_of(dz, i, next * extents.segment / kStep, ((next + 1) * extents.segment - 1) / kStep);
        __syncwarp();  // a warp reads the gradients of its own pixels only
      }
    }
    if (!chain_.wanted) return;
    spread(dz, begin, 0, steps(), -1, -1);
    __syncthreads();
    this->store_map(chain_.g_before);
  }

 protected:
  static GUNN_DEVICE int columns_of(Kind kind) { return 8 * (kind == Kind::project ? 2 * ST : KT); }

  // ---- Memory

  GUNN_DEVICE int64_t segment_at(int number) const {
    return (segment_of<units>(number) - chain_.first_segment) * chain_.extents.pixels * chain_.extents.z_rows();
  }
  template <int pieces>
  GUNN_DEVICE void load(int number, Norm norm, Packed<pieces>& z) const {
    load(chain_.z, number, norm, z);
  }
  template <int pieces>
  GUNN_DEVICE void load(const Storage* map, int number, Norm norm, Packed<pieces>& out) const {
    this->template load_rows<pieces>(map + segment_at(number), chain_.extents.z_rows(), row_of(norm, number), out);
  }
  GUNN_DEVICE void load_outputs(int number, Packed<SP>& z3, Packed<SP>& zs) const {
    load(number, Norm::project, z3);
    if (this->has_shortcut(number)) load(number, Norm::shortcut, zs);
  }
  template <int pieces>
  GUNN_DEVICE void leave(int number, Norm norm, const Packed<pieces>& dz) const {
    if (chain_.dz == nullptr) return;
    this->template store_rows<pieces, pieces>(chain_.dz + segment_at(number), chain_.extents.z_rows(),
                                              row_of(norm, number), dz);
  }
  GUNN_DEVICE void fetch_tables(int segment) const {
    const int rows = chain_.extents.z_rows(), turn = segment % 2;
    for (int row = 4 * threadIdx.x; row < rows; row += 4 * Base::kThreadCount) {
      const int64_t at = static_cast<int64_t>(segment) * rows + row;
      copy_async<16>(tables_.mean[turn] + row, chain_.tables.mean + at);
      copy_async<16>(tables_.scale[turn] + row, chain_.tables.scale + at);
      copy_async<16>(tables_.shift[turn] + row, chain_.tables.shift + at);
    }
  }

  // ---- The gradient of the state

  // Zeros in the padding.
  GUNN_DEVICE void read_gradient(int segment, Packed<SP>& d3) const {
    const int s = chain_.extents.segment;
    this->each_row([&](int mt, int half, int m) {
      GUNN_UNROLL
      for (int p = 0; p < SP; ++p) {
        if (this->even_segments()) {
          const int column = this->pinned(this->column(p));
          d3[mt][p][half] = column < s ? this->bits_at(m, segment * s + column) : 0;
          continue;
        }
        d3[mt][p][half] = Base::pack([&](int v) {
          const int channel = this->column(p) + v;
          return channel < s ? to_float(*this->at(m, segment * s + channel)) : 0;
        });
      }
    });
  }
  // Steps of channels in [from, to), but for those in [first_late, last_late].
  GUNN_DEVICE void spread(const Packed<RP>& dz, int segment, int from, int to, int first_late, int last_late) {
    if constexpr (kRing) {
      const auto late = this->late_steps(this->pinned(segment));
      spread_ahead(dz, segment, from, to, [&](int step) { return step < late.first || step > late.last; });
    } else {
      spread_steps(dz, segment, from, to, first_late, last_late);
    }
  }
  GUNN_DEVICE void spread_of(const Packed<RP>& dz, int segment, int first, int last) {
    if constexpr (kRing || turns) {
      spread_ahead(dz, segment, kRing ? first / kSlotSteps * kSlotSteps : first, last + 1,
                   [&](int step) { return step >= first; });
    } else {
      spread_steps(dz, segment, first, last + 1, -1, -1);
    }
  }
  GUNN_DEVICE void spread_steps(const Packed<RP>& dz, int segment, int from, int to, int first_late,
                                int last_late) const {
    GUNN_ROLLED
    for (int step = from; step < to && !this->is_idle(); ++step) {
      if (step < first_late || step > last_late) spread_step(dz, segment, step);
    }
  }
  // Registers of the gradient are asked for some steps ahead.
  template <class Wanted>
  GUNN_DEVICE void spread_ahead(const Packed<RP>& dz, int segment, int from, int to, const Wanted& wanted) {
    this->each_step(from, to, [&](int step, uint32_t (&g)[MT][4], const Storage* slot, int in_slot) {
      if (!wanted(step)) return;
      Spread b;
      if constexpr (kRing) {
        load_spread(b, slot, Base::kSlotChannels, in_slot * kEach);
      } else {
        load_spread(b, step);
      }
      GUNN_UNROLL
      for (int mt = 0; mt < MT; ++mt) {
        GUNN_UNROLL
        for (int n = 0; n < kEach; ++n) {
          add_spread(dz, segment, step, b, mt, n,
                     [&](int p, int row) -> uint32_t& { return g[mt][2 * (n * Bits::kOfTile + p) + row]; });
        }
      }
      this->each_register(step, [&](int mt, int r, uint32_t* to) { *to = g[mt][r]; });
    });
  }
  GUNN_DEVICE void spread_step(const Packed<RP>& dz, int segment, int step) const {
    Spread b;
    load_spread(b, step);
    const int first = fresh(this->first_row(0) + lane_ / 4);
    GUNN_UNROLL
    for (int mt = 0; mt < MT; ++mt) {
      GUNN_UNROLL
      for (int n = 0; n < kEach; ++n) {
        uint32_t* places[Bits::kOfTile][2];  // of the lane's registers: pieces, rows
        GUNN_UNROLL
        for (int p = 0; p < Bits::kOfTile; ++p) {
          GUNN_UNROLL
          for (int row = 0; row < 2; ++row) {
            const int channel = this->column((kEach * step + n) * Bits::kOfTile + p);
            places[p][row] = &this->bits_at(first + 16 * mt + 8 * row, channel);
          }
        }
        add_spread(dz, segment, step, b, mt, n, [&](int p, int row) -> uint32_t& { return *places[p][row]; });
      }
    }
  }
  // The weights of a step's channels, kEach tiles of 8, at each step of depth.
  static constexpr int kDepthSteps = (RP + 1) / 2;
  using Spread = uint32_t[kDepthSteps][kEach][2];
  // From the tile of 64 rows in which they are packed.
  GUNN_DEVICE void load_spread(Spread& b, int step) const {
    const PackShape shape = this->shape_of(Kind::reduce);
    const int first = step * kStep / kColumns * kColumns, rows = min(shape.rows - first, kColumns);
    const Storage* tile = this->weights(Kind::reduce) + first * shape.chunks<Precision>() * Pool<Precision>::kDepth;
    load_spread(b, tile, rows, (step * kStep - first) / 8);
  }
  // From tile `first` on, of `rows` in a chunk.
  GUNN_DEVICE void load_spread(Spread& b, const Storage* from, int rows, int first) const {
    const int depth = this->shape_of(Kind::reduce).depth;
    GUNN_UNROLL
    for (int step = 0; step < kDepthSteps; step += 2 / kEach) {
      if (!kRing && kStep * step >= depth) continue;
      uint32_t loaded[4];
      if constexpr (kEach == 2) {
        this->load_weights(loaded, from, rows, first, step);
      } else {
        this->load_two_steps(loaded, from, rows, first, step, lane_);
      }
      GUNN_UNROLL
      for (int j = 0; j < 2; ++j) {
        const int to = kEach == 2 ? step : step + j;
        if (to >= kDepthSteps) continue;
        b[to][kEach == 2 ? j : 0][0] = loaded[2 * j], b[to][kEach == 2 ? j : 0][1] = loaded[2 * j + 1];
      }
    }
  }
  // To tile n of the step's, in rows g and g + 8; bits_of(piece of it, row) is the lane's register.
  template <class BitsOf>
  GUNN_DEVICE void add_spread(const Packed<RP>& dz, int segment, int step, const Spread& b, int mt, int n,
                              const BitsOf& bits_of) const {
    const int depth = chain_.extents.reduce_columns(0);
    float g[4];
    GUNN_UNROLL
    for (int row = 0; row < 2; ++row) {
      GUNN_UNROLL
      for (int p = 0; p < Bits::kOfTile; ++p) {
        GUNN_UNROLL
        for (int v = 0; v < kEach; ++v) g[2 * row + kEach * p + v] = Bits::value(bits_of(p, row), v);
      }
    }
    if (!chain_.extents.residual) {
      GUNN_UNROLL
      for (int j = 0; j < 4; ++j) {
        if (this->column_of(kEach * step + n, j % 2) / chain_.extents.segment == segment) g[j] = 0;  // replaced
      }
    }
    GUNN_UNROLL
    for (int at = 0; at < kDepthSteps; ++at) {
      if (!kRing && kStep * at >= depth) break;  // no shortcut
      uint32_t a[4];
      Base::template fragment<RP>(a, dz, mt, at);
      Precision::multiply(g, a, b[at][n]);
    }
    GUNN_UNROLL
    for (int p = 0; p < Bits::kOfTile; ++p) {
      GUNN_UNROLL
      for (int row = 0; row < 2; ++row) {
        bits_of(p, row) = Base::pack([&](int v) { return Base::sum_of(g, p, row, v); });
      }
    }
  }
  static GUNN_DEVICE void join(const Packed<KP>& dz1, const Packed<SP>& dzs, Packed<RP>& dz) {
    GUNN_UNROLL
    for (int mt = 0; mt < MT; ++mt) {
      GUNN_UNROLL
      for (int p = 0; p < RP; ++p) {
        GUNN_UNROLL
        for (int half = 0; half < 2; ++half) {
          dz[mt][p][half] = p < KP ? dz1[mt][p < KP ? p : 0][half] : dzs[mt][p < KP ? 0 : p - KP][half];
        }
      }
    }
    Base::make_operands(dz);
  }

  // ---- Batch norms; rows of z from `row` on

  GUNN_DEVICE int row_of(Norm norm, int number) const { return chain_.extents.z_row(norm, unit_of<units>(number)); }
  // Of the tables, which segments take in turns.
  static GUNN_DEVICE int turn_of(int number) { return segment_of<units>(number) % 2; }
  GUNN_DEVICE float sloped(int turn, int row, float d, float z) const {
    const float direct = d * tables_.scale[turn][row];
    if (!chain_.batch_statistics) return direct;  // z has no part in it, nor has a NaN there
    return direct + ((z - tables_.mean[turn][row]) * tables_.slope[row] + tables_.constant[row]);
  }
  // dz of a register of columns.
  GUNN_DEVICE uint32_t slope_columns(int turn, int row, uint32_t d, uint32_t z) const {
    return Base::pack([&](int v) { return sloped(turn, row + v, Bits::value(d, v), Bits::value(z, v)); });
  }
  template <int pieces>
  GUNN_DEVICE void slope(int number, Norm norm, const Packed<pieces>& d, const Packed<pieces>& z,
                         Packed<pieces>& dz) const {
    GUNN_UNROLL
    for (int p = 0; p < pieces; ++p) {
      const int row = this->pinned(row_of(norm, number) + this->column(p));
      this->each_row([&](int mt, int half, int) {
        dz[mt][p][half] = slope_columns(turn_of(number), row, d[mt][p][half], z[mt][p][half]);
      });
    }
  }
  // dz2 in the place of d2, and of z2.
  GUNN_DEVICE void finish_hidden(int number, Packed<KP>& z2) const {
    this->each_row([&](int mt, int half, int m) {
      if (m >= count_) return;
      uint32_t* bits = this->hidden_bits(m);
      GUNN_UNROLL
      for (int p = 0; p < KP; ++p) {
        uint32_t& z = z2[mt][p][half];
        z = slope_columns(turn_of(number), row_of(Norm::spatial, number) + this->column(p), bits[4 * p], z);
        bits[4 * p] = Bits::operand(z);
      }
    });
  }
  // Through the ReLU behind a batch norm, with the warp's sums of it; tile by tile, or the registers would not do.
  GUNN_DEVICE float stopped(int turn, int row, float z, float gradient) const {
    return z * tables_.scale[turn][row] + tables_.shift[turn][row] <= 0 ? 0 : gradient;
  }
  GUNN_DEVICE void stop(int number, Norm norm, const Sums<KT>& sums, const Packed<KP>& z, Packed<KP>& d) const {
    GUNN_UNROLL
    for (int n = 0; n < KT; ++n) {
      const int first = n * Bits::kOfTile, turn = turn_of(number);
      const int row = this->pinned(row_of(norm, number) + this->column(first));
      this->each_row([&](int mt, int half, int) {
        GUNN_UNROLL
        for (int p = 0; p < Bits::kOfTile; ++p) {
          const uint32_t inputs = z[mt][first + p][half];
          d[mt][first + p][half] = Base::pack([&](int v) {
            return stopped(turn, row + Base::kPiece * p + v, Bits::value(inputs, v),
                           Base::sum_of(sums[mt][n], p, half, v));
          });
        }
      });
      add_sums<KP>(number, n, n, norm, d, z);
    }
  }
  GUNN_DEVICE void receive_edges(int number, unsigned epoch) const {
    const int row = row_of(Norm::spatial, number);
    const Storage* z2 = chain_.z + segment_at(number) + row;
    Base::receive_edges(epoch, [&](int64_t pixel, int column, uint32_t raw) {
      const uint32_t z = *reinterpret_cast<const uint32_t*>(z2 + pixel * chain_.extents.z_rows() + column);
      return Bits::operand(slope_columns(turn_of(number), row + column, raw, z));
    });
  }

  // ---- Sums

  // The warp's sums of d and d * (z - mean) in tile n, which is the exchange's tile `to`.
  template <int pieces>
  GUNN_DEVICE void add_sums(int number, int to, int n, Norm norm, const Packed<pieces>& d,
                            const Packed<pieces>& z) const {
    if (!chain_.exchanges) return;
    const float* means =
        tables_.mean[turn_of(number)] + this->pinned(row_of(norm, number) + this->column(n * Bits::kOfTile));
    const float mean[2] = {means[0], means[Bits::kApart]};
    float sums[4] = {};  // of d in both columns, of the products in both
    this->each_row([&](int mt, int half, int m) {
      if (m >= count_) return;
      GUNN_UNROLL
      for (int p = 0; p < Bits::kOfTile; ++p) {
        const int piece = n * Bits::kOfTile + p;
        const uint32_t gradients = fresh(d[mt][piece][half]), inputs = fresh(z[mt][piece][half]);
        GUNN_UNROLL
        for (int v = 0; v < kEach; ++v) {
          const int which = kEach * p + v;
          sums[which] += Bits::value(gradients, v);
          sums[2 + which] += Bits::value(gradients, v) * (Bits::value(inputs, v) - mean[which]);
        }
      }
    });
    const float mine = Base::over_rows(sums);
    if (lane_ >= 16) return;
    const int g = lane_ / 4;
    (g < 2 ? tables_.a : tables_.b)[warp_][this->column_of(to, g % 2)] = mine;
  }
  // The sums, to the clerks.
  GUNN_DEVICE void exchange(Kind kind, int number, unsigned epoch) const {
    float sum = 0, product = 0;
    if (add_warps(kind, number, &sum, &product)) this->send_pair(kind, threadIdx.x, sum, product, epoch);
  }
  // The band's, of the thread's column, on top of what is there; false where it has none.
  GUNN_DEVICE bool add_warps(Kind kind, int number, float* sum, float* product) const {
    __syncthreads();
    const int mine = threadIdx.x;
    if (!chain_.exchanges || mine >= columns_of(kind)) return false;
    if (place_of(chain_.extents, unit_of<units>(number), kind, Kind::project, mine).row < 0) return false;
    for (int warp = 0; warp < WARPS; ++warp) *sum += tables_.a[warp][mine], *product += tables_.b[warp][mine];
    return true;
  }
  // b and c, for every thread.
  GUNN_DEVICE void settle(Kind kind, int number, unsigned epoch) {
    const int mine = threadIdx.x;
    if (mine < columns_of(kind)) {
      const ColumnPlace place = place_of(chain_.extents, unit_of<units>(number), kind, Kind::project, mine);
      float b = 0, c = 0;
      if (place.row >= 0 && chain_.exchanges) {
        this->receive_pair(kind, mine, epoch, &b, &c);
      }
      // Without a shortcut its place in the exchange is nobody's in z.
      if (place.norm != Norm::shortcut || this->has_shortcut(number)) {
        const int row = row_of(place.norm, number) + place.channel;
        tables_.slope[row] = b, tables_.constant[row] = c;
      }
    }
    __syncthreads();
  }

  const BackwardChain<Precision>& chain_;
  Tables& tables_;
};

// A clerk's warp: its columns of every exchange, in order.
template <class Precision, int KT, int ST, int units = 1>
GUNN_DEVICE void combine_gradients(const BackwardChain<Precision>& chain) {
  const Extents& extents = chain.extents;
  const int lane = threadIdx.x % 32, blocks = chain.blocks;
  const ClerkWarp warp(blocks);
  for (int number = units * (chain.last_segment + 1) - 1; number >= units * chain.first_segment; --number) {
    const int i = segment_of<units>(number), unit = unit_of<units>(number);
    const unsigned epoch = units * extents.segments - number;
    GUNN_UNROLL
    for (int k = kKinds - 1; k >= 0; --k) {
      const Kind kind = static_cast<Kind>(k);
      const int columns = 8 * (kind == Kind::project ? 2 * ST : KT);
      for (int column = warp.mine; column < columns; column += warp.all) {
        const ColumnPlace place = place_of(extents, unit, kind, Kind::project, column);
        if (place.row < 0) continue;  // padding
        const int64_t in_norm = static_cast<int64_t>(i) * extents.channels_of(place.norm) + place.channel;
        const int64_t at = static_cast<int64_t>(i) * extents.z_rows() + extents.z_row(place.norm, unit) + place.channel;
        const float scale = chain.tables.scale[at], inverse = chain.tables.inverse[at];  // read before the wait
        const Word* words = chain.words[k] + 2 * column * blocks;
        const LanePairs pairs(words, blocks, epoch);
        double sum = 0, product = 0;
        GUNN_UNROLL
        for (int j = 0; j < LanePairs::kEach; ++j) {
          if (j < pairs.count) sum += pairs.a(j), product += pairs.b(j);
        }
        sum = over_lanes(sum), product = over_lanes(product);
        if (lane != 0) continue;
        const Slope<float> slope(scale, inverse, sum, product, chain.count);
        send(chain.results[k] + 2 * column, chain.batch_statistics ? slope.b : 0, epoch);
        send(chain.results[k] + 2 * column + 1, chain.batch_statistics ? slope.c : 0, epoch);
        if (!chain.need_gradients) continue;
        norm_weight(chain.gradients[unit], place.norm)[in_norm] = static_cast<float>(product * inverse);
        norm_bias(chain.gradients[unit], place.norm)[in_norm] = static_cast<float>(sum);
      }
    }
  }
}

template <class Precision, int KT, int ST, int WARPS, int MT, bool streams>
__global__ void __launch_bounds__(32 * WARPS, 1) persistent_backward(BackwardChain<Precision> chain) {
  if (static_cast<int>(blockIdx.x) >= chain.blocks) return combine_gradients<Precision, KT, ST>(chain);
  GUNN_DYNAMIC_SHARED(typename Precision::Storage, shared);
  BackwardBlock<Precision, KT, ST, WARPS, MT, streams>(chain, shared).run();
}

}  // namespace gunn
