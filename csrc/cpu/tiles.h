// How an image lies in memory inside the kernels, and how it gets there.
//
// The pixels of an image, in order, are cut into tiles of two vectors:
//
//     state[image][tile][channel][pixel of the tile]
//
// One tile of all channels is one contiguous stream (NCHW planes alias in L1 at 32x32). Rows are padded to whole
// vectors (or to half a vector where the image is that narrow), so that a vector never crosses a row except at its
// middle, as the 3x3 wants it. Where that costs a vector, rows follow one another without padding instead, and only the
// 3x3 pads them (convolution.h). Padding pixels, the last ones of an image included, are zero in the state and in every
// gradient; `mask` says where they are.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/arena.h"
#include "core/layer.h"
#include "cpu/factors.h"
#include "cpu/simd.h"

namespace gunn {
namespace {

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

template <class Scalar>
struct Geometry {
  static constexpr int64_t lanes = Simd<Scalar>::lanes, tile = Simd<Scalar>::tile;

  int64_t height, width;
  bool dense;      // rows are not padded
  int64_t row;     // from one row to the next
  bool halves;     // two padded rows share a vector
  int64_t tiles;   // of one image
  int64_t pixels;  // tiles * tile
  int64_t rows;    // rows that the tiles cover, those below the image included
  int64_t band;    // tiles that threads deal out at least: an even number of whole rows where these are padded
  int64_t bands;   // of one image; the last may be shorter

  // `depth` of a factor: neighbours that make one in the products over pixels must share a row.
  explicit Geometry(const LayerShape& shape, int64_t depth = 1) : Geometry(shape.height, shape.width, false) {
    const Geometry without(height, width, true);
    if (depth == 1 && without.vectors() < vectors()) *this = without;
  }
  // The same image with padded rows.
  Geometry padded() const { return Geometry(height, width, false); }
  int64_t vectors() const { return (height * row + lanes - 1) / lanes; }
  // Whether only the first vector of a tile holds rows of the image.
  bool half(int64_t at) const { return at == tiles - 1 && pixels - height * row >= lanes; }
  bool inside(int64_t pixel) const { return pixel % row < width && pixel / row < height; }

 private:
  Geometry(int64_t height_, int64_t width_, bool dense_) : height(height_), width(width_), dense(dense_) {
    halves = !dense && lanes >= 8 && width <= lanes / 2;
    row = dense ? width : halves ? lanes / 2 : round_up(width, lanes);
    tiles = (round_up(height * row, tile)) / tile;
    pixels = tiles * tile;
    rows = (pixels + row - 1) / row;
    band = dense ? 1 : larger(1, 2 * row / tile);
    bands = (tiles + band - 1) / band;
  }
};

// Tiles [first, last) of one slot: whole bands of an image.
struct Piece {
  int64_t slot, first, last;
};

// The piece and every tile that holds a neighbour of its pixels.
template <class Scalar>
Piece with_neighbours(const Geometry<Scalar>& geometry, const Piece& piece) {
  const int64_t reach = geometry.row + (geometry.dense ? 1 : 0);  // padded rows begin and end in whole vectors
  const int64_t above = piece.first * geometry.tile - reach, below = piece.last * geometry.tile + reach;
  return {piece.slot, larger(0, above) / geometry.tile, smaller(geometry.tiles, (below - 1) / geometry.tile + 1)};
}

// Calls visit(Piece) for the part of each slot among bands [first, last), counted through all slots.
template <class Scalar, class Visit>
GUNN_INLINE void for_each_piece(const Geometry<Scalar>& geometry, int64_t first, int64_t last, Visit visit) {
  for (int64_t band = first; band < last;) {
    const int64_t begin = band % geometry.bands, end = smaller(geometry.bands, begin + last - band);
    visit(Piece{band / geometry.bands, begin * geometry.band, smaller(end * geometry.band, geometry.tiles)});
    band += end - begin;
  }
}

// Calls visit(first pixel of the tile, image row, image column, count) for every run of real pixels in one tile.
template <class Scalar, class Visit>
GUNN_INLINE void for_each_run(const Geometry<Scalar>& geometry, int64_t tile, Visit visit) {
  const int64_t begin = tile * geometry.tile, end = begin + geometry.tile;
  for (int64_t pixel = begin; pixel < end;) {
    const int64_t y = pixel / geometry.row, x = pixel % geometry.row;
    const int64_t run = smaller(end - pixel, geometry.row - x);
    const int64_t count = smaller(run, geometry.width - x);
    if (y < geometry.height && count > 0) visit(pixel - begin, y, x, count);
    pixel += run;
  }
}

// Channels [first, first + channels) of one image's tile, from a feature map of any strides; other channels and padding
// pixels are left alone.
template <class Factor, class Storage>
GUNN_NOINLINE void load_channels(const Geometry<Sum<Factor>>& geometry, const FeatureMap<const Storage>& map,
                                 int64_t image, int64_t tile, int64_t first, int64_t channels, Factor* dst) {
  using Element = typename Products<Factor>::Element;
  constexpr int64_t D = kDepth<Factor>;
  const Storage* origin = map.data + image * map.batch;
  for_each_run(geometry, tile, [&](int64_t pixel, int64_t y, int64_t x, int64_t count) {
    const Storage* src = origin + y * map.row + x * map.column;
    if (map.channel == 1) {  // channels_last: a pixel's channels are neighbours
      for (int64_t j = 0; j < count; ++j) {
        for (int64_t c = first; c < first + channels; ++c) {
          channel_elements(dst, c)[(pixel + j) * D] = widen<Element>(src[j * map.column + c]);
        }
      }
    } else {
      const int64_t end = first + channels;
      for (int64_t c = first; c < end;) {
        const Storage* from = src + c * map.channel;
        if (map.column == 1 && c % D == 0 && c + D <= end) {  // whole factors, in a loop that vectorises
          Factor* to = dst + c / D * geometry.tile + pixel;
          for (int64_t j = 0; j < count; ++j) to[j] = Products<Factor>::gather(from + j, map.channel);
          c += D;
        } else {
          Element* to = channel_elements(dst, c) + pixel * D;
          for (int64_t j = 0; j < count; ++j) to[j * D] = widen<Element>(from[j * map.column]);
          c += 1;
        }
      }
    }
  });
}

// The first `channels` channels, and zeros where there are none.
template <class Factor, class Storage>
GUNN_INLINE void load_tile(const Geometry<Sum<Factor>>& geometry, const FeatureMap<const Storage>& map, int64_t image,
                           int64_t tile, int64_t channels, Factor* dst) {
  constexpr int64_t T = Simd<Factor>::tile;
  int64_t real = 0;
  for_each_run(geometry, tile, [&](int64_t, int64_t, int64_t, int64_t count) { real += count; });
  if (real < T || channels % kDepth<Factor> != 0) {
    for (int64_t j = 0; j < factors<Factor>(channels) * T; ++j) dst[j] = Factor{};
  }
  load_channels(geometry, map, image, tile, 0, channels, dst);
}

template <class Factor, class Storage>
GUNN_NOINLINE void store_tile(const Geometry<Sum<Factor>>& geometry, const FeatureMap<Storage>& map, int64_t image,
                              int64_t tile, int64_t channels, const Factor* src) {
  constexpr int64_t D = kDepth<Factor>;
  Storage* origin = map.data + image * map.batch;
  for_each_run(geometry, tile, [&](int64_t pixel, int64_t y, int64_t x, int64_t count) {
    Storage* dst = origin + y * map.row + x * map.column;
    if (map.channel == 1) {
      for (int64_t j = 0; j < count; ++j) {
        for (int64_t c = 0; c < channels; ++c) {
          dst[j * map.column + c] = narrow<Storage>(channel_elements(src, c)[(pixel + j) * D]);
        }
      }
    } else {
      for (int64_t c = 0; c < channels;) {
        Storage* to = dst + c * map.channel;
        if (map.column == 1 && c % D == 0 && c + D <= channels) {
          const Factor* from = src + c / D * geometry.tile + pixel;
          for (int64_t j = 0; j < count; ++j) Products<Factor>::scatter(from[j], to + j, map.channel);
          c += D;
        } else {
          const auto* from = channel_elements(src, c) + pixel * D;
          for (int64_t j = 0; j < count; ++j) to[j * map.column] = narrow<Storage>(from[j * D]);
          c += 1;
        }
      }
    }
  });
}

// All ones where a padded pixel is a pixel of the image, for one image.
template <class Scalar>
void fill_mask(const Geometry<Scalar>& geometry, typename Simd<Scalar>::Int* mask) {
  for (int64_t pixel = 0; pixel < geometry.pixels; ++pixel) mask[pixel] = geometry.inside(pixel) ? -1 : 0;
}

// to(column)[row] = from[row][column]: `rows` rows of one tile, or of as many columns as said, with columns outermost.
template <class Scalar, class To>
GUNN_INLINE void transpose_tile(const Scalar* from, int64_t rows, To to, int64_t columns = Simd<Scalar>::tile) {
  for (int64_t column = 0; column < columns; column += 4) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) {
      const Scalar* row = from + r * columns + column;
      transpose_4x4<Scalar>({row, row + columns, row + 2 * columns, row + 3 * columns},
                            {to(column) + r, to(column + 1) + r, to(column + 2) + r, to(column + 3) + r});
    }
    for (; r < rows; ++r) {
      for (int64_t j = 0; j < 4; ++j) to(column + j)[r] = from[r * columns + column + j];
    }
  }
}

// Four rows of pixel factors at a time: row(r, room) makes those of one.
template <class Factor, class To, class Row>
GUNN_INLINE void transpose_pixel_factors(int64_t rows, To to, Row row) {
  constexpr int64_t columns = Simd<Factor>::tile / kDepth<Factor>;
  for (int64_t r = 0; r < rows; r += 4) {
    const int64_t count = smaller(4, rows - r);
    alignas(64) Factor room[4 * columns];
    for (int64_t j = 0; j < count; ++j) row(r + j, room + j * columns);
    transpose_tile<Factor>(room, count, [&](int64_t column) { return to(column) + r; }, columns);
  }
}

// The factors of a product over pixels, from `rows` rows of one tile: to(pixel / depth of a factor)[row].
template <class Factor, class To>
GUNN_INLINE void transpose_rows(const Sum<Factor>* from, int64_t rows, To to) {
  if constexpr (kDepth<Factor> == 1) {
    transpose_tile<Factor>(from, rows, to);
  } else {
    constexpr int64_t T = Simd<Factor>::tile;
    transpose_pixel_factors<Factor>(
        rows, to, [&](int64_t r, Factor* room) { store<Factor>(room, Products<Factor>::neighbours(from + r * T)); });
  }
}

}  // namespace
}  // namespace gunn
