// How an image lies in memory inside the kernels, and how it gets there.
//
// Rows of pixels are padded to whole vectors (or to half a vector where the image is that narrow), so that a vector
// never crosses a row except at its middle. The padded pixels of an image, in order, are cut into tiles of two vectors:
//
//     state[image][tile][channel][pixel of the tile]
//
// One tile of all channels is one contiguous stream (NCHW planes alias in L1 at 32x32). Padding pixels are zero in the
// state and in every gradient; `mask` says where they are.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/arena.h"
#include "core/layer.h"
#include "cpu/precision.h"
#include "cpu/simd.h"

namespace gunn {
namespace {

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

template <class Scalar>
struct Geometry {
  static constexpr int64_t lanes = Simd<Scalar>::lanes, tile = Simd<Scalar>::tile;

  int64_t height, width;
  int64_t row;     // padded width
  bool halves;     // two rows share a vector
  int64_t tiles;   // of one image
  int64_t pixels;  // tiles * tile
  int64_t rows;    // rows that the tiles cover, those below the image included
  int64_t band;    // tiles that hold an even number of whole rows: what threads deal out
  int64_t bands;   // of one image; the last may be shorter

  explicit Geometry(const LayerShape& shape) : height(shape.height), width(shape.width) {
    halves = lanes >= 8 && width <= lanes / 2;
    row = halves ? lanes / 2 : round_up(width, lanes);
    tiles = (round_up(height * row, tile)) / tile;
    pixels = tiles * tile;
    rows = (pixels + row - 1) / row;
    band = larger(1, 2 * row / tile);
    bands = (tiles + band - 1) / band;
  }
  bool inside(int64_t pixel) const { return pixel % row < width && pixel / row < height; }
};

// Tiles [first, last) of one slot: whole bands of an image.
struct Piece {
  int64_t slot, first, last;
};

// The piece and every tile that holds a row next to its own.
template <class Scalar>
Piece with_neighbours(const Geometry<Scalar>& geometry, const Piece& piece) {
  const int64_t above = piece.first * geometry.tile - geometry.row, below = piece.last * geometry.tile + geometry.row;
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

// Channels [first, first + channels) of one image's tile, between a feature map of any strides and dst[channel][tile].
template <class Scalar, class Storage>
GUNN_NOINLINE void load_tile(const Geometry<Scalar>& geometry, const FeatureMap<const Storage>& map, int64_t image,
                             int64_t tile, int64_t first, int64_t channels, Scalar* dst) {
  constexpr int64_t T = Simd<Scalar>::tile;
  int64_t real = 0;
  for_each_run(geometry, tile, [&](int64_t, int64_t, int64_t, int64_t count) { real += count; });
  if (real < T) {
    for (int64_t j = 0; j < channels * T; ++j) dst[j] = 0;
  }
  const Storage* origin = map.data + image * map.batch + first * map.channel;
  for_each_run(geometry, tile, [&](int64_t pixel, int64_t y, int64_t x, int64_t count) {
    const Storage* src = origin + y * map.row + x * map.column;
    if (map.channel == 1) {  // channels_last: a pixel's channels are neighbours
      for (int64_t j = 0; j < count; ++j) {
        for (int64_t c = 0; c < channels; ++c) dst[c * T + pixel + j] = widen<Scalar>(src[j * map.column + c]);
      }
    } else if (map.column == 1) {
      for (int64_t c = 0; c < channels; ++c) {
        const Storage* from = src + c * map.channel;
        Scalar* to = dst + c * T + pixel;
        for (int64_t j = 0; j < count; ++j) to[j] = widen<Scalar>(from[j]);
      }
    } else {
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t j = 0; j < count; ++j) {
          dst[c * T + pixel + j] = widen<Scalar>(src[c * map.channel + j * map.column]);
        }
      }
    }
  });
}

template <class Scalar, class Storage>
GUNN_NOINLINE void store_tile(const Geometry<Scalar>& geometry, const FeatureMap<Storage>& map, int64_t image,
                              int64_t tile, int64_t channels, const Scalar* src) {
  constexpr int64_t T = Simd<Scalar>::tile;
  Storage* origin = map.data + image * map.batch;
  for_each_run(geometry, tile, [&](int64_t pixel, int64_t y, int64_t x, int64_t count) {
    Storage* dst = origin + y * map.row + x * map.column;
    if (map.channel == 1) {
      for (int64_t j = 0; j < count; ++j) {
        for (int64_t c = 0; c < channels; ++c) dst[j * map.column + c] = narrow<Storage>(src[c * T + pixel + j]);
      }
    } else if (map.column == 1) {
      for (int64_t c = 0; c < channels; ++c) {
        const Scalar* from = src + c * T + pixel;
        Storage* to = dst + c * map.channel;
        for (int64_t j = 0; j < count; ++j) to[j] = narrow<Storage>(from[j]);
      }
    } else {
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t j = 0; j < count; ++j) {
          dst[c * map.channel + j * map.column] = narrow<Storage>(src[c * T + pixel + j]);
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

// to(pixel of the tile)[row] = from[row][pixel]: `rows` rows of one tile with pixels outermost.
template <class Scalar, class To>
GUNN_INLINE void transpose_tile(const Scalar* from, int64_t rows, To to) {
  constexpr int64_t T = Simd<Scalar>::tile;
  for (int64_t pixel = 0; pixel < T; pixel += 4) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) {
      const Scalar* row = from + r * T + pixel;
      transpose_4x4<Scalar>({row, row + T, row + 2 * T, row + 3 * T},
                            {to(pixel) + r, to(pixel + 1) + r, to(pixel + 2) + r, to(pixel + 3) + r});
    }
    for (; r < rows; ++r) {
      for (int64_t j = 0; j < 4; ++j) to(pixel + j)[r] = from[r * T + pixel + j];
    }
  }
}

}  // namespace
}  // namespace gunn
