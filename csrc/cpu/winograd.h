// The 3x3 convolution of one image by Winograd's F(2x2, 3x3): 16 products where the direct form has 36.
//
// A patch is 2x2 pixels of the output and needs 4x4 of the input. Vectors run over patches, row by row of the image:
//
//     V = Bᵀ d B      for each channel     4x4 values of a patch, from loads at constant offsets
//     M = sum_c U V   for each of the 16   U = G g Gᵀ are the weights, packed [16][block][c][R]
//     y = Aᵀ M A      for each row         2x2 pixels
//
// So that loads need no shuffles, the image is stored with even and odd columns apart, and even and odd rows too. What
// a load at ±1 patch takes from beyond a row's end is masked away. Rows above and below the image are zeros.
//
// Bᵀ and Aᵀ only add: F(2x2) has no more error than the direct form. F(4x4) would have six times as much, more than
// twice torch's over a whole layer.
#pragma once

#include "cpu/gemm.h"

namespace gunn {
namespace {

template <class Scalar>
struct WinogradImage {
  static constexpr int64_t T = Simd<Scalar>::tile, L = Simd<Scalar>::lanes;
  static constexpr int kRows = 2 * kBlockRows;  // of one block: a vector wide each
  using Int = typename Simd<Scalar>::Int;

  Geometry<Scalar> geometry;
  int64_t channels;
  int64_t across;                      // patches of a row of patches
  int64_t group;                       // vectors that cover whole rows of patches
  int64_t groups;                      // of the image
  int64_t odd, channel, parity, line;  // steps to odd columns, the next channel, odd rows, the next row of patches
  Scalar* data = nullptr;
  Int *not_first, *not_last;   // [group][L]: patches with a patch to their left, to their right
  Scalar *patches, *products;  // V of one vector: [16][channels][L]; M of one block: [16][kRows][L]

  WinogradImage(const Geometry<Scalar>& geometry_, int64_t channels_) : geometry(geometry_), channels(channels_) {
    across = geometry.row / 2;
    const int64_t together = across % L == 0 ? 1 : across >= L / 2 ? 2 : L / across;  // rows of patches
    group = together * across / L;
    groups = (geometry.tiles + tiles_of_group() - 1) / tiles_of_group();
    const int64_t rows = groups * together + 2;
    // Where a row fills vectors, the channels of one row lie together; else rows do, as vectors hold several.
    const bool whole = across % L == 0;
    odd = whole ? across : rows * across;
    channel = 2 * odd;
    parity = channels * channel;
    line = whole ? 2 * parity : across;
    size_ = rows * 4 * channels * across + 2 * L;
  }
  int64_t tiles_of_group() const { return 2 * group; }

  // Whether it is worth its transforms.
  static bool suits(const Geometry<Scalar>& geometry, int64_t channels) {
    if (channels < 8) return false;
    const WinogradImage image(geometry, channels);
    return 10 * 16 * image.groups * image.group * L < 7 * 9 * geometry.tiles * T;
  }

  void take(Arena& arena) {
    data = arena.take<Scalar>(size_) + L;
    not_first = arena.take<Int>(group * L);
    not_last = arena.take<Int>(group * L);
    patches = arena.take<Scalar>(16 * channels * L);
    products = arena.take<Scalar>(16 * kRows * L);
  }
  void clear() const {
    for (int64_t j = 0; j < size_; ++j) data[j - L] = 0;
    for (int64_t j = 0; j < group * L; ++j) {
      not_first[j] = j % across == 0 ? 0 : -1;
      not_last[j] = j % across == across - 1 ? 0 : -1;
    }
  }

  // Stores one vector of channel c that begins at padded pixel `pixel`.
  GUNN_INLINE void put(int64_t pixel, int64_t c, Vector<Scalar> v) const {
    const int64_t y = pixel / geometry.row, x = pixel % geometry.row;
    Scalar* to = data + (y / 2 + 1) * line + c * channel;
    if (geometry.halves) {
      store_columns_of_halves<Scalar>(to, odd, parity, v);
    } else {
      store_columns<Scalar>(to + y % 2 * parity + x / 2, odd, v);
    }
  }

  // Where one vector's output goes: for its rows, the two vectors of pixels that are its first and second half.
  struct Destinations {
    Scalar* at[2][2];
  };
  // out(tile) is the tile's first row; null where nobody asks for it.
  template <class Out>
  GUNN_INLINE Destinations destinations(int64_t vector, const Out& out) const {
    Destinations to;
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t patch = vector * L + half * (L / 2);
      for (int64_t r = 0; r < 2; ++r) {
        const int64_t pixel = (patch / across * 2 + r) * geometry.row + patch % across * 2, tile = pixel / T;
        Scalar* begin = out(tile);
        to.at[r][half] = begin ? begin + pixel % T : nullptr;
      }
    }
    return to;
  }

  // The convolution of one group, `rows` rows: tile t's go to out(t)[row][pixel], unless that is null.
  template <class Out>
  GUNN_INLINE void convolve(int64_t which, const Scalar* w, int64_t rows, const Out& out) const {
    for (int64_t v = 0; v < group; ++v) {
      const int64_t vector = which * group + v;
      transform_input(vector, patches, channels * L, L);
      const Destinations to = destinations(vector, out);
      for_row_blocks<kRows>(rows, [&](auto block, int64_t r) {
        constexpr int R = decltype(block)::value;
        multiply_block<R>(w + r * channels, rows * channels);
        transform_output<R>(to, r * T);
      });
    }
  }

  // V of one vector of patches: number (4 * row + column) of channel c goes to `to` + number * step + c * pitch.
  GUNN_NOINLINE void transform_input(int64_t vector, Scalar* to, int64_t step, int64_t pitch) const {
    const int64_t v = vector % group, first = vector * L;
    const Scalar* from = data + (first / across + 1) * line + first % across;
    const Mask<Scalar> inner = load_mask<Scalar>(not_first + v * L), outer = load_mask<Scalar>(not_last + v * L);
    for (int64_t c = 0; c < channels; ++c) {
      Vector<Scalar> t[4][4];
      GUNN_UNROLL for (int j = 0; j < 4; ++j) {
        // Image rows 2y - 1 … 2y + 2: odd, even, odd, even.
        const Scalar* row = from + (j == 0 ? -line : j == 3 ? line : 0) + (j % 2 == 0 ? parity : 0);
        const Vector<Scalar> even = load<Scalar>(row), next = keep<Scalar>(load<Scalar>(row + 1), outer);
        const Vector<Scalar> other = load<Scalar>(row + odd), before = keep<Scalar>(load<Scalar>(row + odd - 1), inner);
        t[j][0] = before - other;
        t[j][1] = even + other;
        t[j][2] = other - even;
        t[j][3] = even - next;
      }
      GUNN_UNROLL for (int q = 0; q < 4; ++q) {
        store<Scalar>(to + q * step, t[0][q] - t[2][q]);
        store<Scalar>(to + (4 + q) * step, t[1][q] + t[2][q]);
        store<Scalar>(to + (8 + q) * step, t[2][q] - t[1][q]);
        store<Scalar>(to + (12 + q) * step, t[1][q] - t[3][q]);
      }
      from += channel;
      to += pitch;
    }
  }

  // This part's share of U, from kernel(row, channel)[tap], with the taps in reverse where `reversed`.
  template <class Kernel>
  static void pack(Scalar* dst, int64_t rows, int64_t channels, bool reversed, int64_t part, int64_t parts,
                   const Kernel& kernel) {
    for_row_blocks<kRows>(rows, [&](auto block, int64_t r) {
      constexpr int R = decltype(block)::value;
      for (int64_t c = channels * part / parts; c < channels * (part + 1) / parts; ++c) {
        Scalar g[9][R];
        for (int j = 0; j < R; ++j) {
          const Scalar* from = kernel(r + j, c);
          for (int tap = 0; tap < 9; ++tap) g[tap][j] = from[reversed ? 8 - tap : tap];
        }
        transform_weights<R>(g, dst + r * channels + c * R, rows * channels);
      }
    });
  }

 private:
  template <int R>
  GUNN_NOINLINE void multiply_block(const Scalar* w, int64_t w_step) const {
    for (int64_t at = 0; at < 16; ++at) {
      Vector<Scalar> acc[R][1];
      gunn::clear<Scalar, R, 1>(acc);
      multiply<Scalar, R, 1>(acc, w + at * w_step, R, patches + at * channels * L, L, channels);
      GUNN_UNROLL for (int r = 0; r < R; ++r) store<Scalar>(products + (at * R + r) * L, acc[r][0]);
    }
  }

  template <int R>
  GUNN_NOINLINE void transform_output(const Destinations& to, int64_t offset) const {
    for (int r = 0; r < R; ++r) {
      Vector<Scalar> s[2][4];
      GUNN_UNROLL for (int q = 0; q < 4; ++q) {
        const auto m = [&](int p) { return load<Scalar>(products + ((4 * p + q) * R + r) * L); };
        const Vector<Scalar> m1 = m(1), m2 = m(2);
        s[0][q] = m(0) + m1 + m2;
        s[1][q] = m1 - m2 - m(3);
      }
      GUNN_UNROLL for (int y = 0; y < 2; ++y) {
        const Vector<Scalar> even = s[y][0] + s[y][1] + s[y][2], other = s[y][1] - s[y][2] - s[y][3];
        GUNN_UNROLL for (int half = 0; half < 2; ++half) {
          if (to.at[y][half] == nullptr) continue;
          Scalar* p = to.at[y][half] + offset + r * T;
          const Vector<Scalar> pixels = half == 0 ? zip_low<Scalar>(even, other) : zip_high<Scalar>(even, other);
          if (geometry.halves) {
            store_halves<Scalar>(p, L, pixels);  // the second half is two rows below
          } else {
            store<Scalar>(p, pixels);
          }
        }
      }
    }
  }

  // U = G g Gᵀ with G = (1 0 0 | ½ ½ ½ | ½ -½ ½ | 0 0 1), for R rows at once.
  template <int R>
  static GUNN_INLINE void transform_weights(const Scalar (&g)[9][R], Scalar* dst, int64_t step) {
    const Scalar half = static_cast<Scalar>(0.5);
    const auto transform = [&](Scalar a, Scalar b, Scalar c, Scalar(&to)[4]) {
      const Scalar ends = a + c;
      to[0] = a, to[1] = half * (ends + b), to[2] = half * (ends - b), to[3] = c;
    };
    for (int j = 0; j < R; ++j) {
      Scalar columns[3][4];
      for (int x = 0; x < 3; ++x) transform(g[x][j], g[3 + x][j], g[6 + x][j], columns[x]);
      for (int y = 0; y < 4; ++y) {
        Scalar u[4];
        transform(columns[0][y], columns[1][y], columns[2][y], u);
        for (int x = 0; x < 4; ++x) dst[(4 * y + x) * step + j] = u[x];
      }
    }
  }

  int64_t size_;
};

}  // namespace
}  // namespace gunn
