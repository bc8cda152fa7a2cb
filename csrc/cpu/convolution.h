// The 3x3 convolution of one image by whichever form suits its size: Winograd's (winograd.h) or the direct one.
// Products of pairs are direct: they are cheaper than the transforms, whose sums would have to be rounded to bfloat16.
//
// Both forms want padded rows. Where the tiles have none (tiles.h), the pixels of each channel lie in one line on
// either side of the 3x3: from any pixel on, a line gives and takes vectors of a row, and whole vectors of a tile.
#pragma once

#include "cpu/conv3x3.h"
#include "cpu/winograd.h"

namespace gunn {
namespace {

template <class Factor>
struct Convolution {
  using Scalar = Sum<Factor>;
  static constexpr int64_t T = Simd<Scalar>::tile, L = Simd<Scalar>::lanes;

  Geometry<Scalar> tiles;     // as the convolution's input and output come
  Geometry<Scalar> geometry;  // with padded rows
  int64_t channels;
  bool winograd;
  PaddedImage<Factor> padded;
  WinogradImage<Scalar> patches;
  Factor* in = nullptr;                        // lines of pixels, [channel][line]
  Scalar* out = nullptr;                       // the same
  Scalar* group = nullptr;                     // padded tiles on their way to `out`
  typename Simd<Scalar>::Int* mask = nullptr;  // of the padded pixels

  Convolution(const Geometry<Scalar>& tiles_, int64_t channels_)
      : tiles(tiles_),
        geometry(tiles_.padded()),
        channels(channels_),
        winograd(suits_winograd(geometry, channels)),
        padded(geometry, channels),
        patches(geometry, channels) {}

  void take(Arena& arena) {
    if (tiles.dense) {
      in = arena.take<Factor>(factors<Factor>(channels) * line());
      out = arena.take<Scalar>(channels * line());
      group = arena.take<Scalar>(step() * channels * T);
      mask = arena.take<typename Simd<Scalar>::Int>(geometry.pixels);
    }
    if (winograd) {
      patches.take(arena);
    } else {
      padded.data = arena.take<Factor>(padded.size());
    }
  }
  // Before the first image: what is never put stays zero.
  void clear() const {
    if (tiles.dense) {
      fill_mask(geometry, mask);
      for (int64_t j = 0; j < channels * line(); ++j) out[j] = 0;  // beyond the image nothing comes, not even garbage
    }
    if (winograd) return patches.clear();
    for (int64_t j = 0; j < padded.size(); ++j) padded.data[j] = Factor{};
  }

  // Values for one weight of the kernel, where it is packed.
  static int64_t values_of_weight(const Geometry<Scalar>& tiles, int64_t channels) {
    return suits_winograd(tiles.padded(), channels) ? 16 : 9;
  }
  // This part's share of packing weights (row, channel, 3, 3), as many rows as channels: for the convolution itself, or
  // `transposed` for its input gradient, whose rows are channels and whose taps are turned round.
  static void pack(const Geometry<Scalar>& tiles, Factor* dst, const Scalar* weights, int64_t channels, bool transposed,
                   int64_t part, int64_t parts) {
    const auto kernel = [&](int64_t r, int64_t c) {
      return weights + (transposed ? c * channels + r : r * channels + c) * 9;
    };
    if constexpr (kDepth<Factor> == 1) {
      if (suits_winograd(tiles.padded(), channels)) {
        WinogradImage<Scalar>::pack(dst, channels, channels, transposed, part, parts, kernel);
        return;
      }
    }
    pack_taps(dst, channels, channels, transposed, part, parts, kernel);
  }

  // Factor c of a tile's channels, both vectors; zero at padding pixels.
  GUNN_INLINE void put(int64_t tile, int64_t c, Vector<Factor> first, Vector<Factor> second) const {
    if (tiles.dense) {
      store<Factor>(in + c * line() + tile * T, first);
      store<Factor>(in + c * line() + tile * T + L, second);
    } else {
      put_padded(tile * T, c, first);
      put_padded(tile * T + L, c, second);
    }
  }

  // All rows of a piece's output, as many as channels: to(tile) is where a tile's go, done(tile) follows when they are
  // there. Padding pixels come out as garbage; whoever reads them masks.
  template <class To, class Done>
  GUNN_INLINE void run(const Factor* w, const Piece& piece, const To& to, const Done& done) const {
    if (!tiles.dense) {
      for (int64_t first = piece.first / step() * step(); first < piece.last; first += step()) {
        const int64_t begin = larger(first, piece.first), end = smaller(first + step(), piece.last);
        convolve(w, first, [&](int64_t tile) { return tile >= begin && tile < end ? to(tile) : nullptr; });
        for (int64_t tile = begin; tile < end; ++tile) done(tile);
      }
      return;
    }
    // The rows that the piece has pixels of.
    const int64_t top = piece.first * T / tiles.row;
    const int64_t bottom = smaller(tiles.height, (piece.last * T + tiles.row - 1) / tiles.row);
    pad(larger(0, top - 1), smaller(tiles.height, bottom + 1));
    int64_t tile = piece.first;
    for (int64_t first = top * geometry.row / T / step() * step(); first * T < bottom * geometry.row; first += step()) {
      const int64_t end = smaller(first + step(), geometry.tiles);
      convolve(w, first, [&](int64_t at) { return at < end ? group + (at - first) * channels * T : nullptr; });
      for (int64_t at = first; at < end; ++at) collect(at);
      const int64_t y = end * T / geometry.row, x = end * T % geometry.row;
      const bool last = y >= bottom;
      const int64_t ready = y * tiles.row + smaller(x, tiles.width);  // pixels in `out`
      for (; tile < piece.last && (last || (tile + 1) * T <= ready); ++tile) {
        Scalar* rows = to(tile);
        for (int64_t c = 0; c < channels; ++c) {
          store<Scalar>(rows + c * T, load<Scalar>(out + c * line() + tile * T));
          store<Scalar>(rows + c * T + L, load<Scalar>(out + c * line() + tile * T + L));
        }
        done(tile);
      }
    }
  }

 private:
  static bool suits_winograd(const Geometry<Scalar>& geometry, int64_t channels) {
    return kDepth<Factor> == 1 && WinogradImage<Scalar>::suits(geometry, channels);
  }
  // Pixels of a line, and as many as a vector from the last row's last pixels on may touch.
  int64_t line() const { return round_up(larger(tiles.pixels, geometry.rows * tiles.row) + 2 * L, L); }
  // Padded tiles that are convolved at once.
  int64_t step() const { return winograd ? patches.tiles_of_group() : 1; }

  GUNN_INLINE void put_padded(int64_t pixel, int64_t c, Vector<Factor> v) const {
    if constexpr (kDepth<Factor> == 1) {
      if (winograd) return patches.put(pixel, c, v);
    }
    padded.put(geometry, pixel, c, v);
  }

  // Padded tiles [first, first + step): at(tile) is where its rows go, or null.
  template <class At>
  GUNN_INLINE void convolve(const Factor* w, int64_t first, const At& at) const {
    if constexpr (kDepth<Factor> == 1) {
      if (winograd) return patches.convolve(first / step(), w, channels, at);
    }
    conv3x3_rows<Factor>(geometry, padded, w, channels, first, at(first));
  }

  // Rows [top, bottom) from their lines to the padded image.
  GUNN_NOINLINE void pad(int64_t top, int64_t bottom) const {
    for (int64_t pixel = top * geometry.row / L * L; pixel < bottom * geometry.row; pixel += L) {
      const Factor* from = in + pixel / geometry.row * tiles.row + pixel % geometry.row;
      const Mask<Scalar> inside = load_mask<Scalar>(mask + pixel);
      for (int64_t c = 0; c < factors<Factor>(channels); ++c, from += line()) {
        const Vector<Factor> v = geometry.halves ? load_halves<Factor>(from, tiles.row) : load<Factor>(from);
        put_padded(pixel, c, keep<Factor>(v, inside));
      }
    }
  }
  // A padded tile of the output to its lines. What a vector writes beyond its row belongs to rows that follow.
  GUNN_NOINLINE void collect(int64_t tile) const {
    for (int64_t pixel = tile * T; pixel < (tile + 1) * T; pixel += L) {
      if (pixel / geometry.row >= tiles.height) return;
      const Scalar* from = group + tile % step() * channels * T + pixel % T;
      Scalar* to_line = out + pixel / geometry.row * tiles.row + pixel % geometry.row;
      for (int64_t c = 0; c < channels; ++c, from += T, to_line += line()) {
        if (geometry.halves) {
          store_halves<Scalar>(to_line, tiles.row, load<Scalar>(from));
        } else {
          store<Scalar>(to_line, load<Scalar>(from));
        }
      }
    }
  }
};

}  // namespace
}  // namespace gunn
