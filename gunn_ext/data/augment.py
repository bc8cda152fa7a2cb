"""Augmentation of whole batches on their device, from an own generator; no loop over images.

The functions take normalised images, so the zeros that `shift_crop` pads with are the mean colour (the paper's CIFAR
recipe normalises first, then pads). The same code serves CPU and GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gunn_ext.data.part import WHOLE, Part


@dataclass(frozen=True)
class Augmentation:
    """What is done to a training batch.

    Attributes:
        mirror: Mirror an image left to right with probability 1/2.
        crop_padding: Shift an image by up to this many pixels each way, filling with the mean colour; 0 is off.
        cyclic_shift: With probability 2/3, roll an image by a uniform offset along one axis chosen at random.
    """

    mirror: bool = False
    crop_padding: int = 0
    cyclic_shift: bool = False


def augment(images: Tensor, options: Augmentation, generator: torch.Generator, part: Part = WHOLE) -> Tensor:
    """Apply mirror, shift-crop and cyclic shift, in this order, where switched on.

    Args:
        images: Normalised batch ``(B, C, H, W)``. Not modified.
        options: What to do.
        generator: Source of all random numbers, on the device of ``images``.
        part: Which part of a batch, divided equally, ``images`` are. Random numbers are drawn for the whole batch, so
            that what becomes of an image does not depend on the division.

    Returns:
        ``(B, C, H, W)``.
    """
    if options.mirror:
        images = mirror(images, generator, part)
    if options.crop_padding:
        images = shift_crop(images, options.crop_padding, generator, part)
    if options.cyclic_shift:
        images = cyclic_shift(images, generator, part)
    return images


def mirror(images: Tensor, generator: torch.Generator, part: Part = WHOLE) -> Tensor:
    """Mirror each image left to right with probability 1/2."""
    chosen = _integers(2, images.shape[0], generator, part).bool()
    return torch.where(chosen.view(-1, 1, 1, 1), images.flip(-1), images)


def shift_crop(images: Tensor, padding: int, generator: torch.Generator, part: Part = WHOLE) -> Tensor:
    """Pad each image with ``padding`` zeros on every side and cut its own size out at a random place."""
    count, _, height, width = images.shape
    down = _integers(2 * padding + 1, count, generator, part)
    right = _integers(2 * padding + 1, count, generator, part)
    padded = F.pad(images, (padding, padding, padding, padding))
    rows = torch.arange(height, device=images.device) + down[:, None]
    columns = torch.arange(width, device=images.device) + right[:, None]
    return _take(padded, rows, columns)


def cyclic_shift(images: Tensor, generator: torch.Generator, part: Part = WHOLE) -> Tensor:
    """With probability 2/3 roll each image by a uniform offset along one axis, height or width with equal chance."""
    count, _, height, width = images.shape
    axis = _integers(3, count, generator, part)  # 0: leave, 1: height, 2: width
    down = torch.where(axis == 1, _integers(height, count, generator, part), 0)
    right = torch.where(axis == 2, _integers(width, count, generator, part), 0)
    rows = (torch.arange(height, device=images.device) - down[:, None]) % height
    columns = (torch.arange(width, device=images.device) - right[:, None]) % width
    return _take(images, rows, columns)


def _integers(limit: int, count: int, generator: torch.Generator, part: Part) -> Tensor:
    whole = count * part.of
    return torch.randint(limit, (whole,), generator=generator, device=generator.device)[part.range(whole)]


def _take(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Pixels of each image at its own ``rows (B, H)`` and ``columns (B, W)``."""
    image = torch.arange(images.shape[0], device=images.device)[:, None, None, None]
    channel = torch.arange(images.shape[1], device=images.device)[None, :, None, None]
    return images[image, channel, rows[:, None, :, None], columns[:, None, None, :]]
