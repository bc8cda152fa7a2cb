"""The data set that a configuration names."""

from __future__ import annotations

import dataclasses

import torch

from gunn_ext._optional import MissingPackageError
from gunn_ext.data import (
    CIFAR10,
    CIFAR100,
    Dataset,
    FolderDataset,
    ImageDataset,
    hold_out,
    load_arrays,
    load_cifar,
    load_digits,
    load_folder,
    make_fake,
    make_shapes,
)
from gunn_ext.training.config import Config
from gunn_ext.training.data_config import FILES
from gunn_ext.training.errors import ConfigError

DATA_FOLDER = "data"


def load_data(config: Config, device: torch.device | str) -> Dataset:
    """The data set of a configuration, on ``device``, with a validation split where one is asked for.

    Raises:
        ConfigError: Its files are not where the settings say, or a package that reads them is not installed.
        ValueError: A file is damaged or holds something else.
    """
    try:
        data = _load(config, device)
    except (FileNotFoundError, MissingPackageError) as error:
        raise ConfigError(str(error)) from error
    validation = config.validation
    return hold_out(data, validation.size, validation.seed) if validation.size else data


def _load(config: Config, device: torch.device | str) -> ImageDataset | FolderDataset:
    if config.data == "fake":
        fake = config.fake
        return make_fake(fake.shape, fake.classes, fake.train_images, fake.test_images, fake.seed, device)
    if config.data == "shapes":
        shapes = config.shapes
        return make_shapes(
            shapes.classes, shapes.train_images, shapes.test_images, shapes.difficulty, shapes.seed, device
        )
    if config.data in ("cifar10", "cifar100"):
        published = CIFAR10 if config.data == "cifar10" else CIFAR100
        return load_cifar(published, config.data_path or DATA_FOLDER, coarse=config.cifar.coarse, device=device)
    if config.data == "arrays" and config.data_path is not None:
        return load_arrays(config.data_path, device)
    if config.data in FILES:
        options = dataclasses.asdict(config.folder)
        return load_folder(config.data_path or DATA_FOLDER, name=config.data, device=device, **options)
    return load_digits(config.digits.image_size, device)
