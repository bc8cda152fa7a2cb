"""The learning rate as a pure function of the epoch: nothing to save, nothing to lose on resuming."""

from __future__ import annotations

from collections.abc import Sequence


def step_learning_rate(
    epoch: int, epochs: int, *, base: float, drops: Sequence[float] = (0.5, 0.75), factor: float = 0.1
) -> float:
    """The learning rate of one epoch under the paper's step schedule.

    ``base * factor ** (number of drops d with epoch + 1 >= d * epochs)``: of 300 epochs, counted from 0, epoch 149 is
    the first with the second rate and epoch 224 the first with the third (Qiao et al. 2018, section 6.2, and the
    authors' code, which counts from 1).

    Args:
        epoch: Counted from 0.
        epochs: Of the whole run.
        base: Rate of the beginning.
        drops: Where the rate drops, as fractions of the run.
        factor: By which it is multiplied at each drop.

    Raises:
        ValueError: ``epoch`` is not one of the run's.
    """
    if not 0 <= epoch < epochs:
        raise ValueError(f"step_learning_rate: epoch must lie in 0 … {epochs - 1}, got {epoch}.")
    return base * factor ** sum(epoch + 1 >= drop * epochs for drop in drops)
