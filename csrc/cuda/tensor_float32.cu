#include "cuda/dispatch.h"
#include "cuda/staged.cuh"

namespace gunn {

const Kernels<float> cuda_tensor_float32 = staged_kernels<TensorFloat32>();

}  // namespace gunn
