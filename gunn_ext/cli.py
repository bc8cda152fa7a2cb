"""The command ``gunn``: a thin skin over the library."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence

from gunn_ext.commands.table import print_table
from gunn_ext.training.config import flattened
from gunn_ext.training.distributed import launched_rank
from gunn_ext.training.errors import ConfigError, TrainingInterrupted

USAGE = """\
usage: gunn COMMAND [OPTIONS]

Gradually updated neural networks: train them, evaluate them, look at them.

commands:
  train             train a network; without options a small one on the embedded digits, in a minute or two
  eval RUN          evaluate the network of a run directory, or an ensemble of its snapshots, on its test images
  predict RUN FILE  classify images; prints JSON
  recipes           list the experiments that gunn train --recipe knows, with the paper's figures
  reproduce TABLE   run every line of a table of the paper and compare
  sweep             train over seeds and values of settings; mean and deviation
  curves RUN...     plot training curves, mean over seeds
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
        with _rank_0_speaks():
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
    commands = {
        "train": _from("runs", "train"),
        "eval": _from("runs", "evaluate"),
        "predict": _from("runs", "predict"),
        "recipes": _from("experiments", "recipes"),
        "reproduce": _from("experiments", "reproduce"),
        "sweep": _from("experiments", "sweep"),
        "curves": _from("experiments", "curves"),
        "bench": _bench,
        "models": _models,
        "info": _info,
    }
    if name not in commands:
        raise ConfigError(f"unknown command {name!r}; expected {', '.join(commands)}. gunn --help explains them.")
    return commands[name]


def _from(module: str, name: str) -> Callable[[list[str]], int]:
    """A command that is imported when it is called."""
    return lambda arguments: getattr(importlib.import_module(f"gunn_ext.commands.{module}"), name)(arguments)


@contextlib.contextmanager
def _rank_0_speaks() -> Iterator[None]:
    """Of several processes that torchrun started, silence all but the first; errors are told by each."""
    if launched_rank() == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def _name() -> str:
    """Who speaks: of several processes that torchrun started, which."""
    rank = launched_rank()
    return f"gunn: rank {rank}" if rank else "gunn"


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if type(error).__module__ == _OURS or isinstance(error, ValueError):
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"


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
    print_table(("model", "input", "parameters", "FLOPs", "activations"), rows)
    return 0


def _info(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="gunn info", description="Versions, backends built, why one is missing.")
    parser.add_argument("--json", action="store_true", help="as JSON")
    options = parser.parse_args(arguments)
    from gunn_ext._info import info

    facts = info()
    if options.json:
        print(json.dumps(facts, indent=2, default=str))
    else:
        for name, value in flattened(facts).items():
            print(f"{name}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
