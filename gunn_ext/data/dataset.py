"""A data set as two splits of uint8 images and labels, and how batches are drawn from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from gunn_ext.data.augment import Augmentation, augment
from gunn_ext.data.part import WHOLE, Part


class AnySplit(Protocol):
    """Images with labels, of any kind: `Split` in memory, `gunn_ext.data.folder.FileSplit` in files."""

    @property
    def labels(self) -> Tensor:
        """``(n,)`` int64."""

    def __len__(self) -> int:
        """Number of images."""

    def take(self, indices: Tensor) -> Any:
        """Some of the images, in the order of ``indices``, as a split of the same kind."""


class Dataset(Protocol):
    """What training and evaluation need of a data set, wherever its images lie.

    `ImageDataset` holds them on the device; `gunn_ext.data.folder.FolderDataset` decodes files on the way. The splits
    are opaque to everyone but the data set itself, save for their length and labels.
    """

    @property
    def name(self) -> str:
        """As on the command line."""

    @property
    def train(self) -> Any:
        """Training split, an `AnySplit`, like the other two."""

    @property
    def test(self) -> Any:
        """Test split."""

    @property
    def validation(self) -> Any:
        """Split to choose by, held out of the training images; or None."""

    @property
    def classes(self) -> int:
        """Number of classes; labels are 0 … classes - 1."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the network sees."""

    @property
    def mean(self) -> tuple[float, ...]:
        """Per channel, on the scale 0 … 255; with ``std``, the normalisation of every batch."""

    @property
    def std(self) -> tuple[float, ...]:
        """Likewise."""

    @property
    def mirror(self) -> bool:
        """Whether a mirrored image is still an image of its class."""

    def training_batches(
        self, order: Iterable[Tensor], augmentation: Augmentation, generator: torch.Generator, part: Part = WHOLE
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs ``(B, C, H, W)`` float32 and labels ``(B,)`` of the images of each batch, normalised and augmented.

        All that is random is a function of the generator's state and the images' places in ``order``; of each batch
        only a part is yielded.
        """

    def evaluation_batches(self, split: Any, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and labels of every image of a split once, in its order, normalised.

        Inputs are ``(B, C, H, W)``, or ``(B, V, C, H, W)`` for V views of an image, whose predictions are averaged.
        """


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

    def take(self, indices: Tensor) -> Split:
        """Some of the images, in the order of ``indices``."""
        return Split(self.images[indices], self.labels[indices])

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
        validation: Split held out of the training images, where one was asked for.
    """

    name: str
    train: Split
    test: Split
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mirror: bool
    validation: Split | None = None

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
        held_out = None if self.validation is None else self.validation.to(device)
        return replace(self, train=self.train.to(device), test=self.test.to(device), validation=held_out)

    def normalize(self, images: Tensor) -> Tensor:
        """Map uint8 images ``(B, C, H, W)`` to float32 of mean 0 and variance 1 per channel of the training split."""
        return normalized(images, self.mean, self.std)

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


def normalized(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images ``(…, C, H, W)`` on the scale 0 … 255 as float32, less the mean of each channel, over its deviation."""
    shape = (-1, 1, 1)
    means, stds = (torch.tensor(values, device=images.device).view(shape) for values in (mean, std))
    return (images.to(torch.float32) - means) / stds


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
