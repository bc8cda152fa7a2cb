// The layer in float32.
#include "layer.h"

#include "cuda/float32.cu"

LAYER(cuda_float32, false);
