"""Reads the pickled batches of CIFAR without running anything that a pickle names.

Python 2 wrote the files, in protocol 2: a dictionary of strings, lists of integers and one NumPy array. The three names
of NumPy that an array needs are answered with stand-ins that keep its bytes; any other name is refused.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class _Dtype:
    """Stands in for numpy.dtype."""

    def __init__(self, code: Any = None, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        """Nothing of it matters to bytes."""


class _Array:
    """Stands in for numpy.ndarray and for the function that makes an empty one."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        """Version, shape, dtype, Fortran order, bytes."""
        self.state = state


_STAND_INS: dict[tuple[str, str], type] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        """One of the stand-ins."""
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no batch of CIFAR needs")
        return _STAND_INS[module, name]


def read_batch(content: bytes, name: str, keys: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Read a pickled batch.

    Args:
        content: Of the file.
        name: Of the file, for error messages.
        keys: Of the labels.

    Returns:
        Pixels ``(n, m)`` uint8 and labels ``(n, len(keys))`` int64.

    Raises:
        ValueError: The file is no such batch, or asks for more than it may.
    """
    try:
        batch = _Unpickler(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise ValueError(f"{name}: not a readable batch of CIFAR: {error}; fetch the archive again.") from error
    found = sorted(map(str, batch)) if isinstance(batch, dict) else type(batch).__name__
    if not isinstance(batch, dict) or any(key not in batch for key in ("data", *keys)):
        raise ValueError(f"{name}: expected the keys data, {', '.join(keys)}, got {found}; fetch the archive again.")
    pixels = _pixels(batch["data"], name)
    lists = [batch[key] for key in keys]
    for key, labels in zip(keys, lists, strict=True):
        whole = isinstance(labels, list) and all(type(label) is int for label in labels)
        if not whole or len(labels) != len(pixels):
            raise ValueError(f"{name}: {key} must be a list of {len(pixels)} integers; the file is damaged.")
    return pixels, torch.tensor(lists, dtype=torch.int64).T


def _pixels(array: Any, name: str) -> Tensor:
    match getattr(array, "state", None):
        case (_, (int(rows), int(columns)), _Dtype(code="u1"), fortran, str(text)):
            data = text.encode("latin1")
            if rows > 0 and len(data) == rows * columns:
                pixels = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                return pixels.reshape(columns, rows).T.contiguous() if fortran else pixels.reshape(rows, columns)
    raise ValueError(f"{name}: data must be an array of bytes (images, pixels); the file is damaged.")
