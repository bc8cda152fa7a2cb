// What every driver does around its kernels: sizes for the device, launches on one layer.
#pragma once

#include <algorithm>
#include <utility>

#include "core/arena.h"
#include "cuda/tables.cuh"
#include "cuda/weights.cuh"

namespace gunn {

// Throws where a size does not fit: single sizes are 32-bit on the device, offsets 64-bit.
inline Extents extents_of(const LayerShape& shape) {
  constexpr int64_t kMost = INT32_MAX / 2, kMostSegments = 65535;  // a grid's second and third size
  require(shape.segments <= kMostSegments, "the CUDA kernels take at most ", kMostSegments, " segments, got ",
          shape.segments, ".");
  require(shape.batch <= kMost && shape.height * shape.width <= kMost && shape.channels <= kMost &&
              10 * (shape.hidden() + 8) <= kMost && shape.rows() + 32 * shape.units <= kMost,
          "the CUDA kernels take sizes below 2^30: batch ", shape.batch, ", pixels of an image ",
          shape.height * shape.width, ", channels ", shape.channels, ", hidden channels ", shape.hidden(), ".");
  Extents e{};
  e.pixels = shape.batch * shape.height * shape.width;
  e.height = static_cast<int>(shape.height), e.width = static_cast<int>(shape.width);
  e.channels = static_cast<int>(shape.channels), e.segment = static_cast<int>(shape.segment());
  e.hidden = static_cast<int>(shape.hidden()), e.segments = static_cast<int>(shape.segments);
  e.units = static_cast<int>(shape.units);
  e.shortcut = shape.shortcut, e.residual = shape.residual;
  return e;
}

// Launches on one layer.
struct Launcher {
  const LayerShape& shape;
  Stream stream;

  Launcher(const LayerShape& shape_, const Options& options) : shape(shape_), stream{options.device, options.stream} {}

  // One thread for each of `count` things.
  Launch by_element(const char* name, int64_t count) const {
    return {name, dim3(static_cast<unsigned>((count + 127) / 128)), dim3(128), 0, stream, &shape};
  }
};

template <class Pointer>
std::pair<Pointer, Pointer> norm_tensors(const UnitTensors<Pointer>& unit, Norm norm) {
  return {norm_weight(unit, norm), norm_bias(unit, norm)};
}

template <class Precision>
int64_t packed_size(const Extents& e, Pack pack, int m) {
  return e.segments * pack_shape(e, pack, m).template size<Precision>();
}

}  // namespace gunn
