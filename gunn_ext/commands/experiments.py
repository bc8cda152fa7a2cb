"""``gunn recipes``, ``reproduce``, ``sweep`` and ``curves``: many runs."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gunn_ext.bench.plots import require_matplotlib
from gunn_ext.commands.settings import parse_train_arguments
from gunn_ext.commands.table import print_table
from gunn_ext.training.config import Config
from gunn_ext.training.curves import find_runs, plot_curves, read_curves
from gunn_ext.training.distributed import launched_rank
from gunn_ext.training.errors import ConfigError
from gunn_ext.training.progress import make_reporter
from gunn_ext.training.recipes import list_recipes, load_recipe
from gunn_ext.training.result import versions
from gunn_ext.training.trials import Trial, run_trial, spread


def recipes(arguments: list[str]) -> int:
    """List the recipes."""
    parser = argparse.ArgumentParser(
        prog="gunn recipes", description="List the recipes of gunn train --recipe, with the paper's test errors in %%."
    )
    parser.add_argument("table", metavar="TABLE", nargs="?", help="table3, table4, table5 or figure3 only")
    options = parser.parse_args(arguments)
    rows = []
    for recipe in map(load_recipe, list_recipes(options.table)):
        top5 = "" if recipe.error5 is None else f"{recipe.error5:.2f}"
        settings = recipe.settings
        rows.append(
            (recipe.name, settings["model"], settings["data"], f"{recipe.error:.2f}", top5, ", ".join(recipe.shown_in))
        )
    print_table(("recipe", "model", "data", "error", "top-5", "shown in"), rows)
    return 0


def reproduce(arguments: list[str]) -> int:
    """Run the lines of a table and compare."""
    parser = argparse.ArgumentParser(
        prog="gunn reproduce",
        usage="gunn reproduce TABLE [--seeds SEEDS] [--output FOLDER] [OPTIONS OF gunn train]",
        description="Run every line of a table or figure of the paper and print the measured test error beside the "
        "published one. Finished runs are not done again, begun ones go on. Other options are those of gunn train and "
        "hold for every line.",
        allow_abbrev=False,
    )
    parser.add_argument("table", metavar="TABLE", help="table3, table4, table5 or figure3")
    parser.add_argument("--seeds", type=_seeds, default=[0], help="such as 0:5 or 1,3 (default: 0)")
    parser.add_argument("--output", metavar="FOLDER", help="of the runs (default: runs)")
    options, others = parser.parse_known_args(arguments)
    folder = Path(options.output or "runs")
    lines = [load_recipe(name) for name in list_recipes(options.table)]
    if options.table.startswith("figure"):
        require_matplotlib("train its recipes one by one, gunn recipes lists them")
    _refuse(others, "seed", "recipe", "resume")
    configs = [
        [
            _config([f"--recipe={recipe.name}", *others], seed, folder / f"{recipe.name}-seed{seed}")
            for seed in options.seeds
        ]
        for recipe in lines
    ]
    rows: list[dict[str, Any]] = []
    for recipe, seeds in zip(lines, configs, strict=True):
        trials = [run_trial(config, make_reporter(), ensemble=recipe.ensemble) for config in seeds]
        rows.append(
            {"recipe": recipe.name, "source": recipe.source, "published": recipe.error, "published5": recipe.error5}
            | _summary(trials)
        )
    _write_json(folder / f"{options.table}.json", rows)
    print_table(
        ("recipe", "runs", "published", "measured", "published top-5", "measured top-5"),
        [
            [
                str(row["recipe"]),
                str(row["finished"]),
                f"{row['published']:.2f}",
                _with_spread(row, "error"),
                "" if row["published5"] is None else f"{row['published5']:.2f}",
                "" if row["published5"] is None else _with_spread(row, "error5"),
            ]
            for row in rows
        ],
    )
    _report_failures(rows)
    print(f"test errors in %, after the last epoch; {folder / options.table}.json")
    if options.table.startswith("figure"):
        outputs = [Path(trial["output"]) for row in rows for trial in row["trials"] if trial["failure"] is None]
        plot_curves(read_curves(outputs), folder / f"{options.table}.png")
        print(folder / f"{options.table}.png")
    return 0


def sweep(arguments: list[str]) -> int:
    """Train over seeds and values."""
    parser = argparse.ArgumentParser(
        prog="gunn sweep",
        usage="gunn sweep [--seeds SEEDS] [--output FOLDER] [OPTIONS OF gunn train, with values between commas]",
        description="Train every combination of the values given, each over all seeds, and print mean and standard "
        "deviation of the test error. Finished runs are not done again, begun ones go on.",
        epilog="Example: gunn sweep --seeds 0:5 --lr 0.05,0.1 --model gunn_tiny,gunn15",
        allow_abbrev=False,
    )
    parser.add_argument("--seeds", type=_seeds, default=[0, 1, 2], help="such as 0:5 or 1,3 (default: 0:3)")
    parser.add_argument("--output", metavar="FOLDER", help="of the runs (default: sweeps/<model>-<data>)")
    options, others = parser.parse_known_args(arguments)
    _refuse(others, "seed", "resume")
    settings = _values(others)
    swept = [name for name, values in settings if len(values) > 1]
    combinations = [
        dict(zip([name for name, _ in settings], values, strict=True))
        for values in itertools.product(*(values for _, values in settings))
    ]
    folder = Path(options.output) if options.output else _default_folder(combinations)
    configs = []  # all of them first: a wrong value shows before anything runs
    for chosen in combinations:
        label = re.sub(r"[^\w.=,+-]", "_", ",".join(f"{name}={chosen[name]}" for name in swept))
        given = [f"--{name}={value}" for name, value in chosen.items()]
        names = [f"{label}-seed{seed}" if label else f"seed{seed}" for seed in options.seeds]
        configs.append([_config(given, s, folder / name) for s, name in zip(options.seeds, names, strict=True)])
    rows = []
    for chosen, seeds in zip(combinations, configs, strict=True):
        trials = [run_trial(config, make_reporter()) for config in seeds]
        rows.append({"settings": {name: chosen[name] for name in swept}} | _summary(trials))
    _write_json(folder / "sweep.json", rows)
    print_table(
        (*swept, "runs", "test error"),
        [[*map(str, row["settings"].values()), str(row["finished"]), _with_spread(row, "error")] for row in rows],
    )
    _report_failures(rows)
    print(f"test errors in %, after the last epoch, mean ± standard deviation; {folder}/sweep.json")
    return 0


def curves(arguments: list[str]) -> int:
    """Plot training curves."""
    parser = argparse.ArgumentParser(
        prog="gunn curves",
        description="Plot test and training errors by epoch. Runs that differ only in their seed make one curve.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run directories, or folders of them")
    parser.add_argument("--output", type=Path, default=Path("curves.png"), help="PNG, SVG or PDF (default: curves.png)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the curves as numbers")
    options = parser.parse_args(arguments)
    require_matplotlib("take metrics.jsonl of the runs")
    found = read_curves(find_runs(options.runs))
    plot_curves(found, options.output)
    if options.json:
        _write_json(options.json, [asdict(curve) for curve in found])
    print(options.output)
    return 0


def _config(given: Sequence[str], seed: int, output: Path) -> Config:
    config, _ = parse_train_arguments([*given, f"--seed={seed}", f"--output={output}"])
    return config


def _seeds(text: str) -> list[int]:
    """``0:5`` to 0 … 4, ``1,3`` to 1 and 3."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match:
        seeds = list(range(int(match[1]), int(match[2])))
    else:
        seeds = [int(part) for part in text.split(",")] if re.fullmatch(r"\d+(,\d+)*", text) else []
    if not seeds or len(set(seeds)) != len(seeds):
        raise argparse.ArgumentTypeError(f"expected seeds such as 0:5 or 1,3, each once, got {text!r}")
    return seeds


def _refuse(arguments: Iterable[str], *names: str) -> None:
    for argument in arguments:
        name = argument.partition("=")[0]
        if name in [f"--{refused}" for refused in names]:
            raise ConfigError(f"{name} is not for this command, which sets it itself; seeds are given as --seeds.")


def _values(arguments: Sequence[str]) -> list[tuple[str, list[str]]]:
    """``--name value,value`` or ``--name=value,value`` to names and values; commas within brackets separate nothing."""
    found: dict[str, list[str]] = {}
    rest = list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--"):
            raise ConfigError(f"unexpected argument {name!r}; settings are given as --name value,value.")
        if not equals:
            if not rest:
                raise ConfigError(f"{name}: expected a value or several, with commas between them.")
            value = rest.pop(0)
        name = name[2:].replace("-", "_")
        if name in found:
            raise ConfigError(f"--{name} is given twice; put all its values behind one, with commas between them.")
        found[name] = [part.strip() for part in re.split(r",(?![^\[{(]*[\]})])", value)]
        if len(set(found[name])) != len(found[name]):
            raise ConfigError(f"--{name}: each value once, got {value}.")
    return list(found.items())


def _default_folder(combinations: Sequence[dict[str, str]]) -> Path:
    names = ("model", "data")
    parts = ["+".join(dict.fromkeys(c.get(name, getattr(Config, name)) for c in combinations)) for name in names]
    return Path("sweeps") / "-".join(parts)


def _summary(trials: Sequence[Trial]) -> dict[str, Any]:
    error, error5 = spread([trial.error for trial in trials]), spread([trial.error5 for trial in trials])
    return {
        "finished": sum(trial.failure is None for trial in trials),
        "error": error[0],
        "error_std": error[1],
        "error5": error5[0],
        "error5_std": error5[1],
        "trials": [asdict(trial) for trial in trials],
    }


def _with_spread(row: dict[str, Any], name: str) -> str:
    mean, deviation = row[name], row[f"{name}_std"]
    if math.isnan(mean):
        return "-"
    return f"{mean:.2f}" if math.isnan(deviation) else f"{mean:.2f} ± {deviation:.2f}"


def _report_failures(rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        for trial in row["trials"]:
            if trial["failure"]:
                print(f"diverged: {trial['output']}: {trial['failure']}")


def _write_json(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rows with versions; NaN, which is no JSON, as null. Of several processes the first writes."""
    if launched_rank() > 0:
        return

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        if isinstance(value, list):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"versions": versions(), "rows": plain(list(rows))}, indent=1) + "\n", encoding="utf-8")
