// The layer in float16.
#include "layer.h"

#include "cuda/float16.cu"

LAYER(cuda_float16, true);
