"""The data set that a configuration names."""

from __future__ import annotations

import torch

from gunn_ext.data import ImageDataset, load_digits, make_fake, make_shapes
from gunn_ext.training.config import Config


def load_data(config: Config, device: torch.device | str) -> ImageDataset:
    """The data set of a configuration, on ``device``."""
    if config.data == "fake":
        fake = config.fake
        return make_fake(fake.shape, fake.classes, fake.train_images, fake.test_images, fake.seed, device)
    if config.data == "shapes":
        shapes = config.shapes
        return make_shapes(
            shapes.classes, shapes.train_images, shapes.test_images, shapes.difficulty, shapes.seed, device
        )
    return load_digits(config.digits.image_size, device)
