// What the persistent kernels have in common: blocks that hold an image, or a band of its rows, for the whole launch,
// and speak to each other in words (words.cuh) while all of them are resident.
//
// Owns:      compute block b has band b % bands of image b / bands: WARPS warps of 16 * MT pixels each. Clerk blocks,
//            behind them, have no pixels: each of their warps combines columns of an exchange.
// Turns:     of more bands than blocks at once. Without exchanges they are several launches', images as a whole. With
//            exchanges a block has every `blocks`-th band and does each step for all of them before the exchange; what
//            a band has between steps lies in memory (turns_forward.cuh, turns_backward.cuh).
// Exchanges: three a unit, one for each Kind. A compute block sends two numbers of its pixels for each column; a
//            clerk's warp takes the words of all blocks, in a fixed tree, and sends two numbers back. Two hops through
//            L2, no barrier of the grid. A slot is used again one unit later: by then every block has received the
//            later exchanges of the unit, which needed every block's earlier ones to have been taken. Bands send the
//            rows at their edges to each other, as words too; these slots take turns, as without exchanges nothing else
//            keeps neighbours in step: who sends the rows of the unit after next has received the next one's, which its
//            neighbour sent when it had taken these.
// Needs:     all blocks resident at once: a cooperative launch. Without exchanges whole images need nothing.
// Shared:    map pixels * resident channels; one segment's weights n * (k + s) + 9 * k * k + k * s, fetched ahead;
//            hidden activations (or their gradients) with a border, in their last form as operands. Values of 2 bytes,
//            of 4 for TF32. Channels that find no room are streamed from a copy of the block's own in global memory,
//            which L2 holds.
// Ring:      a segment's weights that are too many for that (k 80: 122 kB and 160 bytes a channel) come from L2 through
//            three slots of 64 of depth (10 kB; transposed, 64 channels: 12 kB; of TF32 32: 10 kB; k 112: 20 kB), in
//            the order in which they are multiplied, across products and segments: so two slots are on their way while
//            one is multiplied, and during waits. The project's, which are few, lie ready. A barrier a slot; as it is
//            also one behind whatever the slots before were read for, copies of tables and of the project's weights
//            travel with slots.
// Units:     are numbered through all segments, as epochs of words are; of one in each the numbers are the segments'.
//
// k and s of one template: KT and ST tiles of 8 channels. How lanes hold values: registers.cuh.
#pragma once

#include "cuda/registers.cuh"
#include "cuda/tables.cuh"
#include "cuda/weights.cuh"
#include "cuda/words.cuh"

namespace gunn {

enum class Kind { reduce, spatial, project };
constexpr int kKinds = 3;
constexpr int kMostBlocks = 256;  // of an exchange: as many words as a clerk's lanes take at once

// Slots of the ring, and the steps (of depth, or of channels that are made) that one serves.
constexpr int kSlots = 3, kSlotSteps = 4;
constexpr int kMostUnits = 2;  // of a segment
// Whether one segment's weights are too many to lie in shared memory: all but the project's come through the ring
// then. Such layers have segments of an even number of channels, and of one unit, the ImageNet models', no shortcut.
constexpr bool through_ring(int k_tiles) { return 2 * 9 * 64 * k_tiles * k_tiles > 64 << 10; }

// The batch norm behind a kind's convolution.
GUNN_DEVICE Norm norm_of(Kind kind) {
  return kind == Kind::reduce ? Norm::reduce : kind == Kind::spatial ? Norm::spatial : Norm::project;
}
// The packed weights of a kind.
__host__ GUNN_DEVICE Pack pack_of(Kind kind, bool transposed) {
  switch (kind) {
    case Kind::reduce:
      return transposed ? Pack::reduce_transposed : Pack::reduce;
    case Kind::spatial:
      return transposed ? Pack::spatial_transposed : Pack::spatial;
    default:
      return transposed ? Pack::project_transposed : Pack::project;
  }
}

// What both directions' launches are told.
template <class Precision>
struct Chain {
  using Storage = typename Precision::Storage;

  Extents extents;
  const Storage* packed[kMostUnits][kKinds];  // weights.cuh
  Word *words[kKinds], *results[kKinds];      // (columns, 2, blocks), (columns, 2)
  Word* edges;                                // (2 turns, all bands, upper and lower, registers of a row's k)
  Storage* streamed;                // (blocks, pieces of streamed channels, pixels of a block); in turns of bands
  int bands, band_rows;             // of an image, and their rows, the last one's fewer
  int all_bands, first_band;        // of the batch; the first block's
  int blocks;                       // with pixels
  int resident;                     // channels in shared memory, a multiple of 16
  int first_segment, last_segment;  // of this launch
  bool exchanges;

  __host__ GUNN_DEVICE int streamed_channels() const { return (extents.channels + 15) / 16 * 16 - resident; }
  GUNN_DEVICE int rows_of(int band) const { return min(band_rows, extents.height - band % bands * band_rows); }
  GUNN_DEVICE int pixels_of(int band) const { return rows_of(band) * extents.width; }
  // Of the band's first pixel, among those of the batch.
  GUNN_DEVICE int64_t first_pixel(int band) const {
    return (static_cast<int64_t>(band / bands) * extents.height + band % bands * band_rows) * extents.width;
  }
};

// Where things lie in shared memory, in values; the same function for host and device.
template <class Precision>
struct ChainLayout {
  int map_stride, hidden_stride, slot;        // elements of a pixel, of a slot of the ring
  int weights[kKinds], ring, hidden, tables;  // begins
  int bytes;

  __host__ GUNN_DEVICE ChainLayout(const Extents& extents, int pixels, int band_rows, int resident, bool transposed,
                                   bool rings) {
    // Strides are odd multiples of 16 bytes: eight rows of one matrix lie in different banks.
    constexpr int kPiece = Registers<Precision>::kPiece;
    map_stride = (resident / kPiece | 1) * kPiece;
    hidden_stride = (extents.k() / kPiece | 1) * kPiece;
    int next = pixels * map_stride;
    for (int kind = 0; kind < kKinds; ++kind) {
      weights[kind] = next;
      if (rings && static_cast<Kind>(kind) != Kind::project) continue;
      next += static_cast<int>(
          pack_shape(extents, pack_of(static_cast<Kind>(kind), transposed), 0).template size<Precision>());
    }
    ring = next;
    constexpr int kChunk = 4 * kPiece;  // of depth
    slot = kSlotSteps * Registers<Precision>::kStep *
           (transposed ? (extents.reduce_columns(0) + kChunk - 1) / kChunk * kChunk : extents.reduce_columns(0));
    if (rings) next += kSlots * slot;
    hidden = next;
    next += (band_rows + 2) * (extents.width + 2) * hidden_stride;
    tables = (next + kPiece - 1) / kPiece * kPiece;
    bytes = tables * static_cast<int>(sizeof(typename Precision::Storage));
  }
};

// Behind the layout's elements: two numbers of each warp and column, before they are combined; and where the hidden
// activations of each pixel lie.
template <int KT, int ST, int warps, int fragments, int units>
struct BlockTables {
  static constexpr int kColumns = KT > 8 ? 8 * (KT + (units > 1 ? ST : 0)) : 64;  // of an exchange, at most
  float a[warps][kColumns], b[warps][kColumns];
  int hidden_at[16 * warps * fragments];
};

// What a column of an exchange stands for; row -1 in the padding.
struct ColumnPlace {
  Norm norm;
  int channel, row;
};
// The shortcut's columns lie behind those of one kind.
GUNN_DEVICE ColumnPlace place_of(const Extents& extents, int unit, Kind kind, Kind with_shortcut, int column) {
  const Norm own = norm_of(kind);
  const int columns = padded(extents.channels_of(own));
  const bool behind = kind == with_shortcut && column >= columns;
  const Norm norm = behind ? Norm::shortcut : own;
  const int channel = behind ? column - columns : column;
  const bool real = channel < extents.channels_of(norm) && (norm != Norm::shortcut || extents.projects(unit));
  return {norm, channel, real ? extents.row(norm, unit) + channel : -1};
}

// Which warp of the clerks this is, and of how many.
struct ClerkWarp {
  int mine, all;

  GUNN_DEVICE explicit ClerkWarp(int blocks)
      : mine((blockIdx.x - blocks) * (blockDim.x / 32) + threadIdx.x / 32),
        all((gridDim.x - blocks) * (blockDim.x / 32)) {}
};
// Pixels of the blocks that are the lane's, lane + 32 * j.
struct LanePixels {
  float of[kMostBlocks / 32] = {};

  template <class Precision>
  GUNN_DEVICE explicit LanePixels(const Chain<Precision>& chain) {
    GUNN_UNROLL
    for (int j = 0; j < kMostBlocks / 32; ++j) {
      const int block = threadIdx.x % 32 + 32 * j;
      int pixels = 0;
      for (int band = block; block < chain.blocks && band < chain.all_bands; band += chain.blocks) {
        pixels += chain.pixels_of(band);
      }
      of[j] = static_cast<float>(pixels);
    }
  }
};
// Both numbers of the blocks that are the lane's, lane + 32 * j, of one column.
struct LanePairs {
  static constexpr int kEach = kMostBlocks / 32;
  uint32_t bits[2 * kEach];
  int count;

  GUNN_DEVICE LanePairs(const Word* words, int blocks, unsigned epoch) : count((blocks + 31 - threadIdx.x % 32) / 32) {
    const int lane = threadIdx.x % 32;
    receive(bits, epoch, "a block's numbers", [&](int j) -> const Word* {
      return j / 2 < count ? words + j % 2 * blocks + lane + 32 * (j / 2) : nullptr;
    });
  }
  GUNN_DEVICE float a(int j) const { return __uint_as_float(bits[2 * j]); }
  GUNN_DEVICE float b(int j) const { return __uint_as_float(bits[2 * j + 1]); }
};
template <class Value>
GUNN_DEVICE Value over_lanes(Value value) {
  GUNN_UNROLL
  for (int bits = 1; bits < 32; bits *= 2) value += __shfl_xor_sync(~0u, value, bits);
  return value;
}

// Of the unit with a number.
template <int units>
GUNN_DEVICE int segment_of(int number) {
  return units == 1 ? number : number / units;
}
template <int units>
GUNN_DEVICE int unit_of(int number) {
  return units == 1 ? 0 : number % units;
}

template <class Precision, int KT, int ST, int WARPS, int MT, bool streams, bool transposed, bool turns, int units>
class PixelBlock {
 protected:
  using Storage = typename Precision::Storage;
  using Bits = Registers<Precision>;
  static constexpr int kThreadCount = 32 * WARPS, kPixels = 16 * WARPS * MT;
  static constexpr int kPiece = Bits::kPiece, kEach = Bits::kEach, kStep = Bits::kStep;
  static constexpr bool kRing = through_ring(KT);
  static constexpr int RT = KT + (kRing && units == 1 ? 0 : ST);  // the reduce's tiles, the shortcut's behind its own
  static constexpr int KP = KT * Bits::kOfTile, SP = ST * Bits::kOfTile, RP = RT * Bits::kOfTile;  // pieces of 16 bytes
  // As ChainLayout has them.
  static constexpr int kHiddenStride = (KP | 1) * kPiece, kChunk = 4 * kPiece;
  static constexpr int kSlot = kSlotSteps * kStep * (transposed ? (8 * RT + kChunk - 1) / kChunk * kChunk : 8 * RT);
  static constexpr int kSlotChannels = kSlotSteps * kStep;  // of the transposed reduce
  // Beside many sums registers are short. In turns what is asked for ahead comes from memory, else from L2.
  static constexpr bool kManySums = MT * RT > 32;
  static constexpr int kStepsAhead = MT * RT > (turns ? 32 : 16) ? 2 : kSlotSteps;
  template <int tiles>
  using Sums = float[MT][tiles][4];
  template <int pieces>
  using Packed = uint32_t[MT][pieces][2];  // rounded: rows g and g + 8, the lane's register of each piece

  using Tables = BlockTables<KT, ST, WARPS, MT, units>;

  GUNN_DEVICE PixelBlock(const Chain<Precision>& chain, Storage* shared)
      : base_(chain),
        layout_(chain.extents, kPixels, chain.band_rows, turns ? 0 : chain.resident, transposed, kRing),
        shared_(shared),
        warp_(threadIdx.x / 32),
        lane_(threadIdx.x % 32),
        band_(chain.first_band + blockIdx.x),
        count_(chain.pixels_of(band_)),
        streamed_(copy_of(blockIdx.x)),
        tables_(*reinterpret_cast<Tables*>(shared + layout_.tables)) {
    const int width = chain.extents.width;
    for (int m = threadIdx.x; m < kPixels; m += kThreadCount) {
      const int inside = min(m, chain.band_rows * width - 1);
      tables_.hidden_at[m] = layout_.hidden + ((inside / width + 1) * (width + 2) + inside % width + 1) * kHiddenStride;
    }
  }

  // ---- The band that the block is at: in turns all of its bands, each after a barrier

  GUNN_DEVICE void enter(int band) {
    band_ = band, count_ = base_.pixels_of(band);
    streamed_ = copy_of(band);
  }
  GUNN_DEVICE Storage* copy_of(int64_t place) const {
    return base_.streamed + place * kPixels * base_.streamed_channels();
  }
  GUNN_DEVICE bool is_last_band() const { return band_ + base_.blocks >= base_.all_bands; }
  template <class Work>
  GUNN_DEVICE void each_band(const Work& work) {
    GUNN_ROLLED
    for (enter(blockIdx.x); band_ < base_.all_bands; enter(band_ + base_.blocks)) {
      __syncthreads();  // what the band before has in shared memory has been read
      work();
    }
  }

  // ---- Weights: rows of 64 bytes of depth, whose four pieces are exchanged so that eight rows lie in all banks.

  GUNN_DEVICE Storage* weights(Kind kind) const { return shared_ + layout_.weights[static_cast<int>(kind)]; }
  GUNN_DEVICE PackShape shape_of(Kind kind, int unit = 0) const {
    return pack_shape(base_.extents, pack_of(kind, transposed), unit);
  }
  static GUNN_DEVICE int piece(int row, int piece) { return (row * 4 + (piece ^ (row >> 1 & 3))) * kPiece; }

  // But for those that the ring brings.
  GUNN_DEVICE void fetch(Kind kind, int number) const {
    if (kRing && kind != Kind::project) return;
    const int pieces = static_cast<int>(shape_of(kind).template size<Precision>() / kPiece);
    const Storage* from = packed_of(kind, number);
    Storage* to = weights(kind);
    for (int at = pinned(static_cast<int>(threadIdx.x)); at < pieces; at += kThreadCount) {
      copy_async<16>(to + piece(at / 4, at % 4), from + at * kPiece);
    }
  }
  GUNN_DEVICE const Storage* packed_of(Kind kind, int number) const {
    const int unit = unit_of<units>(number);
    return base_.packed[unit][static_cast<int>(kind)] +
           segment_of<units>(number) * shape_of(kind, unit).template size<Precision>();
  }
  // Fragments of two neighbouring tiles of 8 columns, at a step of depth; `rows` in a chunk. Where there is no second
  // tile, its are the first one's last row.
  GUNN_DEVICE void load_weights(uint32_t (&b)[4], const Storage* from, int rows, int tile, int step) const {
    load_weights(b, from, rows, tile, step, lane_);
  }
  static GUNN_DEVICE void load_weights(uint32_t (&b)[4], const Storage* from, int rows, int tile, int step, int lane) {
    const int matrix = lane / 8, both = matrix / 2 * 8 + Bits::source(lane % 8);
    const int row = 8 * tile + 8 < rows ? both : min(both, 7);
    from += (step / 2 * rows + 8 * tile) * 4 * kPiece;
    load_matrices<false>(b, from + piece(row, step % 2 * 2 + matrix % 2));
  }
  // Of one tile, at an even step of depth and the next one.
  static GUNN_DEVICE void load_two_steps(uint32_t (&b)[4], const Storage* from, int rows, int tile, int step,
                                         int lane) {
    from += (step / 2 * rows + 8 * tile) * 4 * kPiece;
    load_matrices<false>(b, from + piece(Bits::source(lane % 8), lane / 8));
  }
  // The same of all rows of a product, packed in tiles of 64: of each, `chunks` lie together.
  template <int tiles, int chunks>
  static GUNN_DEVICE void load_tiles(uint32_t (&b)[4], const Storage* from, int tile, int step, int lane) {
    const int first = tile / 8 * 8;
    from += 8 * first * chunks * 4 * kPiece;
    load_weights(b, from, min(8 * (tiles - first), kColumns), tile - first, step, lane);
  }
  template <int tiles, int chunks>
  GUNN_DEVICE void multiply(Sums<tiles>& sums, const uint32_t (&a)[MT][4], const Storage* from, int step) const {
    const int lane = pinned(lane_);
    GUNN_UNROLL
    for (int n = 0; n < tiles; n += 2) {
      uint32_t b[4];
      load_tiles<tiles, chunks>(b, from, n, step, lane);
      GUNN_UNROLL
      for (int mt = 0; mt < MT; ++mt) {
        Precision::multiply(sums[mt][n], a[mt], {b[0], b[1]});
        if (n + 1 < tiles) Precision::multiply(sums[mt][n + 1 < tiles ? n + 1 : n], a[mt], {b[2], b[3]});
      }
    }
  }

  // ---- The ring: weights in the order in which they are multiplied, slot by slot, some slots ahead
  //
  // Forward, of each unit: reduce, once more where the segment before has written, spatial. Backward, last to first:
  // spatial, of the reduce where the segment before will read, then all of it. In turns each for all bands, and of the
  // backward's reduce, and of that of more units than one, all at once.

  struct Steps {
    int first, last;
    GUNN_DEVICE int slots() const { return last < first ? 0 : last / kSlotSteps - first / kSlotSteps + 1; }
  };
  GUNN_DEVICE Steps all_steps(int unit = 0) const { return {0, (base_.extents.inputs(unit) + kStep - 1) / kStep - 1}; }
  // Those that have channels of the segment before; none of the first one's.
  GUNN_DEVICE Steps late_steps(int segment) const {
    const int s = base_.extents.segment;
    if (segment == (transposed ? base_.first_segment : 0)) return {0, -1};
    return {(segment - 1) * s / kStep, (segment * s - 1) / kStep};
  }

  GUNN_DEVICE int first_number() const { return units * base_.first_segment; }
  GUNN_DEVICE int last_number() const { return units * base_.last_segment + units - 1; }
  // `whole`: the backward wants the reduce of its first segment.
  GUNN_DEVICE void start_ring(bool whole) {
    next_number_ = transposed ? last_number() : first_number(), whole_ = whole;
    turn_ = next_slot_ = next_band_ = 0, next_spatial_ = transposed;
    GUNN_ROLLED
    for (int place = 0; place < kSlots - 1; ++place) fetch_slot(place);
  }
  GUNN_DEVICE const Storage* next_slot() {
    copy_async_wait<kSlots - 2>();
    __syncthreads();  // it has come, and the one before has been read
    fetch_slot(turn_ == 0 ? kSlots - 1 : turn_ - 1);
    const Storage* slot = shared_ + layout_.ring + turn_ * kSlot;
    turn_ = turn_ == kSlots - 1 ? 0 : turn_ + 1;
    return slot;
  }
  GUNN_DEVICE void fetch_slot(int place) {
    const bool at_once = units > 1 || (transposed && turns);
    const Steps late = at_once ? Steps{0, -1} : late_steps(segment_of<units>(next_number_));
    const int all = all_steps(unit_of<units>(next_number_)).slots(), reduce = all + late.slots();
    const bool wanted =
        transposed ? next_number_ > first_number() || (next_number_ == first_number() && (next_spatial_ || whole_))
                   : next_number_ <= last_number();
    if (wanted) {
      int slot = next_slot_;
      if (!next_spatial_) {  // the late ones come last, backward first
        const int late_begin = transposed ? 0 : all, in_late = slot - late_begin;
        slot = in_late >= 0 && in_late < late.slots() ? late.first / kSlotSteps + in_late
               : transposed                           ? slot - late.slots()
                                                      : slot;
      }
      copy_slot(shared_ + layout_.ring + place * kSlot, next_spatial_ ? Kind::spatial : Kind::reduce, slot);
    }
    copy_async_commit();
    if (++next_slot_ < (next_spatial_ ? kSpatialSlots : reduce)) return;
    next_slot_ = 0;
    if (turns && static_cast<int>(blockIdx.x) + ++next_band_ * base_.blocks < base_.all_bands) return;
    next_band_ = 0;
    if (next_spatial_ != transposed) next_number_ += transposed ? -1 : 1;  // it was the unit's last product
    next_spatial_ = !next_spatial_;
  }
  // shape_of, of what the template knows.
  GUNN_DEVICE PackShape ring_shape(Kind kind, int unit) const {
    constexpr int k = 8 * KT;
    if (kind == Kind::spatial) return {k, 9 * k};
    const int made = unit == 0 ? 8 * RT : k, inputs = unit == 0 ? padded(base_.extents.channels) : 8 * ST;
    return transposed ? PackShape{inputs, made} : PackShape{made, inputs};
  }
  // Two chunks of depth of all rows, packed in tiles of 64; of the transposed reduce, whose rows are channels, all
  // chunks of kSlotChannels, zeros behind the last.
  GUNN_DEVICE void copy_slot(Storage* to, Kind kind, int slot) const {
    constexpr int kSlotChunks = kSlotSteps / 2, kTile = kSlotChunks * kColumns * 4;  // pieces of a tile
    const bool by_channels = transposed && kind == Kind::reduce;
    const PackShape shape = ring_shape(kind, unit_of<units>(next_number_));
    const int all_chunks = shape.chunks<Precision>(), first_chunk = slot * kSlotChunks;
    const int chunks = min(all_chunks - first_chunk, kSlotChunks);
    const int pieces = 4 * (by_channels ? all_chunks * kSlotChannels : kSlotChunks * shape.rows);
    const Storage* const from = base_.packed[unit_of<units>(next_number_)][static_cast<int>(kind)] +
                                segment_of<units>(next_number_) * shape.size<Precision>();
    GUNN_ROLLED
    for (int at = threadIdx.x; at < pieces; at += kThreadCount) {
      // The tile's first row, its rows, and the piece among its own.
      const int row = by_channels ? slot * kSlotChannels / kColumns * kColumns : at / kTile * kColumns;
      const int rows = min(shape.rows - row, kColumns);
      int in_tile = first_chunk * rows * 4 + at % kTile;
      bool inside = true;
      if (by_channels) {
        const int in_chunk = slot * kSlotChannels - row + at / 4 % kSlotChannels;
        inside = in_chunk < rows;
        in_tile = (at / (4 * kSlotChannels) * rows + (inside ? in_chunk : 0)) * 4 + at % 4;
      } else if (at % kTile >= chunks * rows * 4) {
        continue;
      }
      copy_async<16>(to + piece(at / 4, at % 4), from + (row * all_chunks * 4 + in_tile) * kPiece, inside);
    }
  }

  // ---- The map: the state, or its gradient

  // Channels in shared memory; in turns none.
  GUNN_DEVICE int resident() const { return turns ? 0 : base_.resident; }
  // Where the map has a pixel's channel.
  GUNN_DEVICE Storage* at(int m, int channel) const {
    if (!streams || (!turns && channel < base_.resident)) return shared_ + m * layout_.map_stride + channel;
    const int behind = channel - resident();
    return streamed_ + (static_cast<int64_t>(behind / kPiece) * kPixels + m) * kPiece + behind % kPiece;
  }
  // A register of channels at once, where they have one for themselves.
  GUNN_DEVICE uint32_t& bits_at(int m, int channel) const { return *reinterpret_cast<uint32_t*>(at(m, channel)); }
  // A step's registers of the lane's pixels, as operands and sums have them: calls visit(fragment, number, register)
  // with that of piece number / 2 of row g + 8 * (number % 2).
  template <class Visit>
  GUNN_DEVICE void each_register(int step, const Visit& visit) const {
    const auto each = [&](Storage* first, int row, int piece) {
      GUNN_UNROLL
      for (int mt = 0; mt < MT; ++mt) {
        GUNN_UNROLL
        for (int r = 0; r < 4; ++r) {
          visit(mt, r, reinterpret_cast<uint32_t*>(first + (16 * mt + r % 2 * 8) * row + r / 2 * piece));
        }
      }
    };
    const int m = first_row(0) + lane_ / 4, behind = kStep * step - resident();
    if (!turns && behind < 0) {
      each(shared_ + m * layout_.map_stride + kStep * step + column(0), layout_.map_stride, kPiece);
    } else {
      each(streamed_ + behind * kPixels + kPiece * m + column(0), kPiece, kPiece * kPixels);
    }
  }
  // Steps [from, to) of channels: calls work(step, its registers, slot of the ring or null, step of the slot).
  // Registers, which may come from L2, are on their way kStepsAhead steps before they are needed.
  template <class Work>
  GUNN_DEVICE void each_step(int from, int to, const Work& work) {
    uint32_t bits[kStepsAhead][MT][4] = {};
    const auto load = [&](int j, int step) {
      if (step >= to || is_idle()) return;
      each_register(step, [&](int mt, int r, const uint32_t* from) { bits[j][mt][r] = *from; });
    };
    GUNN_UNROLL
    for (int j = 0; j < kStepsAhead; ++j) load(j, from + j);
    GUNN_ROLLED
    for (int first = from; first < to; first += kSlotSteps) {
      const Storage* slot = nullptr;
      if constexpr (kRing) slot = next_slot();
      GUNN_UNROLL
      for (int j = 0; j < kSlotSteps; ++j) {
        if (first + j < to && !is_idle()) work(first + j, bits[j % kStepsAhead], slot, j);
        load(j % kStepsAhead, first + j + kStepsAhead);
      }
    }
  }
  GUNN_DEVICE bool has_shortcut(int number = 0) const {
    return units > 1 ? unit_of<units>(number) == 0 : !kRing && base_.extents.shortcut;
  }
  // Whether segments begin and end between registers.
  GUNN_DEVICE bool even_segments() const { return kRing || base_.extents.segment % kEach == 0; }
  // Pixel m of the band, from the beginning of its image.
  template <class Scalar>
  GUNN_DEVICE Scalar* pixel_of(const FeatureMap<Scalar>& map, int m) const {
    const int width = base_.extents.width, row = band_ % base_.bands * base_.band_rows + m / width;
    return map.data + static_cast<int64_t>(band_ / base_.bands) * map.batch + row * map.row + m % width * map.column;
  }
  // The map from tensors, channels below `written` from `before`.
  GUNN_DEVICE void load_map(const FeatureMap<const Storage>& before, const FeatureMap<const Storage>& from,
                            int written) const {
    const int channels = resident() + base_.streamed_channels();
    const bool pixels_fast = from.column < from.channel;
    for (int e = threadIdx.x; e < kPixels * channels; e += kThreadCount) {
      const int m = pixels_fast ? e % kPixels : e / channels, c = pixels_fast ? e / kPixels : e % channels;
      const bool real = m < count_ && c < base_.extents.channels;
      const FeatureMap<const Storage> map = c < written ? before : from;
      *at(m, c) = real ? pixel_of(map, m)[c * map.channel] : from_float<Storage>(0.0f);
    }
  }
  GUNN_DEVICE void store_map(const FeatureMap<Storage>& to) const {
    const int channels = base_.extents.channels;
    const bool pixels_fast = to.column < to.channel;
    for (int e = threadIdx.x; e < count_ * channels; e += kThreadCount) {
      const int m = pixels_fast ? e % count_ : e / channels, c = pixels_fast ? e / count_ : e % channels;
      pixel_of(to, m)[c * to.channel] = *at(m, c);
    }
  }

  // ---- Pixel-major maps in memory, of which the block has rows [first_pixel, first_pixel + count)

  GUNN_DEVICE int64_t first_of_lane() const { return base_.first_pixel(band_) + first_row(0) + lane_ / 4; }
  // Pieces of each of the lane's pixels from channel `row` on, zero beyond the block's.
  template <int pieces>
  GUNN_DEVICE void load_rows(const Storage* map, int step, int row, Packed<pieces>& out) const {
    map += first_of_lane() * step + fresh(row + column(0));
    each_row([&](int mt, int half, int m) {
      const Storage* from = map + (16 * mt + 8 * half) * step;
      GUNN_UNROLL
      for (int p = 0; p < pieces; ++p) {
        out[mt][p][half] = m < count_ ? *reinterpret_cast<const uint32_t*>(from + kPiece * p) : 0;
      }
    });
  }
  template <int pieces, int of>
  GUNN_DEVICE void store_rows(Storage* map, int step, int row, const Packed<of>& values, int first_piece = 0) const {
    map += first_of_lane() * step + fresh(row + column(0));
    each_row([&](int mt, int half, int m) {
      if (m >= count_) return;
      Storage* to = map + (16 * mt + 8 * half) * step;
      GUNN_UNROLL
      for (int p = 0; p < pieces; ++p) {
        *reinterpret_cast<uint32_t*>(to + kPiece * p) = values[mt][first_piece + p][half];
      }
    });
  }

  // ---- The hidden activations: the image with a border of one pixel

  GUNN_DEVICE int first_row(int mt) const { return (warp_ * MT + mt) * 16; }
  // Whether none of the warp's pixels are the band's: it takes part in barriers, not in products.
  GUNN_DEVICE bool is_idle() const { return !kManySums && first_row(0) >= count_; }
  // Calls visit(fragment, which half of it, pixel) for the two rows of each fragment that the lane has values of.
  template <class Visit>
  GUNN_DEVICE void each_row(const Visit& visit) const {
    GUNN_UNROLL
    for (int mt = 0; mt < MT; ++mt) {
      GUNN_UNROLL
      for (int half = 0; half < 2; ++half) visit(mt, half, fresh(first_row(mt)) + 8 * half + lane_ / 4);
    }
  }
  // The lane's register of a pixel's first piece; of the others every fourth behind it.
  GUNN_DEVICE uint32_t* hidden_bits(int m) const {
    return reinterpret_cast<uint32_t*>(shared_ + tables_.hidden_at[m] + column(0));
  }
  GUNN_DEVICE void clear_hidden() const {
    const int elements = (base_.band_rows + 2) * (base_.extents.width + 2) * kHiddenStride;
    for (int e = threadIdx.x; e < elements; e += kThreadCount) {
      shared_[layout_.hidden + e] = from_float<Storage>(0.0f);
    }
  }
  template <int pieces>
  GUNN_DEVICE void store_hidden(const Packed<pieces>& values) const {
    each_row([&](int mt, int half, int m) {
      if (m >= count_) return;
      uint32_t* to = hidden_bits(m);
      GUNN_UNROLL
      for (int p = 0; p < KP; ++p) to[4 * p] = values[mt][p][half];
    });
  }
  // The first and last row of the band, raw, for the bands beside it.
  GUNN_DEVICE Word* edge(int band, int lower, unsigned epoch) const {
    const int64_t words = base_.extents.width * 4 * KP;
    return base_.edges + ((epoch % 2 * base_.all_bands + band) * 2 + lower) * words;
  }
  template <int pieces>
  GUNN_DEVICE void send_edges(const Packed<pieces>& values, unsigned epoch) const {
    if (base_.bands == 1) return;
    const int width = base_.extents.width;
    each_row([&](int mt, int half, int m) {
      for (int lower = 0; lower < 2; ++lower) {
        const int column = lower ? m - (count_ - width) : m;
        if (column < 0 || column >= width || m >= count_) continue;
        Word* to = edge(band_, lower, epoch) + column * 4 * KP + lane_ % 4;
        GUNN_UNROLL
        for (int p = 0; p < KP; ++p) send_bits(to + 4 * p, values[mt][p][half], epoch);
      }
    });
  }
  // What neighbours have sent, into the border: what finish(pixel of the batch, first column, raw bits) makes of them.
  template <class Finish>
  GUNN_DEVICE void receive_edges(unsigned epoch, const Finish& finish) const {
    const int band = band_ % base_.bands, width = base_.extents.width;
    constexpr int kTogether = 4;
    const int words = width * 4 * KP;
    // The upper neighbour's lower edge goes above the first row, the lower one's upper edge below the last.
    const int begin = band == 0 ? words : 0, end = band == base_.bands - 1 ? words : 2 * words;
    for (int first = begin + threadIdx.x; first < end; first += kTogether * kThreadCount) {
      uint32_t raw[kTogether];
      receive(raw, epoch, "a neighbour's row", [&](int j) -> const Word* {
        const int e = first + j * kThreadCount, lower = e >= words;
        return e < end ? edge(band_ + (lower ? 1 : -1), 1 - lower, epoch) + e - lower * words : nullptr;
      });
      GUNN_UNROLL
      for (int j = 0; j < kTogether; ++j) {
        const int e = first + j * kThreadCount, lower = e >= words, at = e - lower * words;
        if (e >= end) break;
        const int column = at / (4 * KP), channel = at % (4 * KP) * kEach;
        const int row = lower ? base_.rows_of(band_) + 1 : 0;
        Storage* to = shared_ + layout_.hidden + (row * (width + 2) + column + 1) * kHiddenStride + channel;
        const int64_t pixel = base_.first_pixel(band_) + (lower ? count_ : -width) + column;
        *reinterpret_cast<uint32_t*>(to) = finish(pixel, channel, raw[j]);
      }
    }
  }
  // Zeros above the first row of an image and below its last one, where the band before may have had a neighbour's.
  GUNN_DEVICE void clear_border() const {
    const int band = band_ % base_.bands, elements = (base_.extents.width + 2) * kHiddenStride;
    GUNN_UNROLL
    for (int lower = 0; lower < 2; ++lower) {
      if (band != (lower ? base_.bands - 1 : 0)) continue;
      Storage* row = shared_ + layout_.hidden + (lower ? base_.rows_of(band_) + 1 : 0) * elements;
      for (int e = threadIdx.x; e < elements; e += kThreadCount) row[e] = from_float<Storage>(0.0f);
    }
  }
  // The 3x3 convolution; transposed, with the opposite offsets.
  GUNN_DEVICE void spatial_steps(Sums<KT>& sums) {
    constexpr int kPieces = 9 * KP, kDirection = transposed ? -1 : 1;  // of all taps
    const int row = (base_.extents.width + 2) * kHiddenStride, matrix = lane_ / 8;
    int pixel[MT];
    GUNN_UNROLL
    for (int mt = 0; mt < MT; ++mt) pixel[mt] = tables_.hidden_at[first_row(mt) + lane_ % 16];
    const auto load = [&](uint32_t (&a)[MT][4], int step) {
      const int piece = min(2 * step + matrix / 2, kPieces - 1), tap = piece / KP;
      const int offset = kDirection * ((tap / 3 - 1) * row + (tap % 3 - 1) * kHiddenStride) + piece % KP * kPiece;
      GUNN_UNROLL
      for (int mt = 0; mt < MT; ++mt) load_matrices<false>(a[mt], shared_ + pixel[mt] + offset);
    };
    if constexpr (kRing) {
      GUNN_ROLLED
      for (int slot = 0; slot < kSpatialSlots; ++slot) {
        const Storage* from = next_slot();
        if (is_idle()) continue;
        GUNN_UNROLL
        for (int j = 0; j < kSlotSteps; ++j) {
          if (kSlotSteps * slot + j >= kSpatialSteps) break;
          uint32_t a[MT][4];
          load(a, kSlotSteps * slot + j);
          multiply<KT, kSlotSteps / 2>(sums, a, from, j);
        }
      }
    } else {
      GUNN_ROLLED
      for (int step = 0; step < kSpatialSteps && !is_idle(); ++step) {
        uint32_t a[MT][4];
        load(a, step);
        multiply<KT, (kSpatialSteps + 1) / 2>(sums, a, weights(Kind::spatial), step);
      }
    }
  }
  // A product whose operand is in registers: `values` are sums of another, rounded, and at once fragments of pixels.
  template <int in, int out>
  GUNN_DEVICE void project_steps(const Packed<in>& values, Sums<out>& sums) const {
    if (is_idle()) return;
    GUNN_UNROLL
    for (int step = 0; step < (in + 1) / 2; ++step) {
      const int lane = pinned(lane_);
      GUNN_UNROLL
      for (int n = 0; n < out; n += 2) {
        uint32_t b[4];
        load_tiles<out, (in + 3) / 4>(b, weights(Kind::project), n, step, lane);
        GUNN_UNROLL
        for (int mt = 0; mt < MT; ++mt) {
          uint32_t a[4];
          fragment<in>(a, values, mt, step);
          Precision::multiply(sums[mt][n], a, {b[0], b[1]});
          if (n + 1 < out) Precision::multiply(sums[mt][n + 1 < out ? n + 1 : n], a, {b[2], b[3]});
        }
      }
    }
  }
  template <int pieces>
  static GUNN_DEVICE void fragment(uint32_t (&a)[4], const Packed<pieces>& values, int mt, int step) {
    const int last = pieces - 1, next = 2 * step < last ? 2 * step + 1 : last;
    a[0] = values[mt][2 * step][0], a[1] = values[mt][2 * step][1];
    a[2] = 2 * step < last ? values[mt][next][0] : 0, a[3] = 2 * step < last ? values[mt][next][1] : 0;
  }

  // ---- The lane's columns: those of its register of a piece, the first one; one of its two of a tile

  GUNN_DEVICE int column(int piece) const { return kPiece * piece + kEach * (lane_ % 4); }
  GUNN_DEVICE int column_of(int tile, int which) const { return column(Bits::piece_of(tile, which)) + which % kEach; }
  // Sums of both columns, in rows g and g + 8, as what a register has.
  static GUNN_DEVICE float sum_of(const float (&sums)[4], int piece, int half, int v) {
    return sums[2 * half + piece % Bits::kOfTile * kEach + v];
  }
  // fresh, in the largest ring block: what all tiles need at once, or registers taken apart, would not fit otherwise.
  template <class T>
  static GUNN_DEVICE T pinned(T value) {
    return kRing && MT > 1 ? fresh(value) : value;
  }
  template <class ValueOf>
  static GUNN_DEVICE uint32_t pack(const ValueOf& value_of) {
    return pinned(Bits::pack(value_of));
  }
  template <int tiles, int pieces>
  static GUNN_DEVICE void round(const Sums<tiles>& sums, Packed<pieces>& z) {
    GUNN_UNROLL
    for (int mt = 0; mt < MT; ++mt) {
      GUNN_UNROLL
      for (int p = 0; p < pieces; ++p) {
        GUNN_UNROLL
        for (int half = 0; half < 2; ++half) {
          z[mt][p][half] = pack([&](int v) { return sum_of(sums[mt][p / Bits::kOfTile], p, half, v); });
        }
      }
    }
  }
  template <int pieces>
  static GUNN_DEVICE void make_operands(Packed<pieces>& values) {
    GUNN_UNROLL
    for (int mt = 0; mt < MT; ++mt) {
      GUNN_UNROLL
      for (int p = 0; p < pieces; ++p) {
        GUNN_UNROLL
        for (int half = 0; half < 2; ++half) values[mt][p][half] = Bits::operand(values[mt][p][half]);
      }
    }
  }
  template <int tiles>
  static GUNN_DEVICE void clear(Sums<tiles>& sums) {
    GUNN_UNROLL
    for (int mt = 0; mt < MT; ++mt) {
      GUNN_UNROLL
      for (int n = 0; n < tiles; ++n) sums[mt][n][0] = sums[mt][n][1] = sums[mt][n][2] = sums[mt][n][3] = 0;
    }
  }
  // Sums over a fragment's eight rows g, folded: lanes share the values among them instead of summing each everywhere.
  // Of two values the lane has number g % 2, of four number g % 4.
  static GUNN_DEVICE float over_rows(const float (&values)[2]) {
    const bool odd = threadIdx.x / 4 % 2 == 1;
    float sum = odd ? values[1] : values[0];
    sum += __shfl_xor_sync(~0u, odd ? values[0] : values[1], 4);
    sum += __shfl_xor_sync(~0u, sum, 8);
    return sum + __shfl_xor_sync(~0u, sum, 16);
  }
  static GUNN_DEVICE float over_rows(const float (&values)[4]) {
    const bool odd = threadIdx.x / 4 % 2 == 1, later = threadIdx.x / 8 % 2 == 1;
    const float first = (odd ? values[1] : values[0]) + __shfl_xor_sync(~0u, odd ? values[0] : values[1], 4);
    const float second = (odd ? values[3] : values[2]) + __shfl_xor_sync(~0u, odd ? values[2] : values[3], 4);
    const float sum = (later ? second : first) + __shfl_xor_sync(~0u, later ? first : second, 8);
    return sum + __shfl_xor_sync(~0u, sum, 16);
  }

  // The block's two numbers of a column, to the clerks.
  GUNN_DEVICE void send_pair(Kind kind, int column, float a, float b, unsigned epoch) const {
    Word* words = base_.words[static_cast<int>(kind)] + 2 * column * base_.blocks + blockIdx.x;
    send(words, a, epoch);
    send(words + base_.blocks, b, epoch);
  }

  // What the clerks made of it.
  GUNN_DEVICE void receive_pair(Kind kind, int column, unsigned epoch, float* a, float* b) const {
    uint32_t bits[2];
    receive(bits, epoch, "a batch norm",
            [&](int j) -> const Word* { return base_.results[static_cast<int>(kind)] + 2 * column + j; });
    *a = __uint_as_float(bits[0]), *b = __uint_as_float(bits[1]);
  }

  const Chain<Precision>& base_;
  const ChainLayout<Precision> layout_;
  Storage* shared_;
  const int warp_, lane_;
  int band_, count_;  // where the block is, and its pixels
  Storage* streamed_;
  Tables& tables_;

 private:
  static constexpr int kSpatialSteps = (9 * KP + 1) / 2;
  static constexpr int kSpatialSlots = (kSpatialSteps + kSlotSteps - 1) / kSlotSteps;
  // Of the ring: the slot to multiply, and what to fetch.
  int turn_ = 0, next_number_ = 0, next_band_ = 0, next_slot_ = 0;
  bool next_spatial_ = transposed, whole_ = true;
};

}  // namespace gunn
