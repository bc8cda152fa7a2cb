#include "cuda/dispatch.h"
#include "cuda/staged.cuh"

namespace gunn {

const Kernels<Float16, float> cuda_float16 = staged_kernels<Float16Bits<Float16>>();

}  // namespace gunn
