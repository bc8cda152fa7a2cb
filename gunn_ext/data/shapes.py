"""The rendered data set ``shapes``: what figure is the largest, and how is it filled?

An image shows one large figure of a class, that is a form (disc, star, …) with a filling (stripes, dots, …), at a
random place, size, angle and in two random colours, so neither colour nor place tells the class. Smaller figures of any
class lie behind it and in front of it, the background is patterned as well, light falls off to one side, and pixels are
noisy.

All random numbers are a hash of (seed, split, image, use) and all geometry is in integers, so the bytes are the same on
every machine and for every version of torch, and the first images of a large set are those of a small one.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gunn_ext.data.dataset import ImageDataset, Split

SIZE = 32
_SAMPLES = 2  # a pixel is the mean of this many samples each way
_GRID = SIZE * _SAMPLES
_FINE = 16  # places are in this fraction of a pixel
_MARGIN = 16  # samples around the image in which figures may lie
_CANVAS = _GRID + 2 * _MARGIN
_UNIT = 256  # radius of a figure in its own coordinates
_TURN = 256  # angles
_ONE = 4096  # 1 of cosines and sines
_CHUNK = 1024  # images rendered at a time
_WORDS = 2**32

COSINES = torch.tensor([round(_ONE * math.cos(2 * math.pi * i / _TURN)) for i in range(_TURN)], dtype=torch.int32)
SINES = COSINES.roll(_TURN // 4)


def _within(u: Tensor, v: Tensor, angles: tuple[int, ...], distance: int) -> Tensor:
    """Of how many half-planes, at this distance from the centre in these directions, each sample is inside."""
    return sum((u * int(COSINES[a]) + v * int(SINES[a]) < distance * _ONE).to(torch.uint8) for a in angles)  # type: ignore[return-value]


_FIFTHS = tuple(round(i * _TURN / 5) for i in range(5))
_THIRDS = tuple(round(i * _TURN / 3) for i in range(3))

# Each takes the coordinates of samples relative to a figure, ±256 at its rim, and says which of them it covers. None
# differs from its mirror image by more than a rotation.
FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "disc": lambda u, v: u * u + v * v < 215**2,
    "ring": lambda u, v: (u * u + v * v < 235**2) & (u * u + v * v > 130**2),
    "square": lambda u, v: torch.maximum(u.abs(), v.abs()) < 180,
    "triangle": lambda u, v: _within(u, v, _THIRDS, 125) == 3,
    "star": lambda u, v: _within(u, v, _FIFTHS, 78) >= 4,
    "cross": lambda u, v: (torch.minimum(u.abs(), v.abs()) < 75) & (torch.maximum(u.abs(), v.abs()) < 230),
    "half": lambda u, v: (u * u + v * v < 245**2) & (v > -20),
    "crescent": lambda u, v: (u * u + v * v < 240**2) & ((u - 110) * (u - 110) + v * v > 170**2),
    "corner": lambda u, v: (torch.maximum(u.abs(), v.abs()) < 180) & ((u < -30) | (v < -30)),
    "hourglass": lambda u, v: (u.abs() < v.abs()) & (v.abs() < 180),
}

# Each takes the coordinates of samples along a figure's axes, in 1/16 of half the pattern's period, and says where its
# second colour is.
FILLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "plain": lambda u, v: torch.zeros_like(u, dtype=torch.bool),
    "stripes": lambda u, v: (u & 16) == 0,
    "checks": lambda u, v: ((u ^ v) & 16) == 0,
    "dots": lambda u, v: ((u & 31) - 16) ** 2 + ((v & 31) - 16) ** 2 < 12**2,
}
MOST_CLASSES = len(FORMS) * len(FILLINGS)


def make_shapes(
    classes: int = MOST_CLASSES,
    train_images: int = 10_000,
    test_images: int = 2_000,
    difficulty: int = 2,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> ImageDataset:
    """Render the set; the same bytes on every device and machine.

    Image i is of class i mod ``classes``; class c has the form c mod 10 of `FORMS` and the filling c div 10 of
    `FILLINGS`.

    Args:
        classes: 2 to 40; the first ten are the plain forms.
        train_images: Size of the training split.
        test_images: Size of the test split; may be 0.
        difficulty: 0 to 3: contrast falls, noise and the number of other figures rise with it.
        seed: Of everything random.
        device: Where the images and labels will lie.

    Returns:
        The data set, images ``(n, 3, 32, 32)``.

    Raises:
        ValueError: A value is out of range.
    """
    limits = {
        "classes": (classes, 2, MOST_CLASSES),
        "train_images": (train_images, 1, _WORDS - 1),
        "test_images": (test_images, 0, _WORDS - 1),
        "difficulty": (difficulty, 0, 3),
        "seed": (seed, 0, _WORDS - 1),
    }
    for name, (value, least, most) in limits.items():
        if not least <= value <= most:
            raise ValueError(f"shapes: {name} must be from {least} to {most}, got {value}.")

    def split(part: int, count: int) -> Split:
        labels = torch.arange(count) % classes
        images = torch.empty(count, 3, SIZE, SIZE, dtype=torch.uint8)
        for start in range(0, count, _CHUNK):
            numbers = torch.arange(start, min(start + _CHUNK, count))
            images[start : start + _CHUNK] = _Renderer(seed, part, numbers, difficulty).render(labels[numbers])
        return Split(images, labels)

    train, test = split(0, train_images), split(1, test_images)
    return ImageDataset.from_splits("shapes", train, test, classes, mirror=True).to(device)


def scramble(words: Tensor) -> Tensor:
    """A bijection of 0 … 2³² - 1 that looks random; int64, nothing overflows."""
    for _ in range(2):
        words = ((words ^ (words >> 16)) * 0x45D9F3B) % _WORDS
    return words ^ (words >> 16)


@dataclass(frozen=True)
class Figure:
    """One figure for each image, places and radius in 1/16 pixels.

    Attributes:
        x: Of the centre ``(n,)``, like all that follow but the colours.
        y: Likewise.
        radius: Of the circle around it.
        form: Index into `FORMS`; None covers everything.
        filling: Index into `FILLINGS`.
        first: Colour ``(n, 3)``.
        second: Colour of the pattern ``(n, 3)``.
    """

    x: Tensor
    y: Tensor
    radius: Tensor
    form: Tensor | None
    filling: Tensor
    first: Tensor
    second: Tensor


def _packed(colour: Tensor) -> Tensor:
    """``(n, 3)`` to ``(n,)``: a colour as one number."""
    return colour[:, 0] | colour[:, 1] << 8 | colour[:, 2] << 16


class _Renderer:
    """Draws some images of a split; every random number is asked for by a name of its own."""

    def __init__(self, seed: int, part: int, numbers: Tensor, difficulty: int) -> None:
        self.count = len(numbers)
        self.difficulty = difficulty
        self.contrast = (96, 64, 48, 32)[difficulty]
        self.key = scramble(scramble(scramble(torch.tensor(seed)) ^ part) ^ numbers)

    def draw(self, use: str, low: int, high: int) -> Tensor:
        """An integer from ``low`` to ``high`` for each image."""
        words = scramble(self.key ^ zlib.crc32(use.encode()))
        return (low + (words * (high - low + 1) >> 32)).to(torch.int32)

    def colour(self, use: str) -> Tensor:
        """``(n, 3)`` of 0 … 255."""
        return torch.stack([self.draw(f"{use} {channel}", 0, 255) for channel in "rgb"], 1)

    def other(self, use: str, colour: Tensor) -> Tensor:
        """Another colour, that differs in every channel by no less than the contrast."""
        shift = [self.draw(f"{use} {channel}", self.contrast, 256 - self.contrast) for channel in "rgb"]
        return (colour + torch.stack(shift, 1)) & 255

    def render(self, labels: Tensor) -> Tensor:
        """``(n, 3, 32, 32)`` uint8 of the classes ``labels (n,)``."""
        ground = self.colour("ground")
        weave = (ground + 24 - (ground & 128) // 128 * 48).clamp(0, 255)
        middle = torch.full((self.count,), _FINE * SIZE // 2, dtype=torch.int32)
        everywhere = Figure(
            middle, middle, middle, None, self.draw("ground filling", 0, len(FILLINGS) - 1), ground, weave
        )
        canvas = torch.zeros(self.count, _CANVAS, _CANVAS, dtype=torch.int32)
        self.paint(canvas, "ground", everywhere, _GRID)
        for i in range(1 + self.difficulty):
            self.extra(canvas, f"behind {i}", ground, 50, 90)
        first = self.other("large", ground)
        large = Figure(
            self.draw("large x", 170, 342),
            self.draw("large y", 170, 342),
            self.draw("large radius", 130, 205),
            labels % len(FORMS),
            labels // len(FORMS),
            first,
            self.other("large filling", first),
        )
        self.paint(canvas, "large", large, 205 * _SAMPLES * 2 // _FINE + 2)
        for i in range(self.difficulty):
            self.extra(canvas, f"before {i}", ground, 30, 60)
        seen = canvas[:, _MARGIN:-_MARGIN, _MARGIN:-_MARGIN]
        pixels = torch.zeros(self.count, 3, SIZE, SIZE, dtype=torch.int32)
        for offset in range(_SAMPLES**2):
            sample = seen[:, offset // _SAMPLES :: _SAMPLES, offset % _SAMPLES :: _SAMPLES]
            for channel in range(3):
                pixels[:, channel] += (sample >> 8 * channel) & 255
        return self.noisy(self.lit(pixels >> 2)).clamp(0, 255).to(torch.uint8)

    def extra(self, canvas: Tensor, use: str, ground: Tensor, least: int, most: int) -> None:
        """Paint a figure of any class anywhere, of a radius between two limits."""
        first = self.other(use, ground)
        figure = Figure(
            self.draw(f"{use} x", 0, _FINE * SIZE - 1),
            self.draw(f"{use} y", 0, _FINE * SIZE - 1),
            self.draw(f"{use} radius", least, most),
            self.draw(f"{use} form", 0, len(FORMS) - 1),
            self.draw(f"{use} filling", 0, len(FILLINGS) - 1),
            first,
            self.other(f"{use} filling", first),
        )
        self.paint(canvas, use, figure, most * _SAMPLES * 2 // _FINE + 2)

    def paint(self, canvas: Tensor, use: str, figure: Figure, window: int) -> None:
        """Paint a figure into every image, at random angle, of a pattern with random step and phase.

        Args:
            canvas: ``(n, 96, 96)`` int32, a margin around the samples, each red + 256 green + 65536 blue; changed.
            use: Name of the random numbers.
            figure: What and where.
            window: Side of a square around the centre that holds all of the figure, in samples.
        """
        angle = self.draw(f"{use} angle", 0, _TURN - 1)
        frequency = self.draw(f"{use} frequency", 79, 120)  # a half of the pattern is 3.25 to 2.13 pixels
        phases = [self.draw(f"{use} phase {axis}", 0, 31) for axis in "uv"]
        magnification = _ONE * _UNIT // figure.radius
        spacing = _FINE // _SAMPLES
        window_places = torch.arange(window, dtype=torch.int32)
        kinds = figure.filling if figure.form is None else figure.form * len(FILLINGS) + figure.filling
        for kind in kinds.unique().tolist():
            (chosen,) = torch.where(kinds == kind)

            def of(values: Tensor, chosen: Tensor = chosen) -> Tensor:
                return values[chosen].view(-1, 1, 1)

            rows, columns = (  # of the window, in samples; the first may be outside of the image
                (of(middle) // spacing - window // 2).view(-1, 1) + window_places for middle in (figure.y, figure.x)
            )
            down = (rows * spacing + spacing // 2)[:, :, None] - of(figure.y)
            right = (columns * spacing + spacing // 2)[:, None, :] - of(figure.x)
            cosine, sine = of(COSINES[angle]), of(SINES[angle])
            along, across = (right * cosine + down * sine) >> 12, (down * cosine - right * sine) >> 12
            filled = list(FILLINGS.values())[kind % len(FILLINGS)](
                (along * of(frequency) >> 8) + of(phases[0]), (across * of(frequency) >> 8) + of(phases[1])
            )
            painted = torch.where(filled, of(_packed(figure.second)), of(_packed(figure.first)))
            place = (chosen[:, None] * _CANVAS + rows + _MARGIN)[:, :, None] * _CANVAS + columns[:, None, :] + _MARGIN
            if figure.form is not None:
                covered = list(FORMS.values())[kind // len(FILLINGS)](
                    along * of(magnification) >> 12, across * of(magnification) >> 12
                )
                place, painted = place[covered], painted[covered]
            canvas.view(-1)[place] = painted

    def lit(self, pixels: Tensor) -> Tensor:
        """Light that falls off from one side to the other, to no less than a half."""
        places = torch.arange(SIZE, dtype=torch.int32) * 2 - (SIZE - 1)  # -31 … 31
        right, down = (self.draw(f"light {axis}", -128, 128).view(-1, 1, 1) for axis in "xy")
        slope = right * places[None, None, :] + down * places[None, :, None]  # at most 2 · 31 · 128 either way
        light = 2**14 - (slope + 2 * 31 * 128) // 2
        return (pixels * light[:, None]) >> 14

    def noisy(self, pixels: Tensor) -> Tensor:
        """Noise of triangular distribution, the sum of two uniform ones, in every channel of every pixel."""
        if not self.difficulty:
            return pixels
        places = torch.arange(SIZE * SIZE).view(1, SIZE, SIZE) + _WORDS // 2
        words = scramble(self.key.view(-1, 1, 1) ^ places)
        width = 16 * self.difficulty
        noise = [((words >> shift & 31) + (words >> (shift + 5) & 31) - 31) * width // 31 for shift in range(0, 30, 10)]
        return pixels + torch.stack(noise, 1).to(torch.int32)
