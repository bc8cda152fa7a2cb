"""Reads arrays of .npy files and of .npz files (zips of those) as tensors, without NumPy and without unpickling."""

from __future__ import annotations

import ast
import math
import struct
import zipfile
import zlib
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
                member.removesuffix(".npy"): read_npy(archive.read(member), f"{name}/{member}")
                for member in archive.namelist()
            }
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ValueError(f"{name}: not a readable .npz file ({error}); the file is damaged.") from error


def read_npy(content: bytes, name: str) -> Tensor:
    """Read the array of a .npy file.

    Args:
        content: Of the file.
        name: Of the file, for error messages.

    Raises:
        ValueError: The file is damaged, or its array not of C-ordered little-endian numbers.
    """
    if content[:6] != _MAGIC or len(content) < 12:
        raise ValueError(f"{name}: starts with {content[:6]!r}, expected {_MAGIC!r}; the file is damaged.")
    size_format = "<H" if content[6] == 1 else "<I"
    start = 8 + struct.calcsize(size_format)
    (header_size,) = struct.unpack(size_format, content[8:start])
    data = start + header_size
    try:
        header = ast.literal_eval(content[start:data].decode("latin1").strip())
        descr, fortran, shape = header["descr"], bool(header["fortran_order"]), tuple(map(int, header["shape"]))
    except (SyntaxError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{name}: its header is not that of a .npy file ({error}); the file is damaged.") from error
    dtype = _DTYPES.get(str(descr))
    if dtype is None or fortran:
        raise ValueError(
            f"{name}: dtype {descr!r}, Fortran order {fortran}; expected C order and one of {', '.join(_DTYPES)}."
        )
    count = math.prod(shape)
    expected = count * dtype.itemsize
    if len(content) - data != expected:
        raise ValueError(f"{name}: {len(content) - data} bytes of data, expected {expected}; the file is damaged.")
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(content[data:]), dtype=dtype).reshape(shape)
