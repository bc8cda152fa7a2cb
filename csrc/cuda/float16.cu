#include "cuda/dispatch.h"
#include "cuda/drivers.cuh"

namespace gunn {

const Kernels<Float16, float> cuda_float16 = Drivers<Float16Bits<Float16>>::table();

}  // namespace gunn
