// The weight gradient of the 3x3 in Winograd's domain: 16 products for four pixels instead of 36.
//
// With y = Aᵀ (U ⊙ V) A for every patch of 2x2 pixels (winograd.h), and U = G g Gᵀ:
//
//     dU += V ⊗ (A dy Aᵀ)    for each of the 16, over all patches    V is the forward's, of the same image
//     dg  = Gᵀ dU G          once, from the sums
//
// The products are those of outer.h, patches in place of pixels: lanes are rows of dy, channels of V are read where the
// transform leaves them.
#pragma once

#include "cpu/outer.h"
#include "cpu/winograd.h"

namespace gunn {
namespace {

template <class Scalar>
struct WinogradWeights {
  static constexpr int64_t T = Simd<Scalar>::tile, L = Simd<Scalar>::lanes;
  // Multiplied at once: enough for their sums to stay in registers, few enough for the second cache.
  static constexpr int64_t kPatches = larger(32, L);

  int64_t channels, pitch;
  Scalar* inputs = nullptr;     // V: [16][channel][kPatches]
  Scalar* gradients = nullptr;  // A dy Aᵀ: [16][kPatches][pitch], each of the 16 with room for a vector behind it

  explicit WinogradWeights(int64_t channels_) : channels(channels_), pitch(padded_rows<Scalar>(channels_)) {}

  void take(Arena& arena) {
    inputs = arena.take<Scalar>(16 * channels * kPatches);
    gradients = arena.take<Scalar>(16 * gradients_step());
  }
  // Of the sums, [16][channel][pitch].
  static int64_t sums_size(int64_t channels) { return 16 * channels * padded_rows<Scalar>(channels); }

  // Adds the patches of a piece whose hidden tiles are put in `image`; gradient[pixel][pitch] is the whole image's,
  // with room for a vector behind it, and zero at padding pixels.
  void add(const WinogradImage<Scalar>& image, const Piece& piece, const Scalar* gradient, Scalar* sums) const {
    const Geometry<Scalar>& geometry = image.geometry;
    const int64_t rows = smaller(geometry.height, piece.last * T / geometry.row);
    const int64_t first = piece.first * T / geometry.row / 2 * image.across, last = (rows + 1) / 2 * image.across;
    for (int64_t begin = first / L * L; begin < last; begin += kPatches) {
      const int64_t end = smaller(last, begin + kPatches), skipped = larger(first, begin) - begin;
      for (int64_t patch = begin; patch < end; patch += L) {
        image.transform_input(patch / L, inputs + patch - begin, channels * kPatches, kPatches);
      }
      for (int64_t patch = begin + skipped; patch < end; ++patch) {
        const int64_t y = patch / image.across * 2, x = patch % image.across * 2;
        const Scalar* from = gradient + (y * geometry.row + x) * pitch;
        transform_gradient(from, y + 1 < geometry.height ? from + geometry.row * pitch : nullptr,
                           gradients + (patch - begin) * pitch);
      }
      for (int64_t at = 0; at < 16; ++at) {
        outer_product<Scalar, kPatches>({1, end - begin - skipped, 0, 0}, inputs + at * channels * kPatches + skipped,
                                        channels, gradients + at * gradients_step() + skipped * pitch, channels,
                                        sums + at * channels * pitch);
      }
    }
  }

  // The nine taps of one weight from its sixteen sums.
  static GUNN_INLINE void finish(const Scalar (&sums)[16], Scalar* taps) {
    const Scalar half = static_cast<Scalar>(0.5);
    const auto transform = [&](Scalar a, Scalar b, Scalar c, Scalar d, Scalar(&to)[3]) {
      const Scalar both = half * (b + c);
      to[0] = a + both, to[1] = half * (b - c), to[2] = both + d;
    };
    Scalar columns[4][3];
    for (int x = 0; x < 4; ++x) transform(sums[x], sums[4 + x], sums[8 + x], sums[12 + x], columns[x]);
    for (int y = 0; y < 3; ++y) {
      Scalar row[3];
      transform(columns[0][y], columns[1][y], columns[2][y], columns[3][y], row);
      for (int x = 0; x < 3; ++x) taps[3 * y + x] = row[x];
    }
  }

 private:
  int64_t gradients_step() const { return kPatches * pitch + L; }

  // One patch; `below` is null where the image has ended. Whole vectors are written, beyond the last row too: patches
  // come in order, so the next one puts that right.
  GUNN_INLINE void transform_gradient(const Scalar* above, const Scalar* below, Scalar* to) const {
    for (int64_t r = 0; r < pitch; r += L) {
      Vector<Scalar> t[4][2];
      GUNN_UNROLL for (int x = 0; x < 2; ++x) {
        const Vector<Scalar> a = load<Scalar>(above + x * pitch + r);
        const Vector<Scalar> b = below ? load<Scalar>(below + x * pitch + r) : Vector<Scalar>{};
        t[0][x] = a, t[1][x] = a + b, t[2][x] = a - b, t[3][x] = -b;
      }
      GUNN_UNROLL for (int64_t p = 0; p < 4; ++p) {
        Scalar* row = to + 4 * p * gradients_step() + r;
        store<Scalar>(row, t[p][0]);
        store<Scalar>(row + gradients_step(), t[p][0] + t[p][1]);
        store<Scalar>(row + 2 * gradients_step(), t[p][0] - t[p][1]);
        store<Scalar>(row + 3 * gradients_step(), -t[p][1]);
      }
    }
  }
};

}  // namespace
}  // namespace gunn
