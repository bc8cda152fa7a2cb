"""Data sets of image files, a folder for each class, decoded by worker processes while the network computes."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from gunn_ext._optional import require
from gunn_ext.data.augment import Augmentation, augment
from gunn_ext.data.dataset import normalized
from gunn_ext.data.part import WHOLE, Part
from gunn_ext.data.photo import change_colours, draw_colours, evaluation_views, open_image, training_view

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp", ".tif", ".tiff")
_Decode = Callable[[int], tuple[Tensor, ...]]
TEST_FOLDERS = ("val", "test")
# Of ImageNet's training images, times 255.
MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)


@dataclass(frozen=True)
class FileSplit:
    """Image files and their labels ``(n,)`` int64, which stay on the CPU."""

    files: tuple[Path, ...]
    labels: Tensor

    def __len__(self) -> int:
        """Number of images."""
        return len(self.files)

    def take(self, indices: Tensor) -> FileSplit:
        """Some of the images, in the order of ``indices``."""
        return FileSplit(tuple(self.files[i] for i in indices.tolist()), self.labels[indices.cpu()])


@dataclass(frozen=True)
class FolderDataset:
    """Image files in two splits; see `gunn_ext.data.dataset.Dataset` for what a data set does.

    Attributes:
        name: As on the command line.
        train: Training split.
        test: Test split.
        classes: Number of classes.
        class_names: Names of the folders, by label.
        image_size: Height and width of what the network sees.
        resize: Length of an image's shorter side before the middle is cut out, in evaluation.
        jitter: Brightness, contrast and saturation change by up to this share in training.
        lighting: Standard deviation of the lighting noise in training.
        ten_crop: Whether evaluation sees ten views of an image.
        workers: Processes that decode; 0: this one does.
        device: Where batches go.
        mean: Per channel, on the scale 0 … 255.
        std: Likewise.
        mirror: Whether a mirrored image is still an image of its class.
        validation: Split held out of the training images, where one was asked for.
    """

    name: str
    train: FileSplit
    test: FileSplit
    classes: int
    class_names: tuple[str, ...]
    image_size: int = 224
    resize: int = 256
    jitter: float = 0.4
    lighting: float = 0.1
    ten_crop: bool = False
    workers: int = 4
    device: torch.device = torch.device("cpu")
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    mirror: bool = True
    validation: FileSplit | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image as the network sees it."""
        return 3, self.image_size, self.image_size

    def training_batches(
        self, order: Iterable[Tensor], augmentation: Augmentation, generator: torch.Generator, part: Part = WHOLE
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch: random crops, mirrored, with changed colours, normalised.

        What happens to an image depends on one draw from ``generator`` and on the image's index alone, so the batches
        are the same for any number of workers.

        Args:
            order: Indices of the images of each batch; taken up at once.
            augmentation: What is done beyond crops and colours.
            generator: Source of all random numbers.
            part: Which part of each batch to decode and yield; batches must be divisible by their number.

        Yields:
            Inputs ``(B, 3, image_size, image_size)`` float32 and labels ``(B,)``, on the device.

        Raises:
            ValueError: An image cannot be decoded; the message names its file.
        """
        indices = [batch[part.range(len(batch))].tolist() for batch in order]
        seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
        decode = partial(_training_item, split=self.train, size=self.image_size, mirror=augmentation.mirror, seed=seed)
        rest = replace(augmentation, mirror=False)
        for pixels, draws, labels in self._load(decode, indices):
            images = change_colours(pixels.to(torch.float32) / 255, draws, self.jitter, self.lighting)
            yield augment(normalized(images * 255, self.mean, self.std), rest, generator, part), labels

    def evaluation_batches(self, split: FileSplit, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image of a split once, in its order, scaled, cut out and normalised; the last batch may be smaller.

        Yields:
            Inputs ``(B, 3, image_size, image_size)`` float32, with ``ten_crop`` ``(B, 10, 3, image_size, image_size)``,
            and labels ``(B,)``, on the device.

        Raises:
            ValueError: An image cannot be decoded; the message names its file.
        """
        decode = partial(_test_item, split=split, resize=self.resize, size=self.image_size, ten_crop=self.ten_crop)
        order = [list(range(i, min(i + batch_size, len(split)))) for i in range(0, len(split), batch_size)]
        for pixels, labels in self._load(decode, order):
            yield normalized(pixels, self.mean, self.std), labels

    def _load(self, decode: _Decode, order: list[list[int]]) -> Iterator[list[Tensor]]:
        """Decoded batches on the device, in order."""
        pinned = self.device.type == "cuda"
        loader: DataLoader[Any] = DataLoader(
            _Batches(decode),  # type: ignore[arg-type]
            batch_size=None,  # an item is a whole batch already
            sampler=order,
            num_workers=min(self.workers, len(order)),
            pin_memory=pinned,
            generator=torch.Generator(),  # else the loader draws from torch's global one
        )
        for batch in loader:
            if isinstance(batch, Exception):
                raise batch
            yield [part.to(self.device, non_blocking=pinned) for part in batch]


class _Batches:
    """Decoded batches by the indices of their images; an error is an item, too, so that its text gets through whole."""

    def __init__(self, decode: _Decode) -> None:
        self.decode = decode

    def __getitem__(self, indices: list[int]) -> list[Tensor] | Exception:
        try:
            return [torch.stack(parts) for parts in zip(*map(self.decode, indices), strict=True)]
        except (ValueError, RuntimeError, OSError) as error:
            return error


def _training_item(index: int, *, split: FileSplit, size: int, mirror: bool, seed: int) -> tuple[Tensor, ...]:
    """Pixels, random numbers for the colours, label."""
    draw = random.Random(f"{seed} {index}")
    pixels = training_view(open_image(split.files[index]), size, draw, mirror=mirror)
    return pixels, torch.tensor(draw_colours(draw)), split.labels[index]


def _test_item(index: int, *, split: FileSplit, resize: int, size: int, ten_crop: bool) -> tuple[Tensor, ...]:
    """Pixels of one or ten views, label."""
    return evaluation_views(open_image(split.files[index]), resize, size, ten_crop=ten_crop), split.labels[index]


def load_folder(
    path: Path | str, *, name: str = "folder", device: torch.device | str = "cpu", **options: Any
) -> FolderDataset:
    """List a data set of image files; they are decoded when batches are drawn.

    Args:
        path: A folder with the folders ``train`` and ``val`` (or ``test``), in each of which a folder for each class
            holds its images, at any depth. Classes are numbered in the order of their folders' names.
        name: ``folder``, or ``imagenet``, which must have the 1,000 classes of ILSVRC 2012.
        device: Where batches go.
        **options: Fields of `FolderDataset` from ``image_size`` to ``workers``.

    Raises:
        FileNotFoundError: A folder is missing or holds no images.
        ValueError: The test images have a class that the training images lack, or the classes are not ImageNet's.
        MissingPackageError: Pillow is not installed.
    """
    require("PIL.Image", "imagenet")
    path = Path(path)
    found = [path / part for part in TEST_FOLDERS if (path / part).is_dir()]
    if not (path / "train").is_dir() or not found:
        raise FileNotFoundError(
            f"{path}: expected the folders train and val (or test), each with a folder of images for every class. "
            f"{_WHERE if name == 'imagenet' else 'Name the folder with --data_path.'}"
        )
    names = tuple(sorted(folder.name for folder in (path / "train").iterdir() if folder.is_dir()))
    if name == "imagenet" and (len(names) != 1000 or not all(re.fullmatch(r"n\d{8}", name) for name in names)):
        raise ValueError(
            f"{path}/train holds {len(names)} folders ({', '.join(names[:3])} …), expected the 1,000 of ImageNet, "
            "named n01440764 to n15075141. Use data=folder for other images."
        )
    train, test = _list(path / "train", names), _list(found[0], names)
    missing = (train.labels.bincount(minlength=len(names)) == 0).nonzero()
    if len(missing) or not names:
        empty = path / "train" / names[int(missing[0])] if len(missing) else path / "train"
        raise FileNotFoundError(f"{empty} holds no images ({', '.join(SUFFIXES)}).")
    return FolderDataset(name, train, test, len(names), names, device=torch.device(device), **options)


_WHERE = (
    "Fetch the images of ILSVRC 2012 (ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar) from https://image-net.org, "
    "unpack each class into a folder named by its synset, and name the folder of both with --data_path. Nothing is "
    "downloaded for you."
)


def _list(part: Path, names: tuple[str, ...]) -> FileSplit:
    """The images below a folder of class folders, in the order of their paths."""
    others = sorted({folder.name for folder in part.iterdir() if folder.is_dir()} - set(names))
    if others:
        raise ValueError(f"{part} holds the class {others[0]!r}, which the training images lack.")
    files, labels = [], []
    for label, name in enumerate(names):
        found = sorted(file for file in (part / name).rglob("*") if file.suffix.lower() in SUFFIXES)
        files += found
        labels += [label] * len(found)
    return FileSplit(tuple(files), torch.tensor(labels, dtype=torch.int64))
