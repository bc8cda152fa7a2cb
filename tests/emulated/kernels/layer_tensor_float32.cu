// The layer in tensor_float32.
#include "layer.h"

#include "cuda/tensor_float32.cu"

LAYER(cuda_tensor_float32, true);
