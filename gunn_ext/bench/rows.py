"""Rows of a result: their fields, and their form as JSON, as CSV and on a terminal."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# Milliseconds are medians with 20 and 80 % quantiles. GFLOP/s count algorithmic work, a training step three forward
# passes; recomputation is work, but not counted. Bytes are the least that must move: the feature maps, once each.
FIELDS = (
    "layer",
    "channels",
    "segments",
    "size",
    "expansion",
    "units",
    "shortcut",
    "batch",
    "dtype",
    "pass",
    "peer",
    "format",
    "best_format",
    "backend",
    "driver",
    "large_tiles",
    "turns",
    "threads",
    "ms",
    "ms_20",
    "ms_80",
    "repeats",
    "gflops",
    "share_of_peak",
    "share_of_registers",
    "bytes",
    "gbps",
    "saved_bytes",
    "peak_bytes",
    "predicted_ms",
    "relative_error",
    "share_of_tolerance",
    "error",
)


def mark_best(rows: Sequence[Row]) -> None:
    """Say of each row whether its memory format was the faster one of its peer."""
    cells: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = tuple(row.get(name) for name in ("layer", "batch", "dtype", "pass", "peer"))
        cells.setdefault(key, []).append(row)
    for cell in cells.values():
        timed = [row["ms"] for row in cell if row.get("ms")]
        for row in cell:
            row["best_format"] = bool(row.get("ms")) and row["ms"] == min(timed)


def rounded(value: Any) -> Any:
    """Five significant digits; what is not a finite float as it is, or None."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.5g}") if math.isfinite(value) else None


def write_json(path: Path, environment: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """``{"environment": …, "rows": […]}``; the file is replaced as a whole, never half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    clean = [{name: rounded(value) for name, value in row.items() if value is not None} for row in rows]
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps({"environment": dict(environment), "rows": clean}, indent=1) + "\n")
    partial.replace(path)


def read_json(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """Environment and rows of a file that `write_json` wrote.

    Raises:
        ValueError: The file has another form.
    """
    found = json.loads(path.read_text())
    if not isinstance(found, dict) or not {"environment", "rows"} <= set(found):
        raise ValueError(f"{path}: no result of gunn bench; expected an object with environment and rows.")
    return found["environment"], found["rows"]


def write_csv(path: Path, environment: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """A line for each row, with device, commit and date behind it."""
    facts = {name: environment.get(name, "") for name in ("device", "torch", "commit", "date")}
    extra = sorted({name for row in rows for name in row} - set(FIELDS))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*FIELDS, *extra, *facts], restval="")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: rounded(value) for name, value in row.items() if value is not None} | facts)


def describe(row: Row) -> str:
    """One line: what, how fast, how that compares with limits and prediction."""
    head = f"{row['layer']:18} {row['dtype']:9} {row['pass']:10} {row.get('format', ''):4} {row['peer']:38}"
    if "ms" not in row:
        return f"{head} {row.get('error', 'not timed')}"
    parts = [f"{row['ms']:9.3f} ms [{row['ms_20']:.3f} {row['ms_80']:.3f}]", f"{row['gflops']:8.1f} GFLOP/s"]
    if row.get("share_of_peak"):
        parts.append(f"({100 * row['share_of_peak']:.0f} % of peak)")
    if row.get("gbps"):
        parts.append(f"{row['gbps']:.1f} GB/s")
    if row.get("peak_bytes"):
        parts.append(f"peak {row['peak_bytes'] / 1e6:.0f} MB")
    if row.get("predicted_ms"):
        parts.append(f"predicted {row['predicted_ms']:.3f} ms")
    if row.get("share_of_tolerance") is not None:
        parts.append(f"max err {row['share_of_tolerance']:.2f} of tolerance")
    return " ".join([head, *parts])
