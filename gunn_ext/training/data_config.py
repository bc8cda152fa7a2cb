"""The settings of the data sets, one frozen dataclass each; `gunn_ext.training.datasets` loads what they describe."""

from __future__ import annotations

from dataclasses import dataclass

from gunn_ext.training import checks
from gunn_ext.training.errors import ConfigError

DATASETS = ("digits", "shapes", "fake")
LARGEST_SEED = 2**32 - 1


@dataclass(frozen=True)
class DigitsConfig:
    """Options of the data set ``digits``.

    Args:
        image_size: Height and width the 8x8 scans are resized to.
    """

    image_size: int = 16

    def __post_init__(self) -> None:
        """Check the values."""
        checks.integer("digits.image_size", self.image_size, least=1)


@dataclass(frozen=True)
class ShapesConfig:
    """Options of the data set ``shapes``: rendered figures among others, 32x32 in colour.

    Args:
        classes: 2 to 40: ten forms, each in up to four fillings.
        train_images: Size of the training split.
        test_images: Size of the test split.
        difficulty: 0 to 3: less contrast, more noise and clutter.
        seed: Of everything random in the images.
    """

    classes: int = 40
    train_images: int = 10_000
    test_images: int = 2_000
    difficulty: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values."""
        checks.integer("shapes.classes", self.classes, least=2, most=40)
        checks.integer("shapes.train_images", self.train_images, least=1, most=LARGEST_SEED)
        checks.integer("shapes.test_images", self.test_images, least=0, most=LARGEST_SEED)
        checks.integer("shapes.difficulty", self.difficulty, least=0, most=3)
        checks.integer("shapes.seed", self.seed, least=0, most=LARGEST_SEED)


@dataclass(frozen=True)
class FakeConfig:
    """Options of the data set ``fake``: random images, random labels.

    Args:
        shape: (channels, height, width).
        classes: Number of classes.
        train_images: Size of the training split.
        test_images: Size of the test split.
        seed: Of the images.
    """

    shape: tuple[int, int, int] = (3, 32, 32)
    classes: int = 10
    train_images: int = 512
    test_images: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values."""
        object.__setattr__(self, "shape", checks.sequence("fake.shape", self.shape))
        if len(self.shape) != 3:
            raise ConfigError(f"fake.shape must be (channels, height, width), got {list(self.shape)}.")
        for size in self.shape:
            checks.integer("fake.shape", size, least=1)
        checks.integer("fake.classes", self.classes, least=1)
        checks.integer("fake.train_images", self.train_images, least=1)
        checks.integer("fake.test_images", self.test_images, least=0)
        checks.integer("fake.seed", self.seed, least=0, most=LARGEST_SEED)
