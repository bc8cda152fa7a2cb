"""Experiments by name: a YAML file each beside this, with its source and the figure that was published."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml

from gunn_ext.training.errors import ConfigError


@dataclass(frozen=True)
class Recipe:
    """The settings of a published experiment.

    Attributes:
        name: Of the file.
        source: Where it was published.
        shown_in: Tables and figures of the paper with this line, such as ``table5``.
        error: Published top-1 test error, per cent.
        error5: Published top-5 test error, per cent; None where there is none.
        ensemble: Whether the error is that of the ensemble of all snapshots.
        settings: As in `gunn_ext.training.Config`; what is not named keeps its default.
    """

    name: str
    source: str
    shown_in: tuple[str, ...]
    error: float
    error5: float | None
    ensemble: bool
    settings: dict[str, Any]


def list_recipes(shown_in: str | None = None) -> list[str]:
    """Names of the recipes, sorted; with ``shown_in`` those of one table or figure.

    Raises:
        ConfigError: No recipe is shown there.
    """
    names = sorted(
        file.name.removesuffix(".yaml")
        for file in resources.files(__package__).iterdir()
        if file.name.endswith(".yaml")
    )
    if shown_in is None:
        return names
    recipes = [load_recipe(name) for name in names]
    found = [recipe.name for recipe in recipes if shown_in in recipe.shown_in]
    if not found:
        places = sorted({place for recipe in recipes for place in recipe.shown_in})
        raise ConfigError(f"unknown table {shown_in!r}; expected {', '.join(places)}.")
    return found


def load_recipe(name: str) -> Recipe:
    """Read a recipe.

    Raises:
        ConfigError: There is none of this name; the message suggests the nearest ones.
    """
    names = list_recipes()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(f"unknown recipe {name!r}.{hint} gunn recipes lists all {len(names)}.")
    values = yaml.safe_load((resources.files(__package__) / f"{name}.yaml").read_text(encoding="utf-8"))
    return Recipe(
        name=name,
        source=values["source"],
        shown_in=tuple(values["shown_in"]),
        error=values["error"],
        error5=values.get("error5"),
        ensemble=values.get("ensemble", False),
        settings=values["settings"],
    )
