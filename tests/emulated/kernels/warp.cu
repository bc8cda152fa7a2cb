// Lanes of one warp: shuffles, votes, barriers, with masks and warps that are not full.
#include "harness.h"

namespace gunn::test {
namespace {

__global__ void shuffle_kernel(int* out) {
  const int t = static_cast<int>(threadIdx.x), lane = t % 32;
  int* mine = out + t * 8;
  mine[0] = __shfl_sync(~0u, t, 5);
  mine[1] = __shfl_sync(~0u, t, lane + 1, 8);
  mine[2] = __shfl_xor_sync(~0u, t, 9);
  mine[3] = __shfl_xor_sync(~0u, t, 8, 8);
  mine[4] = __shfl_up_sync(~0u, t, 3, 16);
  mine[5] = __shfl_down_sync(~0u, t, 3, 16);
  mine[6] = static_cast<int>(2 * __shfl_sync(~0u, t * 0.5, 31 - lane));
  int sum = t;
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  mine[7] = sum;
}

CASE(shuffles_read_the_right_lane) {
  for (const int block : {32, 96, static_cast<int>(kLargestBlock)}) {
    Buffer<int> out(block * 8);
    launch(Launch{"shuffle_kernel", 1, static_cast<unsigned>(block)}, shuffle_kernel, out.data());
    finish();
    for (int t = 0; t < block; ++t) {
      const int lane = t % 32, base = t - lane;
      const int expected[8] = {base + 5,
                               base + lane / 8 * 8 + (lane + 1) % 8,
                               base + (lane ^ 9),
                               (lane ^ 8) / 8 > lane / 8 ? t : base + (lane ^ 8),
                               lane % 16 >= 3 ? t - 3 : t,
                               lane % 16 < 13 ? t + 3 : t,
                               base + 31 - lane,
                               32 * base + 496};
      for (int i = 0; i < 8; ++i) expect_equal("shuffle " + std::to_string(i), t, out[t * 8 + i], expected[i]);
    }
  }
}

__global__ void vote_kernel(unsigned* out) {
  const unsigned t = threadIdx.x, lane = t % 32;
  out[t * 3] = __ballot_sync(~0u, lane % 3 == 0);
  out[t * 3 + 1] = static_cast<unsigned>(__any_sync(~0u, lane == 7));
  out[t * 3 + 2] = static_cast<unsigned>(__all_sync(~0u, t < 40));
}

// 48 threads: the second warp has 16 lanes, and votes count those alone.
CASE(votes_in_a_warp_that_is_not_full) {
  Buffer<unsigned> out(48 * 3);
  launch(Launch{"vote_kernel", 1, 48}, vote_kernel, out.data());
  finish();
  for (unsigned t = 0; t < 48; ++t) {
    expect_equal("ballot", t, out[t * 3], t < 32 ? 0x49249249u : 0x9249u);
    expect_equal("any", t, out[t * 3 + 1], 1u);
    expect_equal("all", t, out[t * 3 + 2], t < 32 ? 1u : 0u);
  }
}

// The halves of a warp go their own ways, each with its mask.
__global__ void halves_kernel(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  int sum = lane;
  if (lane < 16) {
    for (int step = 8; step > 0; step /= 2) sum += __shfl_xor_sync(0x0000ffffu, sum, step);
  } else {
    sum *= 2;
    for (int step = 8; step > 0; step /= 2) sum += __shfl_down_sync(0xffff0000u, sum, static_cast<unsigned>(step), 16);
    sum = __shfl_sync(0xffff0000u, sum, 16);
  }
  __syncwarp();
  out[lane] = sum;
}

CASE(halves_of_a_warp_shuffle_apart) {
  Buffer<int> out(32);
  launch(Launch{"halves_kernel", 1, 32}, halves_kernel, out.data());
  finish();
  for (int lane = 0; lane < 32; ++lane) expect_equal("sum", lane, out[lane], lane < 16 ? 120 : 2 * (120 + 256));
}

// Lanes hand values to their neighbours through shared memory, with only the warp's barrier between.
__global__ void neighbour_kernel(int* out) {
  GUNN_SHARED(int, box, [96]);
  const unsigned t = threadIdx.x, neighbour = t / 32 * 32 + (t + 1) % 32;
  int value = static_cast<int>(t);
  for (int round = 0; round < 5; ++round) {
    box[t] = value;
    __syncwarp();
    value = box[neighbour] + 1;
    __syncwarp();
  }
  out[t] = value;
}

CASE(a_warp_barrier_orders_shared_memory) {
  Buffer<int> out(96);
  launch(Launch{"neighbour_kernel", 1, 96}, neighbour_kernel, out.data());
  finish();
  for (int t = 0; t < 96; ++t) expect_equal("out", t, out[t], t / 32 * 32 + (t + 5) % 32 + 5);
}

}  // namespace
}  // namespace gunn::test
