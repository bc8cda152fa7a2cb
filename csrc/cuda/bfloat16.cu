#include "cuda/dispatch.h"
#include "cuda/drivers.cuh"

namespace gunn {

const Kernels<BFloat16, float> cuda_bfloat16 = Drivers<Float16Bits<BFloat16>>::table();

}  // namespace gunn
