// The 3x3 convolution of one image, on rows padded with zeros: no borders in the inner loop.
//
//     padded[row -1 … rows][channel][gap | row of pixels]
//
// The gap of zeros before each row serves as the right border of the channel before it. Taps are unaligned loads at
// constant offsets from the same 12 x 2 (6 x 2) register block as the 1x1. With two rows to a vector a load is two
// half loads. Weights are packed [block][c][9][R]. Direct form: 2·9·k FLOPs an output.
#pragma once

#include "cpu/gemm.h"

namespace gunn {
namespace {

template <class Factor>
struct PaddedImage {
  using Scalar = Sum<Factor>;

  int64_t channels;  // in factors
  int64_t channel;   // step from one channel's row to the next channel's
  int64_t line;      // step from one row to the next of the same channel
  int64_t gap;
  int64_t rows;
  Factor* data = nullptr;

  PaddedImage(const Geometry<Scalar>& geometry, int64_t channels_)
      : channels(factors<Factor>(channels_)),
        gap(geometry.halves ? geometry.row : geometry.lanes),
        rows(geometry.rows + 2) {
    channel = gap + geometry.row;
    line = channels * channel;
  }
  int64_t size() const { return rows * line + 2 * Simd<Scalar>::tile; }
  int64_t offset(const Geometry<Scalar>& geometry, int64_t pixel) const {
    return (pixel / geometry.row + 1) * line + gap + pixel % geometry.row;
  }
  // Stores one vector of channel c at the place of the padded pixel that it begins at.
  Factor* place(const Geometry<Scalar>& geometry, int64_t pixel) const { return data + offset(geometry, pixel); }
  GUNN_INLINE void put(const Geometry<Scalar>& geometry, Factor* place, int64_t c, Vector<Factor> v) const {
    if (geometry.halves) {
      store_halves<Factor>(place + c * channel, line, v);
    } else {
      store<Factor>(place + c * channel, v);
    }
  }
};

// This part's share of packing kernel(row, channel)[tap], with the taps in reverse where `reversed`.
template <class Factor, class Kernel>
GUNN_INLINE void pack_taps(Factor* dst, int64_t rows, int64_t channels, bool reversed, int64_t part, int64_t parts,
                           const Kernel& kernel) {
  const int64_t inner = factors<Factor>(channels);
  for_row_blocks(rows, [&](auto block, int64_t r) {
    constexpr int R = decltype(block)::value;
    for (int64_t c = inner * part / parts; c < inner * (part + 1) / parts; ++c) {
      Factor* to = dst + (r * inner + c * R) * 9;
      for (int j = 0; j < R; ++j) {
        const auto from = sources<Factor>(c, channels, [&](int64_t at) { return kernel(r + j, at); });
        for (int tap = 0; tap < 9; ++tap) to[tap * R + j] = from[reversed ? 8 - tap : tap];
      }
    }
  });
}

template <class Factor, int R, bool halves>
GUNN_NOINLINE void conv3x3_block(const PaddedImage<Factor>& image, const Factor* w, int64_t offset0, int64_t offset1,
                                 Sum<Factor>* out) {
  using Scalar = Sum<Factor>;
  constexpr int64_t T = Simd<Scalar>::tile, L = Simd<Scalar>::lanes;
  constexpr int64_t kChannels = kLongestSum / 9;
  const int64_t line = image.line;
  const Factor *p0 = image.data + offset0, *p1 = image.data + offset1;
  for (int64_t first = 0; first < image.channels; first += kChannels) {
    Vector<Scalar> acc[R][2];
    clear<Scalar, R, 2>(acc);
    const int64_t end = first + kChannels < image.channels ? first + kChannels : image.channels;
    for (int64_t c = first; c < end; ++c) {
      GUNN_UNROLL for (int64_t dy = -1; dy <= 1; ++dy) {
        GUNN_UNROLL for (int64_t dx = -1; dx <= 1; ++dx) {
          const int64_t at = dy * line + dx;
          const Vector<Factor> in[2] = {halves ? load_halves<Factor>(p0 + at, line) : load<Factor>(p0 + at),
                                        halves ? load_halves<Factor>(p1 + at, line) : load<Factor>(p1 + at)};
          multiply_step<Factor, R, 2>(acc, w, in);
          w += R;
        }
      }
      p0 += image.channel;
      p1 += image.channel;
    }
    GUNN_UNROLL for (int r = 0; r < R; ++r) {
      GUNN_UNROLL for (int v = 0; v < 2; ++v) {
        Scalar* p = out + r * T + v * L;
        store<Scalar>(p, first == 0 ? acc[r][v] : load<Scalar>(p) + acc[r][v]);
      }
    }
  }
}

// One tile of the output: out[rows][tile]. Padding pixels come out as garbage; whoever reads them masks.
template <class Factor>
GUNN_INLINE void conv3x3_rows(const Geometry<Sum<Factor>>& geometry, const PaddedImage<Factor>& image, const Factor* w,
                              int64_t rows, int64_t tile, Sum<Factor>* out) {
  constexpr int64_t T = Simd<Factor>::tile, L = Simd<Factor>::lanes;
  const int64_t offset0 = image.offset(geometry, tile * T), offset1 = image.offset(geometry, tile * T + L);
  const int64_t inner = image.channels * 9;
  for_row_blocks(rows, [&](auto block, int64_t r) {
    constexpr int R = decltype(block)::value;
    if (geometry.halves) {
      conv3x3_block<Factor, R, true>(image, w + r * inner, offset0, offset1, out + r * T);
    } else {
      conv3x3_block<Factor, R, false>(image, w + r * inner, offset0, offset1, out + r * T);
    }
  });
}

}  // namespace
}  // namespace gunn
