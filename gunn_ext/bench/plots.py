"""Pictures of a result: time by peer, time against a size, and the roofline. Needs matplotlib, the extra ``plot``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gunn_ext.bench.rows import Row


def require_matplotlib(instead: str = "leave --plot out and plot the rows of --json") -> None:
    """Fail before anything is done.

    Args:
        instead: What to do without it.

    Raises:
        ValueError: There is no matplotlib.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"a plot needs matplotlib, which cannot be imported here ({error}); "
            f'pip install "gunn-ext[plot]", or {instead}.'
        ) from None


def write_plots(folder: Path, environment: Mapping[str, Any], rows: Sequence[Row]) -> list[Path]:
    """Write what the rows have something for.

    Args:
        folder: Made where it does not exist.
        environment: Of the run; peaks for the roofline, device and commit for the title.
        rows: Of the run.

    Returns:
        The files: ``peers.png``; ``sweep-segments.png`` or ``sweep-batch.png`` where one of them takes several values;
        ``roofline.png`` where bytes were counted.
    """
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    timed = [row for row in rows if row.get("ms") and row.get("best_format")]
    title = f"{environment.get('device', '')}, {environment.get('commit', '')}"
    written: list[Path] = []

    def save(figure: Figure, name: str) -> None:
        figure.suptitle(title, fontsize=8)
        figure.savefig(folder / name, dpi=120)
        written.append(folder / name)

    if timed:
        save(_peers(timed), "peers.png")
    for name in ("segments", "batch"):
        if len({row.get(name) for row in timed} - {None}) > 1:
            save(_against(timed, name), f"sweep-{name}.png")
    counted = [row for row in timed if row.get("bytes")]
    if counted:
        save(_roofline(counted, environment), "roofline.png")
    return written


def _label(row: Row) -> str:
    return f"{row['layer']} {row['dtype']} {row['pass']} b{row['batch']}"


def _peers(rows: Sequence[Row]) -> Any:
    from matplotlib.figure import Figure

    cells = list(dict.fromkeys(map(_label, rows)))
    figure = Figure(figsize=(8, 0.6 + 0.22 * len(rows) + 0.3 * len(cells)), layout="constrained")
    axes = figure.subplots(
        len(cells), squeeze=False, height_ratios=[sum(_label(r) == cell for r in rows) for cell in cells]
    )
    for axis, cell in zip(axes[:, 0], cells, strict=True):
        of_cell = [row for row in rows if _label(row) == cell][::-1]
        reach = [
            [row["ms"] - row["ms_20"] for row in of_cell],
            [row["ms_80"] - row["ms"] for row in of_cell],
        ]
        axis.barh([f"{row['peer']} ({row['format']})" for row in of_cell], [row["ms"] for row in of_cell], xerr=reach)
        axis.set_title(cell, fontsize=8)
        axis.tick_params(labelsize=7)
    axes[-1, 0].set_xlabel("ms (median; 20 to 80 %)")
    return figure


def _against(rows: Sequence[Row], name: str) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(f"{row['peer']}, {row['pass']}, {row['dtype']}", []).append(row)
    for label, line in lines.items():
        points = sorted((row[name], row["ms"]) for row in line if row.get(name))
        axis.plot(*zip(*points, strict=True), marker="o", label=label)
    axis.set(xscale="log", yscale="log", xlabel="segments P" if name == "segments" else name, ylabel="ms")
    axis.legend(fontsize=6)
    return figure


def _roofline(rows: Sequence[Row], environment: Mapping[str, Any]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    intensity = [row["gflops"] / row["gbps"] for row in rows]
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        peak = environment.get(f"peak_{dtype}")
        if peak:
            ridge = peak["gflops"] / peak["gbps"]
            xs = [min(*intensity, ridge) / 2, ridge, 2 * max(*intensity, ridge)]
            axis.plot(xs, [min(peak["gflops"], x * peak["gbps"]) for x in xs], label=f"measured limits, {dtype}")
    for peer in dict.fromkeys(row["peer"] for row in rows):
        points = [(row["gflops"] / row["gbps"], row["gflops"]) for row in rows if row["peer"] == peer]
        axis.plot(*zip(*points, strict=True), "o", markersize=4, label=peer)
    axis.set(xscale="log", yscale="log", xlabel="FLOP per least byte", ylabel="GFLOP/s")
    axis.legend(fontsize=6)
    return figure
