// Values in the 32-bit registers that tensor cores take (precision.cuh): two neighbours in depth of 16 bits, or one
// TF32. The persistent kernels keep results in the same registers, which so are operands of the next product.
//
// A piece is 16 bytes that are neighbours in memory: lane t of a quad has its register t. A product's step of depth is
// two pieces, a tile of its 8 columns one or two: the lane's two columns are 2t and 2t + 1 in 16 bits, t and t + 4 of
// 32. Tensor cores give it 2t and 2t + 1 in both; in 32 bits the weights' rows are exchanged for that on their way in.
#pragma once

#include "cuda/precision.cuh"

namespace gunn {

template <class Precision>
struct Registers {
  using Storage = typename Precision::Storage;
  static constexpr int kEach = 4 / static_cast<int>(sizeof(Storage));  // values of a register
  static constexpr int kPiece = 4 * kEach;                             // of a piece
  static constexpr int kStep = 2 * kPiece;
  static constexpr int kOfTile = 8 / kPiece;              // pieces
  static constexpr int kApart = kEach == 2 ? 1 : kPiece;  // a lane's columns of a tile

  // The column whose product is column i of a tile.
  static GUNN_DEVICE int source(int i) { return kEach == 2 ? i : i / 2 + 4 * (i % 2); }
  // Of a lane's two columns of a tile, where the second has its piece and its place in the register.
  static GUNN_DEVICE int piece_of(int tile, int which) { return tile * kOfTile + which / kEach; }

  static GUNN_DEVICE float value(uint32_t bits, int which) {
    if constexpr (kEach == 2) {
      return to_float(Storage{static_cast<uint16_t>(bits >> 16 * which)});
    } else {
      return __uint_as_float(bits);
    }
  }
  // Of value_of(0), …, rounded to storage.
  template <class ValueOf>
  static GUNN_DEVICE uint32_t pack(const ValueOf& value_of) {
    if constexpr (kEach == 2) {
      const float low = value_of(0), high = value_of(1);
      return from_float<Storage>(low).bits | static_cast<uint32_t>(from_float<Storage>(high).bits) << 16;
    } else {
      return __float_as_uint(value_of(0));
    }
  }
  // As tensor cores take it.
  static GUNN_DEVICE uint32_t operand(uint32_t bits) {
    if constexpr (kEach == 2) {
      return bits;
    } else {
      return __float_as_uint(Precision::element(__uint_as_float(bits)));
    }
  }
};

}  // namespace gunn
