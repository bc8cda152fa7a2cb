"""The settings of the data sets, one frozen dataclass each; `gunn_ext.training.datasets` loads what they describe."""

from __future__ import annotations

from dataclasses import dataclass

from gunn_ext.training import checks
from gunn_ext.training.errors import ConfigError

DATASETS = ("digits", "shapes", "cifar10", "cifar100", "arrays", "folder", "imagenet", "fake")
NATURAL = ("shapes", "cifar10", "cifar100", "folder", "imagenet", "fake")  # a mirrored image is still one of its class
FILES = ("folder", "imagenet")  # decoded on the way to the device
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
class CifarConfig:
    """Options of the data sets ``cifar10`` and ``cifar100``.

    Args:
        coarse: Of cifar100, the 20 superclasses instead of the 100 classes.
    """

    coarse: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        checks.boolean("cifar.coarse", self.coarse)


@dataclass(frozen=True)
class FolderConfig:
    """Options of the data sets ``folder`` and ``imagenet``: image files, a folder for each class.

    Args:
        image_size: Height and width of what the network sees.
        resize: Length of an image's shorter side before its middle is cut out, in evaluation.
        jitter: Brightness, contrast and saturation change by up to this share in training.
        lighting: Standard deviation of the noise along the principal components of colours, in training.
        ten_crop: Evaluate on corners, middle and their mirrors, averaged.
        workers: Processes that decode.
    """

    image_size: int = 224
    resize: int = 256
    jitter: float = 0.4
    lighting: float = 0.1
    ten_crop: bool = False
    workers: int = 4

    def __post_init__(self) -> None:
        """Check the values."""
        checks.integer("folder.image_size", self.image_size, least=1)
        checks.integer("folder.resize", self.resize, least=1)
        if self.resize < self.image_size:
            raise ConfigError(
                f"folder.resize ({self.resize}) must not be below folder.image_size ({self.image_size}), which is cut "
                "out of it."
            )
        checks.number("folder.jitter", self.jitter, least=0, most=1)
        checks.number("folder.lighting", self.lighting, least=0)
        checks.boolean("folder.ten_crop", self.ten_crop)
        checks.integer("folder.workers", self.workers, least=0)


@dataclass(frozen=True)
class ValidationConfig:
    """A split held out of the training images; the best checkpoint is then chosen on it, not on the test images.

    Args:
        size: Number of images, or, below 1, share of the training split; 0 holds out none.
        seed: Of the choice; the same for every ``seed`` of a run.
    """

    size: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values."""
        checks.number("validation.size", self.size, least=0)
        if self.size > 1 and self.size != int(self.size):
            raise ConfigError(f"validation.size must be a share below 1 or a whole number of images, got {self.size}.")
        checks.integer("validation.seed", self.seed, least=0, most=LARGEST_SEED)


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
