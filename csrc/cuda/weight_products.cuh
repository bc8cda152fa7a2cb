// Gradients of weights where gradients of pre-activations lie ready in memory (persistent_backward.cuh), in 16-bit
// dtypes: products whose depth is pixels, of all segments of a launch.
//
//   input_weights    dW1 | dWs = [dz1, dzs]ᵀ · state      all of a segment's rows and columns in one block
//   hidden_weights   dW2 = dz2ᵀ · taps of h1, dW3 = dz3ᵀ · h2, of one unit; of k 80 and 112 in three parts
//
// Owns:      block (pair of segments, range of pixels), or (part, segment, range of bands of rows). Sums stay in
//            registers.
// Leaves:    partial sums of its range; sum_partials adds the ranges in order.
// Barriers:  one a chunk of pixels; two a band.
// Costs:     the state is read once for two segments, by asynchronous copies some chunks ahead; z1, z2, dz2, dz3 once,
//            the rows beside a band twice, in parts z1 and dz2 for each. 2*pixels*(n*(k + s) + 9*k^2 + k*s) FLOPs.
//
// Pixels are rows in shared memory, of an odd number of 16-byte pieces: eight of them lie in different banks, and are
// read transposed.
#pragma once

#include "cuda/backward.cuh"

namespace gunn {

// Where in 16 pixels of depth and 16 channels the lane's row of a matrix begins (load_matrices), as operand of rows or
// of columns: these have their four matrices in another order.
GUNN_DEVICE int depth_of_lane(bool rows) {
  const int matrix = threadIdx.x % 32 / 8;
  return threadIdx.x % 8 + 8 * (rows ? matrix / 2 : matrix % 2);
}
GUNN_DEVICE int channel_of_lane(bool rows) {
  const int matrix = threadIdx.x % 32 / 8;
  return 8 * (rows ? matrix % 2 : matrix / 2);
}

// ---- dW1 | dWs

// What a block stages of a pixel, in pieces of 8 channels: the state before its first segment, in tiles of 16; the
// pieces that the second segment sees otherwise; dz of both.
struct InputPieces {
  static constexpr int kOther = 4;
  int state, gradients;  // pieces: of the state, of one segment's dz
  int first_other;       // piece of the state that the first of the others replaces
  int others;

  GUNN_DEVICE InputPieces(const Extents& extents, int segment)
      : state((extents.channels + 15) / 16 * 2),
        gradients(extents.reduce_columns(0) / 8),
        first_other(segment * extents.segment / 8),
        others(((segment + 1) * extents.segment - 1) / 8 - first_other + 1) {}
  GUNN_DEVICE int gradients_at(int which) const { return state + kOther + which * gradients; }
  static __host__ GUNN_DEVICE int stride(const Extents& extents) {
    const int pieces = (extents.channels + 15) / 16 * 2 + kOther + 2 * extents.reduce_columns(0) / 8;
    return (pieces | 1) * 8;
  }
};

struct InputWeights {
  static constexpr int kWarps = 8, kThreadCount = 32 * kWarps, kChunk = 32, kChunks = 4;  // pixels; of them in flight
  static constexpr int kLanePieces = 3;                                                   // of 32 lanes each
  static constexpr int kLanePixels = kChunk / kWarps;

  template <class Storage>
  static size_t shared_bytes(const Extents& extents) {
    return sizeof(Storage) * kChunks * kChunk * InputPieces::stride(extents);
  }
  // Tiles of 16 channels that a warp has: a segment's are dealt to four.
  static int tiles_of_warp(const Extents& extents) { return ((extents.channels + 15) / 16 + 2 + 3) / 4; }
};

// `tiles`: of 8 rows of dz. `jobs`: tiles of 16 channels of a warp.
template <class Precision, int tiles, int jobs>
__global__ void __launch_bounds__(InputWeights::kThreadCount, 1)
    input_weights(View<Precision> view, int first_segment, int segments, int64_t range, float* partials) {
  using Storage = typename Precision::Storage;
  using Sizes = InputWeights;
  GUNN_DYNAMIC_SHARED(Storage, shared);
  const Extents& extents = view.extents;
  const int i = first_segment + 2 * blockIdx.x, both = 2 * static_cast<int>(blockIdx.x) + 1 < segments;
  const InputPieces pieces(extents, i);
  const int stride = InputPieces::stride(extents), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t begin = blockIdx.y * range, end = min(begin + range, extents.pixels);
  const int chunks = static_cast<int>((end - begin + Sizes::kChunk - 1) / Sizes::kChunk);
  const int channels = padded(extents.channels) / 8, z_rows = extents.z_rows();

  const auto load = [&](int chunk) {
    if (chunk < chunks) {
      Storage* slot = shared + chunk % Sizes::kChunks * Sizes::kChunk * stride;
      GUNN_UNROLL
      for (int q = 0; q < Sizes::kLanePieces; ++q) {
        const int piece = lane + 32 * q, other = piece - pieces.state;
        int channel = 8 * piece, written = i * extents.segment;
        const Storage* gradients = nullptr;
        if (piece >= pieces.gradients_at(0)) {
          const int which = piece >= pieces.gradients_at(1), row = piece - pieces.gradients_at(which);
          if (row >= pieces.gradients || which > both) continue;
          gradients = view.d + (i + which - view.first_segment) * extents.pixels * z_rows + 8 * row;
        } else if (other >= 0) {
          if (other >= pieces.others || !both) continue;
          channel = 8 * (pieces.first_other + other), written += extents.segment;
        } else if (piece >= channels) {
          continue;
        }
        GUNN_UNROLL
        for (int r = 0; r < Sizes::kLanePixels; ++r) {
          const int m = warp + Sizes::kWarps * r;
          const int64_t pixel = begin + static_cast<int64_t>(chunk) * Sizes::kChunk + m;
          const bool inside = pixel < end;
          Storage* to = slot + m * stride + 8 * piece;
          const int64_t from = inside ? pixel : begin;
          if (gradients != nullptr) {
            copy_async<16>(to, gradients + from * z_rows, inside);
            continue;
          }
          const Storage* x = view.x + from * view.x_step + channel;
          const Storage* y = view.y + from * view.y_step + channel;
          if (channel + 8 <= written || channel >= written) {
            copy_async<16>(to, channel < written ? y : x, inside);
            continue;
          }
          GUNN_UNROLL
          for (int v = 0; v < 8; v += 2) {
            if (channel + v + 1 == written) {
              to[v] = inside ? y[v] : from_float<Storage>(0.0f);
              to[v + 1] = inside ? x[v + 1] : from_float<Storage>(0.0f);
            } else {
              copy_async<4>(to + v, (channel + v < written ? y : x) + v, inside);
            }
          }
        }
      }
    }
    copy_async_commit();
  };

  const int which = warp / 4, base_tiles = pieces.state / 2;
  const int all_tiles = which == 0 ? base_tiles : base_tiles + InputPieces::kOther / 2;
  float sums[jobs][tiles][4] = {};
  for (int chunk = 0; chunk < Sizes::kChunks - 1; ++chunk) load(chunk);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    copy_async_wait<Sizes::kChunks - 2>();
    __syncthreads();  // the chunk has come, the one before has been multiplied
    load(chunk + Sizes::kChunks - 1);
    const Storage* slot = shared + chunk % Sizes::kChunks * Sizes::kChunk * stride;
    if (which > both) continue;
    GUNN_UNROLL
    for (int k = 0; k < Sizes::kChunk; k += 16) {
      uint32_t b[(tiles + 1) / 2][4];
      const Storage* gradients = slot + (k + depth_of_lane(false)) * stride + 8 * pieces.gradients_at(which);
      GUNN_UNROLL
      for (int n = 0; n < tiles; n += 2) {
        if (n < pieces.gradients) {
          load_matrices<true>(b[n / 2], gradients + min(8 * n + channel_of_lane(false), 8 * pieces.gradients - 8));
        }
      }
      const Storage* states = slot + (k + depth_of_lane(true)) * stride + channel_of_lane(true);
      GUNN_UNROLL
      for (int job = 0; job < jobs; ++job) {
        const int tile = warp % 4 + 4 * job;
        if (tile >= all_tiles) break;
        uint32_t a[4];
        load_matrices<true>(a, states + 16 * tile);
        GUNN_UNROLL
        for (int n = 0; n < tiles; ++n) {
          if (n >= pieces.gradients) break;
          Precision::multiply(sums[job][n], a, {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]});
        }
      }
    }
  }
  if (which > both) return;
  const int64_t width = 8 * channels, rows = 8 * pieces.gradients;
  float* to = partials + ((2 * static_cast<int64_t>(blockIdx.x) + which) * gridDim.y + blockIdx.y) * rows * width;
  GUNN_UNROLL
  for (int job = 0; job < jobs; ++job) {
    const int tile = warp % 4 + 4 * job;
    if (tile >= all_tiles) break;
    GUNN_UNROLL
    for (int half = 0; half < 2; ++half) {
      int piece = 2 * tile + half;
      const int other = piece - pieces.first_other;
      if (piece < pieces.state) {
        if (piece >= channels || (which == 1 && other >= 0 && other < pieces.others)) continue;
      } else {
        piece -= pieces.state;
        if (piece >= pieces.others) continue;
        piece += pieces.first_other;
      }
      GUNN_UNROLL
      for (int n = 0; n < tiles; ++n) {
        if (n >= pieces.gradients) break;
        GUNN_UNROLL
        for (int j = 0; j < 2; ++j) {
          to[(8 * n + 2 * (lane % 4) + j) * width + 8 * piece + lane / 4] = sums[job][n][2 * half + j];
        }
      }
    }
  }
}

// ---- dW2 and dW3

struct HiddenWeights {
  static constexpr int kWarps = 8, kThreadCount = 32 * kWarps;
  // A job is 16 rows of a product: first those of dW2ᵀ, tap by tap in eights, then those of dW3.
  static __host__ GUNN_DEVICE constexpr int jobs_of_warp(int k_tiles) { return k_tiles > 10 ? 3 : 2; }
  static __host__ GUNN_DEVICE constexpr int jobs_of_part(int k_tiles) { return jobs_of_warp(k_tiles) * kWarps; }
  static __host__ GUNN_DEVICE constexpr int spatial_jobs(int k_tiles) { return (9 * k_tiles + 1) / 2; }
  static __host__ GUNN_DEVICE constexpr int jobs(int k_tiles, int s_tiles) {
    return spatial_jobs(k_tiles) + (s_tiles + 1) / 2;
  }
  static int parts(const Extents& extents) {
    const int part = jobs_of_part(extents.k() / 8);
    return (jobs(extents.k() / 8, extents.s() / 8) + part - 1) / part;
  }
  // Of a band: two blocks find room on a multiprocessor, of k 112 one.
  static __host__ GUNN_DEVICE constexpr int most_pixels(int k) { return k > 24 ? 128 : 256; }

  // Rows of a band: images are cut where they are too large, as equally as may be.
  static __host__ GUNN_DEVICE int band_rows(const Extents& extents) {
    const int most = min(extents.height, most_pixels(extents.k()) / extents.width);
    const int bands = (extents.height + most - 1) / most;
    return (extents.height + bands - 1) / bands;
  }
  static __host__ GUNN_DEVICE int bands(const Extents& extents) {
    const int rows = band_rows(extents);
    return (extents.height + rows - 1) / rows;
  }
  static __host__ GUNN_DEVICE int stride(int channels) { return (channels / 8 | 1) * 8; }
  // Elements: h1 with a border, then dz2, h2 and dz3 of a band's pixels.
  static __host__ GUNN_DEVICE int hidden(const Extents& extents) {
    return (band_rows(extents) + 2) * (extents.width + 2) * stride(extents.k());
  }
  template <class Storage>
  static size_t shared_bytes(const Extents& extents) {
    const int pixel = 2 * stride(extents.k()) + stride(extents.s()), pixels = most_pixels(extents.k());
    return sizeof(Storage) * (hidden(extents) + pixels * pixel) + sizeof(int) * pixels;
  }
};

template <class Precision, int KT, int ST>
__global__ void __launch_bounds__(HiddenWeights::kThreadCount, KT > 10 ? 1 : 2)
    hidden_weights(View<Precision> view, int unit, int first_segment, int range, int all_bands, float* spatial,
                   float* project) {
  using Storage = typename Precision::Storage;
  using Sizes = HiddenWeights;
  constexpr int k = 8 * KT, s = 8 * ST, kGroups = 9 * KT, kJobsOfWarp = Sizes::jobs_of_warp(KT);
  constexpr int kHiddenStride = (KT | 1) * 8, kOutStride = (ST | 1) * 8, kPixels = Sizes::most_pixels(k);
  constexpr int kSpatialJobs = Sizes::spatial_jobs(KT), kJobs = Sizes::jobs(KT, ST);
  GUNN_DYNAMIC_SHARED(Storage, shared);
  const Extents& extents = view.extents;
  const int width = extents.width, band_rows = Sizes::band_rows(extents), bands = Sizes::bands(extents);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, i = first_segment + blockIdx.y;
  const int first_job = blockIdx.z * Sizes::jobs_of_part(KT),
            last_job = min(first_job + Sizes::jobs_of_part(KT), kJobs) - 1;
  const int job_of_warp = first_job + kJobsOfWarp * warp;
  const auto tap_of = [&](int group) { return min(group, kGroups - 1) / KT; };
  // Rows of h1 that the part's taps see above and below; whether it has some of the project's.
  const int above = 1 - tap_of(2 * first_job) / 3, below = tap_of(2 * last_job + 1) / 3 - 1;
  const bool projects = last_job >= kSpatialJobs;
  Storage* const h1 = shared;
  Storage* const dz2 = h1 + Sizes::hidden(extents);
  Storage* const h2 = dz2 + kPixels * kHiddenStride;
  Storage* const dz3 = h2 + kPixels * kHiddenStride;
  int* const hidden_at = reinterpret_cast<int*>(dz3 + kPixels * kOutStride);
  for (int m = threadIdx.x; m < kPixels; m += Sizes::kThreadCount) {
    const int inside = min(m, band_rows * width - 1);
    hidden_at[m] = ((inside / width + 1) * (width + 2) + inside % width + 1) * kHiddenStride;
  }

  const int64_t z_rows = extents.z_rows();
  const Storage* z = view.z_of(i);
  const Storage* dz = view.d + (i - view.first_segment) * extents.pixels * z_rows;
  // Eight channels of a pixel, through the ReLU behind their batch norm.
  const auto activate = [&](const Storage* from, int row) {
    const int64_t at = view.in_tables(i, row);
    Values<Precision> values, scale, shift;
    read<Precision>(from + row, values);
    read_table<Precision>(view.tables.scale + at, scale);
    read_table<Precision>(view.tables.shift + at, shift);
    GUNN_UNROLL
    for (int v = 0; v < 8; ++v) values[v] = relu(values[v] * scale[v] + shift[v]);
    Vector<Storage> out;
    GUNN_UNROLL
    for (int v = 0; v < 8; ++v) out.values[v] = from_float<Storage>(values[v]);
    return out;
  };
  const Vector<Storage> nothing{};
  float sums[kJobsOfWarp][KT][4] = {};
  const int end = min((static_cast<int>(blockIdx.x) + 1) * range, all_bands);
  for (int band = blockIdx.x * range; band < end; ++band) {
    const int first_row = band % bands * band_rows, rows = min(band_rows, extents.height - first_row);
    const int64_t first = (static_cast<int64_t>(band / bands) * extents.height + first_row) * width;
    const int count = rows * width, depth = (count + 15) / 16 * 16, border = (band_rows + 2) * (width + 2);
    __syncthreads();  // the band before has been multiplied
    for (int e = threadIdx.x; e < border * KT; e += Sizes::kThreadCount) {
      const int place = e / KT, piece = e % KT, row = place / (width + 2) - 1, column = place % (width + 2) - 1;
      if (row < -above || row >= band_rows + below) continue;
      const bool inside = column >= 0 && column < width && first_row + row >= 0 && first_row + row < extents.height;
      const Storage* from = z + (first + static_cast<int64_t>(row) * width + column) * z_rows;
      store_vector(h1 + place * kHiddenStride + 8 * piece,
                   inside ? activate(from, extents.z_row(Norm::reduce, unit) + 8 * piece) : nothing);
    }
    const int pieces = projects ? 2 * KT + ST : KT;
    for (int e = threadIdx.x; e < depth * pieces; e += Sizes::kThreadCount) {
      const int m = e / pieces, piece = e % pieces;
      const int64_t at = (first + m) * z_rows;
      const bool inside = m < count;
      if (piece < KT) {
        const Storage* from = dz + at + extents.z_row(Norm::spatial, unit) + 8 * piece;
        store_vector(dz2 + m * kHiddenStride + 8 * piece, inside ? load_vector(from) : nothing);
      } else if (piece < 2 * KT) {
        const int channel = 8 * (piece - KT);
        store_vector(h2 + m * kHiddenStride + channel,
                     inside ? activate(z + at, extents.z_row(Norm::spatial, unit) + channel) : nothing);
      } else {
        const int channel = 8 * (piece - 2 * KT);
        const Storage* from = dz + at + extents.z_row(Norm::project, unit) + channel;
        store_vector(dz3 + m * kOutStride + channel, inside ? load_vector(from) : nothing);
      }
    }
    __syncthreads();
    GUNN_ROLLED
    for (int d = 0; d < depth && job_of_warp <= last_job; d += 16) {
      uint32_t a[kJobsOfWarp][4] = {};
      GUNN_UNROLL
      for (int j = 0; j < kJobsOfWarp; ++j) {
        const int job = job_of_warp + j, group = 2 * job + channel_of_lane(true) / 8;
        if (job < kSpatialJobs) {
          const int tap = tap_of(group), channel = min(group, kGroups - 1) % KT * 8;
          const int offset = ((tap / 3 - 1) * (width + 2) + tap % 3 - 1) * kHiddenStride + channel;
          load_matrices<true>(a[j], h1 + hidden_at[d + depth_of_lane(true)] + offset);
        } else if (job <= last_job) {
          const int channel = min(16 * (job - kSpatialJobs) + channel_of_lane(true), s - 8);
          load_matrices<true>(a[j], dz3 + (d + depth_of_lane(true)) * kOutStride + channel);
        }
      }
      const int column = (d + depth_of_lane(false)) * kHiddenStride + channel_of_lane(false);
      const bool alike = kSpatialJobs % kJobsOfWarp == 0 || job_of_warp != kSpatialJobs - 1;
      GUNN_UNROLL
      for (int n = 0; n < KT; n += 2) {
        const int at = min(column + 8 * n, column - channel_of_lane(false) + k - 8);
        uint32_t b[4];
        load_matrices<true>(b, (job_of_warp < kSpatialJobs ? dz2 : h2) + at);
        GUNN_UNROLL
        for (int j = 0; j < kJobsOfWarp; ++j) {
          if (j > 0 && !alike) load_matrices<true>(b, h2 + at);
          Precision::multiply(sums[j][n], a[j], {b[0], b[1]});
          if (n + 1 < KT) Precision::multiply(sums[j][n + 1 < KT ? n + 1 : n], a[j], {b[2], b[3]});
        }
      }
    }
  }

  const int64_t slot = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  const int g = lane / 4, t = lane % 4;
  float *to_spatial = spatial + slot * k * 9 * k, *to_project = project + slot * s * k;
  GUNN_UNROLL
  for (int own = 0; own < kJobsOfWarp; ++own) {
    const int job = job_of_warp + own;
    GUNN_UNROLL
    for (int n = 0; n < KT; ++n) {
      GUNN_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int column = 8 * n + 2 * t + j % 2;
        if (job < kSpatialJobs) {
          const int group = 2 * job + j / 2;
          if (group < kGroups) to_spatial[column * 9 * k + 8 * group + g] = sums[own][n][j];
        } else {
          const int row = 16 * (job - kSpatialJobs) + 8 * (j / 2) + g;
          if (job <= last_job && row < s) to_project[row * k + column] = sums[own][n][j];
        }
      }
    }
  }
}

}  // namespace gunn
