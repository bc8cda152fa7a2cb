#include "cuda/dispatch.h"
#include "cuda/drivers.cuh"

namespace gunn {

const Kernels<double> cuda_float64 = Drivers<Float64>::table();

}  // namespace gunn
