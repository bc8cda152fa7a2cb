// A tile of a product: 64 rows x 64 columns, one block of 128 threads.
//
//   out[row][column] = sum over depth of a(row, depth) * b(column, depth)
//
// Owns:      the block; operands are staged in shared memory a chunk of depth at a time, sums stay in registers.
// Operands:  loaders. A loader says where its values come from and what is done to them on the way (batch norm, ReLU,
//            a shift of the pixel), so a product never needs its operand in memory in its final form:
//                Row row(int m);  Column column(int64_t k);  Wide value(Row, Column);  bool rows_fast;
//            `valid` of a Row says whether it exists; rows that do not are zeros. rows_fast says which neighbours are
//            neighbours in memory, and so in a warp: rows or depth.
// Barriers:  two a chunk.
// Costs:     2*64*64*chunk FLOPs for 128*chunk values staged: 16-bit chunks are 32 deep, others 16.
// Registers: 32 accumulators a thread.
// Shared:    operands padded to 20 words (tensor cores) or 17 elements a row, free of bank conflicts where products
//            read them; the finished tile takes their place.
#pragma once

#include "cuda/precision.cuh"

namespace gunn {

constexpr int kRows = 64, kColumns = 64, kThreads = 128;

// 64 pixels in a row of all the batch's pixels, and where in their images they are.
struct PixelWindow {
  int64_t first;
  int count;  // of them, fewer at the end
  int image[kRows], row[kRows], column[kRows];
};

struct Pair {
  double a, b;
};

// The dynamic shared memory of every kernel with a tile.
template <class Precision>
struct Pool {
  using Element = typename Precision::Element;
  using Wide = typename Precision::Wide;
  static constexpr int kDepth = Precision::kTensorCores ? 16 * 4 / sizeof(Element) : 16;
  static constexpr int kStride = Precision::kTensorCores ? 20 * 4 / sizeof(Element) : 17;
  static constexpr int kOutStride = kColumns + 8;

  struct Operands {
    alignas(16) Element a[kRows * kStride];
    alignas(16) Element b[kColumns * kStride];
  };
  union {
    Operands operands;
    Wide out[kRows * kOutStride];
  } tile;
  PixelWindow window;
  Pair halves[2 * kColumns];
  int last;
};

// The sums of a tile, spread over the registers of the block.
template <class Precision, bool tensor_cores = Precision::kTensorCores>
class Product;

template <class Precision>
class Product<Precision, true> {
 public:
  // One staged chunk; columns from `columns` on are not computed.
  GUNN_DEVICE void multiply(const typename Pool<Precision>::Operands& operands, int columns) {
    constexpr int kWords = Pool<Precision>::kStride * static_cast<int>(sizeof(typename Precision::Element)) / 4;
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const uint32_t* a_words = reinterpret_cast<const uint32_t*>(operands.a) + (16 * warp + g) * kWords + t;
    const uint32_t* b_words = reinterpret_cast<const uint32_t*>(operands.b) + g * kWords + t;
    GUNN_UNROLL
    for (int step = 0; step < 16; step += 8) {
      const uint32_t a[4] = {a_words[step], a_words[8 * kWords + step], a_words[step + 4],
                             a_words[8 * kWords + step + 4]};
      GUNN_UNROLL
      for (int n = 0; n < kColumns / 8; ++n) {
        if (8 * n >= columns) break;
        const uint32_t b[2] = {b_words[8 * n * kWords + step], b_words[8 * n * kWords + step + 4]};
        Precision::multiply(sums_[n], a, b);
      }
    }
  }
  template <class Visit>
  GUNN_DEVICE void visit(const Visit& visit) const {
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    GUNN_UNROLL
    for (int n = 0; n < kColumns / 8; ++n) {
      GUNN_UNROLL
      for (int i = 0; i < 4; ++i) visit(16 * warp + g + 8 * (i / 2), 8 * n + 2 * t + i % 2, sums_[n][i]);
    }
  }

 private:
  float sums_[kColumns / 8][4] = {};
};

template <class Precision>
class Product<Precision, false> {
  using Wide = typename Precision::Wide;

 public:
  GUNN_DEVICE void multiply(const typename Pool<Precision>::Operands& operands, int columns) {
    constexpr int S = Pool<Precision>::kStride;
    const int x = threadIdx.x % 16, y = threadIdx.x / 16;
    for (int d = 0; d < Pool<Precision>::kDepth; ++d) {
      Wide a[kRows / 8];
      GUNN_UNROLL
      for (int j = 0; j < kRows / 8; ++j) a[j] = operands.a[(y + 8 * j) * S + d];
      GUNN_UNROLL
      for (int i = 0; i < kColumns / 16; ++i) {
        if (16 * i >= columns) break;
        const Wide b = operands.b[(x + 16 * i) * S + d];
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
  Wide sums_[kRows / 8][kColumns / 16] = {};
};

// Depth [first, first + kDepth) of an operand, zeros from `depth` on.
template <class Precision, class Loader>
GUNN_DEVICE void stage(typename Precision::Element* to, const Loader& load, int64_t first, int64_t depth) {
  using Wide = typename Precision::Wide;
  constexpr int D = Pool<Precision>::kDepth, S = Pool<Precision>::kStride;
  const int thread = threadIdx.x;
  if (load.rows_fast) {
    const int m = thread % kRows;
    const auto row = load.row(m);
    for (int d = thread / kRows; d < D; d += kThreads / kRows) {
      Wide value = 0;
      if (row.valid && first + d < depth) value = load.value(row, load.column(first + d));
      to[m * S + d] = Precision::element(value);
    }
  } else {
    const int d = thread % D;
    typename Loader::Column column{};
    const bool inside = first + d < depth;
    if (inside) column = load.column(first + d);
    for (int m = thread / D; m < kRows; m += kThreads / D) {
      Wide value = 0;
      if (inside) {
        const auto row = load.row(m);
        if (row.valid) value = load.value(row, column);
      }
      to[m * S + d] = Precision::element(value);
    }
  }
}

// Adds the whole depth to the product. Begins with a barrier: what the loaders read may have been written just before.
template <class Precision, class A, class B>
GUNN_DEVICE void accumulate(Pool<Precision>& pool, Product<Precision>& product, const A& a, const B& b, int64_t depth,
                            int columns) {
  for (int64_t first = 0; first < depth; first += Pool<Precision>::kDepth) {
    __syncthreads();
    stage<Precision>(pool.tile.operands.a, a, first, depth);
    stage<Precision>(pool.tile.operands.b, b, first, depth);
    __syncthreads();
    product.multiply(pool.tile.operands, columns);
  }
}

// Puts the finished tile where the operands were.
template <class Precision>
GUNN_DEVICE void leave(Pool<Precision>& pool, const Product<Precision>& product) {
  __syncthreads();
  product.visit([&](int m, int n, typename Precision::Wide value) {
    pool.tile.out[m * Pool<Precision>::kOutStride + n] = value;
  });
  __syncthreads();
}

}  // namespace gunn
