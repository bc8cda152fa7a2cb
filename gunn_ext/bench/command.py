"""The options of ``gunn bench`` and what its commands do."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from gunn_ext.analysis.performance import BYTES, H200, PASSES, LayerSizes
from gunn_ext.bench.cases import DEFAULT, LAYERS, Case, custom_case, divisors, named_case, reduced
from gunn_ext.bench.contest import DTYPES, Contest, Settings
from gunn_ext.bench.data import READY, measure_data
from gunn_ext.bench.environment import environment
from gunn_ext.bench.layers import measure_layers, sweep_segments
from gunn_ext.bench.memory import PAPER_GB, measure_memory
from gunn_ext.bench.models import DEFAULT as DEFAULT_MODELS
from gunn_ext.bench.models import measure_models
from gunn_ext.bench.networks import input_of
from gunn_ext.bench.others import OTHERS
from gunn_ext.bench.peers import peers_of
from gunn_ext.bench.plots import require_matplotlib, write_plots
from gunn_ext.bench.predict import HEADER, PARTS_HEADER, aligned, markdown, part_rows, prediction_rows
from gunn_ext.bench.profiles import profile_layers
from gunn_ext.bench.rows import read_json, write_json
from gunn_ext.bench.steps import FORMATS
from gunn_ext.bench.training import measure_step
from gunn_ext.bench.tune import update_table
from gunn_ext.choice import TABLE
from gunn_ext.commands.settings import parse_train_arguments
from gunn_ext.training.config import Config
from gunn_ext.training.data_config import FolderConfig
from gunn_ext.training.device import resolve_device

USAGE = """\
usage: gunn bench COMMAND [OPTIONS]

Measure layers and networks against their peers; everything is verified before it is timed.

commands:
  layer [NAME...]   named layers (default: those of GUNN-15), or one of any sizes
  sweep [NAME]      one layer over the number of segments, or over the batch size
  model [NAME...]   a training step or an evaluation of whole networks
  step              where the time of a training step goes: data, forward, backward, optimiser
  memory [NAME]     what a training step keeps and grows by on the CPU, each variant in a process of its own
  data [NAME...]    how fast training batches of data sets come
  predict [NAME...] what the performance model says, without measuring anything
  tune FILE         from measured rows, the table of which CUDA driver serves a layer

gunn bench COMMAND --help lists the options.
"""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are the command's: one line, with where to look."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{self.prog}: {message}. {self.prog} --help lists the options.")


def main(arguments: Sequence[str]) -> int:
    """Run ``gunn bench`` with these arguments; returns the exit status.

    Raises:
        ValueError: An argument is unknown or wrong; nothing was timed.
        WrongResult: A peer computes something else than the reference; it was not timed.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    commands = {
        "layer": _layer,
        "sweep": _sweep,
        "model": _model,
        "step": _step,
        "memory": _memory,
        "data": _data,
        "predict": _predict,
        "tune": _tune,
    }
    if arguments[0] not in commands:
        raise ValueError(f"unknown command {arguments[0]!r} of gunn bench; expected {', '.join(commands)}.")
    return commands[arguments[0]](list(arguments[1:]))


# --- Options --------------------------------------------------------------------------------------------------------


def _listed(name: str, allowed: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        values = tuple(part.strip() for part in text.split(",") if part.strip())
        for value in values:
            if value not in allowed:
                raise argparse.ArgumentTypeError(f"unknown {name} {value!r}; expected {', '.join(allowed)}")
        return values

    return parse


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers with commas between them, got {text!r}") from None


def _add_measuring(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--batch", type=int, help="images (default: 16 on the CPU, 64 on a GPU; --reduced: 2)")
    parser.add_argument(
        "--dtype",
        type=_listed("dtype", DTYPES),
        help="one or more, with commas (default: float32; cuda: bfloat16,float32)",
    )
    parser.add_argument(
        "--pass",
        dest="passes",
        type=_listed("pass", PASSES),
        default=PASSES,
        help="training, evaluation (default: both)",
    )
    parser.add_argument(
        "--peers",
        type=lambda text: tuple(text.split(";")),
        default=(),
        help="wildcards, with ; between them: 'ours*;sunn'",
    )
    parser.add_argument(
        "--format", type=_listed("format", tuple(FORMATS)), default=tuple(FORMATS), help="nhwc, nchw (default: both)"
    )
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of the CPU (default: all of torch)"
    )
    parser.add_argument("--repeats", type=int, default=None, help="timed rounds (default: 9; cuda: 30; --reduced: 2)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing new after this time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="rows, written as they come")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="the same as a table")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="pictures (needs matplotlib)")
    parser.add_argument("--reduced", action="store_true", help="tiny shapes: a rehearsal, no figures")


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--channels", type=int, help="N of a layer of your own")
    parser.add_argument("--segments", type=int, help="P of it")
    parser.add_argument("--size", type=int, default=32, help="height and width of it (default: 32)")
    parser.add_argument("--expansion", type=int, default=2, help="K of it (default: 2)")
    parser.add_argument("--units", type=int, default=1, help="M of it (default: 1)")
    parser.add_argument("--shortcut", action="store_true", help="with a projection shortcut")


def _cases(options: argparse.Namespace, default: Sequence[str]) -> list[Case]:
    """The layers asked for: by name, or one by its sizes."""
    names = list(getattr(options, "names", []))
    if options.channels is None and options.segments is None:
        return [named_case(name) for name in names or default]
    if names:
        raise ValueError("--channels and --segments describe a layer of your own; leave the names out, or them.")
    if options.channels is None or options.segments is None:
        raise ValueError(
            "a layer of your own needs both --channels and --segments, such as --channels 240 --segments 20."
        )
    sizes = (options.channels, options.segments, options.size, options.expansion, options.units, options.shortcut)
    return [custom_case(LayerSizes(*sizes))]


def _contest(options: argparse.Namespace) -> Contest:
    """The contest that the options of `_add_measuring` ask for; wrong ones fail here, before anything is timed."""
    if options.plot:
        require_matplotlib()
    cuda = options.device == "cuda"
    batch = options.batch if options.batch is not None else 2 if options.reduced else 64 if cuda else 16
    repeats = options.repeats if options.repeats is not None else 2 if options.reduced else 30 if cuda else 9
    settings = Settings(
        device=options.device,
        batch=batch,
        dtypes=options.dtype or (("bfloat16", "float32") if cuda else ("float32",)),
        passes=options.passes,
        peers=options.peers,
        formats=options.format,
        threads=options.threads,
        repeats=repeats,
        minutes=options.minutes,
        reduced=options.reduced,
    )
    settings.check()
    peers_of(settings.device, settings.peers)
    return Contest(settings, options.json, options.csv)


def _finish(contest: Contest, options: argparse.Namespace) -> int:
    if options.plot:
        for path in write_plots(options.plot, contest.environment, contest.rows):
            print(path)
    contest.finish()
    return 0


# --- Commands -------------------------------------------------------------------------------------------------------


def _layer(arguments: list[str]) -> int:
    parser = _Parser(
        prog="gunn bench layer", description=f"Time layers: {', '.join(LAYERS)}, or one of your own sizes."
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help=f"(default: {' '.join(DEFAULT)})")
    _add_sizes(parser)
    _add_measuring(parser)
    parser.add_argument("--profile", type=Path, metavar="FILE", help="where ours spends its time, by kernel or stage")
    options = parser.parse_args(arguments)
    cases = _cases(options, DEFAULT)
    if options.reduced:
        cases = [reduced(case) for case in cases]
    contest = _contest(options)
    if options.profile:
        text = profile_layers(cases, contest.settings)
        options.profile.parent.mkdir(parents=True, exist_ok=True)
        options.profile.write_text(text)
    measure_layers(contest, cases)
    return _finish(contest, options)


def _sweep(arguments: list[str]) -> int:
    parser = _Parser(prog="gunn bench sweep", description="Time one layer over its segments or over the batch size.")
    parser.add_argument("names", metavar="NAME", nargs="*", help=f"(default: {DEFAULT[0]})")
    parser.add_argument("--over", choices=("segments", "batch"), default="segments", help="(default: segments)")
    parser.add_argument(
        "--values", type=_numbers, help="with commas (default: every divisor of N; powers of two up to --batch)"
    )
    _add_sizes(parser)
    _add_measuring(parser)
    options = parser.parse_args(arguments)
    case, *others = _cases(options, DEFAULT[:1])
    if others:
        raise ValueError(f"gunn bench sweep takes one layer, got {', '.join(options.names)}.")
    if options.over == "segments":
        sizes = reduced(case).sizes if options.reduced else case.sizes
        cases = sweep_segments(sizes, options.values or divisors(sizes.channels))
        contest = _contest(options)
        measure_layers(contest, cases)
    else:
        contest = _contest(options)
        case = reduced(case) if options.reduced else case
        top = contest.settings.batch
        values = options.values or [2**i for i in range(top.bit_length())]
        if min(values) < 1:
            raise ValueError(f"--values: batch sizes must be at least 1, got {min(values)}.")
        for value in values:
            measure_layers(contest, [case], batch=value)
    return _finish(contest, options)


def _model(arguments: list[str]) -> int:
    parser = _Parser(
        prog="gunn bench model", description=f"Time whole networks: those of gunn models, and {', '.join(OTHERS)}."
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help=f"(default: {' '.join(DEFAULT_MODELS)})")
    parser.add_argument("--size", type=int, help="height and width of the images (default: the network's own)")
    _add_measuring(parser)
    options = parser.parse_args(arguments)
    names = options.names or DEFAULT_MODELS
    for name in names:
        input_of(name)
    if options.size is not None and options.size < 1:
        raise ValueError(f"--size must be at least 1, got {options.size}.")
    contest = _contest(options)
    measure_models(contest, names, options.size)
    return _finish(contest, options)


def _step(arguments: list[str]) -> int:
    parser = _Parser(
        prog="gunn bench step",
        usage="gunn bench step [--repeats N] [--json FILE] [OPTIONS OF gunn train]",
        description="Time data, forward, backward and optimiser of a training step, set up as gunn train sets it up.",
        allow_abbrev=False,
    )
    parser.add_argument("--repeats", type=int, default=9, help="steps that count (default: 9)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")
    options, others = parser.parse_known_args(arguments)
    if options.repeats < 2:
        raise ValueError(f"--repeats must be at least 2, got {options.repeats}.")
    config, _ = parse_train_arguments(others)
    if config.cuda_graph:
        raise ValueError("gunn bench step times forward and backward apart, a CUDA graph joins them: cuda_graph=false.")
    rows = measure_step(config, options.repeats)
    print(f"{config.model} on {config.data}, batch {rows[0]['batch']}, {config.precision}")
    for row in rows:
        share = f"{100 * row['share_of_step']:5.1f} %"
        print(f"  {row['peer']:10} {row['ms']:9.3f} ms [{row['ms_20']:.3f} {row['ms_80']:.3f}] {share}")
    if options.json:
        write_json(options.json, environment(resolve_device(config.device).type), rows)
    return 0


def _memory(arguments: list[str]) -> int:
    parser = _Parser(prog="gunn bench memory", description="Memory of one training step on the CPU, by variant.")
    parser.add_argument("name", metavar="NAME", nargs="?", default="gunn15", help="(default: gunn15)")
    parser.add_argument("--batch", type=int, default=64, help="images (default: 64)")
    parser.add_argument("--size", type=int, help="height and width of the images (default: the network's own)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")
    options = parser.parse_args(arguments)
    if options.batch < 1:
        raise ValueError(f"--batch must be at least 1, got {options.batch}.")
    if options.name in OTHERS:
        raise ValueError(f"gunn bench memory compares the variants of a GUNN; {options.name} has none.")
    size = options.size or input_of(options.name)[1]
    print(f"{options.name}, 3x{size}x{size}, batch {options.batch}, float32; the paper: GUNN-15 in {PAPER_GB} GB at 64")
    rows = measure_memory(options.name, options.batch, size)
    for row in rows:
        figures = row.get("error") or (
            f"saved {row['saved_bytes'] / 1e9:6.3f} GB  resident {row['resident_bytes'] / 1e9:6.3f} GB"
        )
        print(f"  {row['peer']:24} {figures}")
    if options.json:
        write_json(options.json, environment("cpu"), rows)
    return 0


def _data(arguments: list[str]) -> int:
    parser = _Parser(
        prog="gunn bench data", description="Images a second of training batches, augmented, with no network behind."
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help=f"of data sets (default: {' '.join(READY)})")
    parser.add_argument("--data-path", help="file or folder of a data set that is read from disk")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--batch", type=int, default=64, help="images (default: 64)")
    parser.add_argument("--workers", type=int, default=FolderConfig.workers, help="that decode files (default: 4)")
    parser.add_argument("--batches", type=int, default=50, help="of a pass, at most (default: 50)")
    parser.add_argument("--repeats", type=int, default=5, help="passes (default: 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")
    options = parser.parse_args(arguments)
    for name, least in (("batches", 2), ("repeats", 1)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name} must be at least {least}, got {getattr(options, name)}.")
    configs = [
        Config(
            data=name,
            data_path=options.data_path,
            device=options.device,
            batch_size=options.batch,
            folder=FolderConfig(workers=options.workers),
        )
        for name in options.names or READY
    ]
    rows = []
    for config in configs:
        row = measure_data(config, options.batches, options.repeats)
        rows.append(row)
        print(
            f"{row['data']:10} {row['shape']:>9} batch {row['batch']}  {row['images_per_second']:10,.0f} images/s "
            f"[{row['images_per_second_least']:,.0f} {row['images_per_second_most']:,.0f}]  first batch "
            f"{row['first_ms']:.1f} ms  loaded in {row['load_seconds']:.1f} s"
        )
    if options.json:
        write_json(options.json, environment(options.device), rows)
    return 0


def _predict(arguments: list[str]) -> int:
    parser = _Parser(prog="gunn bench predict", description="Predicted microseconds on an H200; nothing is measured.")
    parser.add_argument("names", metavar="NAME", nargs="*", help="(default: all named layers)")
    parser.add_argument("--batch", type=int, default=64, help="images (default: 64)")
    parser.add_argument("--dtype", default="bfloat16", choices=[d for d in BYTES if d in H200.peak_flops])
    parser.add_argument("--parts", action="store_true", help="what the times are made of")
    parser.add_argument("--markdown", action="store_true", help="as a Markdown table")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the table's cells by column")
    _add_sizes(parser)
    options = parser.parse_args(arguments)
    if options.batch < 1:
        raise ValueError(f"--batch must be at least 1, got {options.batch}.")
    layers = {case.name: case.sizes for case in _cases(options, tuple(LAYERS))}
    make, header = (part_rows, PARTS_HEADER) if options.parts else (prediction_rows, HEADER)
    rows = make(layers, options.batch, options.dtype, H200)
    print(f"Predictions for {H200.name}, {options.dtype}, in µs; none of this is measured.")
    print((markdown if options.markdown else aligned)(header, rows))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"predicted": True, "header": header, "rows": rows}, indent=1) + "\n")
    return 0


def _tune(arguments: list[str]) -> int:
    parser = _Parser(
        prog="gunn bench tune",
        description="Which CUDA driver serves a layer, from rows measured on a GPU. Times nothing.",
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="rows of gunn bench layer --device cuda --json FILE")
    parser.add_argument("--table", type=Path, default=TABLE, help="the table to update (default: the package's own)")
    options = parser.parse_args(arguments)
    if not options.file.is_file():
        raise ValueError(f"{options.file}: no such file; expected rows that `gunn bench layer --json` has written.")
    facts, rows = read_json(options.file)
    for row in update_table(options.table, facts["device"], rows):
        times = ", ".join(
            f"{name} {row[f'{name}_ms']:.3f} ms" for name in ("staged", "persistent") if f"{name}_ms" in row
        )
        print(
            f"{row['layer']:16} batch {row['batch']:4} {row['dtype']:9} {row['pass']:10} {row['driver']:10} ({times})"
        )
    print(options.table)
    return 0
