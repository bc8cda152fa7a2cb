// The table of CUDA kernels for each dtype.
#pragma once

#include "core/layer.h"

namespace gunn {

extern const Kernels<double> cuda_float64;
extern const Kernels<float> cuda_float32;
extern const Kernels<float> cuda_tensor_float32;
extern const Kernels<BFloat16, float> cuda_bfloat16;
extern const Kernels<Float16, float> cuda_float16;

}  // namespace gunn
