"""Classes of images in files, by the network of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gunn_ext.data.photo import open_image
from gunn_ext.training.device import resolve_device
from gunn_ext.training.precision import autocast, widened
from gunn_ext.training.runs import load_run

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


def predict_images(
    run: Path | str,
    paths: Sequence[Path],
    checkpoint: str = "last",
    device: str = "auto",
    *,
    ensemble: int | None = None,
) -> list[dict[str, Any]]:
    """Classify images.

    Args:
        run: The run directory.
        paths: Pictures, arrays (.npy) or folders that are searched for them.
        checkpoint: As in `load_run`.
        device: As in `Config`.
        ensemble: As in `load_run`.

    Returns:
        For each image, in order: ``file``, ``class``, ``probability`` of that class, and all ``probabilities``.

    Raises:
        ValueError: A file is missing or no image of this network.
    """
    where = resolve_device(device)
    trained = load_run(run, checkpoint, where, ensemble=ensemble)
    config = trained.config
    channels, height, width = trained.image_shape
    files = find_images(paths)
    mean = torch.tensor(trained.mean, device=where).view(1, -1, 1, 1)
    std = torch.tensor(trained.std, device=where).view(1, -1, 1, 1)
    found = []
    for start in range(0, len(files), config.eval_batch_size):
        some = files[start : start + config.eval_batch_size]
        images = torch.stack([fitted(read_image(file, channels), height, width) for file in some]).to(where)
        with torch.no_grad(), autocast(where, getattr(torch, config.precision)):
            logits = trained.model((images - mean) / std)
        for file, row in zip(some, widened(logits).softmax(1).tolist(), strict=True):
            best = max(range(len(row)), key=row.__getitem__)
            found.append({"file": str(file), "class": best, "probability": row[best], "probabilities": row})
    return found


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The files themselves, and in place of each folder the images in and below it, sorted.

    Raises:
        ValueError: A path does not exist, or a folder holds no image.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in (*PICTURES, ".npy"))
            if not inside:
                raise ValueError(
                    f"{path}: no images in this folder; expected files ending in .npy {' '.join(PICTURES)}."
                )
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"{path}: no such file or folder.")
    return files


def read_image(path: Path, channels: int) -> Tensor:
    """Read a picture, or a uint8 array ``(H, W)``, ``(H, W, C)`` or ``(C, H, W)``.

    Returns:
        ``(C, H, W)`` float32 on the scale 0 … 255, pictures converted to the channels of the network.

    Raises:
        ValueError: The file is damaged, of another kind, or cannot be brought to these channels.
    """
    suffix = path.suffix.lower()
    if suffix == ".npy":
        try:
            array = np.load(path, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"{path}: not a .npy array ({error}).") from error
        if array.ndim == 2:
            array = array[..., None]
        elif array.ndim == 3 and array.shape[0] == channels != array.shape[2]:
            array = np.moveaxis(array, 0, 2)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != channels or 0 in array.shape:
            raise ValueError(
                f"{path}: {array.dtype} of shape {array.shape}, expected uint8 of shape (H, W, {channels}) or "
                f"({channels}, H, W)."
            )
    elif suffix in PICTURES:
        array = _decode(path, channels)
    else:
        raise ValueError(f"{path}: unknown kind of file; expected .npy {' '.join(PICTURES)}.")
    return torch.from_numpy(np.moveaxis(array, 2, 0).astype(np.float32))


def fitted(image: Tensor, height: int, width: int) -> Tensor:
    """Scale ``(C, H, W)`` so that it just covers ``height`` by ``width``, and cut that out of its middle."""
    scale = max(height / image.shape[1], width / image.shape[2])
    size = (max(height, round(scale * image.shape[1])), max(width, round(scale * image.shape[2])))
    if size != tuple(image.shape[1:]):
        image = F.interpolate(image[None], size=size, mode="bilinear", align_corners=False, antialias=True)[0]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return image[:, top : top + height, left : left + width]


def _decode(path: Path, channels: int) -> np.ndarray:
    mode = {1: "L", 3: "RGB"}.get(channels)
    if mode is None:
        raise ValueError(f"{path}: the network takes {channels} channels, pictures have 1 or 3; give .npy files.")
    array = np.asarray(open_image(path, mode))
    return array if channels == 3 else array[..., None]
