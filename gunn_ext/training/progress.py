"""How a run reports itself: a progress bar on a terminal, one line an epoch elsewhere, nothing in a library call."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Protocol, TextIO

if TYPE_CHECKING:
    from rich.console import Console


class Reporter(Protocol):
    """What the trainer tells while it works. All calls come from the training thread."""

    def start(self, description: str, epochs: int, steps: int, first_epoch: int) -> None:
        """The run begins at ``first_epoch``, with ``steps`` training steps in each of ``epochs``."""

    def step(self, epoch: int, step: int, images_per_second: float) -> None:
        """``step`` steps of ``epoch`` are done."""

    def epoch(self, record: dict[str, Any], eta_seconds: float) -> None:
        """An epoch is complete, with its record of metrics.jsonl."""

    def close(self) -> None:
        """The run ends, for whatever reason."""


class SilentReporter:
    """Says nothing."""

    def start(self, description: str, epochs: int, steps: int, first_epoch: int) -> None:
        """Says nothing."""

    def step(self, epoch: int, step: int, images_per_second: float) -> None:
        """Says nothing."""

    def epoch(self, record: dict[str, Any], eta_seconds: float) -> None:
        """Says nothing."""

    def close(self) -> None:
        """Says nothing."""


class LineReporter(SilentReporter):
    """Prints one plain line an epoch.

    Args:
        stream: Where to; standard output by default.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        """Print nothing yet."""
        self._stream = stream or sys.stdout
        self._epochs = 0

    def start(self, description: str, epochs: int, steps: int, first_epoch: int) -> None:
        """Print what is trained."""
        self._epochs = epochs
        print(opening_line(description, first_epoch), file=self._stream, flush=True)

    def epoch(self, record: dict[str, Any], eta_seconds: float) -> None:
        """Print the record."""
        print(f"{epoch_line(record, self._epochs)}  eta {clock(eta_seconds)}", file=self._stream, flush=True)


class BarReporter:
    """A bar over the whole run with rate and time left, and a line above it for each finished epoch.

    Args:
        console: A ``rich`` console; one on standard output by default.
    """

    def __init__(self, console: Console | None = None) -> None:
        """Show nothing yet."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:,.0f} img/s"),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task: Any = None
        self._epochs = self._steps = self._first = 0

    def start(self, description: str, epochs: int, steps: int, first_epoch: int) -> None:
        """Print what is trained, and show the bar."""
        self._epochs, self._steps, self._first = epochs, steps, first_epoch
        self._progress.console.print(opening_line(description, first_epoch), highlight=False, markup=False)
        remaining = (epochs - first_epoch) * steps
        self._task = self._progress.add_task("", total=remaining, epoch=f"{first_epoch + 1}/{epochs}", rate=0.0)
        self._progress.start()

    def step(self, epoch: int, step: int, images_per_second: float) -> None:
        """Move the bar."""
        self._progress.update(
            self._task,
            completed=(epoch - self._first) * self._steps + step,
            epoch=f"{epoch + 1}/{self._epochs}",
            rate=images_per_second,
        )

    def epoch(self, record: dict[str, Any], eta_seconds: float) -> None:
        """Print the record above the bar."""
        self._progress.console.print(epoch_line(record, self._epochs), highlight=False, markup=False)

    def refresh(self) -> None:
        """Draw the bar now; it draws itself ten times a second anyway."""
        self._progress.refresh()

    def close(self) -> None:
        """Take the bar away."""
        self._progress.stop()


def make_reporter() -> Reporter:
    """The bar on a terminal, plain lines elsewhere."""
    return BarReporter() if sys.stdout.isatty() else LineReporter()


def opening_line(description: str, first_epoch: int) -> str:
    """What is trained, and after how many epochs it goes on."""
    return f"{description}, resumed after epoch {first_epoch}" if first_epoch else description


def epoch_line(record: dict[str, Any], epochs: int) -> str:
    """One epoch in one line; epochs are counted from 1 for people."""
    part = "test" if record.get("validation_accuracy") is None else "validation"
    accuracy = record[f"{part}_accuracy"]
    tested = "no test images" if accuracy is None else f"{part} {100 * accuracy:6.2f} %"
    return (
        f"epoch {record['epoch'] + 1:{len(str(epochs))}}/{epochs}  lr {record['lr']:.4g}  "
        f"loss {record['train_loss']:.4f}  {tested}  {record['images_per_second']:,.0f} img/s"
    )


def clock(seconds: float) -> str:
    """``h:mm:ss``, or ``m:ss`` under an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
