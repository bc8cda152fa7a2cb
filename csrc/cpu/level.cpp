// Compiled once for each instruction set: GUNN_LEVEL names it, GUNN_VECTOR_BYTES is its vector's size.
#include "cpu/dispatch.h"
#include "cpu/kernels.h"

#define GUNN_PASTE_(a, b) a##b
#define GUNN_PASTE(a, b) GUNN_PASTE_(a, b)

namespace gunn {

const LevelKernels GUNN_PASTE(kernels_, GUNN_LEVEL) = {kernels<Precision<float>>(), kernels<Precision<double>>(),
                                                       kernels<Precision<BFloat16, float>>(),
                                                       kernels<Precision<Float16, float>>()};

}  // namespace gunn
