#include "cuda/dispatch.h"
#include "cuda/staged.cuh"

namespace gunn {

const Kernels<BFloat16, float> cuda_bfloat16 = staged_kernels<Float16Bits<BFloat16>>();

}  // namespace gunn
