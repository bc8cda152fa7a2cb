#include "cuda/dispatch.h"
#include "cuda/drivers.cuh"

namespace gunn {

const Kernels<float> cuda_tensor_float32 = Drivers<TensorFloat32>::table();

}  // namespace gunn
