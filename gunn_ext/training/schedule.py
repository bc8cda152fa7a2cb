"""The learning rate as a pure function of the step: nothing to save, nothing to lose on resuming."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gunn_ext.training.optimization_config import ScheduleConfig


def learning_rate(schedule: ScheduleConfig, base: float, step: int, steps_per_epoch: int, epochs: int) -> float:
    """The learning rate of one step of a run.

    Args:
        schedule: Which one.
        base: Rate of the beginning, or after the warm-up.
        step: Counted from 0 over the whole run.
        steps_per_epoch: Training steps of each epoch.
        epochs: Of the whole run.

    Raises:
        ValueError: ``step`` is not one of the run's.
    """
    warmup, steps = round(schedule.warmup_epochs * steps_per_epoch), steps_per_epoch * epochs
    _check("learning_rate", "step", step, steps)
    if step < warmup:
        return warmup_learning_rate(step, warmup, base=base)
    if schedule.name == "snapshot":
        return snapshot_learning_rate(step, steps, schedule.cycles, base=base)
    if schedule.name == "cosine":
        return cosine_learning_rate(step - warmup, steps - warmup, base=base)
    epoch = step // steps_per_epoch
    if schedule.milestones:
        factors = schedule.factors or (schedule.factor,) * len(schedule.milestones)
        return milestone_learning_rate(epoch, base=base, milestones=schedule.milestones, factors=factors)
    return step_learning_rate(epoch, epochs, base=base, drops=schedule.drops, factor=schedule.factor)


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
    _check("step_learning_rate", "epoch", epoch, epochs)
    return base * factor ** sum(epoch + 1 >= drop * epochs for drop in drops)


def milestone_learning_rate(epoch: int, *, base: float, milestones: Sequence[int], factors: Sequence[float]) -> float:
    """The learning rate of one epoch, multiplied by ``factors[i]`` once ``milestones[i]`` epochs are done.

    The authors' ImageNet schedule is milestones 30, 60, 90 with factors 0.1, 0.1, 0.01.
    """
    return base * math.prod(factor for milestone, factor in zip(milestones, factors, strict=True) if epoch >= milestone)


def warmup_learning_rate(step: int, steps: int, *, base: float) -> float:
    """``base * (step + 1) / (steps + 1)``: a line that reaches ``base`` in the step after the warm-up's ``steps``."""
    return base * (step + 1) / (steps + 1)


def cosine_learning_rate(step: int, steps: int, *, base: float) -> float:
    """``base / 2 * (1 + cos(pi * step / steps))``: from ``base`` at step 0 down to 0, which no step has any more."""
    return base / 2 * (1 + math.cos(math.pi * step / steps))


def snapshot_learning_rate(step: int, steps: int, cycles: int, *, base: float) -> float:
    """The cosine over each of ``cycles`` equal cycles, begun anew in each (Huang et al. 2017a, equation 2).

    Args:
        step: Counted from 0.
        steps: Of the whole run.
        cycles: Each of ``ceil(steps / cycles)`` steps.
        base: Rate at the beginning of a cycle.
    """
    length = -(-steps // cycles)
    return cosine_learning_rate(step % length, length, base=base)


def _check(function: str, name: str, value: int, count: int) -> None:
    if not 0 <= value < count:
        raise ValueError(f"{function}: {name} must lie in 0 … {count - 1}, got {value}.")
