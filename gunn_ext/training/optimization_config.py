"""The settings of optimiser and learning rate, as frozen dataclasses that check themselves."""

from __future__ import annotations

from dataclasses import dataclass

from gunn_ext.training import checks
from gunn_ext.training.errors import ConfigError

OPTIMIZERS = ("sgd", "adam", "adamw", "rmsprop")
SCHEDULES = ("step", "cosine", "snapshot")


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimiser; weight decay acts on every parameter, as in the paper.

    Args:
        name: sgd, adam, adamw or rmsprop; the learning rate is lr, for the last three 0.001 is usual.
        momentum: Of the gradient; sgd alone.
        nesterov: Nesterov's form of it; sgd alone.
        weight_decay: L2 penalty; of adamw decoupled from the gradient.
        betas: Decay of the two moments; adam and adamw.
        alpha: Decay of the squared gradient; rmsprop.
        eps: Added to the root of the squared gradient; adam, adamw, rmsprop.
    """

    name: str = "sgd"
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    alpha: float = 0.99
    eps: float = 1e-8

    def __post_init__(self) -> None:
        """Check the values."""
        checks.choice("optimizer.name", self.name, OPTIMIZERS)
        checks.number("optimizer.momentum", self.momentum, least=0, below=1)
        checks.boolean("optimizer.nesterov", self.nesterov)
        checks.number("optimizer.weight_decay", self.weight_decay, least=0)
        object.__setattr__(self, "betas", checks.sequence("optimizer.betas", self.betas))
        if len(self.betas) != 2:
            raise ConfigError(f"optimizer.betas must be two numbers, got {list(self.betas)}.")
        for beta in self.betas:
            checks.number("optimizer.betas", beta, least=0, below=1)
        checks.number("optimizer.alpha", self.alpha, least=0, below=1)
        checks.number("optimizer.eps", self.eps, above=0)
        if self.name == "sgd" and self.nesterov and self.momentum == 0:
            raise ConfigError(
                "optimizer.nesterov needs a momentum above 0, got optimizer.momentum=0; set optimizer.nesterov=false."
            )


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over a run.

    Args:
        name: step (drops between epochs), cosine (to zero, step by step) or snapshot (a cosine in each cycle, and a
            checkpoint at its end).
        drops: Where the rate of step drops, as rising fractions of the run.
        factor: By which the rate of step is multiplied at each drop.
        milestones: Epochs after which the rate of step drops, in place of drops.
        factors: By which it is multiplied at each milestone; empty is factor at all.
        warmup_epochs: The rate rises linearly for so long; cosine and snapshot begin after it.
        cycles: Of snapshot; they divide the epochs.
    """

    name: str = "step"
    drops: tuple[float, ...] = (0.5, 0.75)
    factor: float = 0.1
    milestones: tuple[int, ...] = ()
    factors: tuple[float, ...] = ()
    warmup_epochs: float = 0.0
    cycles: int = 6

    def __post_init__(self) -> None:
        """Check the values."""
        checks.choice("schedule.name", self.name, SCHEDULES)
        for name in ("drops", "milestones", "factors"):
            object.__setattr__(self, name, checks.sequence(f"schedule.{name}", getattr(self, name)))
        for drop in self.drops:
            checks.number("schedule.drops", drop, above=0, most=1)
        for milestone in self.milestones:
            checks.integer("schedule.milestones", milestone, least=1)
        for name in ("drops", "milestones"):
            values = list(getattr(self, name))
            if values != sorted(set(values)):
                raise ConfigError(f"schedule.{name} must rise, got {values}.")
        for factor in (self.factor, *self.factors):
            checks.number("schedule.factor" if factor is self.factor else "schedule.factors", factor, above=0, most=1)
        if self.factors and len(self.factors) != len(self.milestones):
            raise ConfigError(
                f"schedule.factors needs one number for each of schedule.milestones, got {list(self.factors)} for "
                f"{list(self.milestones)}."
            )
        checks.number("schedule.warmup_epochs", self.warmup_epochs, least=0)
        checks.integer("schedule.cycles", self.cycles, least=1)

    def check_epochs(self, epochs: int) -> None:
        """Check the values against the length of the run.

        Raises:
            ConfigError: The warm-up is as long as the run, or the cycles do not divide it.
        """
        if self.warmup_epochs >= epochs:
            raise ConfigError(f"schedule.warmup_epochs ({self.warmup_epochs}) must be less than epochs ({epochs}).")
        if self.name != "snapshot":
            return
        if self.warmup_epochs:
            raise ConfigError("schedule.warmup_epochs must be 0 with schedule.name=snapshot: a cycle begins the run.")
        if epochs % self.cycles:
            fits = max(self.cycles, epochs // self.cycles * self.cycles)
            raise ConfigError(
                f"epochs ({epochs}) must be divisible by schedule.cycles ({self.cycles}), so that a cycle ends with an "
                f"epoch; {fits} epochs are."
            )
