// Weights as the products read them: rounded, padded, in the order in which they are staged.
//
// Owns:      one thread packs one element, once a pass (prepare.cuh).
// Leaves:    for each segment, tile of 64 rows and chunk of depth: [rows of the tile][kDepth], so that staging is a
// copy.
//            Rows and depth are padded like the channels they stand for; padding is zero.
#pragma once

#include "cuda/view.cuh"

namespace gunn {

// Rows x depth of a product: forward, and transposed for the gradients of the inputs.
enum class Pack { reduce, spatial, project, reduce_transposed, spatial_transposed, project_transposed };

struct PackShape {
  int rows, depth;  // padded; whole chunks are stored

  template <class Precision>
  __host__ GUNN_DEVICE int chunks() const {
    return (depth + Pool<Precision>::kDepth - 1) / Pool<Precision>::kDepth;
  }
  template <class Precision>
  __host__ GUNN_DEVICE int64_t size() const {  // elements, of one segment
    return static_cast<int64_t>(rows) * chunks<Precision>() * Pool<Precision>::kDepth;
  }
};

__host__ GUNN_DEVICE PackShape pack_shape(const Extents& extents, Pack pack, int unit) {
  const int k = extents.k(), s = extents.s(), n = padded(extents.inputs(unit)), both = extents.reduce_columns(unit);
  switch (pack) {
    case Pack::reduce:
      return {both, n};
    case Pack::spatial:
    case Pack::spatial_transposed:
      return {k, 9 * k};
    case Pack::project:
      return {s, k};
    case Pack::reduce_transposed:
      return {n, both};
    default:
      return {k, s};
  }
}

// The weight at a padded row and depth, zero in the padding. `segment` is that of both pointers.
template <class Wide>
GUNN_DEVICE Wide weight_at(const Extents& extents, Pack pack, int unit, const Wide* weight, const Wide* shortcut,
                           int row, int depth) {
  const int k = extents.hidden, s = extents.segment, n = extents.inputs(unit);
  if (pack == Pack::reduce || pack == Pack::reduce_transposed) {
    const int64_t r = pack == Pack::reduce ? row : depth, c = pack == Pack::reduce ? depth : row;
    if (c >= n) return 0;
    if (r < k) return weight[r * n + c];
    const int64_t in_shortcut = r - extents.k();
    return in_shortcut >= 0 && in_shortcut < s ? shortcut[in_shortcut * n + c] : 0;
  }
  if (pack == Pack::spatial || pack == Pack::spatial_transposed) {
    const int tap = depth / extents.k(), channel = depth - tap * extents.k();
    const int64_t out = pack == Pack::spatial ? row : channel, in = pack == Pack::spatial ? channel : row;
    return out < k && in < k ? weight[(out * k + in) * 9 + tap] : 0;
  }
  const int64_t out = pack == Pack::project ? row : depth, in = pack == Pack::project ? depth : row;
  return out < s && in < k ? weight[out * k + in] : 0;
}

// Place `in_all` of all segments'.
template <class Precision>
GUNN_DEVICE void pack_weight(const Extents& extents, Pack pack, int unit, int64_t in_all,
                             const typename Precision::Wide* weight, const typename Precision::Wide* shortcut,
                             typename Precision::Element* to) {
  constexpr int D = Pool<Precision>::kDepth;
  const PackShape shape = pack_shape(extents, pack, unit);
  const int64_t size = shape.size<Precision>(), segment = in_all / size, at = in_all % size;
  const int64_t n = extents.inputs(unit), k = extents.hidden, s = extents.segment;
  const int64_t tile_size = static_cast<int64_t>(kColumns) * shape.chunks<Precision>() * D;
  const int first = static_cast<int>(at / tile_size) * kColumns, rows = min(shape.rows - first, kColumns);
  const int in_tile = static_cast<int>(at % tile_size), chunk = in_tile / (rows * D), in_chunk = in_tile % (rows * D);
  const bool is_spatial = pack == Pack::spatial || pack == Pack::spatial_transposed;
  const bool is_reduce = pack == Pack::reduce || pack == Pack::reduce_transposed;
  const int64_t step = is_spatial ? k * k * 9 : is_reduce ? k * n : s * k;
  const int row = first + in_chunk / D, depth = chunk * D + in_chunk % D;
  typename Precision::Wide value = 0;
  if (depth < shape.depth) {  // not behind the last, in the rest of its chunk
    value = weight_at(extents, pack, unit, weight + segment * step, shortcut ? shortcut + segment * s * n : nullptr,
                      row, depth);
  }
  to[in_all] = Precision::element(value);
}

// One segment's packed weights, of the tile of rows that begins at `first`.
template <class Precision>
struct PackedTile {
  const typename Precision::Element* data;
  int rows, chunk_size;

  GUNN_DEVICE PackedTile(const PackShape& shape, const typename Precision::Element* packed, int segment, int first)
      : data(packed + segment * shape.size<Precision>() +
             static_cast<int64_t>(first) * shape.chunks<Precision>() * Pool<Precision>::kDepth),
        rows(min(shape.rows - first, kColumns)),
        chunk_size(rows * Pool<Precision>::kDepth) {}
};

// Rows [first, first + rows) of one segment's, for tiles of any size.
template <class Precision>
struct PackedRows {
  static constexpr int kDepth = Pool<Precision>::kDepth, kVector = Pool<Precision>::kVector;
  const typename Precision::Element* data;
  int all, chunks, first, rows;

  GUNN_DEVICE PackedRows(const PackShape& shape, const typename Precision::Element* packed, int segment, int first_,
                         int most)
      : data(packed + segment * shape.size<Precision>()),
        all(shape.rows),
        chunks(shape.chunks<Precision>()),
        first(first_),
        rows(min(shape.rows - first_, most)) {}

  // Asks for a chunk by `threads` threads; who waits for it has it after a barrier.
  template <int threads>
  GUNN_DEVICE void copy(typename Precision::Element* to, int chunk) const {
    constexpr int kPieces = kDepth / kVector;
    for (int at = threadIdx.x; at < rows * kPieces; at += threads) {
      const int row = first + at / kPieces, tile = row / kColumns * kColumns, in_tile = min(all - tile, kColumns);
      const auto* from =
          data + (static_cast<int64_t>(tile) * chunks + static_cast<int64_t>(chunk) * in_tile + row - tile) * kDepth;
      copy_async<16>(to + at / kPieces * Pool<Precision>::kRowStride + at % kPieces * kVector,
                     from + at % kPieces * kVector);
    }
  }
};

}  // namespace gunn
