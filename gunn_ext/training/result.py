"""What a finished run leaves: its result, with the versions of what computed it."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import torch

from gunn_ext._info import __version__


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        output: The run directory.
        test_accuracy: Of the network after the last epoch, 0 … 1; with a validation split, of the best network instead,
            and of no other. None without test images.
        best_accuracy: The highest of all epochs, on the validation split where there is one. Otherwise it was chosen on
            the test split, so quote ``test_accuracy``.
        best_epoch: Where that was, counted from 0.
        test_count: Test images.
        validation_count: Images held out of the training split, by which the best network was chosen.
        test_loss: Mean cross-entropy on them, of the same network as ``test_accuracy``; None without test images.
        test_accuracy5: Of five guesses, likewise; None without test images.
        epochs: Done.
        steps_taken: Optimiser steps; in float16 those that overflowed are not counted.
        train_seconds: Wall time of all epochs with evaluation and checkpoints, over all resumptions.
        images_per_second: Training images over the time of the training passes alone.
        parameters: Trainable values of the network.
        backend: What computed the gradual layers, such as ``cpu/avx512``; ``torch`` for a network without any.
        seed: Of the run.
        model: Name of the network.
        data: Name of the data set.
        versions: Of gunn_ext, torch and python, at the end.
        device: Where it ran.
        threads: Of the CPU.
    """

    output: str
    test_accuracy: float | None
    best_accuracy: float | None
    best_epoch: int
    test_count: int
    validation_count: int
    test_loss: float | None
    test_accuracy5: float | None
    epochs: int
    steps_taken: int
    train_seconds: float
    images_per_second: float
    parameters: int
    backend: str
    seed: int
    model: str
    data: str
    versions: dict[str, str]
    device: str
    threads: int

    def describe(self) -> str:
        """The accuracies in a sentence."""
        if self.best_accuracy is None:
            return "no test images, hence no test accuracy"
        best = f"best {100 * self.best_accuracy:.2f} % after epoch {self.best_epoch + 1}"
        if self.validation_count:
            best = f"chosen on {self.validation_count} validation images: {best}"
        if self.test_accuracy is None:
            return f"no test images, hence no test accuracy; {best}"
        correct = round(self.test_accuracy * self.test_count)
        when = "" if self.validation_count else f" after epoch {self.epochs}"
        return f"test accuracy {100 * self.test_accuracy:.2f} % ({correct} of {self.test_count}){when}; {best}"


def versions() -> dict[str, str]:
    """Versions of what computes."""
    return {"gunn_ext": __version__, "torch": str(torch.__version__), "python": platform.python_version()}
