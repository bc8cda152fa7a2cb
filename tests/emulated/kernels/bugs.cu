// One planted bug of each kind, beside the same kernel without it: cases `<name>` and `<name>_mended`.
//
// Most give the right values all the same, under this schedule or under any: that is why they are dangerous. What finds
// each is in test_planted_bugs.py.
#include "harness.h"

namespace gunn::test {
namespace {

constexpr unsigned kBlocks = 4, kBlock = 64;

// Runs a kernel that takes an input of one value a thread and an output of the same size.
template <class Kernel>
void run(const char* name, Kernel kernel, Launch how) {
  const unsigned count = how.grid.x * how.block.x;
  Buffer<float> x(count), y(count);
  for (unsigned i = 0; i < count; ++i) x[i] = static_cast<float>(i + 1);
  how.name = name;
  launch(how, kernel, x.data(), y.data());
  finish();
  for (unsigned i = 0; i < count; ++i) {
    if (y[i] != y[i]) throw WrongValue(std::string(name) + ": y[" + std::to_string(i) + "] is NaN");
  }
}

Launch ordinary(size_t shared = 0) { return Launch{"", kBlocks, kBlock, shared}; }
Launch cooperative() {
  Launch how = ordinary();
  how.cooperative = true;
  return how;
}
Launch clustered() {
  Launch how = ordinary();
  how.cluster = 2;
  return how;
}

#define PLANTED(name, how)                                       \
  CASE(name) { run(#name, name##_kernel<true>, how); }           \
  CASE(name##_mended) { run(#name, name##_kernel<false>, how); } \
  static_assert(true, "")

// ---- Races

// A warp's sums, then everybody's; `last_barrier` guards `part` for whoever comes next.
GUNN_DEVICE float block_sum(float v, float* part, bool first_barrier, bool last_barrier) {
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(~0u, v, step);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
  if (first_barrier) __syncthreads();
  v = 0;
  for (unsigned i = 0; i < blockDim.x / 32; ++i) v += part[i];
  if (last_barrier) __syncthreads();
  return v;
}

template <bool planted>
__global__ void missing_barrier_kernel(const float* x, float* y) {
  GUNN_SHARED(float, part, [kBlock / 32]);
  if (threadIdx.x < kBlock / 32) part[threadIdx.x] = 0;
  __syncthreads();
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  y[i] = block_sum(x[i], part, !planted, true);
}
PLANTED(missing_barrier, ordinary());

template <bool planted>
__global__ void missing_barrier_before_reuse_kernel(const float* x, float* y) {
  GUNN_SHARED(float, part, [kBlock / 32]);
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  const float sum = block_sum(x[i], part, true, !planted);
  y[i] = block_sum(x[i] * x[i], part, true, true) / sum;
}
PLANTED(missing_barrier_before_reuse, ordinary());

template <bool planted>
__global__ void missing_warp_barrier_kernel(const float* x, float* y) {
  GUNN_SHARED(float, box, [kBlock]);
  const unsigned t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
  box[t] = x[i];
  if (!planted) __syncwarp();
  y[i] = box[t ^ 1] == box[t ^ 1] ? box[t ^ 1] : 0.f;
}
PLANTED(missing_warp_barrier, ordinary());

template <bool planted>
__global__ void update_across_blocks_kernel(const float* x, float* y) {
  if (threadIdx.x != 0) return;
  if (planted) {
    y[0] += x[blockIdx.x];
  } else {
    atomicAdd(&y[0], x[blockIdx.x]);
  }
}
PLANTED(update_across_blocks, ordinary());

template <bool planted>
__global__ void missing_grid_barrier_kernel(const float* x, float* y) {
  const unsigned t = threadIdx.x, n = blockDim.x, next = (blockIdx.x + 1) % gridDim.x;
  y[blockIdx.x * n + t] = x[blockIdx.x * n + t];
  if (!planted) grid_barrier();
  const float value = y[next * n + t];
  grid_barrier();
  y[blockIdx.x * n + t] = value;
}
PLANTED(missing_grid_barrier, cooperative());

template <bool planted>
__global__ void missing_cluster_barrier_kernel(const float* x, float* y) {
  GUNN_SHARED(float, box, [kBlock]);
  const unsigned t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
  cluster_barrier();
  box[t] = x[i];
  if (!planted) cluster_barrier();
  const float value = remote_shared(box, cluster_rank() ^ 1)[t];
  y[i] = value == value ? value : 0.f;
  cluster_barrier();
}
PLANTED(missing_cluster_barrier, clustered());

// A relaxed flag orders nothing that was written before it.
template <bool planted>
__global__ void relaxed_flag_kernel(const float* x, float* y) {
  unsigned* flag = reinterpret_cast<unsigned*>(y + kBlock);
  if (blockIdx.x == 0) {
    y[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    if (threadIdx.x == 0) planted ? store_relaxed(flag, 1u) : store_release(flag, 1u);
  } else if (blockIdx.x == 1) {
    if (threadIdx.x == 0) poll("the flag", [&] { return load_acquire(flag) == 1; });
    __syncthreads();
    y[2 * kBlock + threadIdx.x] = y[threadIdx.x];
  }
}
PLANTED(relaxed_flag, cooperative());

// The next tile is asked for while others still read the buffer it goes to.
template <bool planted>
__global__ void copy_into_a_buffer_in_use_kernel(const float* x, float* y) {
  GUNN_SHARED(float, tile, [kBlock]);
  const unsigned t = threadIdx.x, n = blockDim.x;
  float sum = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) {
    copy_async<4>(&tile[t], x + i * n + t);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    sum += tile[n - 1 - t] == tile[n - 1 - t] ? tile[n - 1 - t] : 0.f;
    if (!planted) __syncthreads();
  }
  y[blockIdx.x * n + t] = sum;
}
PLANTED(copy_into_a_buffer_in_use, ordinary());

// ---- Overruns

template <bool planted>
__global__ void dynamic_shared_overrun_kernel(const float* x, float* y) {
  GUNN_DYNAMIC_SHARED(float, pool);
  const unsigned t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
  pool[planted ? t + 1 : t] = x[i];
  __syncthreads();
  y[i] = pool[blockDim.x - 1 - t];
}
PLANTED(dynamic_shared_overrun, ordinary(kBlock * sizeof(float)));

template <bool planted>
__global__ void static_shared_overrun_kernel(const float* x, float* y) {
  GUNN_SHARED(float, rows, [2][kBlock]);
  const unsigned t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
  rows[0][t] = rows[1][t] = x[i];
  __syncthreads();
  y[i] = (&rows[1][0])[planted ? t + 1 : t];
}
PLANTED(static_shared_overrun, ordinary());

template <bool planted>
__global__ void global_overrun_kernel(const float* x, float* y) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  y[i] = x[planted ? i + 1 : i];
}
PLANTED(global_overrun, ordinary());

template <bool planted>
__global__ void copy_overrun_kernel(const float* x, float* y) {
  GUNN_SHARED(float4, tile, [kBlock]);
  const unsigned t = threadIdx.x, i = blockIdx.x * blockDim.x + t, count = gridDim.x * blockDim.x;
  copy_async<16>(&tile[t], x + 4 * i, planted || 4 * i + 4 <= count);
  copy_async_commit();
  copy_async_wait<0>();
  y[i] = tile[t].x;
}
PLANTED(copy_overrun, ordinary());

template <bool planted>
__global__ void misaligned_vector_kernel(const float* x, float* y) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i % 4 == 0 && i + 8 < gridDim.x * blockDim.x) {
    y[i] = reinterpret_cast<const float2*>(planted ? x + i + 1 : x + i)->y;
  }
}
PLANTED(misaligned_vector, ordinary());

// ---- Barriers that cannot be passed

template <bool planted>
__global__ void barrier_in_a_branch_kernel(const float* x, float* y) {
  const unsigned t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
  if (!planted || t < 16) __syncthreads();
  __syncwarp();
  y[i] = x[i];
}
PLANTED(barrier_in_a_branch, ordinary());

template <bool planted>
__global__ void two_barriers_for_one_kernel(const float* x, float* y) {
  const unsigned t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
  if (planted && t % 2 == 0) {
    y[i] = x[i];
    __syncthreads();
  } else {
    y[i] = x[i] + 1;
    if (planted) __syncthreads();
  }
  if (!planted) __syncthreads();
}
PLANTED(two_barriers_for_one, ordinary());

template <bool planted>
__global__ void block_leaves_the_grid_kernel(const float* x, float* y) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  if (planted && blockIdx.x == 2) return;
  y[i] = x[i];
  grid_barrier();
}
PLANTED(block_leaves_the_grid, cooperative());

// The counter wants one block more than there are.
template <bool planted>
__global__ void a_block_too_few_kernel(const float*, float* y) {
  unsigned* counter = reinterpret_cast<unsigned*>(y);
  __syncthreads();
  if (threadIdx.x == 0) {
    add_acquire_release(counter, 1);
    poll("all blocks", [&] { return load_acquire(counter) >= gridDim.x + (planted ? 1 : 0); });
  }
  __syncthreads();
}
PLANTED(a_block_too_few, cooperative());

// Block 0 waits for block 1, which need not be resident.
template <bool planted>
__global__ void wait_without_cooperation_kernel(const float*, float* y) {
  unsigned* flag = reinterpret_cast<unsigned*>(y);
  if (threadIdx.x != 0) return;
  if (blockIdx.x == 1) store_release(flag, 1u);
  if (planted && blockIdx.x == 0) poll("block 1", [&] { return load_acquire(flag) == 1; });
}
PLANTED(wait_without_cooperation, ordinary());

template <bool planted>
__global__ void grid_barrier_without_cooperation_kernel(const float* x, float* y) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  y[i] = x[i];
  if (planted) grid_barrier();
}
PLANTED(grid_barrier_without_cooperation, ordinary());

// ---- Warps

template <bool planted>
__global__ void shuffle_from_outside_the_mask_kernel(const float* x, float* y) {
  const unsigned t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
  if (t % 32 < 16) y[i] = __shfl_sync(0x0000ffffu, x[i], planted && t % 32 == 5 ? 20 : 3);
}
PLANTED(shuffle_from_outside_the_mask, ordinary());

template <bool planted>
__global__ void shuffle_without_being_in_the_mask_kernel(const float* x, float* y) {
  const unsigned t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
  if (t % 32 < (planted ? 17 : 16)) y[i] = __shfl_xor_sync(0x0000ffffu, x[i], 1);
}
PLANTED(shuffle_without_being_in_the_mask, ordinary());

template <bool planted>
__global__ void shuffle_from_a_lane_that_left_kernel(const float* x, float* y) {
  const unsigned t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
  if (planted && t == 40) return;
  y[i] = __shfl_xor_sync(~0u, x[i], 16);
}
PLANTED(shuffle_from_a_lane_that_left, ordinary());

template <bool planted>
__global__ void lanes_call_different_functions_kernel(const float* x, float* y) {
  const unsigned t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
  if (planted && t % 2 == 0) {
    __syncwarp();
  } else {
    y[i] = __shfl_sync(~0u, x[i], 0);
  }
}
PLANTED(lanes_call_different_functions, ordinary());

template <bool planted>
__global__ void mma_in_half_a_warp_kernel(const float*, float* y) {
  float c[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  if (!planted || threadIdx.x != 3) mma<BFloat16>(c, a, b);
  y[blockIdx.x * blockDim.x + threadIdx.x] = c[0];
}
PLANTED(mma_in_half_a_warp, ordinary());

// ---- Shared memory that holds nothing yet, or nothing any more

template <bool planted>
__global__ void uninitialised_shared_kernel(const float* x, float* y) {
  GUNN_SHARED(float, box, [kBlock]);
  const unsigned t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
  if (!planted || t != 3) box[t] = x[i];
  __syncthreads();
  y[i] = box[kBlock - 1 - t];
}
PLANTED(uninitialised_shared, ordinary());

template <bool planted>
__global__ void uninitialised_shared_checked_kernel(const float* x, float* y) {
  GUNN_SHARED(int, box, [kBlock]);
  const unsigned t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
  if (!planted || t != 3) box[t] = static_cast<int>(x[i]);
  __syncthreads();
  check_initialised(box, kBlock);
  y[i] = static_cast<float>(box[kBlock - 1 - t]);
}
PLANTED(uninitialised_shared_checked, ordinary());

template <bool planted>
__global__ void missing_copy_wait_kernel(const float* x, float* y) {
  GUNN_SHARED(float, tile, [kBlock]);
  const unsigned t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
  tile[t] = -1;  // what a GPU might still show
  copy_async<4>(&tile[t], x + i);
  copy_async_commit();
  if (planted) {
    copy_async_wait<1>();  // one group may still be on its way: this one
  } else {
    copy_async_wait<0>();
  }
  __syncthreads();
  y[i] = tile[kBlock - 1 - t];
}
PLANTED(missing_copy_wait, ordinary());

template <bool planted>
__global__ void remote_shared_too_early_kernel(const float* x, float* y) {
  GUNN_SHARED(float, box, [kBlock]);
  const unsigned t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
  box[t] = x[i];
  if (!planted) cluster_barrier();
  y[i] = remote_shared(box, cluster_rank() ^ 1)[t];
  cluster_barrier();
}
PLANTED(remote_shared_too_early, clustered());

// Block 1 still reads when block 0 has ended.
template <bool planted>
__global__ void remote_shared_too_late_kernel(const float* x, float* y) {
  GUNN_SHARED(float, box, [kBlock]);
  const unsigned t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
  box[t] = x[i];
  cluster_barrier();
  const float* theirs = remote_shared(box, cluster_rank() ^ 1);
  if (cluster_rank() == 1) __syncthreads();
  y[i] = theirs[t];
  if (!planted) cluster_barrier();
}
PLANTED(remote_shared_too_late, clustered());

// ---- Launches that no GPU would take

CASE(too_many_threads) { run("too_many_threads", update_across_blocks_kernel<false>, Launch{"", 1, dim3(33, 32)}); }
CASE(too_much_shared_memory) {
  const LayerShape shape{2, 240, 32, 32, 20, 2, 1, true, true};
  Launch how = ordinary(300000);
  how.shape = &shape;
  run("too_much_shared_memory", update_across_blocks_kernel<false>, how);
}
CASE(empty_grid) { launch(Launch{"empty_grid", dim3(0), 32}, update_across_blocks_kernel<false>, nullptr, nullptr); }

}  // namespace
}  // namespace gunn::test
