// The whole forward of a layer in one launch: an image, or a band of its rows, for each block, whose state stays in
// shared memory from the first segment to the last.
//
// Owns:      compute block b has band b % bands of image b / bands: WARPS warps of 16 * MT pixels each. Clerk blocks,
//            behind them, have no pixels: each of their warps combines columns of statistics.
// Exchanges: three a segment (reduce with shortcut, spatial, project). A compute block sends each channel's mean and
//            squared deviations of its pixels as words (words.cuh); a clerk's warp takes the words of all blocks, in a
//            fixed tree, and sends scale and shift back. Two hops through L2, no barrier of the grid. A slot is used
//            again one segment later: by then every block has received the later exchanges of the segment, which needed
//            every block's earlier ones to have been taken. Bands send the rows of z1 at their edges to each other, as
//            words too; these slots take turns, as with given statistics nothing else keeps neighbours in step: who
//            sends segment i + 2's rows has received i + 1's, which its neighbour sent when it had taken i's.
// Waits:     are filled with the next segment's reduce: its product over all channels but those about to be written
//            back. After the write-back only the steps of depth with these channels remain.
// Needs:     all blocks resident at once: a cooperative launch. Given statistics and whole images need nothing.
// Shared:    state pixels * resident channels * 2 bytes; one segment's weights 2 * (n * (k + s) + 9 * k * k + k * s),
//            fetched ahead; the activations behind the reduce with a border. Channels that find no room are streamed
//            from a copy of the block's own in global memory, which L2 holds.
// Registers: MT * (KT + ST) * 4 sums of the reduce ahead, MT * KT * 4 of the 3x3.
// Costs:     x and y cross memory once. Weights, and streamed channels, come from L2 once a block and segment.
//
// z is rounded to storage before its moments are taken, as everywhere. 16-bit dtypes, one unit, k and s of one
// template.
#pragma once

#include "cuda/tables.cuh"
#include "cuda/weights.cuh"
#include "cuda/words.cuh"

namespace gunn {

enum class Kind { reduce, spatial, project };
constexpr int kKinds = 3, kMostColumns = 64;

__host__ GUNN_DEVICE Pack pack_of(Kind kind) {
  return kind == Kind::reduce ? Pack::reduce : kind == Kind::spatial ? Pack::spatial : Pack::project;
}

// What the launch is told.
template <class Precision>
struct Chain {
  using Storage = typename Precision::Storage;

  Extents extents;
  FeatureMap<const Storage> x;
  FeatureMap<Storage> y;
  const Storage* packed[kKinds];          // weights.cuh
  UnitTensors<const float*> unit;         // batch norms
  Tables<float> tables;                   // with given statistics
  float *mean, *var;                      // (P, rows), with batch statistics
  Word *words[kKinds], *results[kKinds];  // (columns, 2, blocks), (columns, 2)
  Word* edges;                            // (2 turns, blocks, upper and lower, width * k / 2)
  Storage* streamed;                      // (blocks, pixels of a block, streamed channels)
  double eps;
  int bands, band_rows, blocks;  // bands of an image and their rows, the last one's fewer; blocks with pixels
  int resident;                  // channels in shared memory, a multiple of 16
  bool batch_statistics;

  __host__ GUNN_DEVICE int streamed_channels() const { return (extents.channels + 15) / 16 * 16 - resident; }
  GUNN_DEVICE int rows_of(int block) const { return min(band_rows, extents.height - block % bands * band_rows); }
};

// Where things lie in shared memory, in elements of 16 bits; the same function for host and device.
struct ChainLayout {
  int state_stride, hidden_stride;
  int weights[kKinds], hidden, floats;  // begins
  int bytes;

  __host__ GUNN_DEVICE ChainLayout(const Extents& extents, int pixels, int band_rows, int resident) {
    // Strides are odd multiples of 16 bytes: eight rows of one matrix lie in different banks.
    state_stride = (resident / 8 | 1) * 8;
    hidden_stride = (extents.k() / 8 | 1) * 8;
    int next = pixels * state_stride;
    for (int kind = 0; kind < kKinds; ++kind) {
      const PackShape shape = pack_shape(extents, pack_of(static_cast<Kind>(kind)), 0);
      weights[kind] = next;
      next += shape.rows * ((shape.depth + 31) / 32) * 32;
    }
    hidden = next;
    next += (band_rows + 2) * (extents.width + 2) * hidden_stride;
    floats = (next + 7) / 8 * 8;
    bytes = floats * 2;
  }
};

// Behind the layout's elements.
template <int warps>
struct ChainFloats {
  float scale[kKinds][kMostColumns], shift[kKinds][kMostColumns];
  float mean[warps][kMostColumns], squares[warps][kMostColumns];
};

// What a column of a stage stands for; row -1 in the padding.
struct ColumnPlace {
  Norm norm;
  int channel, row;
};
GUNN_DEVICE ColumnPlace place_of(const Extents& extents, Kind kind, int column) {
  const bool behind = kind == Kind::reduce && column >= extents.k();
  const Norm norm = behind                  ? Norm::shortcut
                    : kind == Kind::reduce  ? Norm::reduce
                    : kind == Kind::spatial ? Norm::spatial
                                            : Norm::project;
  const int channel = behind ? column - extents.k() : column;
  const bool real = channel < extents.channels_of(norm) && (norm != Norm::shortcut || extents.shortcut);
  return {norm, channel, real ? extents.row(norm, 0) + channel : -1};
}

template <class Precision, int KT, int ST, int WARPS, int MT, bool streams>
class ComputeBlock {
  using Storage = typename Precision::Storage;
  static constexpr int kThreadCount = 32 * WARPS, kPixels = 16 * WARPS * MT;
  template <int tiles>
  using Sums = float[MT][tiles][4];
  template <int tiles>
  using Packed = uint32_t[MT][tiles][2];  // rounded: rows g and g + 8, columns 2t and 2t + 1

 public:
  GUNN_DEVICE ComputeBlock(const Chain<Precision>& chain, Storage* shared)
      : chain_(chain),
        layout_(chain.extents, kPixels, chain.band_rows, chain.resident),
        shared_(shared),
        floats_(*reinterpret_cast<ChainFloats<WARPS>*>(shared + layout_.floats)),
        warp_(threadIdx.x / 32),
        lane_(threadIdx.x % 32),
        count_(chain.rows_of(blockIdx.x) * chain.extents.width),
        streamed_(chain.streamed + static_cast<int64_t>(blockIdx.x) * kPixels * chain.streamed_channels()) {}

  GUNN_DEVICE void run() {
    const Extents& extents = chain_.extents;
    fetch(Kind::reduce, 0);
    fetch(Kind::spatial, 0);
    fetch(Kind::project, 0);
    load_state();
    find_pixels();
    copy_async_wait<0>();
    __syncthreads();
    const int steps = (extents.channels + 15) / 16;
    Sums<KT + ST> ahead = {};
    reduce_steps(ahead, 0, steps, -1, -1);
    for (int i = 0; i < extents.segments; ++i) {
      const bool more = i + 1 < extents.segments;
      const int first_late = i * extents.segment / 16, last_late = ((i + 1) * extents.segment - 1) / 16;
      const unsigned epoch = i + 1;

      // z1 into the padded image, raw; zs stays in registers.
      Packed<KT + ST> z1;
      round(ahead, z1);
      store_hidden(z1);
      send_edges(z1, epoch);
      exchange(Kind::reduce, z1, epoch);
      if (more) fetch(Kind::reduce, i + 1);
      settle(Kind::reduce, i, epoch);
      activate_hidden();
      receive_edges(epoch);
      __syncthreads();

      Sums<KT> sums = {};
      spatial_steps(sums);
      Packed<KT> z2;
      round(sums, z2);
      exchange(Kind::spatial, z2, epoch);
      clear(ahead);
      if (more) {
        fetch(Kind::spatial, i + 1);
        copy_async_wait<1>();  // the reduce's, not the spatial's
        __syncthreads();
        reduce_steps(ahead, 0, steps / 2, first_late, last_late);
      }
      settle(Kind::spatial, i, epoch);

      Sums<ST> outputs = {};
      project_steps(z2, outputs);
      Packed<ST> z3;
      round(outputs, z3);
      exchange(Kind::project, z3, epoch);
      if (more) {
        fetch(Kind::project, i + 1);
        reduce_steps(ahead, steps / 2, steps, first_late, last_late);
      }
      settle(Kind::project, i, epoch);
      write_back(i, z3, z1);
      // A warp reads the state of its own pixels only.
      __syncwarp();
      if (more) {
        copy_async_wait<0>();
        reduce_steps_of(ahead, first_late, last_late);
        __syncthreads();  // all weights have come, and those of the reduce have been read
      }
    }
    __syncthreads();
    store_state();
  }

 private:
  static GUNN_DEVICE int columns_of(Kind kind) {
    return 8 * (kind == Kind::reduce ? KT + ST : kind == Kind::spatial ? KT : ST);
  }
  GUNN_DEVICE Storage* weights(Kind kind) const { return shared_ + layout_.weights[static_cast<int>(kind)]; }

  // ---- Weights: rows of 32 values of depth, whose 16-byte pieces are exchanged so that eight rows lie in all banks.

  static GUNN_DEVICE int piece(int row, int piece) { return row * 32 + (piece ^ (row >> 1 & 3)) * 8; }

  GUNN_DEVICE void fetch(Kind kind, int segment) const {
    const PackShape shape = pack_shape(chain_.extents, pack_of(kind), 0);
    const int pieces = static_cast<int>(shape.size<Precision>() / 8);
    const Storage* from = chain_.packed[static_cast<int>(kind)] + segment * shape.size<Precision>();
    Storage* to = weights(kind);
    for (int at = threadIdx.x; at < pieces; at += kThreadCount) {
      copy_async<16>(to + piece(at / 4, at % 4), from + at * 8);
    }
    copy_async_commit();
  }
  // Fragments of two neighbouring tiles of 8 columns, at a step of 16 of depth; `rows` in a chunk.
  GUNN_DEVICE void load_weights(uint32_t (&b)[4], const Storage* from, int rows, int tile, int step) const {
    const int matrix = lane_ / 8, row = min(8 * (tile + matrix / 2) + lane_ % 8, rows - 1);
    load_matrices<false>(b, from + step / 2 * rows * 32 + piece(row, step % 2 * 2 + matrix % 2));
  }

  // ---- The state

  // Where the state has a pixel's channel.
  GUNN_DEVICE Storage* at(int m, int channel) const {
    if (!streams || channel < chain_.resident) return shared_ + m * layout_.state_stride + channel;
    return streamed_ + static_cast<int64_t>(m) * chain_.streamed_channels() + channel - chain_.resident;
  }
  // Pixel m of the block, from the beginning of its image.
  template <class Scalar>
  GUNN_DEVICE Scalar* pixel_of(const FeatureMap<Scalar>& map, int m) const {
    const int width = chain_.extents.width, row = blockIdx.x % chain_.bands * chain_.band_rows + m / width;
    return map.data + static_cast<int64_t>(blockIdx.x / chain_.bands) * map.batch + row * map.row +
           m % width * map.column;
  }
  GUNN_DEVICE void load_state() {
    const Extents& extents = chain_.extents;
    const int channels = chain_.resident + chain_.streamed_channels();
    const bool pixels_fast = chain_.x.column < chain_.x.channel;
    for (int e = threadIdx.x; e < kPixels * channels; e += kThreadCount) {
      const int m = pixels_fast ? e % kPixels : e / channels, c = pixels_fast ? e / kPixels : e % channels;
      const bool real = m < count_ && c < extents.channels;
      *at(m, c) = real ? pixel_of(chain_.x, m)[c * chain_.x.channel] : from_float<Storage>(0.0f);
    }
    const int border = (chain_.band_rows + 2) * (extents.width + 2) * layout_.hidden_stride;
    for (int e = threadIdx.x; e < border; e += kThreadCount) {
      shared_[layout_.hidden + e] = from_float<Storage>(0.0f);
    }
  }
  GUNN_DEVICE void store_state() const {
    const Extents& extents = chain_.extents;
    const bool pixels_fast = chain_.y.column < chain_.y.channel;
    for (int e = threadIdx.x; e < count_ * extents.channels; e += kThreadCount) {
      const int m = pixels_fast ? e % count_ : e / extents.channels;
      const int c = pixels_fast ? e / count_ : e % extents.channels;
      pixel_of(chain_.y, m)[c * chain_.y.channel] = *at(m, c);
    }
  }

  // Steps of 16 channels in [from, to), but for those in [first_late, last_late].
  GUNN_DEVICE void reduce_steps(Sums<KT + ST>& sums, int from, int to, int first_late, int last_late) const {
    GUNN_ROLLED
    for (int step = from; step < to; ++step) {
      if (step < first_late || step > last_late) reduce_step(sums, step);
    }
  }
  GUNN_DEVICE void reduce_steps_of(Sums<KT + ST>& sums, int first, int last) const {
    GUNN_ROLLED
    for (int step = first; step <= last; ++step) reduce_step(sums, step);
  }
  // Two fragments of pixels at a time: with all four of the largest block the registers would not do.
  GUNN_DEVICE void reduce_step(Sums<KT + ST>& sums, int step) const {
    constexpr int kTogether = MT < 2 ? MT : 2;
    const int rows = chain_.extents.reduce_columns(0);
    GUNN_UNROLL
    for (int first = 0; first < MT; first += kTogether) {
      uint32_t a[kTogether][4];
      GUNN_UNROLL
      for (int j = 0; j < kTogether; ++j) load_pixels(a[j], first + j, step);
      GUNN_UNROLL
      for (int n = 0; n < KT + ST; n += 2) {
        if (8 * n >= rows) break;
        uint32_t b[4];
        load_weights(b, weights(Kind::reduce), rows, n, step);
        GUNN_UNROLL
        for (int j = 0; j < kTogether; ++j) {
          Precision::multiply(sums[first + j][n], a[j], {b[0], b[1]});
          if (n + 1 >= KT + ST) continue;
          Precision::multiply(sums[first + j][n + 1 < KT + ST ? n + 1 : n], a[j], {b[2], b[3]});
        }
      }
    }
  }
  GUNN_DEVICE void load_pixels(uint32_t (&a)[4], int mt, int step) const {
    if (!streams || 16 * step < chain_.resident) {
      const int matrix = lane_ / 8, row = first_row(mt) + matrix % 2 * 8 + lane_ % 8;
      load_matrices<false>(a, shared_ + row * layout_.state_stride + step * 16 + matrix / 2 * 8);
    } else {
      GUNN_UNROLL
      for (int half = 0; half < 2; ++half) {
        const Storage* from = at(first_row(mt) + 8 * half + lane_ / 4, 16 * step + 2 * (lane_ % 4));
        a[half] = *reinterpret_cast<const uint32_t*>(from);
        a[half + 2] = *reinterpret_cast<const uint32_t*>(from + 8);
      }
    }
  }

  // ---- The hidden activations: the image with a border of one pixel

  GUNN_DEVICE int first_row(int mt) const { return (warp_ * MT + mt) * 16; }
  GUNN_DEVICE int hidden_at(int m) const {
    const int width = chain_.extents.width, inside = min(m, count_ - 1);
    return layout_.hidden + ((inside / width + 1) * (width + 2) + inside % width + 1) * layout_.hidden_stride;
  }
  GUNN_DEVICE void find_pixels() {
    GUNN_UNROLL
    for (int mt = 0; mt < MT; ++mt) pixel_[mt] = hidden_at(first_row(mt) + lane_ / 8 % 2 * 8 + lane_ % 8);
  }
  // Calls visit(row, its place) for the two rows of each fragment that the lane has values of.
  template <class Visit>
  GUNN_DEVICE void each_row(const Visit& visit) const {
    GUNN_UNROLL
    for (int mt = 0; mt < MT; ++mt) {
      GUNN_UNROLL
      for (int half = 0; half < 2; ++half) visit(mt, half, first_row(mt) + 8 * half + lane_ / 4);
    }
  }
  GUNN_DEVICE void store_hidden(const Packed<KT + ST>& z1) const {
    each_row([&](int mt, int half, int m) {
      if (m >= count_) return;
      Storage* to = shared_ + hidden_at(m) + 2 * (lane_ % 4);
      GUNN_UNROLL
      for (int n = 0; n < KT; ++n) *reinterpret_cast<uint32_t*>(to + 8 * n) = z1[mt][n][half];
    });
  }
  GUNN_DEVICE void activate_hidden() const {
    each_row([&](int mt, int half, int m) {
      if (m >= count_) return;
      Storage* to = shared_ + hidden_at(m) + 2 * (lane_ % 4);
      GUNN_UNROLL
      for (int n = 0; n < KT; ++n) {
        uint32_t& pair = *reinterpret_cast<uint32_t*>(to + 8 * n);
        pair = activate(Kind::reduce, n, pair);
      }
      static_cast<void>(mt), static_cast<void>(half);
    });
  }
  // The band's first and last row of z1, raw, for the bands beside it.
  GUNN_DEVICE Word* edge(int block, int lower, unsigned epoch) const {
    const int64_t words = chain_.extents.width * 4 * KT;
    return chain_.edges + ((epoch % 2 * chain_.blocks + block) * 2 + lower) * words;
  }
  GUNN_DEVICE void send_edges(const Packed<KT + ST>& z1, unsigned epoch) const {
    if (chain_.bands == 1) return;
    const int width = chain_.extents.width, rows = chain_.rows_of(blockIdx.x);
    each_row([&](int mt, int half, int m) {
      for (int lower = 0; lower < 2; ++lower) {
        if (m >= count_ || m / width != (lower ? rows - 1 : 0)) continue;
        Word* to = edge(blockIdx.x, lower, epoch) + m % width * 4 * KT + lane_ % 4;
        GUNN_UNROLL
        for (int n = 0; n < KT; ++n) send_bits(to + 4 * n, z1[mt][n][half], epoch);
      }
    });
  }
  GUNN_DEVICE void receive_edges(unsigned epoch) const {
    const int band = blockIdx.x % chain_.bands, width = chain_.extents.width;
    for (int lower = 0; lower < 2; ++lower) {
      if (band == (lower ? chain_.bands - 1 : 0)) continue;
      // The upper neighbour's lower edge goes above the first row, the lower one's upper edge below the last.
      const Word* from = edge(blockIdx.x + (lower ? 1 : -1), 1 - lower, epoch);
      Storage* row =
          shared_ + layout_.hidden + (lower ? chain_.rows_of(blockIdx.x) + 1 : 0) * (width + 2) * layout_.hidden_stride;
      for (int e = threadIdx.x; e < width * 4 * KT; e += kThreadCount) {
        const int column = e / (4 * KT), pair = e % (4 * KT);
        const uint32_t raw = receive_bits(from + e, epoch, "a neighbour's row");
        *reinterpret_cast<uint32_t*>(row + (column + 1) * layout_.hidden_stride + 2 * pair) =
            activate_columns(Kind::reduce, 2 * pair, raw);
      }
    }
  }
  GUNN_DEVICE void spatial_steps(Sums<KT>& sums) const {
    constexpr int kGroups = 9 * KT;  // of 8 channels of a tap
    const int row = (chain_.extents.width + 2) * layout_.hidden_stride, matrix = lane_ / 8;
    GUNN_ROLLED
    for (int step = 0; step < (kGroups + 1) / 2; ++step) {
      const int group = min(2 * step + matrix / 2, kGroups - 1), tap = group / KT;
      const int offset = (tap / 3 - 1) * row + (tap % 3 - 1) * layout_.hidden_stride + group % KT * 8;
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
  // The 3x3's results are the operand, from register to register.
  GUNN_DEVICE void project_steps(const Packed<KT>& z2, Sums<ST>& sums) const {
    GUNN_UNROLL
    for (int step = 0; step < (KT + 1) / 2; ++step) {
      constexpr int kLast = KT - 1;
      GUNN_UNROLL
      for (int n = 0; n < ST; n += 2) {
        uint32_t b[4];
        load_weights(b, weights(Kind::project), 8 * ST, n, step);
        GUNN_UNROLL
        for (int mt = 0; mt < MT; ++mt) {
          uint32_t a[4] = {activate(Kind::spatial, 2 * step, z2[mt][2 * step][0]),
                           activate(Kind::spatial, 2 * step, z2[mt][2 * step][1]), 0, 0};
          if (2 * step < kLast) {
            const int next = 2 * step < kLast ? 2 * step + 1 : kLast;
            a[2] = activate(Kind::spatial, next, z2[mt][next][0]);
            a[3] = activate(Kind::spatial, next, z2[mt][next][1]);
          }
          Precision::multiply(sums[mt][n], a, {b[0], b[1]});
          if (n + 1 < ST) Precision::multiply(sums[mt][n + 1 < ST ? n + 1 : n], a, {b[2], b[3]});
        }
      }
    }
  }

  // ---- Pairs of 16-bit values, columns 2t and 2t + 1 of tile n

  static GUNN_DEVICE uint32_t pack(float low, float high) {
    return from_float<Storage>(low).bits | static_cast<uint32_t>(from_float<Storage>(high).bits) << 16;
  }
  static GUNN_DEVICE float low(uint32_t pair) { return to_float(Storage{static_cast<uint16_t>(pair)}); }
  static GUNN_DEVICE float high(uint32_t pair) { return to_float(Storage{static_cast<uint16_t>(pair >> 16)}); }
  GUNN_DEVICE int column(int tile) const { return 8 * tile + 2 * (lane_ % 4); }
  GUNN_DEVICE float normed(Kind kind, int column, float value) const {
    const int k = static_cast<int>(kind);
    return value * floats_.scale[k][column] + floats_.shift[k][column];
  }
  GUNN_DEVICE uint32_t activate_columns(Kind kind, int column, uint32_t pair) const {
    return pack(relu(normed(kind, column, low(pair))), relu(normed(kind, column + 1, high(pair))));
  }
  GUNN_DEVICE uint32_t activate(Kind kind, int tile, uint32_t pair) const {
    return activate_columns(kind, column(tile), pair);
  }
  template <int tiles>
  static GUNN_DEVICE void round(const Sums<tiles>& sums, Packed<tiles>& z) {
    GUNN_UNROLL
    for (int mt = 0; mt < MT; ++mt) {
      GUNN_UNROLL
      for (int n = 0; n < tiles; ++n) {
        z[mt][n][0] = pack(sums[mt][n][0], sums[mt][n][1]);
        z[mt][n][1] = pack(sums[mt][n][2], sums[mt][n][3]);
      }
    }
  }
  static GUNN_DEVICE void clear(Sums<KT + ST>& sums) {
    GUNN_UNROLL
    for (int mt = 0; mt < MT; ++mt) {
      GUNN_UNROLL
      for (int n = 0; n < KT + ST; ++n) sums[mt][n][0] = sums[mt][n][1] = sums[mt][n][2] = sums[mt][n][3] = 0;
    }
  }

  // ---- Statistics

  static GUNN_DEVICE float over_rows(float value) {
    GUNN_UNROLL
    for (int bits = 4; bits < 32; bits *= 2) value += __shfl_xor_sync(~0u, value, bits);
    return value;
  }
  // The image's mean and squared deviations of every column, sent to the clerks.
  template <int tiles>
  GUNN_DEVICE void exchange(Kind kind, const Packed<tiles>& z, unsigned epoch) {
    if (!chain_.batch_statistics) return __syncthreads();
    const int in_warp = max(0, min(count_ - first_row(0), 16 * MT));
    GUNN_UNROLL
    for (int n = 0; n < tiles; ++n) {
      float sum[2] = {};
      each_row([&](int mt, int half, int m) {
        if (m < count_) sum[0] += low(z[mt][n][half]), sum[1] += high(z[mt][n][half]);
      });
      float mean[2], squares[2] = {};
      GUNN_UNROLL
      for (int j = 0; j < 2; ++j) mean[j] = in_warp > 0 ? over_rows(sum[j]) / static_cast<float>(in_warp) : 0;
      each_row([&](int mt, int half, int m) {
        if (m >= count_) return;
        const float apart[2] = {low(z[mt][n][half]) - mean[0], high(z[mt][n][half]) - mean[1]};
        squares[0] += apart[0] * apart[0], squares[1] += apart[1] * apart[1];
      });
      GUNN_UNROLL
      for (int j = 0; j < 2; ++j) {
        const float all = over_rows(squares[j]);
        if (lane_ / 4 != 0) continue;
        floats_.mean[warp_][column(n) + j] = mean[j];
        floats_.squares[warp_][column(n) + j] = all;
      }
    }
    __syncthreads();
    const int mine = threadIdx.x;
    if (mine < 8 * tiles && channel_of(kind, mine) >= 0) {
      float mean = 0, squares = 0;
      const auto values = [&](int warp) { return static_cast<float>(max(0, min(count_ - warp * 16 * MT, 16 * MT))); };
      for (int warp = 0; warp < WARPS; ++warp) mean += values(warp) * floats_.mean[warp][mine];
      mean /= static_cast<float>(count_);
      for (int warp = 0; warp < WARPS; ++warp) {
        const float apart = floats_.mean[warp][mine] - mean;
        squares += floats_.squares[warp][mine] + values(warp) * (apart * apart);
      }
      Word* words = chain_.words[static_cast<int>(kind)] + 2 * mine * chain_.blocks + blockIdx.x;
      send(words, mean, epoch);
      send(words + chain_.blocks, squares, epoch);
    }
  }
  // Scale and shift of the stage, for every thread.
  GUNN_DEVICE void settle(Kind kind, int segment, unsigned epoch) {
    const int mine = threadIdx.x, k = static_cast<int>(kind);
    if (mine < columns_of(kind)) {
      float scale = 0, shift = 0;
      if (channel_of(kind, mine) >= 0) {
        if (chain_.batch_statistics) {
          scale = receive(chain_.results[k] + 2 * mine, epoch, "a scale");
          shift = receive(chain_.results[k] + 2 * mine + 1, epoch, "a shift");
        } else {
          const Norm norm = kind == Kind::reduce ? Norm::reduce : kind == Kind::spatial ? Norm::spatial : Norm::project;
          const int64_t at =
              static_cast<int64_t>(segment) * chain_.extents.z_rows() + chain_.extents.z_row(norm, 0) + mine;
          scale = chain_.tables.scale[at], shift = chain_.tables.shift[at];
        }
      }
      floats_.scale[k][mine] = scale, floats_.shift[k][mine] = shift;
    }
    __syncthreads();
  }
  GUNN_DEVICE int channel_of(Kind kind, int column) const { return place_of(chain_.extents, kind, column).row; }

  GUNN_DEVICE void write_back(int segment, const Packed<ST>& z3, const Packed<KT + ST>& z1) const {
    const Extents& extents = chain_.extents;
    each_row([&](int mt, int half, int m) {
      if (m >= count_) return;
      GUNN_UNROLL
      for (int n = 0; n < ST; ++n) {
        GUNN_UNROLL
        for (int j = 0; j < 2; ++j) {
          const int channel = column(n) + j;
          if (channel >= extents.segment) continue;
          float out = normed(Kind::project, channel, j == 0 ? low(z3[mt][n][half]) : high(z3[mt][n][half]));
          if (extents.shortcut) {
            const uint32_t pair = z1[mt][KT + n][half];
            out += normed(Kind::reduce, 8 * KT + channel, j == 0 ? low(pair) : high(pair));
          }
          out = to_float(from_float<Storage>(out));
          Storage* to = at(m, segment * extents.segment + channel);
          if (extents.residual) out += to_float(*to);
          *to = from_float<Storage>(out);
        }
      }
    });
  }

  const Chain<Precision>& chain_;
  const ChainLayout layout_;
  Storage* shared_;
  ChainFloats<WARPS>& floats_;
  const int warp_, lane_, count_;
  Storage* streamed_;
  int pixel_[MT];
};

// A clerk's warp: its columns of every exchange, in order.
template <class Precision, int KT, int ST, int WARPS>
GUNN_DEVICE void combine_statistics(const Chain<Precision>& chain) {
  const Extents& extents = chain.extents;
  const int lane = threadIdx.x % 32, blocks = chain.blocks;
  const int mine = (blockIdx.x - blocks) * WARPS + threadIdx.x / 32, clerks = (gridDim.x - blocks) * WARPS;
  const float all = static_cast<float>(extents.pixels);
  const auto values = [&](int block) { return static_cast<float>(chain.rows_of(block) * extents.width); };
  const auto over_lanes = [](float value) {
    GUNN_UNROLL
    for (int bits = 1; bits < 32; bits *= 2) value += __shfl_xor_sync(~0u, value, bits);
    return value;
  };
  for (int i = 0; i < extents.segments; ++i) {
    const unsigned epoch = i + 1;
    GUNN_UNROLL
    for (int k = 0; k < kKinds; ++k) {
      const int columns = 8 * (k == 0 ? KT + ST : k == 1 ? KT : ST);
      for (int column = mine; column < columns; column += clerks) {
        const ColumnPlace place = place_of(extents, static_cast<Kind>(k), column);
        if (place.row < 0) continue;
        const Word* words = chain.words[k] + 2 * column * blocks;
        float sum = 0;
        for (int b = lane; b < blocks; b += 32) sum += values(b) * receive(words + b, epoch, "a block's mean");
        const float mean = over_lanes(sum) / all;
        float squares = 0;
        for (int b = lane; b < blocks; b += 32) {
          const float apart = receive(words + b, epoch, "a block's mean") - mean;
          squares += receive(words + blocks + b, epoch, "a block's deviations") + values(b) * (apart * apart);
        }
        const float var = over_lanes(squares) / all;
        if (lane != 0) continue;
        const int64_t at = static_cast<int64_t>(i) * extents.channels_of(place.norm) + place.channel;
        const UnitTensors<const float*>& unit = chain.unit;
        const float weight = (place.norm == Norm::reduce     ? unit.reduce_weight
                              : place.norm == Norm::shortcut ? unit.shortcut_weight
                              : place.norm == Norm::spatial  ? unit.spatial_weight
                                                             : unit.project_weight)[at];
        const float bias = (place.norm == Norm::reduce     ? unit.reduce_bias
                            : place.norm == Norm::shortcut ? unit.shortcut_bias
                            : place.norm == Norm::spatial  ? unit.spatial_bias
                                                           : unit.project_bias)[at];
        const float inverse = inverse_deviation(var, chain.eps), scale = weight * inverse;
        send(chain.results[k] + 2 * column, scale, epoch);
        send(chain.results[k] + 2 * column + 1, bias - mean * scale, epoch);
        const int64_t row = static_cast<int64_t>(i) * extents.row(Norm::reduce, 1) + place.row;
        chain.mean[row] = mean, chain.var[row] = var;
      }
    }
  }
}

template <class Precision, int KT, int ST, int WARPS, int MT, bool streams>
__global__ void __launch_bounds__(32 * WARPS, 1) persistent_forward(Chain<Precision> chain) {
  if (static_cast<int>(blockIdx.x) >= chain.blocks) return combine_statistics<Precision, KT, ST, WARPS>(chain);
  GUNN_DYNAMIC_SHARED(typename Precision::Storage, shared);
  ComputeBlock<Precision, KT, ST, WARPS, MT, streams>(chain, shared).run();
}

}  // namespace gunn
