"""Which CUDA driver serves a layer: a pure function over a committed table of what was measured.

The table, ``drivers.json``, is written offline by ``gunn bench tune`` from measured rows; nothing is ever timed in a
user's step, so the same layer takes the same driver in every process. GPUs without rows take the staged driver.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("drivers.json")
DRIVERS = ("staged", "persistent")
_SIZES = ("batch", "channels", "pixels", "segments")

Rows = Sequence[Mapping[str, Any]]


@functools.cache
def _committed() -> Rows:
    rows: Rows = json.loads(TABLE.read_text())["rows"]
    return rows


def choose_driver(
    device: str,
    dtype: str,
    training: bool,
    *,
    batch: int,
    channels: int,
    pixels: int,
    segments: int,
    rows: Rows | None = None,
) -> str:
    """The driver that was faster at the nearest measured sizes on this kind of GPU; ``staged`` where none was measured.

    Near is what differs least in the sum of the logarithms of batch, channels, pixels and segments. A driver that does
    not take the layer leaves it to the staged one, whatever the table says.

    Args:
        device: Name of the GPU as torch gives it.
        dtype: Of the feature map, e.g. ``bfloat16``.
        training: Whether batch statistics are exchanged.
        batch: Images.
        channels: N.
        pixels: Height times width.
        segments: P.
        rows: The table; the committed one by default.
    """
    mode = "training" if training else "evaluation"
    known = [
        row
        for row in (_committed() if rows is None else rows)
        if (row["device"], row["dtype"], row["pass"]) == (device, dtype, mode)
    ]
    if not known:
        return DRIVERS[0]
    asked = dict(zip(_SIZES, (batch, channels, pixels, segments), strict=True))

    def distance(row: Mapping[str, Any]) -> float:
        return sum(abs(math.log2(row[name] / max(1, asked[name]))) for name in _SIZES)

    driver: str = min(known, key=distance)["driver"]
    return driver
