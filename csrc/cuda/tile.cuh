// A tile of a product, by one block.
//
//   out[row][column] = sum over depth of a(row, depth) * b(column, depth)
//
// Owns:      the block; operands are staged in shared memory a chunk of depth at a time, sums stay in registers.
// Geometry:  SmallTile, 64 x 64, for every dtype and any sizes; LargeTile, 128 x 160, for 16 bits, where there are
//            enough of them: each operand is read once for so many of the other, so it reads half as much (staged.cuh).
// Operands:  16 bytes at a time, `kVector` neighbours of one pixel or of one row of packed weights. What a batch norm
// or
//            a ReLU does to them is done on the way (view.cuh), so a product never needs its operand in memory in its
//            final form.
// Layouts:   by_row, [row][depth]: depth are the neighbours in memory (channels of pixels, packed weights);
//            by_depth, [depth][row]: rows are (gradients of weights, whose depth is pixels).
// Barriers:  by the caller: two a chunk in small tiles; one in large ones, which have room for two chunks (ahead.cuh).
// Costs:     2*rows*columns*chunk FLOPs for (rows + columns)*chunk values: 16-bit chunks are 32 deep, others 16.
// Registers: 32 accumulators a thread; of a large tile 80.
// Shared:    by_row a row has 16 bytes more than a chunk, by_depth 8 elements more than the rows: what products read
//            together lies in different banks (float32 and float64 by_row: two ways). The finished tile takes their
//            place.
#pragma once

#include "cuda/precision.cuh"

namespace gunn {

// Of small tiles; also how weights are packed, and what element-wise kernels take.
constexpr int kRows = 64, kColumns = 64, kThreads = 128;

// How warps share a tile: each has 16 * kFragments rows, and one of kAcross parts of the columns.
struct SmallTile {
  static constexpr int kRows = gunn::kRows, kColumns = gunn::kColumns, kThreads = gunn::kThreads;
  static constexpr int kAcross = 1, kFragments = 1;
  static constexpr int kChunks = 1;  // in shared memory at once
};
struct LargeTile {
  static constexpr int kRows = 128, kColumns = 160, kThreads = 256;
  static constexpr int kAcross = 2, kFragments = 2;
  static constexpr int kChunks = 2;
};

// Tiles that `columns` are cut into, and the columns of each but the last: as equal as may be where one has more than
// weights are packed in.
template <class Tile>
__host__ GUNN_DEVICE int column_tiles(int columns) {
  return (columns + Tile::kColumns - 1) / Tile::kColumns;
}
template <class Tile>
__host__ GUNN_DEVICE int column_step(int columns) {
  if (Tile::kColumns == kColumns) return kColumns;
  const int tiles = column_tiles<Tile>(columns);
  return (columns + 8 * tiles - 1) / (8 * tiles) * 8;
}

// Blocks that share a multiprocessor at least: all the registers that this leaves (128; float64 168) without spilling a
// word. Left to itself the compiler aims a little higher, and spills. What a later unit reads is put together from two
// batch norms (`unit_input`): that takes a few registers more.
template <class Precision, class Tile = SmallTile, bool unit_input = false>
constexpr int kResident = Tile::kChunks > 1                                     ? 1
                          : unit_input || sizeof(typename Precision::Wide) == 8 ? 3
                                                                                : 4;

enum class Layout { by_row, by_depth };

// Up to `rows` pixels in a row of all the batch's pixels, and where in their images they are.
template <int rows>
struct PixelWindow {
  int64_t first;
  int count;
  int image[rows], row[rows], column[rows];
};

struct Pair {
  double a, b;
};

// The dynamic shared memory of every kernel with a tile.
template <class Precision, class Tile = SmallTile>
struct Pool {
  using Element = typename Precision::Element;
  using Wide = typename Precision::Wide;
  static constexpr int kBytes = static_cast<int>(sizeof(Element));
  static constexpr int kVector = 16 / kBytes;
  static constexpr int kDepth = kBytes == 2 ? 32 : 16;
  static constexpr int kRowStride = kDepth + kVector;
  static constexpr int kDepthStrideA = Tile::kRows + 8, kDepthStrideB = Tile::kColumns + 8;
  static constexpr int elements(int rows) {
    return rows * kRowStride > kDepth * (rows + 8) ? rows * kRowStride : kDepth * (rows + 8);
  }
  static constexpr int kOutStride = Tile::kColumns + 8;

  struct Operands {
    alignas(16) Element a[elements(Tile::kRows)];
    alignas(16) Element b[elements(Tile::kColumns)];
  };
  union {
    Operands operands[Tile::kChunks];
    Wide out[Tile::kRows * kOutStride];
  } tile;
  PixelWindow<Tile::kRows> window[Tile::kChunks];
  Pair parts[Tile::kThreads];
  int last;
};

// The sums of a tile, spread over the registers of the block. Columns from `columns` on are not computed.
template <class Precision, class Tile, bool tensor_cores = Precision::kTensorCores>
class Product;

template <class Precision, class Tile>
class Product<Precision, Tile, true> {
  using P = Pool<Precision, Tile>;
  static constexpr int kStep = 8 * 4 / P::kBytes;  // depth of one instruction
  static constexpr int kAcross = Tile::kAcross, kFragments = Tile::kFragments;
  static constexpr int kTiles = Tile::kColumns / kAcross / 8;
  static_assert(Tile::kThreads / 32 * 16 * kFragments == Tile::kRows * kAcross, "warps cover the tile");

 public:
  GUNN_DEVICE explicit Product(int columns) {
    const int warp = threadIdx.x / 32, share = (columns + 8 * kAcross - 1) / (8 * kAcross) * 8;
    row_ = warp / kAcross * 16 * kFragments;
    column_ = warp % kAcross * share;
    columns_ = min(columns - column_, share);
  }

  // One staged chunk.
  template <Layout layout>
  GUNN_DEVICE void multiply(const typename P::Operands& operands) {
    GUNN_UNROLL
    for (int k = 0; k < P::kDepth; k += kStep) {
      uint32_t a[kFragments][4];
      GUNN_UNROLL
      for (int f = 0; f < kFragments; ++f) load_a<layout>(a[f], operands.a, row_ + 16 * f, k);
      GUNN_UNROLL
      for (int n = 0; n < kTiles; n += 2) {
        if (8 * n >= columns_) break;
        uint32_t b[4];  // of two neighbours
        load_b<layout>(b, operands.b, column_ + 8 * n, k);
        GUNN_UNROLL
        for (int f = 0; f < kFragments; ++f) Precision::multiply(sums_[f][n], a[f], {b[0], b[1]});
        if (8 * n + 8 >= columns_) break;
        GUNN_UNROLL
        for (int f = 0; f < kFragments; ++f) Precision::multiply(sums_[f][n + 1], a[f], {b[2], b[3]});
      }
    }
  }
  template <class Visit>
  GUNN_DEVICE void visit(const Visit& visit) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    GUNN_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      if (8 * n >= columns_) break;
      GUNN_UNROLL
      for (int f = 0; f < kFragments; ++f) {
        GUNN_UNROLL
        for (int i = 0; i < 4; ++i) {
          visit(row_ + 16 * f + g + 8 * (i / 2), column_ + 8 * n + 2 * t + i % 2, sums_[f][n][i]);
        }
      }
    }
  }

 private:
  using Element = typename Precision::Element;

  // A fragment of 16 rows, and those of 16 columns: 8 x 8 words or, in 16 bits, values at a time (launch.cuh).
  template <Layout layout>
  static GUNN_DEVICE void load_a(uint32_t (&a)[4], const Element* tile, int row, int k) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    if constexpr (P::kBytes == 2) {
      const int matrix = lane / 8, i = lane % 8, low = 8 * (matrix % 2), high = 8 * (matrix / 2);
      load_matrices<layout == Layout::by_depth>(a, layout == Layout::by_row
                                                       ? tile + (row + low + i) * P::kRowStride + k + high
                                                       : tile + (k + high + i) * P::kDepthStrideA + row + low);
    } else {
      GUNN_UNROLL
      for (int r = 0; r < 4; ++r) {
        const int m = row + g + 8 * (r % 2), depth = k + t + 4 * (r / 2);
        a[r] = word(layout == Layout::by_row ? tile[m * P::kRowStride + depth] : tile[depth * P::kDepthStrideA + m]);
      }
    }
  }
  template <Layout layout>
  static GUNN_DEVICE void load_b(uint32_t (&b)[4], const Element* tile, int column, int k) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    if constexpr (P::kBytes == 2) {
      const int matrix = lane / 8, i = lane % 8, low = 8 * (matrix % 2), high = 8 * (matrix / 2);
      load_matrices<layout == Layout::by_depth>(b, layout == Layout::by_row
                                                       ? tile + (column + high + i) * P::kRowStride + k + low
                                                       : tile + (k + low + i) * P::kDepthStrideB + column + high);
    } else {
      GUNN_UNROLL
      for (int r = 0; r < 4; ++r) {
        const int n = column + g + 8 * (r / 2), depth = k + t + 4 * (r % 2);
        b[r] = word(layout == Layout::by_row ? tile[n * P::kRowStride + depth] : tile[depth * P::kDepthStrideB + n]);
      }
    }
  }
  static GUNN_DEVICE uint32_t word(float value) { return __float_as_uint(value); }

  int row_, column_, columns_;  // the warp's
  float sums_[kFragments][kTiles][4] = {};
};

template <class Precision>
class Product<Precision, SmallTile, false> {
  using P = Pool<Precision>;
  using Wide = typename Precision::Wide;

 public:
  GUNN_DEVICE explicit Product(int columns) : columns_(columns) {}

  template <Layout layout>
  GUNN_DEVICE void multiply(const typename P::Operands& operands) {
    const auto at = [](int row, int d) {
      return layout == Layout::by_row ? row * P::kRowStride + d : d * P::kDepthStrideA + row;
    };
    const int x = threadIdx.x % 16, y = threadIdx.x / 16;
    for (int d = 0; d < P::kDepth; ++d) {
      Wide a[kRows / 8];
      GUNN_UNROLL
      for (int j = 0; j < kRows / 8; ++j) a[j] = operands.a[at(y + 8 * j, d)];
      GUNN_UNROLL
      for (int i = 0; i < kColumns / 16; ++i) {
        if (16 * i >= columns_) break;
        const Wide b = operands.b[at(x + 16 * i, d)];
        GUNN_UNROLL
        for (int j = 0; j < kRows / 8; ++j) sums_[j][i] += a[j] * b;
      }
    }
  }
  template <class Visit>
  GUNN_DEVICE void visit(const Visit& visit) const {
    const int x = threadIdx.x % 16, y = threadIdx.x / 16;
    GUNN_UNROLL
    for (int j = 0; j < kRows / 8; ++j) {
      GUNN_UNROLL
      for (int i = 0; i < kColumns / 16; ++i) visit(y + 8 * j, x + 16 * i, sums_[j][i]);
    }
  }

 private:
  int columns_;
  Wide sums_[kRows / 8][kColumns / 16] = {};
};

// 16 bytes, read and written at once.
template <class T>
struct Vector {
  static constexpr int kSize = 16 / static_cast<int>(sizeof(T));
  T values[kSize];
};
template <class T>
GUNN_DEVICE Vector<T> load_vector(const T* from) {
  const uint4 words = *reinterpret_cast<const uint4*>(from);
  Vector<T> vector;
  memcpy(&vector, &words, sizeof words);
  return vector;
}
template <class T>
GUNN_DEVICE void store_vector(T* to, const Vector<T>& vector) {
  uint4 words;
  memcpy(&words, &vector, sizeof words);
  *reinterpret_cast<uint4*>(to) = words;
}

// Puts the finished tile where the operands were.
template <class Precision, class Tile>
GUNN_DEVICE void leave(Pool<Precision, Tile>& pool, const Product<Precision, Tile>& product) {
  __syncthreads();
  product.visit([&](int m, int n, typename Precision::Wide value) {
    pool.tile.out[m * Pool<Precision, Tile>::kOutStride + n] = value;
  });
  __syncthreads();
}

}  // namespace gunn
