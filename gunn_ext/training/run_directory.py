"""The directory of a run: config.yaml, metrics.jsonl, summary.json, last.pt, best.pt, snapshots."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from gunn_ext.training.config import Config, differences, load_config, save_config
from gunn_ext.training.errors import ConfigError, RunDirectoryError


class RunDirectory:
    """Names and writes the files of a run; refuses to touch what belongs to another run.

    Args:
        path: Of the directory.
    """

    def __init__(self, path: Path | str) -> None:
        """Name the files; nothing is read or written yet."""
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.metrics_file = self.path / "metrics.jsonl"
        self.summary_file = self.path / "summary.json"
        self.last_file = self.path / "last.pt"
        self.best_file = self.path / "best.pt"
        self.job_file = self.path / ".job"

    def snapshot_file(self, cycle: int) -> Path:
        """The checkpoint at the end of a cycle of the snapshot schedule, counted from 1."""
        return self.path / f"snapshot-{cycle:03}.pt"

    def snapshot_files(self) -> list[Path]:
        """The checkpoints of all cycles that are done, in their order."""
        return sorted(self.path.glob("snapshot-[0-9][0-9][0-9].pt"))

    def create(self, config: Config, job: str | None = None) -> None:
        """Make the directory and save the resolved configuration in it.

        Args:
            config: Of the run.
            job: Whose restarts may go on with the run unasked.

        Raises:
            RunDirectoryError: Something is there already; nothing is changed.
        """
        if self.config_file.exists():
            raise RunDirectoryError(
                f"{self.path} holds a run already ({self._describe()}). Continue it with --resume, or choose another "
                "directory with --output."
            )
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            kind = "is not empty and holds no run" if self.path.is_dir() else "is a file"
            raise RunDirectoryError(f"{self.path} {kind}; choose another directory with --output.")
        self.path.mkdir(parents=True, exist_ok=True)
        if job is not None:
            self.job_file.write_text(job, encoding="utf-8")
        save_config(config.resolved(), self.config_file)

    def belongs_to(self, job: str | None) -> bool:
        """Whether the run was begun by this job."""
        return job is not None and self.job_file.is_file() and self.job_file.read_text(encoding="utf-8") == job

    def check_resumable(self, config: Config) -> None:
        """Check that the directory holds a run of this very configuration.

        Raises:
            RunDirectoryError: It holds none, or one with other settings; nothing is changed.
        """
        saved = self.load_config()
        different = differences(saved, config)
        if different:
            listed = ", ".join(f"{name} {there!r} there, {here!r} now" for name, (there, here) in different.items())
            raise RunDirectoryError(
                f"{self.path} holds a run with other settings ({listed}). Resume it with its own, or start a new run "
                "in another --output."
            )

    def load_config(self) -> Config:
        """The configuration of the run.

        Raises:
            RunDirectoryError: There is none, or it cannot be read.
        """
        if not self.config_file.is_file():
            raise RunDirectoryError(
                f"{self.path} holds no run (no config.yaml). Check the path; a run is started by gunn train without "
                "--resume."
            )
        try:
            return load_config(self.config_file)
        except ConfigError as error:
            raise RunDirectoryError(f"{error} The run needs its config.yaml; restore it.") from error

    def read_metrics(self) -> list[dict[str, Any]]:
        """The records of all epochs; a line cut short by a crash ends the list."""
        records = []
        if self.metrics_file.is_file():
            for line in self.metrics_file.read_text(encoding="utf-8").splitlines():
                try:
                    records.append(json.loads(line))
                except json.JSONDecodeError:
                    break
        return records

    def keep_metrics(self, epochs: int) -> list[dict[str, Any]]:
        """Drop the records past the first ``epochs``, which will be computed again; returns those kept."""
        records = [record for record in self.read_metrics() if record["epoch"] < epochs]
        _write_atomically(self.metrics_file, "".join(json.dumps(record) + "\n" for record in records))
        return records

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add the record of one epoch as a line of JSON."""
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json."""
        _write_atomically(self.summary_file, json.dumps(summary, indent=2) + "\n")

    def _describe(self) -> str:
        try:
            config = self.load_config()
        except RunDirectoryError:
            return "its config.yaml cannot be read"
        done = len(self.read_metrics())
        return f"model {config.model}, data {config.data}, {done} of {config.epochs} epochs"


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
