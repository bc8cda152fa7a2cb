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
  int64_t line;  // pixels of a line, and as many as a vector from the last row's last pixels on may touch
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
        line(round_up(larger(tiles_.pixels, geometry.rows * tiles_.row) + 2 * L, L)),
        winograd(suits_winograd(geometry, channels)),
        padded(geometry, channels),
        patches(geometry, channels) {}

  void take(Arena& arena) {
    if (tiles.dense) {
      in = arena.take<Factor>(factors<Factor>(channels) * line);
      out = arena.take<Scalar>(channels * line);
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
      for (int64_t j = 0; j < channels * line; ++j) out[j] = 0;  // beyond the image nothing comes, not even garbage
    }
    if (winograd) return patches.clear();
    for (int64_t j = 0; j < padded.size(); ++j) padded.data[j] = Factor{};
  }

  // Values for one weight of the kernel, where it is packed.
  static int64_t values_of_weight(const Geometry<Scalar>& tiles, int64_t channels) {
    return suits_winograd(tiles.padded(), channels) ? 16 : 9;
  }
  static bool suits_winograd(const Geometry<Scalar>& geometry, int64_t channels) {
    return kDepth<Factor> == 1 && WinogradImage<Scalar>::suits(geometry, channels);
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

  // Where a tile goes: its two vectors of channel 0.
  struct Place {
    Factor* at[2];
  };
  Place place(int64_t tile) const {
    if (tiles.dense) return {{in + tile * T, in + tile * T + L}};
    return {{padded_place(tile * T), padded_place(tile * T + L)}};
  }
  // Factor c of a tile's channels, both vectors; zero at padding pixels.
  GUNN_INLINE void put(const Place& place, int64_t c, Vector<Factor> first, Vector<Factor> second) const {
    if (tiles.dense) {
      store<Factor>(place.at[0] + c * line, first);
      store<Factor>(place.at[1] + c * line, second);
    } else {
      put_padded(place.at[0], c, first);
      put_padded(place.at[1], c, second);
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
          store<Scalar>(rows + c * T, load<Scalar>(out + c * line + tile * T));
          store<Scalar>(rows + c * T + L, load<Scalar>(out + c * line + tile * T + L));
        }
        done(tile);
      }
    }
  }

 private:
  // Padded tiles that are convolved at once.
  int64_t step() const { return winograd ? patches.tiles_of_group() : 1; }

  Factor* padded_place(int64_t pixel) const {
    if constexpr (kDepth<Factor> == 1) {
      if (winograd) return patches.place(pixel);
    }
    return padded.place(geometry, pixel);
  }
  GUNN_INLINE void put_padded(Factor* place, int64_t c, Vector<Factor> v) const {
    if constexpr (kDepth<Factor> == 1) {
      if (winograd) return patches.put(place, c, v);
    }
    padded.put(geometry, place, c, v);
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
      Factor* place = padded_place(pixel);
      for (int64_t c = 0; c < factors<Factor>(channels); ++c, from += line) {
        const Vector<Factor> v = geometry.halves ? load_halves<Factor>(from, tiles.row) : load<Factor>(from);
        put_padded(place, c, keep<Factor>(v, inside));
      }
    }
  }
  // A padded tile of the output to its lines. What a vector writes beyond its row belongs to rows that follow.
  GUNN_NOINLINE void collect(int64_t tile) const {
    for (int64_t pixel = tile * T; pixel < (tile + 1) * T; pixel += L) {
      if (pixel / geometry.row >= tiles.height) return;
      const Scalar* from = group + tile % step() * channels * T + pixel % T;
      Scalar* to_line = out + pixel / geometry.row * tiles.row + pixel % geometry.row;
      for (int64_t c = 0; c < channels; ++c, from += T, to_line += line) {
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
