"""CIFAR-10 and CIFAR-100 as published: the binary and the pickled archives, packed or unpacked. Nothing is downloaded.

Sizes, MD5 sums and formats are those of https://www.cs.toronto.edu/~kriz/cifar.html. An archive is verified by its MD5
sum; unpacked files by their size, their own sum where it is known, and by every class having its share of the images.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from gunn_ext.data.cifar_pickle import read_batch
from gunn_ext.data.dataset import ImageDataset, Split

PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Form:
    """One of the forms in which a set is published.

    Attributes:
        archive: Name of the file to fetch.
        md5: Of the archive.
        folder: What it unpacks to.
        train: Names of the files of the training split, in order.
        test: Name of the file of the test split.
        sums: MD5 sums of single files, where they are known.
    """

    archive: str
    md5: str
    folder: str
    train: tuple[str, ...]
    test: str
    sums: Mapping[str, str] = field(default_factory=dict)

    @property
    def pickled(self) -> bool:
        """Whether the files are pickles, not records."""
        return not self.test.endswith(".bin")


@dataclass(frozen=True)
class Published:
    """A set and the forms in which it is published.

    Attributes:
        name: As on the command line.
        title: As its authors call it.
        classes: By label; for each of the label bytes of a record, the last being the finest.
        keys: Of these labels in a pickled batch.
        train_images: Size of the training split.
        test_images: Size of the test split.
        mean: Per channel, of the training split, in 0 … 255; the constants of Qiao et al.'s recipe.
        std: Likewise.
        forms: Those that can be read, the preferred one first.
    """

    name: str
    title: str
    classes: tuple[int, ...]
    keys: tuple[str, ...]
    train_images: int
    test_images: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    forms: tuple[Form, ...]


CIFAR10 = Published(
    name="cifar10",
    title="CIFAR-10",
    classes=(10,),
    keys=("labels",),
    train_images=50_000,
    test_images=10_000,
    mean=(125.3, 123.0, 113.9),
    std=(63.0, 62.1, 66.7),
    forms=(
        Form(
            archive="cifar-10-binary.tar.gz",
            md5="c32a1d4ab5d03f1284b67883e8d87530",
            folder="cifar-10-batches-bin",
            train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
            test="test_batch.bin",
        ),
        Form(
            archive="cifar-10-python.tar.gz",
            md5="c58f30108f718f92721af3b95e74349a",
            folder="cifar-10-batches-py",
            train=tuple(f"data_batch_{i}" for i in range(1, 6)),
            test="test_batch",
            sums={
                "data_batch_1": "c99cafc152244af753f735de768cd75f",
                "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
                "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
                "data_batch_4": "634d18415352ddfa80567beed471001a",
                "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
                "test_batch": "40351d587109b95175f43aff81a1287e",
            },
        ),
    ),
)
CIFAR100 = Published(
    name="cifar100",
    title="CIFAR-100",
    classes=(20, 100),
    keys=("coarse_labels", "fine_labels"),
    train_images=50_000,
    test_images=10_000,
    mean=(129.3, 124.1, 112.4),
    std=(68.2, 65.4, 70.4),
    forms=(
        Form(
            archive="cifar-100-binary.tar.gz",
            md5="03b5dce01913d631647c71ecec9e9cb8",
            folder="cifar-100-binary",
            train=("train.bin",),
            test="test.bin",
        ),
        Form(
            archive="cifar-100-python.tar.gz",
            md5="eb9058c3a382ffc7106e4002c42a8d85",
            folder="cifar-100-python",
            train=("train",),
            test="test",
            sums={"train": "16019d7e3df5f24257cddd939b257f8d", "test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
        ),
    ),
)


def load_cifar(
    published: Published, path: Path | str, *, coarse: bool = False, device: torch.device | str = "cpu"
) -> ImageDataset:
    """Read a CIFAR set.

    Args:
        published: `CIFAR10` or `CIFAR100`.
        path: The archive, or a folder that holds the archive or what it unpacks to.
        coarse: Of CIFAR-100, the 20 superclasses instead of the 100 classes.
        device: Where the images and labels will lie.

    Returns:
        The data set, images ``(n, 3, 32, 32)``.

    Raises:
        FileNotFoundError: There is no such archive or folder; the message says what to fetch and where to put it.
        ValueError: A file is damaged or not what was published.
    """
    form, place, read = _find(published, Path(path))
    parts = [
        _parse(published, form, f"{place}/{name}", read(name), published.train_images // len(form.train))
        for name in form.train
    ]
    train = (torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts]))
    test = _parse(published, form, f"{place}/{form.test}", read(form.test), published.test_images)
    for part, (_, labels) in (("training", train), ("test", test)):
        _check_balance(published, f"{place}: {part} images", labels)
    level = 0 if coarse else -1
    return ImageDataset(
        published.name,
        Split(train[0], train[1][:, level].contiguous()),
        Split(test[0], test[1][:, level].contiguous()),
        published.classes[level],
        published.mean,
        published.std,
        mirror=True,
    ).to(device)


def _find(published: Published, path: Path) -> tuple[Form, Path, Callable[[str], bytes]]:
    """The form that lies at ``path``, where exactly, and how to read a file of it."""
    if path.is_file():
        return _open_archive(published, path)
    for form in published.forms:
        for folder in (path, path / form.folder):
            if (folder / form.test).is_file():
                return form, folder, partial(_read_file, form, folder)
    for form in published.forms:
        if (path / form.archive).is_file():
            return _open_archive(published, path / form.archive)
    archives = " or ".join(form.archive for form in published.forms)
    raise FileNotFoundError(
        f"{path}: no {published.title} here. Fetch {archives} from {PAGE} and put it into this folder, packed or "
        "unpacked, or name the file itself with --data_path. Nothing is downloaded for you."
    )


def _open_archive(published: Published, path: Path) -> tuple[Form, Path, Callable[[str], bytes]]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "md5").hexdigest()
    for form in published.forms:
        if form.md5 == digest:
            with tarfile.open(path, "r:gz") as archive:
                content = {name: _member(archive, f"{form.folder}/{name}", path) for name in (*form.train, form.test)}
            return form, path, content.__getitem__
    known = ", ".join(f"{form.archive} {form.md5}" for form in published.forms)
    raise ValueError(
        f"{path}: {path.stat().st_size:,} bytes with the MD5 sum {digest}, expected that of a published archive of "
        f"{published.title} ({known}); the file is damaged or another one, fetch it again from {PAGE}."
    )


def _member(archive: tarfile.TarFile, name: str, path: Path) -> bytes:
    try:
        file = archive.extractfile(name)
    except KeyError:
        file = None
    if file is None:
        raise ValueError(f"{path}: holds no file {name}.")
    return file.read()


def _read_file(form: Form, folder: Path, name: str) -> bytes:
    path = folder / name
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: missing beside the other files of its set; unpack {form.archive} again (from {PAGE})."
        ) from None
    expected = form.sums.get(name)
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if expected is not None and found != expected:
        raise ValueError(
            f"{path}: {len(content):,} bytes with the MD5 sum {found}, expected {expected}; the file is damaged, "
            f"unpack {form.archive} again (from {PAGE})."
        )
    return content


def _parse(published: Published, form: Form, name: str, content: bytes, images: int) -> tuple[Tensor, Tensor]:
    """Images ``(n, 3, 32, 32)`` uint8 and labels ``(n, levels)`` int64 of one file."""
    pixels, labels = (_unpickle if form.pickled else _split_records)(published, form, name, content, images)
    for level, classes in enumerate(published.classes):
        wrong = (labels[:, level] < 0) | (labels[:, level] >= classes)
        if wrong.any():
            image = int(wrong.nonzero()[0])
            raise ValueError(
                f"{name}: label {int(labels[image, level])} of image {image}, expected 0 to {classes - 1}; the file is "
                f"damaged, fetch {form.archive} again from {PAGE}."
            )
    return pixels.reshape(-1, 3, 32, 32), labels


def _split_records(published: Published, form: Form, name: str, content: bytes, images: int) -> tuple[Tensor, Tensor]:
    levels = len(published.classes)
    expected = images * (levels + _PIXELS)
    if len(content) != expected:
        raise ValueError(
            f"{name}: {len(content):,} bytes, expected {expected:,}; the file is damaged, fetch {form.archive} again "
            f"from {PAGE}."
        )
    records = torch.frombuffer(bytearray(content), dtype=torch.uint8).reshape(images, levels + _PIXELS)
    return records[:, levels:].contiguous(), records[:, :levels].to(torch.int64)


def _unpickle(published: Published, form: Form, name: str, content: bytes, images: int) -> tuple[Tensor, Tensor]:
    pixels, labels = read_batch(content, name, published.keys)
    if pixels.shape != (images, _PIXELS):
        raise ValueError(
            f"{name}: data of shape {tuple(pixels.shape)}, expected ({images}, {_PIXELS}); the file is damaged, fetch "
            f"{form.archive} again from {PAGE}."
        )
    return pixels, labels


def _check_balance(published: Published, name: str, labels: Tensor) -> None:
    for level, classes in enumerate(published.classes):
        counts, share = labels[:, level].bincount(minlength=classes), len(labels) // classes
        if not bool((counts == share).all()):
            label = int((counts != share).nonzero()[0])
            raise ValueError(
                f"{name}: {int(counts[label])} have label {label}, expected {share} of every one; the files are "
                f"damaged or mixed up, fetch them again from {PAGE}."
            )
