"""Gradually Updated Neural Networks (Qiao et al., ICML 2018) on fused kernels."""

import torch  # noqa: F401  # first: its OpenMP runtime is then the one of the process

from gunn_ext.layers import GunnLayer
from gunn_ext.reference import ReferenceGunnLayer

__all__ = ["GunnLayer", "ReferenceGunnLayer"]
