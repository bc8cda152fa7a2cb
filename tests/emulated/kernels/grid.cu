// Blocks together: atomics, the grid barrier, clusters and their shared memory, polled words.
#include "harness.h"

namespace gunn::test {
namespace {

__global__ void atomic_kernel(int* integers, float* sum, double* wide, unsigned long long* large) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  atomicAdd(&integers[0], i);
  atomicMax(&integers[1], i);
  atomicMin(&integers[2], -i);
  atomicOr(&integers[3], 1 << i % 20);
  if (atomicCAS(&integers[4], 0, i + 1) == 0) atomicExch(&integers[5], 77);
  atomicSub(&integers[6], 2);
  atomicAdd(sum, 1);
  atomicAdd(wide, 0.25);
  atomicAdd(large, 1ull << 33);
}

CASE(atomics_lose_nothing) {
  const unsigned blocks = 9, block = 50, count = blocks * block;
  Buffer<int> integers(7);
  Buffer<float> sum(1);
  Buffer<double> wide(1);
  Buffer<unsigned long long> large(1);
  launch(Launch{"atomic_kernel", blocks, block}, atomic_kernel, integers.data(), sum.data(), wide.data(), large.data());
  finish();
  const int last = static_cast<int>(count) - 1;
  expect_equal("add", 0, integers[0], last * (last + 1) / 2);
  expect_equal("max", 0, integers[1], last);
  expect_equal("min", 0, integers[2], -last);
  expect_equal("or", 0, integers[3], (1 << 20) - 1);
  expect_equal("exchanged", 0, integers[5], 77);
  expect_equal("sub", 0, integers[6], -2 * static_cast<int>(count));
  expect_equal("float", 0, sum[0], count);
  expect_equal("double", 0, wide[0], count * 0.25);
  expect_equal("long", 0, large[0], count * (1ull << 33));
}

// Each round, everybody reads what the next block wrote in the round before.
__global__ void ring_kernel(int* values, int rounds) {
  const unsigned t = threadIdx.x, n = blockDim.x, next = (blockIdx.x + 1) % gridDim.x;
  values[blockIdx.x * n + t] = static_cast<int>(blockIdx.x * n + t);
  for (int round = 0; round < rounds; ++round) {
    grid_barrier();
    const int value = values[next * n + t];
    grid_barrier();
    values[blockIdx.x * n + t] = value;
  }
}

CASE(the_grid_barrier_orders_all_blocks) {
  for (const unsigned blocks : {1u, 6u, 19u}) {
    const unsigned block = 37;
    const int rounds = 3;
    Buffer<int> values(blocks * block);
    Launch how{"ring_kernel", blocks, block};
    how.cooperative = true;
    launch(how, ring_kernel, values.data(), rounds);
    finish();
    for (unsigned i = 0; i < blocks * block; ++i) {
      expect_equal("values", i, values[i], (i / block + rounds) % blocks * block + i % block);
    }
  }
}

// Each block sums the vectors of all blocks of its cluster, straight from their shared memory.
__global__ void cluster_sum_kernel(const int* x, int* out) {
  GUNN_SHARED(int, part, [48]);
  GUNN_DYNAMIC_SHARED(int, pool);
  const unsigned t = threadIdx.x, n = blockDim.x;
  const unsigned block = blockIdx.x + gridDim.x * blockIdx.y;
  part[t] = x[block * n + t];
  pool[t] = static_cast<int>(cluster_rank());
  cluster_barrier();
  int sum = 0;
  for (unsigned rank = 0; rank < cluster_size(); ++rank) {
    sum += *remote_shared(&part[t], rank) * 16 + remote_shared(pool, rank)[t];
  }
  out[block * n + t] = sum;
  cluster_barrier();  // nobody ends while others still read it
}

CASE(clusters_read_each_others_shared_memory) {
  const unsigned n = 48;
  const dim3 grid(4, 6), cluster(2, 3);
  Buffer<int> x(24 * n), out(24 * n);
  for (unsigned i = 0; i < 24 * n; ++i) x[i] = static_cast<int>(i * 31 % 101);
  for (const bool cooperative : {false, true}) {
    Launch how{"cluster_sum_kernel", grid, n, n * sizeof(int)};
    how.cluster = cluster;
    how.cooperative = cooperative;
    launch(how, cluster_sum_kernel, x.data(), out.data());
    finish();
    for (unsigned block = 0; block < 24; ++block) {
      const unsigned left = block % 4 / 2 * 2, top = block / 4 / 3 * 3;
      for (unsigned t = 0; t < n; ++t) {
        int expected = 15;  // the ranks 0 to 5
        for (unsigned y = 0; y < 3; ++y) {
          for (unsigned column = 0; column < 2; ++column) expected += 16 * x[((top + y) * 4 + left + column) * n + t];
        }
        expect_equal("out", block * n + t, out[block * n + t], expected);
      }
    }
  }
}

struct alignas(8) Word {
  float value;
  unsigned epoch;
};

// Block 0 combines one word of every block and sends the sum back: value and epoch travel in one 64-bit word.
__global__ void word_kernel(Word* sent, Word* result, float* out, unsigned epochs) {
  for (unsigned epoch = 1; epoch <= epochs; ++epoch) {
    const unsigned parity = epoch % 2;
    if (threadIdx.x == 0) {
      store_relaxed(&sent[parity * gridDim.x + blockIdx.x], Word{static_cast<float>(blockIdx.x + epoch), epoch});
    }
    if (blockIdx.x == 0 && threadIdx.x == 1) {
      float sum = 0;
      for (unsigned block = 0; block < gridDim.x; ++block) {
        Word word;
        poll("a block's word", [&] {
          word = load_relaxed(&sent[parity * gridDim.x + block]);
          return word.epoch == epoch;
        });
        sum += word.value;
      }
      store_relaxed(&result[parity], Word{sum, epoch});
    }
    Word word;
    poll("the sum", [&] {
      word = load_relaxed(&result[parity]);
      return word.epoch == epoch;
    });
    if (threadIdx.x == blockDim.x - 1) out[blockIdx.x * epochs + epoch - 1] = word.value;
    __syncthreads();
  }
}

CASE(words_travel_between_polling_blocks) {
  const unsigned blocks = 11, epochs = 7;
  Buffer<Word> sent(2 * blocks), result(2);
  Buffer<float> out(blocks * epochs);
  Launch how{"word_kernel", blocks, 34};
  how.cooperative = true;
  launch(how, word_kernel, sent.data(), result.data(), out.data(), epochs);
  finish();
  for (unsigned i = 0; i < blocks * epochs; ++i) {
    expect_equal("out", i, out[i], blocks * (blocks - 1) / 2 + blocks * (i % epochs + 1));
  }
}

// The last block to count itself in sees what all others wrote.
__global__ void last_block_kernel(int* parts, unsigned* counter, int* out) {
  GUNN_SHARED(unsigned, arrived);
  parts[blockIdx.x * blockDim.x + threadIdx.x] = static_cast<int>(blockIdx.x + threadIdx.x);
  __syncthreads();
  if (threadIdx.x == 0) arrived = add_acquire_release(counter, 1);
  __syncthreads();
  if (arrived != gridDim.x - 1) return;
  int sum = 0;
  for (unsigned block = 0; block < gridDim.x; ++block) sum += parts[block * blockDim.x + threadIdx.x];
  out[threadIdx.x] = sum;
}

CASE(the_last_block_sees_the_others) {
  Buffer<int> parts(8 * 40), out(40);
  Buffer<unsigned> counter(1);
  launch(Launch{"last_block_kernel", 8, 40}, last_block_kernel, parts.data(), counter.data(), out.data());
  finish();
  for (int i = 0; i < 40; ++i) expect_equal("out", i, out[i], 28 + 8 * i);
}

// Flags with release and acquire order everything written before them.
__global__ void hand_over_kernel(int* data, unsigned* flag) {
  if (blockIdx.x == 0) {
    data[threadIdx.x] = static_cast<int>(threadIdx.x) * 3;
    __syncthreads();
    if (threadIdx.x == 0) store_release(flag, 1u);
  } else {
    if (threadIdx.x == 0) poll("the flag", [&] { return load_acquire(flag) == 1; });
    __syncthreads();
    data[threadIdx.x + blockDim.x] = data[threadIdx.x] + 1;
  }
}

CASE(a_flag_hands_data_over) {
  Buffer<int> data(100);
  Buffer<unsigned> flag(1);
  Launch how{"hand_over_kernel", 2, 50};
  how.cooperative = true;
  launch(how, hand_over_kernel, data.data(), flag.data());
  finish();
  for (int i = 0; i < 50; ++i) expect_equal("data", i, data[50 + i], 3 * i + 1);
}

}  // namespace
}  // namespace gunn::test
