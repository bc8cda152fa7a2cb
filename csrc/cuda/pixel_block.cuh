// What the persistent kernels have in common: blocks that hold an image, or a band of its rows, for the whole launch,
// and speak to each other in words (words.cuh) while all of them are resident.
//
// Owns:      compute block b has band b % bands of image b / bands: WARPS warps of 16 * MT pixels each. Clerk blocks,
//            behind them, have no pixels: each of their warps combines columns of an exchange.
// Exchanges: three a segment, one for each Kind. A compute block sends two numbers of its pixels for each column; a
//            clerk's warp takes the words of all blocks, in a fixed tree, and sends two numbers back. Two hops through
//            L2, no barrier of the grid. A slot is used again one segment later: by then every block has received the
//            later exchanges of the segment, which needed every block's earlier ones to have been taken. Bands send the
//            rows at their edges to each other, as words too; these slots take turns, as without exchanges nothing else
//            keeps neighbours in step: who sends the rows of the segment after next has received the next one's, which
//            its neighbour sent when it had taken these.
// Needs:     all blocks resident at once: a cooperative launch. Without exchanges whole images need nothing.
// Shared:    map pixels * resident channels; one segment's weights n * (k + s) + 9 * k * k + k * s, fetched ahead;
//            hidden activations (or their gradients) with a border, in their last form as operands. Values of 2 bytes,
//            of 4 for TF32. Channels that find no room are streamed from a copy of the block's own in global memory,
//            which L2 holds.
//
// One unit, k and s of one template: KT and ST tiles of 8 channels. How lanes hold values: registers.cuh.
#pragma once

#include "cuda/registers.cuh"
#include "cuda/tables.cuh"
#include "cuda/weights.cuh"
#include "cuda/words.cuh"

namespace gunn {

enum class Kind { reduce, spatial, project };
constexpr int kKinds = 3, kMostColumns = 64;
constexpr int kMostBlocks = 256;  // of an exchange: as many words as a clerk's lanes take at once

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
  const Storage* packed[kKinds];          // weights.cuh
  Word *words[kKinds], *results[kKinds];  // (columns, 2, blocks), (columns, 2)
  Word* edges;                            // (2 turns, blocks, upper and lower, registers of a row's k)
  Storage* streamed;                      // (blocks, pieces of streamed channels, pixels of a block)
  int bands, band_rows, blocks;           // bands of an image and their rows, the last one's fewer; blocks with pixels
  int resident;                           // channels in shared memory, a multiple of 16
  int first_segment, last_segment;        // of this launch
  bool exchanges;

  __host__ GUNN_DEVICE int streamed_channels() const { return (extents.channels + 15) / 16 * 16 - resident; }
  GUNN_DEVICE int rows_of(int block) const { return min(band_rows, extents.height - block % bands * band_rows); }
  GUNN_DEVICE int pixels_of(int block) const { return rows_of(block) * extents.width; }
  // Of the block's first pixel, among those of the batch.
  GUNN_DEVICE int64_t first_pixel(int block) const {
    return (static_cast<int64_t>(block / bands) * extents.height + block % bands * band_rows) * extents.width;
  }
};

// Where things lie in shared memory, in values; the same function for host and device.
template <class Precision>
struct ChainLayout {
  int map_stride, hidden_stride;
  int weights[kKinds], hidden, tables;  // begins
  int bytes;

  __host__ GUNN_DEVICE ChainLayout(const Extents& extents, int pixels, int band_rows, int resident, bool transposed) {
    // Strides are odd multiples of 16 bytes: eight rows of one matrix lie in different banks.
    constexpr int kPiece = Registers<Precision>::kPiece;
    map_stride = (resident / kPiece | 1) * kPiece;
    hidden_stride = (extents.k() / kPiece | 1) * kPiece;
    int next = pixels * map_stride;
    for (int kind = 0; kind < kKinds; ++kind) {
      weights[kind] = next;
      next += static_cast<int>(
          pack_shape(extents, pack_of(static_cast<Kind>(kind), transposed), 0).template size<Precision>());
    }
    hidden = next;
    next += (band_rows + 2) * (extents.width + 2) * hidden_stride;
    tables = (next + kPiece - 1) / kPiece * kPiece;
    bytes = tables * static_cast<int>(sizeof(typename Precision::Storage));
  }
};

// Behind the layout's elements: two numbers of each warp and column, before they are combined; and where the hidden
// activations of each pixel lie.
template <int warps, int fragments>
struct BlockTables {
  float a[warps][kMostColumns], b[warps][kMostColumns];
  int hidden_at[16 * warps * fragments];
};

// What a column of an exchange stands for; row -1 in the padding.
struct ColumnPlace {
  Norm norm;
  int channel, row;
};
// The shortcut's columns lie behind those of one kind.
GUNN_DEVICE ColumnPlace place_of(const Extents& extents, Kind kind, Kind with_shortcut, int column) {
  const Norm own = norm_of(kind);
  const int columns = padded(extents.channels_of(own));
  const bool behind = kind == with_shortcut && column >= columns;
  const Norm norm = behind ? Norm::shortcut : own;
  const int channel = behind ? column - columns : column;
  const bool real = channel < extents.channels_of(norm) && (norm != Norm::shortcut || extents.shortcut);
  return {norm, channel, real ? extents.row(norm, 0) + channel : -1};
}

// Which warp of the clerks this is, and of how many.
struct ClerkWarp {
  int mine, all;

  GUNN_DEVICE explicit ClerkWarp(int blocks)
      : mine((blockIdx.x - blocks) * (blockDim.x / 32) + threadIdx.x / 32),
        all((gridDim.x - blocks) * (blockDim.x / 32)) {}
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

template <class Precision, int KT, int ST, int WARPS, int MT, bool streams, bool transposed>
class PixelBlock {
 protected:
  using Storage = typename Precision::Storage;
  using Bits = Registers<Precision>;
  static constexpr int kThreadCount = 32 * WARPS, kPixels = 16 * WARPS * MT;
  static constexpr int kPiece = Bits::kPiece, kEach = Bits::kEach, kStep = Bits::kStep;
  static constexpr int KP = KT * Bits::kOfTile, SP = ST * Bits::kOfTile;  // pieces of 16 bytes
  template <int tiles>
  using Sums = float[MT][tiles][4];
  template <int pieces>
  using Packed = uint32_t[MT][pieces][2];  // rounded: rows g and g + 8, the lane's register of each piece

  using Tables = BlockTables<WARPS, MT>;

  GUNN_DEVICE PixelBlock(const Chain<Precision>& chain, Storage* shared)
      : base_(chain),
        layout_(chain.extents, kPixels, chain.band_rows, chain.resident, transposed),
        shared_(shared),
        warp_(threadIdx.x / 32),
        lane_(threadIdx.x % 32),
        count_(chain.pixels_of(blockIdx.x)),
        streamed_(chain.streamed + static_cast<int64_t>(blockIdx.x) * kPixels * chain.streamed_channels()),
        tables_(*reinterpret_cast<Tables*>(shared + layout_.tables)) {
    const int width = chain.extents.width;
    for (int m = threadIdx.x; m < kPixels; m += kThreadCount) {
      const int inside = min(m, count_ - 1);
      tables_.hidden_at[m] =
          layout_.hidden + ((inside / width + 1) * (width + 2) + inside % width + 1) * layout_.hidden_stride;
    }
    __syncthreads();
    GUNN_UNROLL
    for (int mt = 0; mt < MT; ++mt) pixel_[mt] = tables_.hidden_at[first_row(mt) + lane_ % 16];
  }

  // ---- Weights: rows of 64 bytes of depth, whose four pieces are exchanged so that eight rows lie in all banks.

  GUNN_DEVICE Storage* weights(Kind kind) const { return shared_ + layout_.weights[static_cast<int>(kind)]; }
  GUNN_DEVICE PackShape shape_of(Kind kind) const { return pack_shape(base_.extents, pack_of(kind, transposed), 0); }
  static GUNN_DEVICE int piece(int row, int piece) { return (row * 4 + (piece ^ (row >> 1 & 3))) * kPiece; }

  GUNN_DEVICE void fetch(Kind kind, int segment) const {
    const PackShape shape = shape_of(kind);
    const int pieces = static_cast<int>(shape.size<Precision>() / kPiece);
    const Storage* from = base_.packed[static_cast<int>(kind)] + segment * shape.size<Precision>();
    Storage* to = weights(kind);
    for (int at = threadIdx.x; at < pieces; at += kThreadCount) {
      copy_async<16>(to + piece(at / 4, at % 4), from + at * kPiece);
    }
  }
  // Fragments of two neighbouring tiles of 8 columns, at a step of depth; `rows` in a chunk.
  GUNN_DEVICE void load_weights(uint32_t (&b)[4], const Storage* from, int rows, int tile, int step) const {
    const int matrix = lane_ / 8, row = min(8 * (tile + matrix / 2) + Bits::source(lane_ % 8), rows - 1);
    load_matrices<false>(b, from + step / 2 * rows * 4 * kPiece + piece(row, step % 2 * 2 + matrix % 2));
  }

  // ---- The map: the state, or its gradient

  // Where the map has a pixel's channel.
  GUNN_DEVICE Storage* at(int m, int channel) const {
    if (!streams || channel < base_.resident) return shared_ + m * layout_.map_stride + channel;
    const int behind = channel - base_.resident;
    return streamed_ + (static_cast<int64_t>(behind / kPiece) * kPixels + m) * kPiece + behind % kPiece;
  }
  // A register of channels at once, where they have one for themselves.
  GUNN_DEVICE uint32_t& bits_at(int m, int channel) const { return *reinterpret_cast<uint32_t*>(at(m, channel)); }
  // Whether segments begin and end between registers.
  GUNN_DEVICE bool even_segments() const { return base_.extents.segment % kEach == 0; }
  // Pixel m of the block, from the beginning of its image.
  template <class Scalar>
  GUNN_DEVICE Scalar* pixel_of(const FeatureMap<Scalar>& map, int m) const {
    const int width = base_.extents.width, row = blockIdx.x % base_.bands * base_.band_rows + m / width;
    return map.data + static_cast<int64_t>(blockIdx.x / base_.bands) * map.batch + row * map.row +
           m % width * map.column;
  }
  // The map from tensors, channels below `written` from `before`; and zeros around the hidden activations.
  GUNN_DEVICE void load_map(const FeatureMap<const Storage>& before, const FeatureMap<const Storage>& from,
                            int written) const {
    const int channels = base_.resident + base_.streamed_channels();
    const bool pixels_fast = from.column < from.channel;
    for (int e = threadIdx.x; e < kPixels * channels; e += kThreadCount) {
      const int m = pixels_fast ? e % kPixels : e / channels, c = pixels_fast ? e / kPixels : e % channels;
      const bool real = m < count_ && c < base_.extents.channels;
      const FeatureMap<const Storage> map = c < written ? before : from;
      *at(m, c) = real ? pixel_of(map, m)[c * map.channel] : from_float<Storage>(0.0f);
    }
    const int border = (base_.band_rows + 2) * (base_.extents.width + 2) * layout_.hidden_stride;
    for (int e = threadIdx.x; e < border; e += kThreadCount) {
      shared_[layout_.hidden + e] = from_float<Storage>(0.0f);
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

  GUNN_DEVICE int64_t first_of_lane() const { return base_.first_pixel(blockIdx.x) + first_row(0) + lane_ / 4; }
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
  // Calls visit(fragment, which half of it, pixel) for the two rows of each fragment that the lane has values of.
  template <class Visit>
  GUNN_DEVICE void each_row(const Visit& visit) const {
    GUNN_UNROLL
    for (int mt = 0; mt < MT; ++mt) {
      GUNN_UNROLL
      for (int half = 0; half < 2; ++half) visit(mt, half, fresh(first_row(mt)) + 8 * half + lane_ / 4);
    }
  }
  // The lane's register of a pixel's piece.
  GUNN_DEVICE uint32_t& hidden_bits(int m, int p) const {
    return *reinterpret_cast<uint32_t*>(shared_ + tables_.hidden_at[m] + column(0) + kPiece * p);
  }
  template <int pieces>
  GUNN_DEVICE void store_hidden(const Packed<pieces>& values) const {
    each_row([&](int mt, int half, int m) {
      if (m >= count_) return;
      GUNN_UNROLL
      for (int p = 0; p < KP; ++p) hidden_bits(m, p) = values[mt][p][half];
    });
  }
  // The first and last row of the band, raw, for the bands beside it.
  GUNN_DEVICE Word* edge(int block, int lower, unsigned epoch) const {
    const int64_t words = base_.extents.width * 4 * KP;
    return base_.edges + ((epoch % 2 * base_.blocks + block) * 2 + lower) * words;
  }
  template <int pieces>
  GUNN_DEVICE void send_edges(const Packed<pieces>& values, unsigned epoch) const {
    if (base_.bands == 1) return;
    const int width = base_.extents.width;
    each_row([&](int mt, int half, int m) {
      for (int lower = 0; lower < 2; ++lower) {
        const int column = lower ? m - (count_ - width) : m;
        if (column < 0 || column >= width || m >= count_) continue;
        Word* to = edge(blockIdx.x, lower, epoch) + column * 4 * KP + lane_ % 4;
        GUNN_UNROLL
        for (int p = 0; p < KP; ++p) send_bits(to + 4 * p, values[mt][p][half], epoch);
      }
    });
  }
  // What neighbours have sent, into the border: what finish(pixel of the batch, first column, raw bits) makes of them.
  template <class Finish>
  GUNN_DEVICE void receive_edges(unsigned epoch, const Finish& finish) const {
    const int band = blockIdx.x % base_.bands, width = base_.extents.width;
    constexpr int kTogether = 4;
    const int words = width * 4 * KP;
    // The upper neighbour's lower edge goes above the first row, the lower one's upper edge below the last.
    const int begin = band == 0 ? words : 0, end = band == base_.bands - 1 ? words : 2 * words;
    for (int first = begin + threadIdx.x; first < end; first += kTogether * kThreadCount) {
      uint32_t raw[kTogether];
      receive(raw, epoch, "a neighbour's row", [&](int j) -> const Word* {
        const int e = first + j * kThreadCount, lower = e >= words;
        return e < end ? edge(blockIdx.x + (lower ? 1 : -1), 1 - lower, epoch) + e - lower * words : nullptr;
      });
      GUNN_UNROLL
      for (int j = 0; j < kTogether; ++j) {
        const int e = first + j * kThreadCount, lower = e >= words, at = e - lower * words;
        if (e >= end) break;
        const int column = at / (4 * KP), channel = at % (4 * KP) * kEach;
        const int row = lower ? base_.rows_of(blockIdx.x) + 1 : 0;
        Storage* to = shared_ + layout_.hidden + (row * (width + 2) + column + 1) * layout_.hidden_stride + channel;
        const int64_t pixel = base_.first_pixel(blockIdx.x) + (lower ? count_ : -width) + column;
        *reinterpret_cast<uint32_t*>(to) = finish(pixel, channel, raw[j]);
      }
    }
  }
  // The 3x3 convolution; transposed, with the opposite offsets.
  GUNN_DEVICE void spatial_steps(Sums<KT>& sums) const {
    constexpr int kPieces = 9 * KP, kDirection = transposed ? -1 : 1;  // of all taps
    const int row = (base_.extents.width + 2) * layout_.hidden_stride, matrix = lane_ / 8;
    GUNN_ROLLED
    for (int step = 0; step < (kPieces + 1) / 2; ++step) {
      const int piece = min(2 * step + matrix / 2, kPieces - 1), tap = piece / KP;
      const int offset =
          kDirection * ((tap / 3 - 1) * row + (tap % 3 - 1) * layout_.hidden_stride) + piece % KP * kPiece;
      uint32_t a[MT][4];
      GUNN_UNROLL
      for (int mt = 0; mt < MT; ++mt) load_matrices<false>(a[mt], shared_ + pixel_[mt] + offset);
      GUNN_UNROLL
      for (int n = 0; n < KT; n += 2) {
        uint32_t b[4];
        load_weights(b, weights(Kind::spatial), 8 * KT, n, step);
        GUNN_UNROLL
        for (int mt = 0; mt < MT; ++mt) {
          Precision::multiply(sums[mt][n], a[mt], {b[0], b[1]});
          if (n + 1 < KT) Precision::multiply(sums[mt][n + 1 < KT ? n + 1 : n], a[mt], {b[2], b[3]});
        }
      }
    }
  }
  // A product whose operand is in registers: `values` are sums of another, rounded, and at once fragments of pixels.
  template <int in, int out>
  GUNN_DEVICE void project_steps(const Packed<in>& values, Sums<out>& sums) const {
    GUNN_UNROLL
    for (int step = 0; step < (in + 1) / 2; ++step) {
      GUNN_UNROLL
      for (int n = 0; n < out; n += 2) {
        uint32_t b[4];
        load_weights(b, weights(Kind::project), 8 * out, n, step);
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
  template <int tiles, int pieces>
  static GUNN_DEVICE void round(const Sums<tiles>& sums, Packed<pieces>& z) {
    GUNN_UNROLL
    for (int mt = 0; mt < MT; ++mt) {
      GUNN_UNROLL
      for (int p = 0; p < pieces; ++p) {
        GUNN_UNROLL
        for (int half = 0; half < 2; ++half) {
          z[mt][p][half] = Bits::pack([&](int v) { return sum_of(sums[mt][p / Bits::kOfTile], p, half, v); });
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
  const int warp_, lane_, count_;
  Storage* streamed_;
  Tables& tables_;
  int pixel_[MT];
};

}  // namespace gunn
