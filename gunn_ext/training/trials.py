"""Runs in numbers: finished ones are not done again, begun ones go on, and of several the mean and spread are told."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from gunn_ext.training.config import Config
from gunn_ext.training.errors import DivergenceError, RunDirectoryError
from gunn_ext.training.progress import Reporter
from gunn_ext.training.run_directory import RunDirectory
from gunn_ext.training.runs import evaluate_run
from gunn_ext.training.trainer import train


@dataclass(frozen=True)
class Trial:
    """A run that has come to its end.

    Attributes:
        output: Run directory.
        seed: Of the run.
        error: Test error after the last epoch, per cent; NaN where the run diverged or had no test images.
        error5: Of five guesses; NaN likewise.
        failure: Why the run diverged, or None.
    """

    output: str
    seed: int
    error: float
    error5: float
    failure: str | None = None


def run_trial(config: Config, reporter: Reporter | None = None, *, ensemble: bool = False) -> Trial:
    """Bring a run to its end.

    A run that is finished is only read, one that was begun is resumed, and what diverges is noted, not raised.

    Args:
        config: Of the run.
        reporter: Told about the progress.
        ensemble: Take the error of the ensemble of all snapshots.

    Raises:
        RunDirectoryError: The directory holds a run of other settings, or its summary cannot be read.
    """
    directory = RunDirectory(config.run_directory)
    if directory.summary_file.is_file():
        directory.check_resumable(config)
        try:
            summary = json.loads(directory.summary_file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise RunDirectoryError(
                f"{directory.summary_file}: not JSON ({error}); delete it, and gunn train --resume writes it again."
            ) from error
    else:
        try:
            summary = vars(train(config, resume=directory.config_file.is_file(), reporter=reporter))
        except DivergenceError as error:
            return Trial(str(directory.path), config.seed, math.nan, math.nan, str(error))
    accuracy, accuracy5 = summary["test_accuracy"], summary.get("test_accuracy5")
    if ensemble:
        found = evaluate_run(directory.path, device=config.device, ensemble=0)
        accuracy, accuracy5 = found.accuracy, found.accuracy5
    return Trial(str(directory.path), config.seed, _error(accuracy), _error(accuracy5))


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation of the finite values; NaN where there are too few."""
    finite = [value for value in values if math.isfinite(value)]
    return (
        statistics.fmean(finite) if finite else math.nan,
        statistics.stdev(finite) if len(finite) > 1 else math.nan,
    )


def _error(accuracy: float | None) -> float:
    return math.nan if accuracy is None else 100 * (1 - accuracy)
