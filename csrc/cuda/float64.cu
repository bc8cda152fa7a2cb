#include "cuda/dispatch.h"
#include "cuda/staged.cuh"

namespace gunn {

const Kernels<double> cuda_float64 = staged_kernels<Float64>();

}  // namespace gunn
