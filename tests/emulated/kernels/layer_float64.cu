// The layer in float64.
#include "layer.h"

#include "cuda/float64.cu"

LAYER(cuda_float64, false);
