"""Training curves of runs, epoch by epoch, those that differ only in their seed averaged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gunn_ext.training.config import Config, flattened
from gunn_ext.training.errors import RunDirectoryError
from gunn_ext.training.run_directory import RunDirectory
from gunn_ext.training.trials import spread

_NO_MATTER = ("seed", "output", "device")


@dataclass(frozen=True)
class Curve:
    """Errors of the runs of one setting, per cent, by epoch; means over the runs that have that epoch.

    Attributes:
        label: The settings that tell it from the others.
        runs: How many.
        test_error: On the test images.
        test_std: Its sample standard deviation; NaN for one run.
        train_error: On the training images as they were met, augmented, by a network on its way; NaN where a run of an
            older version has not noted it.
    """

    label: str
    runs: int
    test_error: list[float]
    test_std: list[float]
    train_error: list[float]


def find_runs(paths: Sequence[Path | str]) -> list[Path]:
    """Run directories among and below some folders.

    Raises:
        RunDirectoryError: A folder holds none.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        runs = [path] if (path / "config.yaml").is_file() else sorted(file.parent for file in path.rglob("config.yaml"))
        if not runs:
            raise RunDirectoryError(f"{path} holds no run (no config.yaml in it or below).")
        found += [run for run in runs if run not in found]
    return found


def read_curves(runs: Sequence[Path]) -> list[Curve]:
    """The curves of some runs.

    Raises:
        RunDirectoryError: A run has no finished epoch, or its settings cannot be read.
    """
    groups: dict[tuple[tuple[str, str], ...], list[list[dict]]] = {}
    for run in runs:
        directory = RunDirectory(run)
        records = directory.read_metrics()
        if not records:
            raise RunDirectoryError(f"{run} has no finished epoch yet; leave it out, or wait.")
        groups.setdefault(_settings(directory.load_config()), []).append(records)
    common = set.intersection(*(set(settings) for settings in groups)) if groups else set()
    curves = []
    for settings, members in groups.items():
        special = [(name, value) for name, value in settings if (name, value) not in common]
        own = [value if name == "model" else f"{name} {value}" for name, value in special]
        facts = dict(settings)
        length = max(map(len, members))
        tests = [_errors(members, epoch, "test_accuracy") for epoch in range(length)]
        trains = [_errors(members, epoch, "train_accuracy") for epoch in range(length)]
        curves.append(
            Curve(
                label=", ".join(own) or f"{facts['model']}, {facts['data']}",
                runs=len(members),
                test_error=[spread(values)[0] for values in tests],
                test_std=[spread(values)[1] for values in tests],
                train_error=[spread(values)[0] for values in trains],
            )
        )
    return curves


def plot_curves(curves: Sequence[Curve], path: Path) -> None:
    """Draw test errors as lines, with their deviation, and training errors dashed. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for number, curve in enumerate(curves):
        epochs, colour = range(1, len(curve.test_error) + 1), f"C{number % 10}"
        seeds = f" ({curve.runs} runs)" if curve.runs > 1 else ""
        axis.plot(epochs, curve.test_error, color=colour, label=f"{curve.label}, test{seeds}")
        axis.plot(
            epochs, curve.train_error, color=colour, linestyle="--", linewidth=0.8, label=f"{curve.label}, training"
        )
        if curve.runs > 1:
            bands = list(zip(curve.test_error, curve.test_std, strict=True))
            axis.fill_between(epochs, [m - s for m, s in bands], [m + s for m, s in bands], color=colour, alpha=0.2)
    axis.set(xlabel="epoch", ylabel="error, %", ylim=(0, None))
    axis.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _settings(config: Config) -> tuple[tuple[str, str], ...]:
    settings = flattened(config.resolved().to_dict())
    return tuple((name, str(value)) for name, value in settings.items() if name not in _NO_MATTER)


def _errors(members: Sequence[Sequence[dict]], epoch: int, name: str) -> list[float]:
    values = [records[epoch].get(name) for records in members if epoch < len(records)]
    return [math.nan if value is None else 100 * (1 - value) for value in values]
