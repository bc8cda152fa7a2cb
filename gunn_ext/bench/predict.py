"""``gunn bench predict``: what the performance model says of the named layers, without measuring anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gunn_ext.analysis.performance import (
    FAST_LIBRARY,
    SLOW_LIBRARY,
    DeviceLimits,
    LayerSizes,
    Parts,
    persistent,
    simultaneous,
    staged,
)

HEADER = (
    "layer",
    "batch",
    "GFLOP",
    "staged",
    "forward",
    "backward",
    "persistent",
    "forward",
    "backward",
    "SUNN",
    "evaluation: staged",
    "persistent",
    "SUNN",
)
PARTS_HEADER = ("layer", "pass", "compute", "memory", "cache", "shared", "exchange", "launch", "sum")


def _microseconds(seconds: float) -> str:
    return f"{1e6 * seconds:.0f}"


def prediction_rows(
    layers: Mapping[str, LayerSizes], batch: int, dtype: str, limits: DeviceLimits
) -> list[tuple[str, ...]]:
    """A row under `HEADER` for each layer: µs of a training step and of an evaluation, SUNN from fast to slow."""
    rows = []
    for name, sizes in layers.items():
        ours = staged(sizes, batch, dtype, limits)
        planned = persistent(sizes, batch, dtype, limits)
        fast, slow = (simultaneous(sizes, batch, dtype, limits, library) for library in (FAST_LIBRARY, SLOW_LIBRARY))
        cells = [f"{sizes.flops(batch) / 1e9:.1f}"]
        for found in (ours, planned):
            cells += map(_microseconds, (found.seconds("training"), found.forward.total, found.backward.total))
        cells.append(f"{_microseconds(fast.seconds('training'))}-{_microseconds(slow.seconds('training'))}")
        cells += map(_microseconds, (ours.evaluation.total, planned.evaluation.total))
        cells.append(f"{_microseconds(fast.evaluation.total)}-{_microseconds(slow.evaluation.total)}")
        rows.append((name, str(batch), *cells))
    return rows


def part_rows(layers: Mapping[str, LayerSizes], batch: int, dtype: str, limits: DeviceLimits) -> list[tuple[str, ...]]:
    """Rows under `PARTS_HEADER`: what the forward and the backward of a training step are made of, in µs."""
    rows = []

    def cells(parts: Parts) -> list[str]:
        return [*map(_microseconds, parts.values()), _microseconds(parts.total)]

    for name, sizes in layers.items():
        for variant in (staged, persistent):
            found = variant(sizes, batch, dtype, limits)
            rows.append((name, f"{variant.__name__} forward", *cells(found.forward)))
            rows.append((name, f"{variant.__name__} backward", *cells(found.backward)))
    return rows


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns for a terminal; all but the first stand to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in (header, *rows)
    )


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
