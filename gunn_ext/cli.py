"""The command ``gunn``: a thin skin over the library."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gunn_ext.training.config import Config, load_config, unknown_key
from gunn_ext.training.distributed import launched_rank
from gunn_ext.training.errors import ConfigError, TrainingInterrupted
from gunn_ext.training.run_directory import RunDirectory

USAGE = """\
usage: gunn COMMAND [OPTIONS]

Gradually updated neural networks: train them, evaluate them, look at them.

commands:
  train             train a network; without options a small one on the embedded digits, in a minute or two
  eval RUN          evaluate the network of a run directory on its test images
  bench COMMAND     time layers and networks against their peers, or predict it
  models [PATTERN]  list the models with parameters, FLOPs and activation bytes
  info              versions, backends built, why one is missing

options:
  -h, --help        this text; after a command, its options
  --debug           show the traceback of an error (also: GUNN_DEBUG=1)
"""

_ERROR = 2
_OURS = "gunn_ext.training.errors"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        Exit status: 0, or 2 after an error, 130 after Ctrl-C, 143 after SIGTERM.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or os.environ.get("GUNN_DEBUG", "") not in ("", "0")
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else _ERROR
    try:
        status = _command(arguments[0])(arguments[1:])
        sys.stdout.flush()  # a closed pipe shows here, not at the end of the process
        return status
    except SystemExit as end:  # argparse: 0 after --help, 2 after a wrong option
        return end.code if isinstance(end.code, int) else _ERROR
    except TrainingInterrupted as interruption:
        print(f"{_name()}: {interruption}", file=sys.stderr)
        return 128 + interruption.signal_number
    except KeyboardInterrupt:
        print(f"{_name()}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # gunn models | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        if debug:
            traceback.print_exc()
        else:
            print(f"{_name()}: error: {_one_line(error)}", file=sys.stderr)
        return _ERROR


def _command(name: str) -> Callable[[list[str]], int]:
    commands = {"train": _train, "eval": _evaluate, "bench": _bench, "models": _models, "info": _info}
    if name not in commands:
        raise ConfigError(f"unknown command {name!r}; expected {', '.join(commands)}. gunn --help explains them.")
    return commands[name]


def _name() -> str:
    """Who speaks: of several processes that torchrun started, which."""
    rank = launched_rank()
    return f"gunn: rank {rank}" if rank else "gunn"


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if type(error).__module__ == _OURS or isinstance(error, ValueError):
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"


def _train(arguments: list[str]) -> int:
    config, resume = parse_train_arguments(arguments)
    from gunn_ext.training import make_reporter, train

    result = train(config, resume=resume, reporter=make_reporter())
    if launched_rank() > 0:
        return 0
    if result.test_accuracy is None or result.best_accuracy is None:
        print("no test images, hence no test accuracy")
    else:
        correct = round(result.test_accuracy * result.test_count)
        print(
            f"test accuracy {100 * result.test_accuracy:.2f} % ({correct} of {result.test_count}) after epoch "
            f"{result.epochs}; best {100 * result.best_accuracy:.2f} % after epoch {result.best_epoch + 1}"
        )
    print(
        f"trained in {result.train_seconds:.1f} s, {result.images_per_second:,.0f} images/s, backend {result.backend}"
    )
    print(f"run directory: {result.output} (config.yaml, metrics.jsonl, summary.json, last.pt, best.pt)")
    return 0


def parse_train_arguments(arguments: Sequence[str]) -> tuple[Config, bool]:
    """The configuration that ``gunn train`` was asked for, and whether to resume.

    Options beat the file of ``--config``, wherever it stands, and that beats the defaults. Resuming without
    ``--config``, the settings of the run itself stand in for the defaults.

    Raises:
        ConfigError: An option or key is unknown or its value wrong.
        SystemExit: After ``--help``.
    """
    arguments = [_with_underscores(argument) for argument in arguments]
    chosen = _parse(arguments, None)
    file, resume = chosen.pop("config"), chosen.pop("resume")
    base = None
    if file is not None:
        base = load_config(file)
    elif resume:
        base = RunDirectory(Config.from_dict(chosen).run_directory).load_config()
    if base is not None:
        output = chosen["output"]
        chosen = _parse(arguments, base.to_dict())
        del chosen["config"], chosen["resume"]
        if file is None:  # the directory the user named, wherever the run was made
            chosen["output"] = output or str(Config.from_dict(chosen).run_directory)
    return Config.from_dict(chosen), resume


def _parse(arguments: Sequence[str], defaults: Mapping[str, Any] | None) -> dict[str, Any]:
    """Parse the options of ``gunn train`` into a nested dict of settings, ``config`` and ``resume``."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="gunn train",
        description="Train a network. Every option may also stand in a YAML file, under the same name. Ctrl-C ends a "
        "run; --resume goes on after its last completed epoch.",
        exit_on_error=False,
        allow_abbrev=False,
        print_config=None,
    )
    parser.add_argument("--config", type=str, default=None, help="YAML file of settings; options override it")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output, or the default one")
    parser.add_class_arguments(Config, None)
    if defaults is not None:
        parser.set_defaults(_dotted(defaults))
    try:
        return parser.parse_args(list(arguments)).as_dict()
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        raise ConfigError(_explain(str(error))) from None


def _with_underscores(argument: str) -> str:
    """``--batch-size=8`` to ``--batch_size=8``: both spellings are options."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return "--" + name.replace("-", "_") + equals + value


def _dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


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


def _evaluate(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="gunn eval", description="Evaluate the network of a run directory on the test images of its data set."
    )
    parser.add_argument("run", metavar="RUN", help="run directory, as made by gunn train")
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last", help="which one (default: last)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    options = parser.parse_args(arguments)
    from gunn_ext.training import evaluate_run

    result = evaluate_run(options.run, options.checkpoint, options.device)
    if launched_rank() > 0:
        return 0
    if result.count == 0:
        print("no test images")
    else:
        print(
            f"test accuracy {100 * result.accuracy:.2f} % ({result.correct} of {result.count}), "
            f"loss {result.loss:.4f}, {options.run}/{options.checkpoint}.pt"
        )
    return 0


def _bench(arguments: list[str]) -> int:
    from gunn_ext.bench.command import main as bench

    return bench(arguments)


def _models(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="gunn models",
        description="List the models with what they cost for one image: FLOPs of a forward pass, bytes kept for the "
        "backward.",
    )
    parser.add_argument("pattern", metavar="PATTERN", nargs="?", help="wildcards as in a shell, such as 'gunn*'")
    options = parser.parse_args(arguments)
    from gunn_ext.analysis.cost import model_cost
    from gunn_ext.models import list_models

    names = list_models(options.pattern)
    if not names:
        raise ConfigError(f"no model matches {options.pattern!r}; gunn models lists all.")
    costs = [(name, model_cost(name)) for name in names]
    rows = [
        (
            name,
            "x".join(map(str, cost.input_size)),
            f"{cost.parameters:,}",
            f"{cost.flops / 1e9:.3f} G",
            f"{cost.activation_bytes / 2**20:.1f} MiB",
        )
        for name, cost in costs
    ]
    _print_table(("model", "input", "parameters", "FLOPs", "activations"), rows)
    return 0


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A rich table on a terminal, plain columns elsewhere; numbers stand to the right."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(*header)
        for column in table.columns[1:]:
            column.justify = "right"
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        return
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join([first.strip().ljust(widths[0]), *others]))


def _info(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="gunn info", description="Versions, backends built, why one is missing.")
    parser.add_argument("--json", action="store_true", help="as JSON")
    options = parser.parse_args(arguments)
    from gunn_ext._info import info

    facts = info()
    if options.json:
        print(json.dumps(facts, indent=2, default=str))
    else:
        for name, value in _dotted(facts).items():
            print(f"{name}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
