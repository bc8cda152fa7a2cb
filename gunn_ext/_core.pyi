from collections.abc import Sequence
from typing import Any

class CoreError(RuntimeError): ...

class LayerShape:
    def __init__(
        self,
        *,
        batch: int,
        channels: int,
        height: int,
        width: int,
        segments: int,
        expansion: int,
        units: int,
        shortcut: bool,
        residual: bool,
    ) -> None: ...
    @property
    def rows(self) -> int: ...

class Options:
    def __init__(
        self,
        shape: LayerShape,
        *,
        batch_statistics: bool,
        eps: float,
        threads: int,
        count: int = 0,
        need_input: bool = True,
        need_parameters: bool = True,
        stepwise: bool = False,
        device: int = -1,
        stream: int = 0,
        tensor_float: bool = False,
        pixel_major: bool = False,
        persistent: bool = False,
    ) -> None: ...

def build_info() -> dict[str, Any]: ...
def simd_level() -> str: ...
def multiply_adds(threads: int, rounds: int) -> float: ...
def prefer_large_pages(begin: int, bytes: int) -> None: ...
def sizes(shape: LayerShape, options: Options, dtype: str, keep: bool) -> tuple[int, int, int, int]: ...
def drivers(shape: LayerShape, options: Options, dtype: str, keep: bool) -> tuple[str, str, str, str]: ...
def forward(
    shape: LayerShape,
    options: Options,
    dtype: str,
    *,
    x: int,
    x_strides: Sequence[int],
    y: int,
    y_strides: Sequence[int],
    parameters: Sequence[int],
    statistics: int,
    saved: int,
    workspace: int,
    step: str = "",
    segment: int = 0,
    unit: int = 0,
) -> None: ...
def backward(
    shape: LayerShape,
    options: Options,
    dtype: str,
    *,
    grad_y: int,
    grad_y_strides: Sequence[int],
    x: int,
    x_strides: Sequence[int],
    y: int,
    y_strides: Sequence[int],
    grad_x: int,
    grad_x_strides: Sequence[int],
    parameters: Sequence[int],
    grads: Sequence[int],
    statistics: int,
    saved: int,
    workspace: int,
    sums: int = 0,
    step: str = "",
    segment: int = 0,
    unit: int = 0,
) -> None: ...
