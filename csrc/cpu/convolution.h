// The 3x3 convolution of one image by whichever form suits its size: Winograd's (winograd.h) or the direct one.
// Products of pairs are direct: they are cheaper than the transforms, whose sums would have to be rounded to bfloat16.
#pragma once

#include "cpu/conv3x3.h"
#include "cpu/winograd.h"

namespace gunn {
namespace {

template <class Factor>
struct Convolution {
  using Scalar = Sum<Factor>;
  static constexpr int64_t T = Simd<Scalar>::tile, L = Simd<Scalar>::lanes;

  Geometry<Scalar> geometry;
  bool winograd;
  PaddedImage<Factor> padded;
  WinogradImage<Scalar> patches;

  Convolution(const Geometry<Scalar>& geometry_, int64_t channels)
      : geometry(geometry_),
        winograd(suits_winograd(geometry_, channels)),
        padded(geometry_, channels),
        patches(geometry_, channels) {}

  void take(Arena& arena) {
    if (winograd) {
      patches.take(arena);
    } else {
      padded.data = arena.take<Factor>(padded.size());
    }
  }
  // Before the first image: what is never put stays zero.
  void clear() const {
    if (winograd) return patches.clear();
    for (int64_t j = 0; j < padded.size(); ++j) padded.data[j] = Factor{};
  }

  // Values for one weight of the kernel, where it is packed.
  static int64_t values_of_weight(const Geometry<Scalar>& geometry, int64_t channels) {
    return suits_winograd(geometry, channels) ? 16 : 9;
  }
  static bool suits_winograd(const Geometry<Scalar>& geometry, int64_t channels) {
    return kDepth<Factor> == 1 && WinogradImage<Scalar>::suits(geometry, channels);
  }
  // This part's share of packing weights (row, channel, 3, 3), as many rows as channels: for the convolution itself, or
  // `transposed` for its input gradient, whose rows are channels and whose taps are turned round.
  static void pack(const Geometry<Scalar>& geometry, Factor* dst, const Scalar* weights, int64_t channels,
                   bool transposed, int64_t part, int64_t parts) {
    const auto kernel = [&](int64_t r, int64_t c) {
      return weights + (transposed ? c * channels + r : r * channels + c) * 9;
    };
    if constexpr (kDepth<Factor> == 1) {
      if (suits_winograd(geometry, channels)) {
        WinogradImage<Scalar>::pack(dst, channels, channels, transposed, part, parts, kernel);
        return;
      }
    }
    pack_taps(dst, channels, channels, transposed, part, parts, kernel);
  }

  // Factor c of a tile's channels, both vectors; zero at padding pixels.
  GUNN_INLINE void put(int64_t tile, int64_t c, Vector<Factor> first, Vector<Factor> second) const {
    if constexpr (kDepth<Factor> == 1) {
      if (winograd) {
        patches.put(tile * T, c, first);
        patches.put(tile * T + L, c, second);
        return;
      }
    }
    padded.put(geometry, tile * T, c, first);
    padded.put(geometry, tile * T + L, c, second);
  }

  // All rows of a piece's output: out(tile) is where a tile's go, done(tile) follows when they are there. Padding
  // pixels come out as garbage; whoever reads them masks.
  template <class Out, class Done>
  GUNN_INLINE void run(const Factor* w, int64_t rows, const Piece& piece, const Out& out, const Done& done) const {
    if constexpr (kDepth<Factor> == 1) {
      if (winograd) return run_groups(w, rows, piece, out, done);
    }
    for (int64_t tile = piece.first; tile < piece.last; ++tile) {
      conv3x3_rows<Factor>(geometry, padded, w, rows, tile, out(tile));
      done(tile);
    }
  }

 private:
  template <class Out, class Done>
  GUNN_INLINE void run_groups(const Scalar* w, int64_t rows, const Piece& piece, const Out& out,
                              const Done& done) const {
    const int64_t step = patches.tiles_of_group();
    for (int64_t first = piece.first / step * step; first < piece.last; first += step) {
      const int64_t begin = larger(first, piece.first), end = smaller(first + step, piece.last);
      patches.convolve(first / step, w, rows,
                       [&](int64_t tile) -> Scalar* { return tile >= begin && tile < end ? out(tile) : nullptr; });
      for (int64_t tile = begin; tile < end; ++tile) done(tile);
    }
  }
};

}  // namespace
}  // namespace gunn
