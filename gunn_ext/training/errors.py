"""What can go wrong in a run, as exceptions whose text names the value, the expectation and the next step."""

from __future__ import annotations


class ConfigError(ValueError):
    """A setting is unknown, of the wrong type or out of range, or two settings contradict each other."""


class RunDirectoryError(RuntimeError):
    """A run directory is taken, missing, or belongs to another configuration."""


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, of an unknown format, or of another model."""


class DivergenceError(RuntimeError):
    """The loss is not finite any more."""


class TrainingInterrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM ended a run; every completed epoch is in its checkpoint.

    Attributes:
        signal_number: The signal that asked for it.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        """Take the message and the signal."""
        super().__init__(message)
        self.signal_number = signal_number
