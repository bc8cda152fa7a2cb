// Threads of one block: built-in variables, barriers with votes, static and dynamic shared memory.
#include <thread>
#include <vector>

#include "harness.h"

namespace gunn::test {
namespace {

__global__ void number_kernel(unsigned* seen) {
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  seen[block * blockDim.x * blockDim.y * blockDim.z + thread] += block * 10000 + thread + 1;
}

CASE(every_thread_runs_once) {
  const dim3 grids[] = {dim3(1), dim3(7), dim3(2, 3, 2)},
             blocks[] = {dim3(1), dim3(33), dim3(5, 3, 2), dim3(kLargestBlock)};
  for (const dim3 grid : grids) {
    for (const dim3 block : blocks) {
      const unsigned threads = block.x * block.y * block.z, count = grid.x * grid.y * grid.z * threads;
      Buffer<unsigned> seen(count);
      launch(Launch{"number_kernel", grid, block}, number_kernel, seen.data());
      finish();
      for (unsigned i = 0; i < count; ++i) {
        expect_equal("seen", i, seen[i], i / threads * 10000 + i % threads + 1);
      }
    }
  }
}

// Reverses each block's span, through dynamic shared memory and then through a static array.
__global__ void reverse_twice_kernel(const int* x, int* once, int* twice) {
  GUNN_DYNAMIC_SHARED(int, pool);
  GUNN_SHARED(int, rows, [16][64]);
  const unsigned t = threadIdx.x, n = blockDim.x, i = blockIdx.x * n + t;
  pool[t] = x[i];
  __syncthreads();
  const int reversed = pool[n - 1 - t];
  once[i] = reversed;
  rows[t / 64][t % 64] = reversed;
  __syncthreads();
  twice[i] = rows[(n - 1 - t) / 64][(n - 1 - t) % 64];
}

void check_reverse_twice(unsigned block) {
  const unsigned blocks = 5, count = blocks * block;
  Buffer<int> x(count), once(count), twice(count);
  for (unsigned i = 0; i < count; ++i) x[i] = static_cast<int>(i * 7919 % 10007);
  launch(Launch{"reverse_twice_kernel", blocks, block, block * sizeof(int)}, reverse_twice_kernel, x.data(),
         once.data(), twice.data());
  finish();
  for (unsigned i = 0; i < count; ++i) {
    expect_equal("once", i, once[i], x[i / block * block + block - 1 - i % block]);
    expect_equal("twice", i, twice[i], x[i]);
  }
}

CASE(barriers_and_shared_memory) {
  for (const unsigned block : {1u, 31u, 64u, 100u, kLargestBlock}) check_reverse_twice(block);
}

template <class Scalar>
__global__ void template_arrays_kernel(Scalar* out) {
  GUNN_SHARED(Scalar, total);
  if (threadIdx.x == 0) total = static_cast<Scalar>(sizeof(Scalar));
  __syncthreads();
  out[threadIdx.x] = total;
}

CASE(a_static_array_belongs_to_one_template_instance) {
  Buffer<float> narrow(40);
  Buffer<double> wide(40);
  launch(Launch{"template_arrays_kernel", 1, 40}, template_arrays_kernel<float>, narrow.data());
  launch(Launch{"template_arrays_kernel", 1, 40}, template_arrays_kernel<double>, wide.data());
  finish();
  for (int i = 0; i < 40; ++i) {
    expect_equal("narrow", i, narrow[i], 4);
    expect_equal("wide", i, wide[i], 8);
  }
}

__global__ void vote_kernel(int* out, int limit) {
  const int t = static_cast<int>(threadIdx.x);
  const int count = __syncthreads_count(t < limit), any = __syncthreads_or(t == limit - 1),
            all = __syncthreads_and(t < limit);
  out[t] = count * 4 + any * 2 + all;
}

CASE(barriers_count_votes) {
  for (const int block : {1, 33, 96}) {
    for (const int limit : {0, 1, block}) {
      Buffer<int> out(block);
      launch(Launch{"vote_kernel", 1, static_cast<unsigned>(block)}, vote_kernel, out.data(), limit);
      finish();
      for (int i = 0; i < block; ++i) {
        expect_equal("votes", i, out[i], limit * 4 + (limit > 0) * 2 + (limit == block));
      }
    }
  }
}

// Threads that have ended are not waited for.
__global__ void leave_early_kernel(const int* x, int* out, int count) {
  GUNN_SHARED(int, part, [128]);
  const int t = static_cast<int>(threadIdx.x);
  if (t >= count) return;
  part[t] = x[t];
  __syncthreads();
  out[t] = part[count - 1 - t];
}

CASE(a_barrier_does_not_wait_for_threads_that_ended) {
  Buffer<int> x(77), out(77);
  for (int i = 0; i < 77; ++i) x[i] = i * i;
  launch(Launch{"leave_early_kernel", 1, 128}, leave_early_kernel, x.data(), out.data(), 77);
  finish();
  for (int i = 0; i < 77; ++i) expect_equal("out", i, out[i], x[76 - i]);
}

// Stacks outlive launches and may serve another OS thread next time.
CASE(launches_from_several_os_threads) {
  for (int round = 0; round < 3; ++round) {
    std::vector<std::thread> callers;
    std::vector<std::string> wrong(3);
    for (std::string& text : wrong) {
      callers.emplace_back([&text] {
        try {
          check_reverse_twice(50);
        } catch (const std::exception& error) {
          text = error.what();
        }
      });
    }
    for (std::thread& caller : callers) caller.join();
    for (const std::string& text : wrong) {
      if (!text.empty()) throw WrongValue(text);
    }
  }
}

}  // namespace
}  // namespace gunn::test
