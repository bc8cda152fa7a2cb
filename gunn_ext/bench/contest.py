"""A contest: everybody prepares and is verified, then all are timed in turns. Who fails has an error in its row."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from gunn_ext.analysis.performance import DeviceLimits
from gunn_ext.bench.environment import environment, gpu_state
from gunn_ext.bench.limits import Peak, limits_of_cpu, limits_of_gpu, measure_peak
from gunn_ext.bench.rows import Row, describe, mark_best, write_csv, write_json
from gunn_ext.bench.timing import Work, clock_for, summary, take_turns
from gunn_ext.bench.verify import WrongResult

DTYPES = ("bfloat16", "float32", "float16", "float64")


@dataclass(frozen=True)
class Settings:
    """What all commands that measure have in common.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        batch: Images.
        dtypes: Of the feature maps, the first measured first.
        passes: ``"training"``, ``"evaluation"``.
        peers: Wildcards of names; empty for all.
        formats: ``"nhwc"``, ``"nchw"``.
        threads: Of the CPU.
        repeats: Timed rounds.
        minutes: After which no cell is begun.
        reduced: Tiny shapes.
    """

    device: str = "cpu"
    batch: int = 16
    dtypes: tuple[str, ...] = ("float32",)
    passes: tuple[str, ...] = ("training", "evaluation")
    peers: tuple[str, ...] = ()
    formats: tuple[str, ...] = ("nhwc", "nchw")
    threads: int = 1
    repeats: int = 9
    minutes: float = math.inf
    reduced: bool = False

    def check(self) -> None:
        """Raise a ValueError that says what is wrong, what was expected and what to do."""
        for name, value, least in (
            ("batch", self.batch, 1),
            ("threads", self.threads, 1),
            ("repeats", self.repeats, 2),
        ):
            if value < least:
                raise ValueError(f"--{name} must be at least {least}, got {value}.")
        if not self.minutes > 0:
            raise ValueError(f"--minutes must be above 0, got {self.minutes:g}.")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"--device: unknown device {self.device!r}; expected cpu or cuda.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                "--device cuda: torch finds no GPU here; expected one with a driver. Take --device cpu, or `gunn bench "
                "predict` for predictions. `gunn info` shows what there is."
            )


@dataclass(frozen=True)
class Entry:
    """One contestant.

    Attributes:
        row: Says who it is; its figures are filled in.
        prepare: Builds and verifies it, fills in what is no time, and returns what is timed.
    """

    row: Row
    prepare: Callable[[], Work]


@dataclass
class Contest:
    """Runs cells of entries within a time, and keeps the result's files up to date.

    Attributes:
        settings: Of the run.
        json: File of the rows, written after every cell.
        csv: The same as a table.
        rows: So far.
        wrong: What was not right, for the end.
    """

    settings: Settings
    json: Path | None = None
    csv: Path | None = None
    rows: list[Row] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    skipped: int = 0

    def __post_init__(self) -> None:
        """Check the settings, gather the environment and set torch up."""
        self.settings.check()
        torch.set_num_threads(self.settings.threads)
        torch.backends.cudnn.benchmark = True
        self.deadline = time.monotonic() + 60 * self.settings.minutes
        self.environment: dict[str, Any] = dict(environment(self.settings.device))
        self.environment["threads"] = self.settings.threads
        if self.settings.device == "cuda":
            self.environment["state"] = gpu_state()
        if self.settings.reduced:
            self.environment["reduced"] = True
        self._peaks: dict[str, Peak] = {}
        print(", ".join(f"{name} {value}" for name, value in self.environment.items() if name != "state"), flush=True)

    def peak(self, dtype: str) -> Peak:
        """What the device can do in ``dtype``, measured once."""
        if dtype not in self._peaks:
            peak = measure_peak(self.settings.device, getattr(torch, dtype), reduced=self.settings.reduced)
            self._peaks[dtype] = peak
            self.environment[f"peak_{dtype}"] = {
                name: round(value, 1) for name, value in asdict(peak).items() if value is not None
            }
        return self._peaks[dtype]

    def limits(self) -> DeviceLimits | None:
        """Limits to predict with, where there are any."""
        if self.settings.device == "cuda":
            return limits_of_gpu()
        return limits_of_cpu(self.peak("float32"), self.settings.threads)

    def run(self, entries: Callable[[], Sequence[Entry]], flops: float, least_bytes: float, dtype: str) -> list[Row]:
        """One cell: prepare, verify, time, and write.

        Args:
            entries: Makes the contestants; not called when the time is over.
            flops: Algorithmic work of one repetition.
            least_bytes: That must move in one repetition; 0 where nobody counted.
            dtype: For the peak.
        """
        if time.monotonic() > self.deadline:
            self.skipped += 1
            return []
        peak, ready = self.peak(dtype), []
        cell = list(entries())
        for entry in cell:
            if time.monotonic() > self.deadline:
                entry.row["error"] = f"not reached in {self.settings.minutes:g} minutes"
                continue
            try:
                ready.append((entry.row, entry.prepare()))
            except Exception as error:  # a peer that fails must not take the others with it
                self._failed(entry.row, error)
        clock = clock_for(self.settings.device)
        times = take_turns([work for _, work in ready], clock, self.settings.repeats, self.deadline)
        for (row, _), found in zip(ready, times, strict=True):
            if isinstance(found, Exception):
                self._failed(row, found)
                continue
            row |= summary(found)
            row["gflops"] = flops / row["ms"] / 1e6
            row["share_of_peak"] = row["gflops"] / peak.gflops
            if peak.register_gflops:
                row["share_of_registers"] = row["gflops"] / peak.register_gflops
            if least_bytes:
                row["bytes"], row["gbps"] = int(least_bytes), least_bytes / row["ms"] / 1e6
        rows = [entry.row for entry in cell]
        mark_best(rows)
        self.rows += rows
        for row in rows:
            print(describe(row), flush=True)
        self.write()
        return rows

    def _failed(self, row: Row, error: Exception) -> None:
        text = " ".join(str(error).split())[:500]
        row["error"] = text if isinstance(error, WrongResult) else f"{type(error).__name__}: {text}"
        if isinstance(error, WrongResult):
            self.wrong.append(f"{row['peer']}, {row['layer']}, {row['dtype']}, {row['pass']}: {text}")
        if self.settings.device == "cuda":
            with contextlib.suppress(RuntimeError):  # a broken context: the peers that follow will say so themselves
                torch.cuda.synchronize()
                torch.cuda.empty_cache()

    def write(self) -> None:
        """Bring the files up to date."""
        if self.json:
            write_json(self.json, self.environment, self.rows)
        if self.csv:
            write_csv(self.csv, self.environment, self.rows)

    def finish(self) -> None:
        """Say what was not reached; refuse a result with something wrong in it.

        Raises:
            WrongResult: A peer was not right.
        """
        if self.skipped:
            print(f"{self.skipped} cells were not reached in {self.settings.minutes:g} minutes")
        if self.wrong:
            others = f" (and {len(self.wrong) - 1} more)" if len(self.wrong) > 1 else ""
            raise WrongResult(
                f"{self.wrong[0]}{others}. Run the tests before measuring again: pytest tests/test_layer.py"
            )
