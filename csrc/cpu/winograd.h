// The 3x3 convolution of one image by Winograd's F(2x2, 3x3): 16 products where the direct form has 36.
//
// A patch is 2x2 pixels of the output and needs 4x4 of the input. Vectors run over patches, row by row of the image:
//
//     V = Bᵀ d B      for each channel     4x4 values of a patch, from loads at constant offsets
//     M = sum_c U V   for each of the 16   U = G g Gᵀ are the weights, packed [16][block][c][R]; two vectors at once
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
  using Int = typename Simd<Scalar>::Int;

  Geometry<Scalar> geometry;
  int64_t channels;
  int64_t across;                      // patches of a row of patches
  int64_t vectors;                     // of patches that have rows of the image
  int64_t group;                       // vectors that cover whole rows of patches
  int64_t groups;                      // of the image
  int64_t odd, channel, parity, line;  // steps to odd columns, the next channel, odd rows, the next row of patches
  Scalar* data = nullptr;
  Int *not_first, *not_last;   // [group][L]: patches with a patch to their left, to their right
  Scalar *patches, *products;  // V of two vectors: [16][channels][2 L]; M of one block: [16][R][2 L]

  WinogradImage(const Geometry<Scalar>& geometry_, int64_t channels_) : geometry(geometry_), channels(channels_) {
    across = geometry.row / 2;
    const int64_t together = across % L == 0 ? 1 : across >= L / 2 ? 2 : L / across;  // rows of patches
    group = together * across / L;
    vectors = ((geometry.height + 1) / 2 * across + L - 1) / L;
    // Two vectors share a pass over the weights, which costs more than the products where these are read from afar.
    const bool pairs = group % 2 == 1 && vectors > group;
    if (pairs) group *= 2;
    groups = (vectors + group - 1) / group;
    const int64_t rows = groups * group * L / across + 2;
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
    return 10 * 16 * image.vectors * L < 7 * 9 * geometry.tiles * T;
  }

  void take(Arena& arena) {
    data = arena.take<Scalar>(size_) + L;
    not_first = arena.take<Int>(group * L);
    not_last = arena.take<Int>(group * L);
    patches = arena.take<Scalar>(16 * channels * 2 * L);
    products = arena.take<Scalar>(16 * kBlockRows * 2 * L);
  }
  void clear() const {
    for (int64_t j = 0; j < size_; ++j) data[j - L] = 0;
    for (int64_t j = 0; j < group * L; ++j) {
      not_first[j] = j % across == 0 ? 0 : -1;
      not_last[j] = j % across == across - 1 ? 0 : -1;
    }
  }

  // Stores one vector of channel c at the place of the padded pixel that it begins at.
  Scalar* place(int64_t pixel) const {
    const int64_t y = pixel / geometry.row, x = pixel % geometry.row;
    return data + (y / 2 + 1) * line + y % 2 * parity + x / 2;
  }
  GUNN_INLINE void put(Scalar* place, int64_t c, Vector<Scalar> v) const {
    if (geometry.halves) {
      store_columns_of_halves<Scalar>(place + c * channel, odd, parity, v);
    } else {
      store_columns<Scalar>(place + c * channel, odd, v);
    }
  }

  // Where one vector's output goes: for its rows, the two vectors of pixels that are its first and second half.
  struct Destinations {
    Scalar* at[2][2];
    bool any() const { return at[0][0] || at[0][1] || at[1][0] || at[1][1]; }
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
    Destinations to[2];
    int64_t waiting = 0;
    const int64_t begin = which * group, end = smaller(begin + group, vectors);
    for (int64_t vector = begin; vector < end; ++vector) {
      to[waiting] = destinations(vector, out);
      if (to[waiting].any()) {
        transform_input(vector, patches + waiting * L, channels * 2 * L, 2 * L);
        ++waiting;
      }
      if (waiting == 2 || (waiting == 1 && vector == end - 1)) {
        for_row_blocks(rows, [&](auto block, int64_t r) {
          constexpr int R = decltype(block)::value;
          if (waiting == 2) {
            multiply_block<R, 2>(w + r * channels, rows * channels);
          } else {
            multiply_block<R, 1>(w + r * channels, rows * channels);
          }
          for (int64_t v = 0; v < waiting; ++v) transform_output<R>(to[v], r * T, products + v * L);
        });
        waiting = 0;
      }
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
    for_row_blocks(rows, [&](auto block, int64_t r) {
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
  template <int R, int V>
  GUNN_NOINLINE void multiply_block(const Scalar* w, int64_t w_step) const {
    for (int64_t at = 0; at < 16; ++at) {
      Vector<Scalar> acc[R][V];
      gunn::clear<Scalar, R, V>(acc);
      multiply<Scalar, R, V>(acc, w + at * w_step, R, patches + at * channels * 2 * L, 2 * L, channels);
      GUNN_UNROLL for (int r = 0; r < R; ++r) {
        GUNN_UNROLL for (int v = 0; v < V; ++v) store<Scalar>(products + ((at * R + r) * 2 + v) * L, acc[r][v]);
      }
    }
  }

  template <int R>
  GUNN_NOINLINE void transform_output(const Destinations& to, int64_t offset, const Scalar* from) const {
    for (int r = 0; r < R; ++r) {
      Vector<Scalar> s[2][4];
      GUNN_UNROLL for (int q = 0; q < 4; ++q) {
        const auto m = [&](int p) { return load<Scalar>(from + ((4 * p + q) * R + r) * 2 * L); };
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
    const auto transform = [&](const Scalar(&a)[R], const Scalar(&b)[R], const Scalar(&c)[R], auto to) {
      for (int j = 0; j < R; ++j) {  // of rows, which lie together: vectors
        const Scalar ends = a[j] + c[j];
        to(0)[j] = a[j], to(1)[j] = half * (ends + b[j]), to(2)[j] = half * (ends - b[j]), to(3)[j] = c[j];
      }
    };
    Scalar columns[4][3][R];
    for (int x = 0; x < 3; ++x) transform(g[x], g[3 + x], g[6 + x], [&](int y) { return columns[y][x]; });
    for (int y = 0; y < 4; ++y) {
      transform(columns[y][0], columns[y][1], columns[y][2], [&](int x) { return dst + (4 * y + x) * step; });
    }
  }

  int64_t size_;
};

}  // namespace
}  // namespace gunn
