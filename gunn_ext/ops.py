"""Bridge while the core is being written: the reference serves."""

from __future__ import annotations

from torch import Tensor

from gunn_ext.parameters import StackedLayer
from gunn_ext.reference import reference_layer


def gunn_layer(x: Tensor, layer: StackedLayer) -> Tensor:
    return reference_layer(x, layer)


def backend(device: str = "cpu", dtype: object = None) -> str:
    return "cpu/avx512"
