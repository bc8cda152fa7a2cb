// Which instruction set serves: chosen once per process, the best the CPU has unless GUNN_SIMD says otherwise.
#pragma once

#include "core/layer.h"

namespace gunn {

struct LevelKernels {
  Kernels<float> float32;
  Kernels<double> float64;
};

extern const LevelKernels kernels_baseline;
extern const LevelKernels kernels_avx2;
extern const LevelKernels kernels_avx512;

// "avx512", "avx2" or "baseline". Throws where GUNN_SIMD asks for something this CPU or build lacks.
const char* simd_level();

template <class Scalar>
const Kernels<Scalar>& cpu_kernels();

}  // namespace gunn
