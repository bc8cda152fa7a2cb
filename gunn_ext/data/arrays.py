"""Data sets in arrays of your own: a .npz file, a folder of .npy files, or an HDF5 file.

The arrays are called ``X_train``, ``Y_train``, ``X_test`` and ``Y_test`` (in either case; the names of the VGG study's
HDF5 files, and with a small x those of Keras's archives).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from gunn_ext.data.dataset import ImageDataset, Split
from gunn_ext.data.npz import read_npy, read_npz

NAMES = ("X_train", "Y_train", "X_test", "Y_test")
_CHANNELS = (1, 3)
_WHOLE = 1e-3  # how far from a whole number of 255ths a float32 that was one may lie


def load_arrays(path: Path | str, device: torch.device | str = "cpu") -> ImageDataset:
    """Read images and labels from ``X_train``, ``Y_train``, ``X_test`` and ``Y_test``.

    Images are ``(n, H, W, C)``, ``(n, C, H, W)`` or ``(n, H, W)`` with 1 or 3 channels, of whole numbers 0 … 255 or of
    255ths 0 … 1; labels are integers ``(n,)`` or ``(n, 1)`` from 0, or one-hot ``(n, classes)``.

    Args:
        path: A file .npz, .h5 or .hdf5, or a folder of four files .npy.
        device: Where the images and labels will lie.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: An array is missing, or not of images or labels as above; the message names it.
        MissingPackageError: An HDF5 file, and h5py is not installed.
    """
    path = Path(path)
    arrays = _named(_read(path), path)
    images = {name: _images(arrays[name], f"{path}: {name}") for name in ("X_train", "X_test")}
    labels = {name: _labels(arrays[name], f"{path}: {name}") for name in ("Y_train", "Y_test")}
    for part in ("train", "test"):
        x, y = images[f"X_{part}"], labels[f"Y_{part}"][0]
        if len(x) != len(y):
            raise ValueError(f"{path}: X_{part} holds {len(x)} images, but Y_{part} {len(y)} labels.")
    return ImageDataset.from_splits(
        path.stem,
        Split(images["X_train"], labels["Y_train"][0]),
        Split(images["X_test"], labels["Y_test"][0]),
        max(classes for _, classes in labels.values()),
        mirror=False,
    ).to(device)


def _read(path: Path) -> Mapping[str, Tensor]:
    if path.is_dir():
        return {file.stem: read_npy(file.read_bytes(), str(file)) for file in sorted(path.glob("*.npy"))}
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; name a file .npz, .h5 or .hdf5, or a folder of files .npy, with --data_path."
        )
    if path.suffix == ".npz":
        with path.open("rb") as file:
            return read_npz(file, str(path))
    if path.suffix in (".h5", ".hdf5"):
        from gunn_ext.data.hdf5 import read_hdf5

        return read_hdf5(path, NAMES)
    raise ValueError(f"{path}: expected a file .npz, .h5 or .hdf5, or a folder of files .npy, got {path.suffix!r}.")


def _named(arrays: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    by_name = {name.lower(): array for name, array in arrays.items()}
    missing = [name for name in NAMES if name.lower() not in by_name]
    if missing:
        raise ValueError(
            f"{path}: holds no {' and no '.join(missing)}, but {', '.join(arrays) or 'nothing'}; expected "
            f"{', '.join(NAMES)}."
        )
    return {name: by_name[name.lower()] for name in NAMES}


def _images(array: Tensor, name: str) -> Tensor:
    """Any images as ``(n, C, H, W)`` uint8."""
    if array.dim() == 3:
        array = array.unsqueeze(1)
    if array.dim() != 4:
        raise ValueError(
            f"{name} has shape {tuple(array.shape)}, expected images (n, H, W, C), (n, C, H, W) or (n, H, W)."
        )
    first, last = array.shape[1] in _CHANNELS, array.shape[3] in _CHANNELS
    if first == last:
        raise ValueError(
            f"{name} has shape {tuple(array.shape)}: either the second or the last size must be 1 or 3, the channels."
        )
    return _bytes(array if first else array.permute(0, 3, 1, 2), name).contiguous()


def _bytes(array: Tensor, name: str) -> Tensor:
    """Numbers 0 … 255, or 255ths 0 … 1, as uint8."""
    if array.dtype == torch.uint8 or not array.numel():
        return array.to(torch.uint8)
    if array.dtype == torch.bool or array.is_complex():
        raise ValueError(f"{name} is of {array.dtype}, expected numbers 0 to 255 or 0 to 1.")
    low, high = float(array.min()), float(array.max())
    if array.is_floating_point() and 0 <= low <= high <= 1:
        array = array * 255
        whole = array.round()
        if float((array - whole).abs().max()) > _WHOLE:
            raise ValueError(
                f"{name} runs from {low:g} to {high:g} in steps finer than 1/255; images are kept as bytes, so store "
                "them as uint8 0 to 255 (normalisation is done here)."
            )
        return whole.to(torch.uint8)
    if not (0 <= low <= high <= 255) or (array.is_floating_point() and not bool((array == array.round()).all())):
        raise ValueError(
            f"{name} runs from {low:g} to {high:g} ({array.dtype}), expected whole numbers 0 to 255 or 255ths 0 to 1; "
            "store images as they were before normalisation."
        )
    return array.to(torch.uint8)


def _labels(array: Tensor, name: str) -> tuple[Tensor, int]:
    """Integers or one-hot rows as ``(n,)`` int64, and the number of classes they show."""
    if array.dim() == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.dim() == 2:
        ones = (array == 1).sum(1)
        if not bool(((ones == 1) & ((array != 0).sum(1) == 1)).all()):
            raise ValueError(f"{name} of shape {tuple(array.shape)} is not one-hot: a row must hold one 1 and zeros.")
        return array.to(torch.uint8).argmax(1), array.shape[1]
    whole = array.to(torch.int64)
    if array.dim() != 1 or array.dtype == torch.bool or not bool((whole == array).all()):
        raise ValueError(
            f"{name} of shape {tuple(array.shape)} and {array.dtype} holds no labels; expected integers (n,) or "
            "one-hot rows (n, classes)."
        )
    if len(whole) and int(whole.min()) < 0:
        raise ValueError(f"{name} holds the label {int(whole.min())}; labels count from 0.")
    return whole, int(whole.max()) + 1 if len(whole) else 0
