"""Write the tables of README.md and docs/performance.md from the committed results and the performance model.

    python benchmarks/tables.py [--check]

A table stands between two comments, ``<!-- begin NAME -->`` and ``<!-- end NAME -->``; nothing else is touched.
``--check`` writes nothing and fails where a file is not up to date.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from gunn_ext.analysis.performance import H200
from gunn_ext.bench.cases import LAYERS
from gunn_ext.bench.goals import goals
from gunn_ext.bench.predict import HEADER, PARTS_HEADER, markdown, part_rows, prediction_rows
from gunn_ext.bench.rows import Row, read_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
FILES = ("README.md", "docs/performance.md")
COLUMNS = ("ours", "ours, recompute=False", "eager", "sunn")
BATCH = 64


def milliseconds(rows: Sequence[Row], layer: str, which: str, peer: str) -> str:
    """The median in the better memory format."""
    found = [row["ms"] for row in rows if (row["layer"], row["pass"], row["peer"]) == (layer, which, peer)]
    if not found:
        return ""
    return f"{min(found):.0f}" if min(found) >= 20 else f"{min(found):.1f}"


def taken(environment: dict) -> str:
    """With what, from which sources and when rows were taken."""
    return f"torch {environment['torch']}, commit {environment['commit']}, {environment['date'][:10]}"


def measured_layers() -> str:
    """Times of the layers on the CPU."""
    environment, rows = read_json(RESULTS / "layers.json")
    table = []
    for layer in dict.fromkeys(row["layer"] for row in rows):
        sizes = LAYERS[layer]
        name = f"{sizes.channels} channels, {sizes.size}x{sizes.size}, P {sizes.segments}"
        for which in ("training", "evaluation"):
            cells = [milliseconds(rows, layer, which, peer) for peer in COLUMNS]
            table.append((name if which == "training" else "", which, *cells))
    head = (
        f"Median milliseconds, {rows[0]['dtype']}, batch {rows[0]['batch']}, {environment['threads']} threads of "
        f"{environment['device']}, {environment['simd']},\n{taken(environment)}:"
    )
    return f"{head}\n\n" + markdown(("layer", "pass", "ours", "ours, `recompute=False`", "eager", "SUNN"), table)


def measured_memory() -> str:
    """Memory of a training step on the CPU."""
    environment, rows = read_json(RESULTS / "memory.json")
    table = [
        (row["peer"], f"{row['saved_bytes'] / 1e9:.2f} GB", f"{row['resident_bytes'] / 1e9:.2f} GB") for row in rows
    ]
    head = f"One training step of GUNN-15 at batch {rows[0]['batch']} in {rows[0]['dtype']},\n{taken(environment)}:"
    return f"{head}\n\n" + markdown(("", "kept for the backward", "growth of the process at its peak"), table)


def measured_goals() -> str:
    """What was to be reached on the CPU, and what was."""
    environment, _ = read_json(RESULTS / "layers.json")
    head = f"{environment['threads']} threads of {environment['device']}, {environment['simd']}, {taken(environment)}:"
    return f"{head}\n\n" + markdown(
        ("work", "against", "goal", "measured", "reached"), [goal.cells() for goal in goals(RESULTS)]
    )


def predictions() -> str:
    """The table of gunn bench predict."""
    return markdown(HEADER, prediction_rows(LAYERS, BATCH, "bfloat16", H200))


def parts() -> str:
    """What the predictions of GUNN-15 are made of."""
    layers = {name: sizes for name, sizes in LAYERS.items() if name.startswith("gunn15")}
    return markdown(PARTS_HEADER, part_rows(layers, BATCH, "bfloat16", H200))


TABLES = {
    "measured layers": measured_layers,
    "measured memory": measured_memory,
    "measured goals": measured_goals,
    "predictions": predictions,
    "parts of predictions": parts,
}


def updated(text: str) -> str:
    """``text`` with every table between its comments as it should be."""

    def table(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- begin ([\w ]+) -->)\n.*?(<!-- end \2 -->)", table, text, flags=re.DOTALL)


def main() -> None:
    """Write or check the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--check", action="store_true", help="fail where a file is not up to date")
    check = parser.parse_args().check
    for name in FILES:
        path = ROOT / name
        before = path.read_text()
        after = updated(before)
        if check and after != before:
            raise SystemExit(f"{name} is not up to date: run python benchmarks/tables.py")
        if after != before:
            path.write_text(after)
            print(f"{name} written")


if __name__ == "__main__":
    main()
