"""The embedded data set: 1,797 scans of handwritten digits, 8x8 pixels, 10 classes (source: DIGITS.md beside this)."""

from __future__ import annotations

from importlib import resources

import torch
import torch.nn.functional as F
from torch import Tensor

from gunn_ext.data.dataset import ImageDataset, Split
from gunn_ext.data.npz import read_npz

DIGITS_CLASSES = 10
_DARKEST = 16  # pixel values of the scans are 0 … 16


def load_digits(image_size: int = 16, device: torch.device | str = "cpu") -> ImageDataset:
    """Load the digits: 1,437 training and 360 test images, a fixed split stratified by class.

    The split is stored in the package and never changes: digits.npz holds the indices of the test images, drawn
    once. The pixel values 0 … 16 become 0 … 255.

    Args:
        image_size: Height and width the 8x8 scans are resized to, bilinearly.
        device: Where the images and labels will lie.

    Returns:
        The data set, images ``(n, 1, image_size, image_size)``.

    Raises:
        ValueError: ``image_size`` is not a positive integer.
    """
    if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1:
        raise ValueError(f"digits: image_size must be a positive integer, got {image_size!r}.")
    with (resources.files(__package__) / "digits.npz").open("rb") as file:
        arrays = read_npz(file, "digits.npz")
    images, labels = _resize(arrays["images"], image_size), arrays["labels"].to(torch.int64)
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    is_test[arrays["test_indices"].to(torch.int64)] = True
    return ImageDataset.from_splits(
        "digits",
        Split(images[~is_test], labels[~is_test]),
        Split(images[is_test], labels[is_test]),
        DIGITS_CLASSES,
        mirror=False,
    ).to(device)


def _resize(scans: Tensor, size: int) -> Tensor:
    """``(n, 8, 8)`` of 0 … 16 to ``(n, 1, size, size)`` of 0 … 255."""
    pixels = scans.to(torch.float32).unsqueeze(1) * (255 / _DARKEST)
    if size != scans.shape[-1]:
        pixels = F.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False)
    return pixels.round().clamp(0, 255).to(torch.uint8)
