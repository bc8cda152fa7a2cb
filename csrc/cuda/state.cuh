// Between tensors of any strides and the kernels' pixel-major form.
//
// Owns:      block (tile of 64 pixels, tile of 64 channels); through shared memory, so that both sides move neighbours.
// Costs:     one read and one write of the tensor. Channels-last tensors whose channels come in eights need none.
#pragma once

#include "cuda/view.cuh"

namespace gunn {

// A pixel-major map as a feature map.
template <class Scalar>
FeatureMap<Scalar> pixel_major(Scalar* data, const LayerShape& shape, int64_t step) {
  return {data, shape.height * shape.width * step, 1, shape.width * step, step};
}

// Whether 16 bytes of it can be read anywhere: pixel-major, aligned, channels in eights.
template <class Scalar>
bool is_pixel_major(const FeatureMap<Scalar>& map, const LayerShape& shape) {
  const int64_t step = shape.channels;
  const bool rows = shape.height == 1 || map.row == shape.width * step;
  const bool images = shape.batch == 1 || map.batch == shape.height * shape.width * step;
  return map.channel == 1 && (shape.width == 1 || map.column == step) && rows && images && step % 8 == 0 &&
         reinterpret_cast<uintptr_t>(map.data) % 16 == 0;
}

// The same where the caller has given its word: the workspace has no room for a copy then.
template <class Scalar>
bool lies_ready(const FeatureMap<Scalar>& map, const LayerShape& shape, const Options& options) {
  const bool ready = is_pixel_major(map, shape);
  require(ready || !options.pixel_major,
          "Options: pixel_major, but a feature map is not channels-last with channels in "
          "eights and aligned to 16 bytes; leave pixel_major out, and allocate what sizes() then says.");
  return ready;
}

// to = from, in another dtype or layout, over `channels` channels of which those from extents.channels on are zero.
template <class From, class To>
__global__ void __launch_bounds__(kThreads)
    copy_map(Extents extents, FeatureMap<const From> from, FeatureMap<To> to, int channels) {
  constexpr int S = kColumns + 1;
  GUNN_SHARED(PixelWindow<kRows>, windows, [1]);
  GUNN_SHARED(To, tile, [kRows * S]);
  PixelWindow<kRows>& window = windows[0];
  set_window(window, extents, static_cast<int64_t>(blockIdx.x) * kRows, extents.pixels);
  __syncthreads();
  const int first = blockIdx.y * kColumns, columns = min(channels - first, kColumns), count = window.count;
  // Consecutive threads take neighbours: pixels or channels.
  const auto each = [&](bool pixels_fast, auto visit) {
    for (int e = threadIdx.x; e < kRows * kColumns; e += kThreads) {
      const int m = pixels_fast ? e % kRows : e / kColumns, n = pixels_fast ? e / kRows : e % kColumns;
      if (m < count && n < columns) visit(m, n);
    }
  };
  each(from.column < from.channel, [&](int m, int n) {
    const int64_t channel = first + n;
    To value = from_float<To>(0);
    if (channel < extents.channels) {
      value = from_float<To>(to_float(from.data[offset(from, window, m) + channel * from.channel]));
    }
    tile[m * S + n] = value;
  });
  __syncthreads();
  each(to.column < to.channel,
       [&](int m, int n) { to.data[offset(to, window, m) + (first + n) * to.channel] = tile[m * S + n]; });
}

}  // namespace gunn
