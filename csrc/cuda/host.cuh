// What every driver does before and between its kernels: sizes for the device, weights packed, batch norms as tables.
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

  // One thread for each of `count` things, `times` times.
  Launch by_element(const char* name, int64_t count, int64_t times = 1) const {
    const dim3 grid(static_cast<unsigned>((count + 127) / 128), static_cast<unsigned>(times));
    return {name, grid, dim3(128), 0, stream, &shape};
  }
};

template <class Pointer>
std::pair<Pointer, Pointer> norm_tensors(const UnitTensors<Pointer>& unit, Norm norm) {
  return {norm_weight(unit, norm), norm_bias(unit, norm)};
}

// Calls work(norm, unit, its rows, number of their places in a table) for every batch norm of a layer.
template <class Work>
void for_each_norm(const Extents& e, const Work& work) {
  for (int m = 0; m < e.units; ++m) {
    for (const Norm norm : {Norm::reduce, Norm::shortcut, Norm::spatial, Norm::project}) {
      if (norm == Norm::shortcut && !e.projects(m)) continue;
      const int channels = e.channels_of(norm), rows = e.row(Norm::reduce, e.units);
      const NormRows place{channels, padded(channels), e.row(norm, m), rows, e.z_row(norm, m), e.z_rows(), e.segments};
      work(norm, m, place, static_cast<int64_t>(e.segments) * padded(channels));
    }
  }
}

// Scales and shifts from statistics (2, P, rows); zeros where there are none.
template <class Wide>
void fill_tables(const Launcher& launcher, const Extents& e, const UnitTensors<const Wide*>* units,
                 const Wide* statistics, const Tables<Wide>& tables, double eps) {
  const Wide* var = statistics ? statistics + static_cast<int64_t>(e.segments) * e.row(Norm::reduce, e.units) : nullptr;
  for_each_norm(e, [&](Norm norm, int m, const NormRows& rows, int64_t count) {
    const auto [weight, bias] = norm_tensors(units[m], norm);
    launch(launcher.by_element("make_tables", count), make_tables<Wide>, rows, weight, bias, statistics, var, tables,
           eps);
  });
}

// All segments of one unit.
template <class Precision>
void pack_unit(const Launcher& launcher, const Extents& e, Pack pack, int m,
               const UnitTensors<const typename Precision::Wide*>& unit, typename Precision::Element* to) {
  const bool spatial = pack == Pack::spatial || pack == Pack::spatial_transposed;
  const bool reduce = pack == Pack::reduce || pack == Pack::reduce_transposed;
  const int64_t size = pack_shape(e, pack, m).template size<Precision>();
  launch(launcher.by_element("pack_weights", size, e.segments), pack_weights<Precision>, e, pack, m,
         spatial  ? unit.spatial
         : reduce ? unit.reduce
                  : unit.project,
         reduce ? unit.shortcut : nullptr, to);
}
template <class Precision>
int64_t packed_size(const Extents& e, Pack pack, int m) {
  return e.segments * pack_shape(e, pack, m).template size<Precision>();
}

}  // namespace gunn
