// Tensor cores, asynchronous copies and the short number formats.
#include "harness.h"

namespace gunn::test {
namespace {

__global__ void round_kernel(const float* x, uint16_t* brain, uint16_t* half, float* back, int count) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= count) return;
  brain[i] = from_float<BFloat16>(x[i]).bits;
  half[i] = from_float<Float16>(x[i]).bits;
  back[2 * i] = to_float(BFloat16{brain[i]});
  back[2 * i + 1] = to_float(Float16{half[i]});
}

CASE(short_formats_round_to_nearest_even) {
  const float inf = __builtin_inff();
  const float x[] = {0.f,     -0.f,    1.f,      -2.5f,           1.00390625f, 1.01171875f,  65504.f,
                     65519.f, 65520.f, 0x1p-24f, 0x1p-25f,        0x3p-25f,    0x1.ffcp-15f, 3.14159274f,
                     inf,     -inf,    1e30f,    0x1.fffffep127f, 2049.f,      2051.f};
  const uint16_t brain[] = {0x0000, 0x8000, 0x3f80, 0xc020, 0x3f80, 0x3f82, 0x4780, 0x4780, 0x4780, 0x3380,
                            0x3300, 0x33c0, 0x3880, 0x4049, 0x7f80, 0xff80, 0x714a, 0x7f80, 0x4500, 0x4500};
  const uint16_t half[] = {0x0000, 0x8000, 0x3c00, 0xc100, 0x3c04, 0x3c0c, 0x7bff, 0x7bff, 0x7c00, 0x0001,
                           0x0000, 0x0002, 0x0400, 0x4248, 0x7c00, 0xfc00, 0x7c00, 0x7c00, 0x6800, 0x6802};
  constexpr int count = sizeof x / sizeof x[0];
  Buffer<float> in(count), back(2 * count);
  Buffer<uint16_t> to_brain(count), to_half(count);
  for (int i = 0; i < count; ++i) in[i] = x[i];
  launch(Launch{"round_kernel", 1, 32}, round_kernel, in.data(), to_brain.data(), to_half.data(), back.data(), count);
  finish();
  for (int i = 0; i < count; ++i) {
    expect_equal("bfloat16", i, to_brain[i], brain[i]);
    expect_equal("float16", i, to_half[i], half[i]);
    if (half[i] == 0x0001) expect_equal("smallest half", i, back[2 * i + 1], 0x1p-24f);
    if (half[i] == 0x7bff) expect_equal("largest half", i, back[2 * i + 1], 65504.f);
  }
}

// One warp: C (16 x 8) = A (16 x depth) · B (depth x 8), with A and B row-major.
template <class Scalar>
__global__ void product_kernel(const float* a, const float* b, float* c, int depth) {
  const int g = static_cast<int>(threadIdx.x) / 4, t = static_cast<int>(threadIdx.x) % 4;
  const auto word = [](float low, float high) {
    return from_float<Scalar>(low).bits | static_cast<uint32_t>(from_float<Scalar>(high).bits) << 16;
  };
  float sum[4] = {};
  for (int k = 0; k < depth; k += 16) {
    uint32_t rows[4], columns[2];
    for (int r = 0; r < 4; ++r) {
      const float* p = a + (g + 8 * (r % 2)) * depth + k + 2 * (t + 4 * (r / 2));
      rows[r] = word(p[0], p[1]);
    }
    for (int r = 0; r < 2; ++r) {
      const float* p = b + (k + 2 * (t + 4 * r)) * 8 + g;
      columns[r] = word(p[0], p[8]);
    }
    mma<Scalar>(sum, rows, columns);
  }
  for (int i = 0; i < 4; ++i) c[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = sum[i];
}

__global__ void product_tf32_kernel(const float* a, const float* b, float* c, int depth) {
  const int g = static_cast<int>(threadIdx.x) / 4, t = static_cast<int>(threadIdx.x) % 4;
  float sum[4] = {};
  for (int k = 0; k < depth; k += 8) {
    uint32_t rows[4], columns[2];
    for (int r = 0; r < 4; ++r) {
      rows[r] = __float_as_uint(round_to_tf32(a[(g + 8 * (r % 2)) * depth + k + t + 4 * (r / 2)]));
    }
    for (int r = 0; r < 2; ++r) columns[r] = __float_as_uint(round_to_tf32(b[(k + t + 4 * r) * 8 + g]));
    mma_tf32(sum, rows, columns);
  }
  for (int i = 0; i < 4; ++i) c[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = sum[i];
}

// Small integers: every format holds them, every order of summation gives the same sum.
template <class Kernel>
void check_product(const char* name, Kernel kernel) {
  const int depth = 48;
  Buffer<float> a(16 * depth), b(depth * 8), c(16 * 8);
  for (int i = 0; i < 16 * depth; ++i) a[i] = static_cast<float>(i * 37 % 17 - 8);
  for (int i = 0; i < depth * 8; ++i) b[i] = static_cast<float>(i * 53 % 13 - 6);
  launch(Launch{name, 1, 32}, kernel, a.data(), b.data(), c.data(), depth);
  finish();
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      float sum = 0;
      for (int k = 0; k < depth; ++k) sum += a[row * depth + k] * b[k * 8 + column];
      expect_equal(name, row * 8 + column, c[row * 8 + column], sum);
    }
  }
}

CASE(mma_bfloat16_is_a_matrix_product) { check_product("product_kernel<BFloat16>", product_kernel<BFloat16>); }
CASE(mma_float16_is_a_matrix_product) { check_product("product_kernel<Float16>", product_kernel<Float16>); }
CASE(mma_tf32_is_a_matrix_product) { check_product("product_tf32_kernel", product_tf32_kernel); }

// Tiles stream through two buffers, 16 bytes a thread, the next on its way while one is summed; the last is cut short.
__global__ void stream_kernel(const float* x, float* out, int count) {
  GUNN_SHARED(float4, tile, [2][32]);
  const int t = static_cast<int>(threadIdx.x), tiles = (count + 127) / 128;
  const auto fetch = [&](int i) {
    const bool valid = i * 128 + t * 4 < count;
    copy_async<16>(&tile[i % 2][t], valid ? x + i * 128 + t * 4 : x, valid);
    copy_async_commit();
  };
  fetch(0);
  float sum = 0;
  for (int i = 0; i < tiles; ++i) {
    if (i + 1 < tiles) {
      fetch(i + 1);
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    __syncthreads();
    const float4 v = tile[i % 2][31 - t];
    sum += v.x + v.y + v.z + v.w;
    __syncthreads();
  }
  out[t] = sum;
}

CASE(asynchronous_copies_land_when_waited_for) {
  const int count = 128 * 3 + 64;
  Buffer<float> x(count), out(32);
  for (int i = 0; i < count; ++i) x[i] = static_cast<float>(i % 29);
  launch(Launch{"stream_kernel", 1, 32}, stream_kernel, x.data(), out.data(), count);
  finish();
  for (int t = 0; t < 32; ++t) {
    float expected = 0;
    for (int i = 0; i < count; ++i) expected += i % 128 / 4 == 31 - t ? x[i] : 0.f;
    expect_equal("out", t, out[t], expected);
  }
}

// 4- and 8-byte copies, all waited for at once.
__global__ void small_copies_kernel(const float* x, float* out) {
  GUNN_SHARED(float2, tile, [64]);
  const unsigned t = threadIdx.x;
  if (t % 2 == 0) {
    copy_async<8>(&tile[t], x + 2 * t);
  } else {
    copy_async<4>(&tile[t].x, x + 2 * t);
    copy_async<4>(&tile[t].y, x + 2 * t + 1);
  }
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  check_initialised(tile, 64);
  out[t] = tile[63 - t].x * 1000 + tile[63 - t].y;
}

CASE(small_asynchronous_copies) {
  Buffer<float> x(128), out(64);
  for (int i = 0; i < 128; ++i) x[i] = static_cast<float>(i);
  launch(Launch{"small_copies_kernel", 1, 64}, small_copies_kernel, x.data(), out.data());
  finish();
  for (int t = 0; t < 64; ++t) expect_equal("out", t, out[t], (126 - 2 * t) * 1000 + 127 - 2 * t);
}

}  // namespace
}  // namespace gunn::test
