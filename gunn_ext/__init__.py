"""Gradually Updated Neural Networks (Qiao et al., ICML 2018) on fused kernels, for PyTorch."""

import torch  # noqa: F401  # first: its OpenMP runtime is then the one of the process

from gunn_ext._info import __version__, info
from gunn_ext.layers import GunnLayer
from gunn_ext.models import create_model, list_models
from gunn_ext.reference import ReferenceGunnLayer
from gunn_ext.synchronized import SynchronizedBatchNorm, convert_sync_batchnorm

__all__ = [
    "GunnLayer",
    "ReferenceGunnLayer",
    "SynchronizedBatchNorm",
    "__version__",
    "convert_sync_batchnorm",
    "create_model",
    "info",
    "list_models",
]
