"""The layers that are measured: names and sizes."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace

from gunn_ext.analysis.performance import LayerSizes
from gunn_ext.layers import GunnLayer
from gunn_ext.models.gunn import GUNN_15, GUNN_18, GUNN_24, Spec


@dataclass(frozen=True)
class Case:
    """A layer with a name.

    Attributes:
        name: For rows.
        sizes: What it is.
    """

    name: str
    sizes: LayerSizes


def _stages(spec: Spec, first: int) -> list[LayerSizes]:
    """The layers of a network whose first stage has feature maps of this size."""
    return [
        LayerSizes(channels, segments, first // 2**i, spec.expansion, spec.units, spec.shortcut)
        for i, (channels, segments) in enumerate(zip(spec.channels, spec.segments, strict=True))
    ]


LAYERS: dict[str, LayerSizes] = (
    {f"gunn15-{sizes.size}": sizes for sizes in _stages(GUNN_15, 32)}
    | {f"gunn18-{i}": sizes for i, sizes in enumerate(_stages(GUNN_18, 56), 1)}
    | {f"gunn24-{i}": sizes for i, sizes in enumerate(_stages(GUNN_24, 32), 1)}
    | {"p-equals-n": LayerSizes(240, 240, 32, shortcut=True)}
)
DEFAULT = ("gunn15-32", "gunn15-16", "gunn15-8")


def named_case(name: str) -> Case:
    """A layer of `LAYERS`.

    Raises:
        ValueError: No layer has this name.
    """
    if name not in LAYERS:
        near = difflib.get_close_matches(name.lower(), LAYERS, n=2)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(
            f"unknown layer {name!r}.{hint} Expected {', '.join(LAYERS)}, or sizes: --channels and --segments."
        )
    return Case(name, LAYERS[name])


def custom_case(sizes: LayerSizes) -> Case:
    """A layer of any sizes, named by them.

    Raises:
        ValueError: A size is not positive, or ``segments`` does not divide ``channels``.
    """
    if sizes.size < 1:
        raise ValueError(f"--size must be at least 1, got {sizes.size}.")
    build(GunnLayer, sizes, device="meta")  # checks the others
    name = f"{sizes.channels}x{sizes.size}x{sizes.size}/P{sizes.segments}"
    for letter, value, usual in (("K", sizes.expansion, 2), ("M", sizes.units, 1)):
        name += f"/{letter}{value}" if value != usual else ""
    return Case(name + ("/shortcut" if sizes.shortcut else ""), sizes)


def build(kind: type, sizes: LayerSizes, **options: object) -> GunnLayer:
    """A layer class with these sizes."""
    made: GunnLayer = kind(
        sizes.channels, sizes.segments, sizes.expansion, sizes.units, shortcut=sizes.shortcut, **options
    )
    return made


def reduced(case: Case) -> Case:
    """The same options on a few channels and pixels, to run through everything in a moment; its figures say nothing."""
    sizes = case.sizes
    segments = 3 if sizes.segments < sizes.channels else 6
    width = 2 if sizes.segments < sizes.channels else 1
    small = replace(sizes, channels=segments * width, segments=segments, size=min(sizes.size, 6))
    return Case(f"{case.name} reduced", small)


def divisors(channels: int) -> list[int]:
    """Every P that divides N."""
    return [p for p in range(1, channels + 1) if channels % p == 0]
