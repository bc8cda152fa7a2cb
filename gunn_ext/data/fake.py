"""Random images of any shape, for trying things out without data."""

from __future__ import annotations

import torch

from gunn_ext.data.dataset import ImageDataset, Split


def make_fake(
    shape: tuple[int, int, int] = (3, 32, 32),
    classes: int = 10,
    train_images: int = 512,
    test_images: int = 128,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> ImageDataset:
    """Make a data set of uniform noise with random labels; the same on every device.

    Args:
        shape: (C, H, W) of an image.
        classes: Number of classes.
        train_images: Size of the training split.
        test_images: Size of the test split; may be 0.
        seed: Of the random numbers.
        device: Where the images and labels will lie.

    Raises:
        ValueError: A size is not positive.
    """
    sizes = {"channels": shape[0], "height": shape[1], "width": shape[2], "classes": classes,
             "train_images": train_images}  # fmt: skip
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"fake: {name} must be at least 1, got {value}.")
    if test_images < 0:
        raise ValueError(f"fake: test_images must be at least 0, got {test_images}.")
    generator = torch.Generator().manual_seed(seed)

    def split(count: int) -> Split:
        images = torch.randint(256, (count, *shape), generator=generator, dtype=torch.uint8)
        return Split(images, torch.randint(classes, (count,), generator=generator))

    return ImageDataset.from_splits("fake", split(train_images), split(test_images), classes, mirror=True).to(device)
