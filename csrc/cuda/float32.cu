#include "cuda/dispatch.h"
#include "cuda/staged.cuh"

namespace gunn {

const Kernels<float> cuda_float32 = staged_kernels<Float32>();

}  // namespace gunn
