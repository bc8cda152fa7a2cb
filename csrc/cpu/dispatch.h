// Which instruction set serves: chosen once per process, the best the CPU has unless GUNN_SIMD says otherwise.
#pragma once

#include "core/layer.h"

namespace gunn {

// Pre-activations are kept as the kernels compute them: in float32 where the feature map has 16 bits.
struct LevelKernels {
  Kernels<float> float32;
  Kernels<double> float64;
  Kernels<BFloat16, float, float> bfloat16;
  Kernels<Float16, float, float> float16;
  double (*multiply_adds)(int threads, int64_t rounds);  // peak.h
};

extern const LevelKernels kernels_baseline;
extern const LevelKernels kernels_avx2;
extern const LevelKernels kernels_avx512;
extern const LevelKernels kernels_avx512bf16;

// "avx512bf16", "avx512", "avx2" or "baseline". Throws where GUNN_SIMD asks for something this CPU or build lacks.
const char* simd_level();

const LevelKernels& cpu_kernels();

}  // namespace gunn
