// Sums whose bits depend on the order of the threads, and sums whose bits do not: prints them.
#include <cstdio>

#include "harness.h"

namespace gunn::test {
namespace {

constexpr unsigned kBlocks = 16, kBlock = 96;

// Block sums to their own places, the last block adds them up in a fixed order.
__global__ void fixed_order_kernel(const float* x, float* parts, unsigned* counter, float* out) {
  GUNN_SHARED(float, part, [kBlock / 32]);
  GUNN_SHARED(bool, last);
  float v = x[blockIdx.x * kBlock + threadIdx.x];
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(~0u, v, step);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
  __syncthreads();
  if (threadIdx.x == 0) {
    parts[blockIdx.x] = part[0] + part[1] + part[2];
    last = add_acquire_release(counter, 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last || threadIdx.x != 0) return;
  for (unsigned i = 0; i < gridDim.x; ++i) *out += parts[i];
}

__global__ void any_order_kernel(const float* x, float* out) { atomicAdd(out, x[blockIdx.x * kBlock + threadIdx.x]); }

void fill(Buffer<float>& x) {
  for (unsigned i = 0; i < x.size(); ++i) x[i] = 1.0f / static_cast<float>(i * 7919 % 1013 + 1);
}

void print(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  std::printf("%08x\n", bits);
}

CASE(fixed_order) {
  Buffer<float> x(kBlocks * kBlock), parts(kBlocks), out(1);
  Buffer<unsigned> counter(1);
  fill(x);
  launch(Launch{"fixed_order_kernel", kBlocks, kBlock}, fixed_order_kernel, x.data(), parts.data(), counter.data(),
         out.data());
  finish();
  print(out[0]);
}

CASE(any_order) {
  Buffer<float> x(kBlocks * kBlock), out(1);
  fill(x);
  launch(Launch{"any_order_kernel", kBlocks, kBlock}, any_order_kernel, x.data(), out.data());
  finish();
  print(out[0]);
}

}  // namespace
}  // namespace gunn::test
