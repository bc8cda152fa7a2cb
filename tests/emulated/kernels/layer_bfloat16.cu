// The layer in bfloat16.
#include "layer.h"

#include "cuda/bfloat16.cu"

LAYER(cuda_bfloat16, true);
