"""Reads arrays of an HDF5 file as tensors; needs h5py (extra ``hdf5``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from gunn_ext._optional import require


def read_hdf5(path: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Read some arrays of the file's root.

    Args:
        path: Of the file.
        names: Of the arrays wanted; upper and lower case are the same.

    Returns:
        Those that are there, by their name in the file.

    Raises:
        MissingPackageError: h5py is not installed.
        ValueError: The file is damaged, or an array is not one of numbers.
    """
    h5py = require("h5py", "hdf5")
    wanted = {name.lower() for name in names}
    try:
        with h5py.File(path, "r") as file:
            found = {name: node[()] for name, node in file.items() if name.lower() in wanted and hasattr(node, "dtype")}
    except OSError as error:
        raise ValueError(f"{path}: not a readable HDF5 file ({' '.join(str(error).split())}).") from error
    arrays = {}
    for name, array in found.items():
        try:
            arrays[name] = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
        except (TypeError, AttributeError) as error:
            raise ValueError(f"{path}: {name} is no array of numbers ({error}).") from error
    return arrays
