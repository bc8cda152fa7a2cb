// CUDA's words for g++: keywords, vector types, built-in variables, small functions.
//
// There is no word for __shared__ on purpose: a kernel says GUNN_SHARED (cuda/launch.cuh), and a plain __shared__ fails
// to compile.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

constexpr int warpSize = 32;

// The alignments are CUDA's: a misaligned vector access fails here too (UndefinedBehaviorSanitizer names the line).
#define GUNN_VECTOR_TYPES(T, name, align2, align4)                      \
  struct alignas(align2) name##2 { T x, y; };                           \
  struct name##3 { T x, y, z; };                                        \
  struct alignas(align4) name##4 { T x, y, z, w; };                     \
  constexpr name##2 make_##name##2(T x, T y) { return {x, y}; }         \
  constexpr name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
  constexpr name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

GUNN_VECTOR_TYPES(int, int, 8, 16)
GUNN_VECTOR_TYPES(unsigned, uint, 8, 16)
GUNN_VECTOR_TYPES(float, float, 8, 16)
GUNN_VECTOR_TYPES(double, double, 16, 16)
#undef GUNN_VECTOR_TYPES

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace gunn::emulator {

// The built-in variables of one CUDA thread.
struct Coordinates {
  uint3 thread, block;
  dim3 block_size, grid_size;
};

// Of the thread that runs on this OS thread; null outside a kernel. `__thread`, as thread_local costs a call each time.
extern __thread const Coordinates* self __attribute__((tls_model("initial-exec")));

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace gunn::emulator

#define threadIdx (::gunn::emulator::self->thread)
#define blockIdx (::gunn::emulator::self->block)
#define blockDim (::gunn::emulator::self->block_size)
#define gridDim (::gunn::emulator::self->grid_size)

using std::max;
using std::min;

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline uint32_t __float_as_uint(float x) { return gunn::emulator::bit_cast<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return gunn::emulator::bit_cast<float>(x); }
inline int __float_as_int(float x) { return gunn::emulator::bit_cast<int>(x); }
inline float __int_as_float(int x) { return gunn::emulator::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return gunn::emulator::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return gunn::emulator::bit_cast<double>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }

template <class T>
T __ldg(const T* p) {
  return *p;
}
