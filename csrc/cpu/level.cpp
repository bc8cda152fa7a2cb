// Compiled once for each instruction set: GUNN_LEVEL names it, GUNN_VECTOR_BYTES is its vector's size.
#include "cpu/dispatch.h"
#include "cpu/kernels.h"

#define GUNN_PASTE_(a, b) a##b
#define GUNN_PASTE(a, b) GUNN_PASTE_(a, b)

namespace gunn {

#ifdef __AVX512BF16__
using BFloat16Precision = Precision<BFloat16, float, Pair>;
#else
using BFloat16Precision = Precision<BFloat16, float>;
#endif

const LevelKernels GUNN_PASTE(kernels_, GUNN_LEVEL) = {kernels<Precision<float>>(), kernels<Precision<double>>(),
                                                       kernels<BFloat16Precision>(),
                                                       kernels<Precision<Float16, float>>(), multiply_adds};

}  // namespace gunn
