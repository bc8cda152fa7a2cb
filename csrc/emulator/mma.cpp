// The tensor core's product of a whole warp, in float: each sum runs over k in order, so its bits do not depend on the
// schedule. A GPU's sums run in an order of its own: compare with a tolerance.
//
// Lane = 4·g + t. In 32-bit registers, each one value (tf32) or two neighbours in k (16 bits; first in the low half):
//
//   A  register r: row g + 8·(r % 2), register column t + 4·(r / 2)      C  value i: row g + 8·(i / 2), column 2·t + i
//   % 2 B  register r: column g, register row t + 4·r
#include "emulator/numbers.h"
#include "emulator/warp.h"

namespace gunn::emulator {
namespace {

template <Format format>
void unpack(uint32_t word, float* values) {
  if constexpr (format == Format::tf32) {
    values[0] = truncate_to_tf32(word);
  } else {
    const uint16_t low = static_cast<uint16_t>(word), high = static_cast<uint16_t>(word >> 16);
    values[0] = format == Format::bfloat16 ? bfloat16_to_float(low) : float16_to_float(low);
    values[1] = format == Format::bfloat16 ? bfloat16_to_float(high) : float16_to_float(high);
  }
}

template <Format format>
void multiply_as(Contribution (&lanes)[32]) {
  constexpr int kPerWord = format == Format::tf32 ? 1 : 2, kDepth = 8 * kPerWord;
  float a[16][kDepth], b[8][kDepth], product[16][8] = {};
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    const uint32_t* words = lanes[lane].slot.words;
    for (int r = 0; r < 4; ++r) unpack<format>(words[r], &a[g + 8 * (r % 2)][(t + 4 * (r / 2)) * kPerWord]);
    for (int r = 0; r < 2; ++r) unpack<format>(words[4 + r], &b[g][(t + 4 * r) * kPerWord]);
  }
  for (int k = 0; k < kDepth; ++k) {
    for (int row = 0; row < 16; ++row) {
      for (int column = 0; column < 8; ++column) product[row][column] += a[row][k] * b[column][k];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) lanes[lane].slot.words[i] = bit_cast<uint32_t>(product[g + 8 * (i / 2)][2 * t + i % 2]);
  }
}

}  // namespace

void multiply_fragments(Format format, Contribution (&lanes)[32]) {
  switch (format) {
    case Format::bfloat16:
      return multiply_as<Format::bfloat16>(lanes);
    case Format::float16:
      return multiply_as<Format::float16>(lanes);
    case Format::tf32:
      return multiply_as<Format::tf32>(lanes);
  }
}

}  // namespace gunn::emulator
