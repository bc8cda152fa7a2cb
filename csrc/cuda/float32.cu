#include "cuda/dispatch.h"
#include "cuda/drivers.cuh"

namespace gunn {

const Kernels<float> cuda_float32 = Drivers<Float32>::table();

}  // namespace gunn
