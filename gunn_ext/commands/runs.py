"""``gunn train``, ``eval`` and ``predict``: one run."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from gunn_ext.commands.settings import parse_train_arguments
from gunn_ext.training.distributed import launched_rank
from gunn_ext.training.progress import make_reporter
from gunn_ext.training.runs import evaluate_run
from gunn_ext.training.trainer import train as train_network


def train(arguments: list[str]) -> int:
    """Train a network."""
    config, resume = parse_train_arguments(arguments)
    result = train_network(config, resume=resume, reporter=make_reporter())
    print(result.describe())
    print(
        f"trained in {result.train_seconds:.1f} s, {result.images_per_second:,.0f} images/s, backend {result.backend}"
    )
    print(f"run directory: {result.output} (config.yaml, metrics.jsonl, summary.json, last.pt, best.pt)")
    return 0


def evaluate(arguments: list[str]) -> int:
    """Evaluate a run."""
    parser = argparse.ArgumentParser(
        prog="gunn eval", description="Evaluate the network of a run directory on the test images of its data set."
    )
    _add_run(parser)
    parser.add_argument("--ten-crop", action="store_true", help="average ten views of each image (data from files)")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    options = parser.parse_args(arguments)
    result = evaluate_run(
        options.run, options.checkpoint, options.device, ensemble=options.ensemble, ten_crop=options.ten_crop
    )
    if options.json:
        print(json.dumps(asdict(result) | {"accuracy": result.accuracy, "accuracy5": result.accuracy5}, indent=2))
    elif result.count == 0:
        print("no test images")
    else:
        print(
            f"test accuracy {100 * result.accuracy:.2f} % ({result.correct} of {result.count}), "
            f"top-5 {100 * result.accuracy5:.2f} %, loss {result.loss:.4f}, {_which(options)}"
        )
    return 0


def predict(arguments: list[str]) -> int:
    """Classify images."""
    parser = argparse.ArgumentParser(
        prog="gunn predict", description="Classify images with the network of a run directory; prints JSON."
    )
    _add_run(parser)
    parser.add_argument("images", metavar="IMAGE", nargs="+", type=Path, help="image or .npy files, or folders of them")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON to a file")
    options = parser.parse_args(arguments)
    if launched_rank() > 0:
        return 0  # of several processes one predicts and writes
    from gunn_ext.training.prediction import predict_images

    found = predict_images(options.run, options.images, options.checkpoint, options.device, ensemble=options.ensemble)
    text = json.dumps(found, indent=2) + "\n"
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)
    return 0


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run directory, as made by gunn train")
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last", help="which one (default: last)")
    parser.add_argument(
        "--ensemble",
        metavar="M",
        type=int,
        nargs="?",
        const=0,
        help="average the softmax of the last M snapshots (default: all) of a run with schedule.name=snapshot",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")


def _which(options: argparse.Namespace) -> str:
    if options.ensemble is None:
        return f"{options.run}/{options.checkpoint}.pt"
    from gunn_ext.training.run_directory import RunDirectory

    names = [file.name for file in RunDirectory(options.run).snapshot_files()[-options.ensemble :]]
    return f"{options.run}, ensemble of {', '.join(names)}"
