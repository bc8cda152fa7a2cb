"""Gradually Updated Neural Networks (Qiao et al., ICML 2018) on fused kernels, for PyTorch."""

import torch  # noqa: F401  # first: its OpenMP runtime is then the one of the process

from gunn_ext._info import __version__, info
from gunn_ext.layers import GunnLayer
from gunn_ext.models import create_model, list_models
from gunn_ext.reference import ReferenceGunnLayer

__all__ = ["GunnLayer", "ReferenceGunnLayer", "__version__", "create_model", "info", "list_models"]
