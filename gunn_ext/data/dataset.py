"""A data set as two splits of uint8 images and labels, and how batches are drawn from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gunn_ext.data.augment import Augmentation, augment
from gunn_ext.data.part import WHOLE, Part


@dataclass(frozen=True)
class Split:
    """Images ``(n, C, H, W)`` uint8 and labels ``(n,)`` int64, on one device."""

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        """Check shapes and dtypes."""
        if self.images.dim() != 4 or self.images.dtype != torch.uint8:
            raise ValueError(
                f"Split: images must be uint8 of shape (n, C, H, W), got {self.images.dtype} of shape "
                f"{tuple(self.images.shape)}."
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"Split: labels must be int64 of shape ({self.images.shape[0]},), one for each image, got "
                f"{self.labels.dtype} of shape {tuple(self.labels.shape)}."
            )

    def __len__(self) -> int:
        """Number of images."""
        return self.images.shape[0]

    def part(self, part: Part) -> Split:
        """A part of it, for one of several processes."""
        own = part.range(len(self))
        return Split(self.images[own], self.labels[own])

    def to(self, device: torch.device | str) -> Split:
        """The same split on ``device``."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class ImageDataset:
    """A training and a test split, with what is needed to normalise them.

    Attributes:
        name: As on the command line.
        train: Training split.
        test: Test split.
        classes: Number of classes; labels are 0 … classes - 1.
        mean: Per channel, over the training split, on the scale 0 … 255.
        std: Likewise; not 0.
        mirror: Whether a mirrored image is still an image of its class, hence the default of that augmentation.
    """

    name: str
    train: Split
    test: Split
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mirror: bool

    @classmethod
    def from_splits(cls, name: str, train: Split, test: Split, classes: int, *, mirror: bool) -> ImageDataset:
        """Build a data set and measure mean and standard deviation of its training split.

        Raises:
            ValueError: The splits differ in image shape, the training split is empty, or a label is out of range.
        """
        if train.images.shape[1:] != test.images.shape[1:]:
            raise ValueError(
                f"{name}: training images are {tuple(train.images.shape[1:])} but test images "
                f"{tuple(test.images.shape[1:])}; both must have the same shape (C, H, W)."
            )
        if len(train) == 0:
            raise ValueError(f"{name}: the training split is empty; expected at least one image.")
        for part, split in (("training", train), ("test", test)):
            if len(split) and not 0 <= int(split.labels.min()) <= int(split.labels.max()) < classes:
                raise ValueError(
                    f"{name}: {part} labels run from {int(split.labels.min())} to {int(split.labels.max())}, "
                    f"expected 0 to {classes - 1} for {classes} classes."
                )
        mean, std = channel_statistics(train.images)
        return cls(name, train, test, classes, mean, std, mirror)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    def to(self, device: torch.device | str) -> ImageDataset:
        """The same data set on ``device``."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))

    def normalize(self, images: Tensor) -> Tensor:
        """Map uint8 images ``(B, C, H, W)`` to float32 of mean 0 and variance 1 per channel of the training split."""
        mean = torch.tensor(self.mean, device=images.device).view(1, -1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(1, -1, 1, 1)
        return (images.to(torch.float32) - mean) / std

    def training_batches(
        self, order: Iterable[Tensor], augmentation: Augmentation, generator: torch.Generator, part: Part = WHOLE
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch, normalised and augmented.

        Args:
            order: Indices of the images of each batch, see `batches`.
            augmentation: What is done to the images.
            generator: Source of all random numbers.
            part: Which part of each batch to yield; batches must be divisible by their number.

        Yields:
            Inputs ``(B, C, H, W)`` float32 and labels ``(B,)``.
        """
        for batch in order:
            chosen = batch[part.range(len(batch))]
            images = self.normalize(self.train.images[chosen])
            yield augment(images, augmentation, generator, part), self.train.labels[chosen]

    def evaluation_batches(self, split: Split, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image of a split once, in its order, normalised; the last batch may be smaller.

        Yields:
            Inputs ``(B, C, H, W)`` float32 and labels ``(B,)``.
        """
        for start in range(0, len(split), batch_size):
            yield self.normalize(split.images[start : start + batch_size]), split.labels[start : start + batch_size]


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 images, exact sums, in 0 … 255; a constant gets std 1."""
    count = images.numel() // images.shape[1]
    means, stds = [], []
    for channel in images.unbind(1):
        values = channel.to(torch.int64)
        total, squares = int(values.sum()), int((values * values).sum())
        variance = (count * squares - total * total) / count**2
        means.append(total / count)
        stds.append(variance**0.5 if variance > 0 else 1.0)
    return tuple(means), tuple(stds)


def batches(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of the batches of one epoch: a random order, cut into equal batches.

    All batches have the same size: the remainder, another one each epoch, is left out. A split smaller than one batch
    is one batch.

    Args:
        count: Size of the split.
        batch_size: Images in a batch.
        generator: Draws the order; the indices are on its device.
    """
    order = torch.randperm(count, generator=generator, device=generator.device)
    if count < batch_size:
        yield order
        return
    for start in range(0, count - batch_size + 1, batch_size):
        yield order[start : start + batch_size]


def batches_per_epoch(count: int, batch_size: int) -> int:
    """How many batches `batches` yields."""
    return max(1, count // batch_size)
