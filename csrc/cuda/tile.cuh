// A tile of a product: 64 rows x 64 columns, one block of 128 threads.
//
//   out[row][column] = sum over depth of a(row, depth) * b(column, depth)
//
// Owns:      the block; operands are staged in shared memory a chunk of depth at a time, sums stay in registers.
// Operands:  16 bytes at a time, `kVector` neighbours of one pixel or of one row of packed weights. What a batch norm
// or
//            a ReLU does to them is done on the way (view.cuh), so a product never needs its operand in memory in its
//            final form.
// Layouts:   by_row, [row][depth]: depth are the neighbours in memory (channels of pixels, packed weights);
//            by_depth, [depth][row]: rows are (gradients of weights, whose depth is pixels).
// Barriers:  two a chunk, by the caller.
// Costs:     2*64*64*chunk FLOPs for 128*chunk values staged: 16-bit chunks are 32 deep, others 16.
// Registers: 32 accumulators a thread.
// Shared:    by_row a row has 16 bytes more than a chunk, by_depth 8 elements more than 64: what products read together
//            lies in different banks (float32 and float64 by_row: two ways). The finished tile takes their place.
#pragma once

#include "cuda/precision.cuh"

namespace gunn {

constexpr int kRows = 64, kColumns = 64, kThreads = 128;

// Blocks that share a multiprocessor at least: all the registers that this leaves (128; float64 168) without spilling a
// word. Left to itself the compiler aims a little higher, and spills.
template <class Precision>
constexpr int kResident = sizeof(typename Precision::Wide) == 8 ? 3 : 4;

enum class Layout { by_row, by_depth };

// Up to 64 pixels in a row of all the batch's pixels, and where in their images they are.
struct PixelWindow {
  int64_t first;
  int count;
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
  static constexpr int kBytes = static_cast<int>(sizeof(Element));
  static constexpr int kVector = 16 / kBytes;
  static constexpr int kDepth = kBytes == 2 ? 32 : 16;
  static constexpr int kRowStride = kDepth + kVector;
  static constexpr int kDepthStride = kRows + 8;
  static constexpr int kElements =
      kRows * kRowStride > kDepth* kDepthStride ? kRows * kRowStride : kDepth * kDepthStride;
  static constexpr int kOutStride = kColumns + 8;

  struct Operands {
    alignas(16) Element a[kElements];
    alignas(16) Element b[kElements];
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
  using P = Pool<Precision>;
  static constexpr int kStep = 8 * 4 / P::kBytes;  // depth of one instruction

 public:
  // One staged chunk; columns from `columns` on are not computed.
  template <Layout layout>
  GUNN_DEVICE void multiply(const typename P::Operands& operands, int columns) {
    const int warp = threadIdx.x / 32;
    GUNN_UNROLL
    for (int k = 0; k < P::kDepth; k += kStep) {
      uint32_t a[4];
      load_a<layout>(a, operands.a, 16 * warp, k);
      GUNN_UNROLL
      for (int n = 0; n < kColumns / 8; n += 2) {
        if (8 * n >= columns) break;
        uint32_t b[4];  // of two neighbours
        load_b<layout>(b, operands.b, 8 * n, k);
        Precision::multiply(sums_[n], a, {b[0], b[1]});
        if (8 * n + 8 >= columns) break;
        Precision::multiply(sums_[n + 1], a, {b[2], b[3]});
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
  using Element = typename Precision::Element;

  // A fragment of 16 rows, and those of 16 columns: 8 x 8 words or, in 16 bits, values at a time (launch.cuh).
  template <Layout layout>
  static GUNN_DEVICE void load_a(uint32_t (&a)[4], const Element* tile, int row, int k) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    if constexpr (P::kBytes == 2) {
      const int matrix = lane / 8, i = lane % 8, low = 8 * (matrix % 2), high = 8 * (matrix / 2);
      load_matrices<layout == Layout::by_depth>(a, layout == Layout::by_row
                                                       ? tile + (row + low + i) * P::kRowStride + k + high
                                                       : tile + (k + high + i) * P::kDepthStride + row + low);
    } else {
      GUNN_UNROLL
      for (int r = 0; r < 4; ++r) {
        const int m = row + g + 8 * (r % 2), depth = k + t + 4 * (r / 2);
        a[r] = word(layout == Layout::by_row ? tile[m * P::kRowStride + depth] : tile[depth * P::kDepthStride + m]);
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
                                                       : tile + (k + low + i) * P::kDepthStride + column + high);
    } else {
      GUNN_UNROLL
      for (int r = 0; r < 4; ++r) {
        const int n = column + g + 8 * (r / 2), depth = k + t + 4 * (r % 2);
        b[r] = word(layout == Layout::by_row ? tile[n * P::kRowStride + depth] : tile[depth * P::kDepthStride + n]);
      }
    }
  }
  static GUNN_DEVICE uint32_t word(float value) { return __float_as_uint(value); }

  float sums_[kColumns / 8][4] = {};
};

template <class Precision>
class Product<Precision, false> {
  using P = Pool<Precision>;
  using Wide = typename Precision::Wide;

 public:
  template <Layout layout>
  GUNN_DEVICE void multiply(const typename P::Operands& operands, int columns) {
    const auto at = [](int row, int d) {
      return layout == Layout::by_row ? row * P::kRowStride + d : d * P::kDepthStride + row;
    };
    const int x = threadIdx.x % 16, y = threadIdx.x / 16;
    for (int d = 0; d < P::kDepth; ++d) {
      Wide a[kRows / 8];
      GUNN_UNROLL
      for (int j = 0; j < kRows / 8; ++j) a[j] = operands.a[at(y + 8 * j, d)];
      GUNN_UNROLL
      for (int i = 0; i < kColumns / 16; ++i) {
        if (16 * i >= columns) break;
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
template <class Precision>
GUNN_DEVICE void leave(Pool<Precision>& pool, const Product<Precision>& product) {
  __syncthreads();
  product.visit([&](int m, int n, typename Precision::Wide value) {
    pool.tile.out[m * Pool<Precision>::kOutStride + n] = value;
  });
  __syncthreads();
}

}  // namespace gunn
