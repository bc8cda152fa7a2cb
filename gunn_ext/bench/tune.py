"""From measured rows to the table that says which CUDA driver serves a layer (`gunn_ext.choice`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gunn_ext.bench.rows import Row
from gunn_ext.choice import DRIVERS

_KEYS = ("dtype", "pass", "layer", "batch", "channels", "segments", "size")


def table_rows(device: str, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The faster driver of every layer, batch, dtype and pass, by the best memory format of the graphed peers.

    Where the persistent driver has no time, because it does not take the layer or failed, the staged one is chosen.

    Raises:
        ValueError: No row is of a driver's.
    """
    best: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        if row.get("ms") and row["peer"] in {f"ours {driver}, graphed" for driver in DRIVERS}:
            times = best.setdefault(tuple(row[key] for key in _KEYS), {})
            driver = row["peer"].split()[1].rstrip(",")
            times[driver] = min(row["ms"], times.get(driver, row["ms"]))
    made = []
    for key, times in best.items():
        if "staged" not in times:  # nothing to compare with
            continue
        facts = dict(zip(_KEYS, key, strict=True))
        made.append(
            {"device": device, "dtype": facts["dtype"], "pass": facts["pass"], "layer": facts["layer"]}
            | {"batch": facts["batch"], "channels": facts["channels"], "pixels": facts["size"] ** 2}
            | {"segments": facts["segments"], "driver": min(times, key=lambda name: times[name])}
            | {f"{name}_ms": times[name] for name in DRIVERS if name in times}
        )
    if not made:
        raise ValueError(
            "no row has a time of 'ours staged, graphed'; expected what `gunn bench layer --device cuda --json` writes."
        )
    return made


def update_table(table: Path, device: str, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Replace the rows of this kind of GPU in ``table``; returns those it has now."""
    made = table_rows(device, rows)
    before = json.loads(table.read_text())["rows"] if table.exists() else []
    others = [row for row in before if row["device"] != device]
    lines = ",\n".join(f"  {json.dumps(row)}" for row in [*others, *made])
    table.write_text(f'{{"rows": [\n{lines}\n]}}\n')
    return made
