"""Reads arrays of a .npz file (a zip of .npy files) as tensors, without NumPy, which torch does not require."""

from __future__ import annotations

import ast
import struct
import zipfile
from typing import IO

import torch
from torch import Tensor

_MAGIC = b"\x93NUMPY"
_DTYPES = {"|u1": torch.uint8, "|i1": torch.int8, "<i2": torch.int16, "<i4": torch.int32, "<i8": torch.int64,
           "<f4": torch.float32, "<f8": torch.float64, "|b1": torch.bool}  # fmt: skip


def read_npz(file: IO[bytes], name: str) -> dict[str, Tensor]:
    """Read every array of a .npz file.

    Args:
        file: Opened for reading bytes.
        name: Of the file, for error messages.

    Returns:
        Tensors by the name of their array.

    Raises:
        ValueError: The file is damaged, or holds an array that is not C-ordered little-endian numbers.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            return {
                member.removesuffix(".npy"): _parse_npy(archive.read(member), f"{name}/{member}")
                for member in archive.namelist()
            }
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{name}: not a readable .npz file ({error}); the file is damaged, install again.") from error


def _parse_npy(content: bytes, name: str) -> Tensor:
    if content[:6] != _MAGIC or len(content) < 12:
        raise ValueError(f"{name}: starts with {content[:6]!r}, expected {_MAGIC!r}; the file is damaged.")
    size_format = "<H" if content[6] == 1 else "<I"
    start = 8 + struct.calcsize(size_format)
    (header_size,) = struct.unpack(size_format, content[8:start])
    data = start + header_size
    header = ast.literal_eval(content[start:data].decode("latin1").strip())
    dtype = _DTYPES.get(header["descr"])
    if dtype is None or header["fortran_order"]:
        raise ValueError(
            f"{name}: dtype {header['descr']!r}, Fortran order {header['fortran_order']}; expected C order and one of "
            f"{', '.join(_DTYPES)}."
        )
    shape = tuple(header["shape"])
    count = 1
    for size in shape:
        count *= size
    expected = count * dtype.itemsize
    if len(content) - data != expected:
        raise ValueError(f"{name}: {len(content) - data} bytes of data, expected {expected}; the file is damaged.")
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(content[data:]), dtype=dtype).reshape(shape)
