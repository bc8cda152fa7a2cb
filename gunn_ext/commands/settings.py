"""From options, files and recipes to the settings of a run."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gunn_ext.training.config import Config, flattened, load_config, read_yaml, unknown_key
from gunn_ext.training.errors import ConfigError
from gunn_ext.training.recipes import load_recipe
from gunn_ext.training.run_directory import RunDirectory


def parse_train_arguments(arguments: Sequence[str]) -> tuple[Config, bool]:
    """The configuration that ``gunn train`` was asked for, and whether to resume.

    Options beat the file of ``--config``, wherever it stands, that beats the ``--recipe``, and that the defaults.
    Resuming without ``--config``, the settings of the run itself stand in for all but the options.

    Raises:
        ConfigError: An option, key or recipe is unknown or a value wrong.
        SystemExit: After ``--help``.
    """
    arguments = [_with_underscores(argument) for argument in arguments]
    chosen, recipe, file, resume = _parse(arguments, {})
    if recipe is not None or file is not None:
        chosen, *_ = _parse(arguments, _defaults(recipe, file))
    if recipe is not None and chosen["output"] is None:
        chosen["output"] = f"runs/{recipe}-seed{chosen['seed']}"
    if resume and file is None:
        directory = Config.from_dict(chosen).run_directory
        base = RunDirectory(directory).load_config()
        chosen, *_ = _parse(arguments, base.to_dict())
        chosen["output"] = str(directory)  # as the user named it, wherever the run was made
    return Config.from_dict(chosen), resume


def _defaults(recipe: str | None, file: str | None) -> dict[str, Any]:
    """Settings of a recipe, a file, or a file over a recipe."""
    if recipe is None:
        return load_config(file).to_dict() if file else {}
    settings = load_recipe(recipe).settings
    return overlaid(settings, read_yaml(file)) if file else settings


def overlaid(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings, those of ``above`` over those of ``below``."""
    merged = dict(below)
    for name, value in above.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = overlaid(merged[name], value) if nested else value
    return merged


def _parse(
    arguments: Sequence[str], defaults: Mapping[str, Any]
) -> tuple[dict[str, Any], str | None, str | None, bool]:
    """Parse the options of ``gunn train`` into a nested dict of settings, recipe, file, and whether to resume."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="gunn train",
        description="Train a network. Every option may also stand in a YAML file, under the same name. Ctrl-C ends a "
        "run; --resume goes on after its last completed epoch.",
        exit_on_error=False,
        allow_abbrev=False,
        print_config=None,
    )
    parser.add_argument("--recipe", type=str, default=None, help="settings by name, see gunn recipes")
    parser.add_argument("--config", type=str, default=None, help="YAML file of settings; options override it")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output, or the default one")
    parser.add_class_arguments(Config, None)
    parser.set_defaults(flattened(defaults))
    try:
        chosen = parser.parse_args(list(arguments)).as_dict()
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        raise ConfigError(_explain(str(error))) from None
    return chosen, chosen.pop("recipe"), chosen.pop("config"), chosen.pop("resume")


def _with_underscores(argument: str) -> str:
    """``--batch-size=8`` to ``--batch_size=8``: both spellings are options."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return "--" + name.replace("-", "_") + equals + value


def _explain(message: str) -> str:
    """The parser's message in one line, with the nearest option where one is unknown."""
    text = " ".join(message.split())
    marker = "unrecognized arguments: "
    if text.lower().startswith(marker):
        first = text[len(marker) :].split()[0]
        if not first.startswith("-"):
            return f"unexpected argument {first!r}; settings are given as --name value. gunn train --help lists them."
        return unknown_key(first.lstrip("-").partition("=")[0])
    wrong = re.match(r'Parser key "(.+?)": Expected an? (.*)\. Got value: (.*)$', text)
    if wrong:
        name, kind, value = wrong.groups()
        kind = kind.replace("<class '", "").replace("'>", "")
        if value.lstrip("+-").lower() in ("nan", "inf", "infinity"):
            kind = f"finite {kind}"
        return f"{name}: expected {'an' if kind[0] in 'aeiou' else 'a'} {kind}, got {value}."
    return text
