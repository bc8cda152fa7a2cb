"""What is done to a photograph on its way to the network: the transformations of the ImageNet recipe.

Decoding, cropping and scaling are Pillow's, as in torchvision, whose definitions these are (``RandomResizedCrop``,
``Resize``, ``CenterCrop``, ``TenCrop``, ``ColorJitter``): the images are the same, and torchvision, which has to fit
the version of torch exactly, is not needed. Colours are changed on whole batches, on the device.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gunn_ext._optional import require

VIEWS = 10
_LEAST_AREA, _ASPECTS = 0.08, (3 / 4, 4 / 3)
_TRIES = 10

GREY = (0.2989, 0.587, 0.114)
# Principal components of the colours of ImageNet's pixels (Krizhevsky et al. 2012), on the scale 0 … 1.
EIGENVALUES = (0.2175, 0.0188, 0.0045)
EIGENVECTORS = (
    (-0.5675, 0.7192, 0.4009),
    (-0.5808, -0.0045, -0.8140),
    (-0.5836, -0.6948, 0.4203),
)


def open_image(path: Path, mode: str = "RGB") -> Any:
    """Decode an image file completely.

    Args:
        path: Of the file.
        mode: Of the PIL image: ``"RGB"``, or ``"L"`` for grey.

    Raises:
        MissingPackageError: Pillow is not installed.
        ValueError: The file is truncated or no image; the message names it.
    """
    pil = require("PIL.Image", "imagenet")
    try:
        with pil.open(path) as image:
            return image.convert(mode)
    except (OSError, ValueError, SyntaxError, pil.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be decoded ({error}); the file is damaged or no image.") from error


def random_box(width: int, height: int, draw: random.Random) -> tuple[int, int, int, int]:
    """Left, top, right and lower edge of a crop of random area, 8 to 100 %, and aspect, 3/4 to 4/3."""
    for _ in range(_TRIES):
        area = width * height * draw.uniform(_LEAST_AREA, 1)
        aspect = math.exp(draw.uniform(*map(math.log, _ASPECTS)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = draw.randint(0, width - w), draw.randint(0, height - h)
            return left, top, left + w, top + h
    aspect = width / height  # too narrow or too wide: as much of the middle as the limits allow
    w = width if aspect <= _ASPECTS[1] else round(height * _ASPECTS[1])
    h = height if aspect >= _ASPECTS[0] else round(width / _ASPECTS[0])
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def training_view(image: Any, size: int, draw: random.Random, *, mirror: bool) -> Tensor:
    """A random crop, scaled to ``size``, mirrored with probability 1/2 where asked for: ``(3, size, size)`` uint8."""
    width, height = image.size
    view = _to_tensor(_scaled(image.crop(random_box(width, height, draw)), size, size))
    return view.flip(-1) if mirror and draw.random() < 0.5 else view


def evaluation_views(image: Any, resize: int, size: int, *, ten_crop: bool) -> Tensor:
    """The middle of an image whose shorter side is scaled to ``resize``, or four corners, the middle, their mirrors.

    Returns:
        ``(3, size, size)`` uint8, or with ``ten_crop`` ``(10, 3, size, size)``.
    """
    width, height = image.size
    short = min(width, height)
    scaled = _to_tensor(_scaled(image, int(resize * width / short), int(resize * height / short)))
    down, right = scaled.shape[1] - size, scaled.shape[2] - size
    middle = scaled[:, round(down / 2) :, round(right / 2) :][:, :size, :size]
    if not ten_crop:
        return middle.contiguous()
    corners = [scaled[:, y : y + size, x : x + size] for y in (0, down) for x in (0, right)]
    # The mirrored crops are those of the mirrored image, in the same order.
    flipped = scaled.flip(-1)
    mirrored = [flipped[:, y : y + size, x : x + size] for y in (0, down) for x in (0, right)]
    mirrored.append(flipped[:, round(down / 2) :, round(right / 2) :][:, :size, :size])
    return torch.stack([*corners, middle, *mirrored])


def _scaled(image: Any, width: int, height: int) -> Any:
    return image.resize((width, height), require("PIL.Image", "imagenet").Resampling.BILINEAR)


def _to_tensor(image: Any) -> Tensor:
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1).contiguous()


COLOUR_DRAWS = 9


def draw_colours(draw: random.Random) -> list[float]:
    """The random numbers of `change_colours` for one image: three in -1 … 1, three to order by, three normal ones."""
    return (
        [draw.uniform(-1, 1) for _ in range(3)]
        + [draw.random() for _ in range(3)]
        + [draw.gauss(0, 1) for _ in range(3)]
    )


def change_colours(images: Tensor, draws: Tensor, jitter: float, lighting: float) -> Tensor:
    """Change brightness, contrast and saturation by up to ``jitter``, in random order, then light along the PCA.

    Args:
        images: ``(B, 3, H, W)`` float32, 0 … 1.
        draws: ``(B, 9)`` from `draw_colours`, on the same device.
        jitter: Factors are uniform in 1 - jitter … 1 + jitter.
        lighting: Standard deviation of the multiples of the principal components that are added.

    Returns:
        ``(B, 3, H, W)``; lighting may leave 0 … 1.
    """
    if jitter:
        factors = 1 + jitter * draws[:, :3].view(-1, 3, 1, 1, 1)
        order = draws[:, 3:6].argsort(1)
        for place in range(3):
            which = order[:, place].view(-1, 1, 1, 1)
            grey = (images * images.new_tensor(GREY).view(1, 3, 1, 1)).sum(1, keepdim=True)
            other = torch.where(which == 1, grey.mean((1, 2, 3), keepdim=True), grey) * (which > 0)
            factor = factors.gather(1, order[:, place].view(-1, 1, 1, 1, 1)).squeeze(1)
            images = (factor * images + (1 - factor) * other).clamp(0, 1)
    if lighting:
        steps = draws[:, 6:] * lighting * images.new_tensor(EIGENVALUES)
        images = images + (steps @ images.new_tensor(EIGENVECTORS).T).view(-1, 3, 1, 1)
    return images
