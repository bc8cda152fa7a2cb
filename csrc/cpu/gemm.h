// The 1x1 convolutions and the weight gradients: one register block serves both.
//
//     acc[R][V] += w[c][R] * x[c][V vectors]     for c in 0 … inner
//
// 1x1 convolution: rows are output channels, lanes are pixels, c runs over input channels, w is packed [block][c][R].
// Weight gradient: rows are output channels of the gradient, lanes are input channels, c runs over pixels.
// With AVX-512 a block is 12 rows x 2 vectors (24 of 32 registers), else 6 x 2 (12 of 16): both reach the FMA limit.
#pragma once

#include "cpu/factors.h"
#include "cpu/tiles.h"

namespace gunn {
namespace {

constexpr int kBlockRows = GUNN_VECTOR_BYTES == 64 ? 12 : 6;

template <int R>
struct Rows {
  static constexpr int value = R;
};

// Calls visit(Rows<R>, first row) for blocks that cover `rows`: blocks of `most` first, then the rest in smaller ones.
template <int most = kBlockRows, class Visit>
GUNN_INLINE void for_row_blocks(int64_t rows, Visit visit) {
  int64_t r = 0;
  for (; rows - r >= most; r += most) visit(Rows<most>(), r);
  if constexpr (most > 12) {
    if (rows - r >= 12) visit(Rows<12>(), r), r += 12;
  }
  if constexpr (most > 8) {
    if (rows - r >= 8) visit(Rows<8>(), r), r += 8;
  }
  if (rows - r >= 4) visit(Rows<4>(), r), r += 4;
  if (rows - r >= 2) visit(Rows<2>(), r), r += 2;
  if (rows - r >= 1) visit(Rows<1>(), r);
}

// Packing of weights as [block][c][R], c running over factors: a block that begins at row r begins at dst + r * inner.
// Each of `parts` parts packs its share of every block.

// Weight (r, c) is row(r)[c].
template <class Factor, class Row>
GUNN_INLINE void pack_rows(Factor* dst, int64_t rows, int64_t depth, int64_t part, int64_t parts, const Row& row) {
  constexpr int64_t D = kDepth<Factor>;
  const int64_t inner = factors<Factor>(depth);
  const int64_t begin = inner * part / parts, end = inner * (part + 1) / parts;
  for_row_blocks(rows, [&](auto block, int64_t r) {
    constexpr int R = decltype(block)::value;
    Factor* to = dst + r * inner;
    const Sum<Factor>* from[R];
    for (int j = 0; j < R; ++j) from[j] = row(r + j);
    const auto single = [&](int64_t c, int j) {
      to[c * R + j] = sources<Factor>(c, depth, [&](int64_t at) { return from[j] + at; })[0];
    };
    int64_t c = begin;
    for (; c + 4 <= end && (c + 4) * D <= depth; c += 4) {
      GUNN_UNROLL for (int j = 0; j + 4 <= R; j += 4) {
        Factor room[4][4];
        const auto four = [&](int i) { return Products<Factor>::four(from[j + i] + c * D, room[i]); };
        transpose_4x4<Factor>({four(0), four(1), four(2), four(3)},
                              {to + c * R + j, to + (c + 1) * R + j, to + (c + 2) * R + j, to + (c + 3) * R + j});
      }
      for (int j = R / 4 * 4; j < R; ++j) {
        for (int64_t next = c; next < c + 4; ++next) single(next, j);
      }
    }
    for (; c < end; ++c) {
      for (int j = 0; j < R; ++j) single(c, j);
    }
  });
}

// Weight (r, c) is column(c)[r].
template <class Factor, class Column>
GUNN_INLINE void pack_columns(Factor* dst, int64_t rows, int64_t depth, int64_t part, int64_t parts,
                              const Column& column) {
  const int64_t inner = factors<Factor>(depth);
  const int64_t begin = inner * part / parts, end = inner * (part + 1) / parts;
  for_row_blocks(rows, [&](auto block, int64_t r) {
    constexpr int R = decltype(block)::value;
    for (int64_t c = begin; c < end; ++c) {
      const auto from = sources<Factor>(c, depth, [&](int64_t at) { return column(at) + r; });
      Factor* to = dst + r * inner + c * R;
      GUNN_UNROLL for (int j = 0; j < R; ++j) to[j] = from[j];
    }
  });
}

template <class Scalar, int R, int V>
GUNN_INLINE void clear(Vector<Scalar> (&acc)[R][V]) {
  GUNN_UNROLL for (int r = 0; r < R; ++r) { GUNN_UNROLL for (int v = 0; v < V; ++v) acc[r][v] = Vector<Scalar>{}; }
}

template <class Factor, int R, int V>
GUNN_INLINE void multiply_step(Vector<Sum<Factor>> (&acc)[R][V], const Factor* w, const Vector<Factor> (&x)[V]) {
  GUNN_UNROLL for (int r = 0; r < R; ++r) {
    GUNN_UNROLL for (int v = 0; v < V; ++v) Products<Factor>::add(acc[r][v], x[v], w[r]);
  }
}

template <class Factor, int R, int V>
GUNN_INLINE void multiply(Vector<Sum<Factor>> (&acc)[R][V], const Factor* w, int64_t w_step, const Factor* x,
                          int64_t x_step, int64_t inner) {
  for (int64_t c = 0; c < inner; ++c) {
    Vector<Factor> in[V];
    GUNN_UNROLL for (int v = 0; v < V; ++v) in[v] = load<Factor>(x + v * Simd<Factor>::lanes);
    multiply_step<Factor, R, V>(acc, w, in);
    w += w_step;
    x += x_step;
  }
}

enum class Into { store, add };

// out[r][pixel] (+)= sum_c w[r][c] x[c][pixel] on one tile, for one block of rows.
//
// Adding is product first, then one addition: starting the sum from `out` costs three times the error in float32.
// `ahead` > 0 prefetches x that many channels ahead: worth it for the first block, which streams the tile in.
template <class Factor, int R, Into into>
GUNN_NOINLINE void gemm_block(const Factor* w, const Factor* x, int64_t inner, int64_t ahead, Sum<Factor>* out) {
  using Scalar = Sum<Factor>;
  constexpr int64_t T = Simd<Scalar>::tile, L = Simd<Scalar>::lanes;
  Vector<Scalar> acc[R][2];
  clear<Scalar, R, 2>(acc);
  if (into == Into::add) {  // a gradient that has left the cache since the last segment
    GUNN_UNROLL for (int r = 0; r < R; ++r) {
      __builtin_prefetch(out + r * T, 1);
      if constexpr (T * sizeof(Scalar) > 64) __builtin_prefetch(out + r * T + L, 1);
    }
  }
  if (ahead) {
    for (int64_t c = 0; c < inner; ++c) {
      __builtin_prefetch(x + (c + ahead) * T);
      if constexpr (T * sizeof(Scalar) > 64) __builtin_prefetch(x + (c + ahead) * T + L);
      const Vector<Factor> in[2] = {load<Factor>(x + c * T), load<Factor>(x + c * T + L)};
      multiply_step<Factor, R, 2>(acc, w + c * R, in);
    }
  } else {
    multiply<Factor, R, 2>(acc, w, R, x, T, inner);
  }
  GUNN_UNROLL for (int r = 0; r < R; ++r) {
    GUNN_UNROLL for (int v = 0; v < 2; ++v) {
      Scalar* p = out + r * T + v * L;
      store<Scalar>(p, into == Into::add ? load<Scalar>(p) + acc[r][v] : acc[r][v]);
    }
  }
}

// The same for a tile whose second vector holds no pixels: even and odd c are summed apart, so that as many sums are
// under way. The second vector of `out` becomes zero, or stays.
template <class Factor, int R, Into into>
GUNN_NOINLINE void gemm_half_block(const Factor* w, const Factor* x, int64_t inner, Sum<Factor>* out) {
  using Scalar = Sum<Factor>;
  constexpr int64_t T = Simd<Scalar>::tile, L = Simd<Scalar>::lanes;
  Vector<Scalar> even[R][1], odd[R][1];
  clear<Scalar, R, 1>(even);
  clear<Scalar, R, 1>(odd);
  for (int64_t c = 0; c + 2 <= inner; c += 2) {
    const Vector<Factor> first[1] = {load<Factor>(x + c * T)}, second[1] = {load<Factor>(x + (c + 1) * T)};
    multiply_step<Factor, R, 1>(even, w + c * R, first);
    multiply_step<Factor, R, 1>(odd, w + (c + 1) * R, second);
  }
  if (inner % 2 != 0) {
    const Vector<Factor> last[1] = {load<Factor>(x + (inner - 1) * T)};
    multiply_step<Factor, R, 1>(even, w + (inner - 1) * R, last);
  }
  GUNN_UNROLL for (int r = 0; r < R; ++r) {
    Scalar* p = out + r * T;
    const Vector<Scalar> sum = even[r][0] + odd[r][0];
    store<Scalar>(p, into == Into::add ? load<Scalar>(p) + sum : sum);
    if (into == Into::store) store<Scalar>(p + L, Vector<Scalar>{});
  }
}

constexpr int64_t kPrefetchAhead = 12;

// Products in one sum at most: longer ones are added in parts, or rounding grows with the depth.
constexpr int64_t kLongestSum = 384;

// The whole 1x1 convolution on one tile: x[inner][tile] → out[rows][tile], w from pack_rows. `half`: only the first of
// the tile's vectors holds pixels.
template <class Factor, Into into>
GUNN_INLINE void gemm_rows(const Factor* w, int64_t rows, const Factor* x, int64_t inner, bool half, Sum<Factor>* out) {
  constexpr int64_t T = Simd<Factor>::tile;
  const int64_t parts = (inner + kLongestSum - 1) / kLongestSum, part = parts > 1 ? (inner + parts - 1) / parts : inner;
  for_row_blocks(rows, [&](auto block, int64_t r) {
    constexpr int R = decltype(block)::value;
    const int64_t ahead = r == 0 && inner > kPrefetchAhead ? kPrefetchAhead : 0;
    const auto add_part = [&](auto mode, int64_t c) {
      constexpr Into kMode = decltype(mode)::value;
      const Factor *part_w = w + r * inner + c * R, *part_x = x + c * T;
      const int64_t depth = smaller(part, inner - c);
      if (half) {
        gemm_half_block<Factor, R, kMode>(part_w, part_x, depth, out + r * T);
      } else {
        gemm_block<Factor, R, kMode>(part_w, part_x, depth, ahead, out + r * T);
      }
    };
    add_part(std::integral_constant<Into, into>(), 0);
    for (int64_t c = part; c < inner; c += part) add_part(std::integral_constant<Into, Into::add>(), c);
  });
}

// Pixels of a weight gradient: `lines` runs of `count`, at steps of their own in a (gradient) and b (input).
struct PixelRuns {
  int64_t lines, count;
  int64_t a_line, a_pixel;
  int64_t b_line, b_pixel;
};

// out[r][lane] += sum over pixels of a[pixel][r] * b[pixel][lane], R rows and V vectors of lanes.
template <class Factor, int R, int V>
GUNN_NOINLINE void outer_block(const PixelRuns& runs, const Factor* a, const Factor* b, Sum<Factor>* out,
                               int64_t out_row) {
  using Scalar = Sum<Factor>;
  Vector<Scalar> acc[R][V];
  clear<Scalar, R, V>(acc);
  for (int64_t line = 0; line < runs.lines; ++line) {
    multiply<Factor, R, V>(acc, a + line * runs.a_line, runs.a_pixel, b + line * runs.b_line, runs.b_pixel, runs.count);
  }
  GUNN_UNROLL for (int r = 0; r < R; ++r) {
    GUNN_UNROLL for (int v = 0; v < V; ++v) {
      Scalar* p = out + r * out_row + v * Simd<Scalar>::lanes;
      store<Scalar>(p, load<Scalar>(p) + acc[r][v]);
    }
  }
}

// All `rows` rows and `columns` lanes (a multiple of the vector's) of a weight gradient.
template <class Factor>
GUNN_INLINE void outer_rows(const PixelRuns& runs, const Factor* a, int64_t rows, const Factor* b, int64_t columns,
                            Sum<Factor>* out, int64_t out_row) {
  constexpr int64_t L = Simd<Factor>::lanes;
  for_row_blocks(rows, [&](auto block, int64_t r) {
    constexpr int R = decltype(block)::value;
    int64_t j = 0;
    for (; j + 2 * L <= columns; j += 2 * L) {
      outer_block<Factor, R, 2>(runs, a + r, b + j, out + r * out_row + j, out_row);
    }
    if (j < columns) outer_block<Factor, R, 1>(runs, a + r, b + j, out + r * out_row + j, out_row);
  });
}

}  // namespace
}  // namespace gunn
