"""Checks of single settings: each raises a ConfigError that names the setting, what was expected and what came."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from typing import Any

from gunn_ext.training.errors import ConfigError


def hint(value: str, known: Sequence[str]) -> str:
    """A question for the nearest of the known names, or nothing."""
    near = difflib.get_close_matches(value, known, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def choice(name: str, value: Any, known: Sequence[str]) -> None:
    """One of a few names."""
    string(name, value)
    if value not in known:
        raise ConfigError(f"{name} must be one of {', '.join(known)}, got {value!r}.{hint(value, known)}")


def boolean(name: str, value: Any) -> None:
    """True or false."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be true or false, got {value!r}.")


def string(name: str, value: Any) -> None:
    """A text that is not empty."""
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{name} must be a text, got {value!r}.")


def sequence(name: str, value: Any) -> tuple[Any, ...]:
    """A list, as a tuple."""
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{name} must be a list, got {value!r}.")
    return tuple(value)


def integer(name: str, value: Any, *, least: int, most: int | None = None) -> None:
    """An integer between two limits."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} must be an integer, got {value!r}.")
    if value < least or (most is not None and value > most):
        limits = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ConfigError(f"{name} must be {limits}, got {value}.")


def number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> None:
    """A finite number between limits; those of ``above`` and ``below`` are not allowed themselves."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{name} must be a number, got {value!r}.")
    bounds = {"above": above, "at least": least, "below": below, "at most": most}
    wanted = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)
    inside = (
        (above is None or value > above)
        and (least is None or value >= least)
        and (below is None or value < below)
        and (most is None or value <= most)
    )
    if not math.isfinite(value) or not inside:
        raise ConfigError(f"{name} must be a finite number {wanted}, got {value}.")
