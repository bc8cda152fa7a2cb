"""How fast training batches come: images a second of a data set, as a run would draw them, with no network behind."""

from __future__ import annotations

import itertools
import statistics
import time

import torch

from gunn_ext.bench.rows import Row
from gunn_ext.data import Augmentation, Dataset, batches
from gunn_ext.training.config import Config
from gunn_ext.training.datasets import load_data
from gunn_ext.training.device import resolve_device

READY = ("digits", "shapes", "fake")  # what needs no files


def measure_data(config: Config, count: int, repeats: int) -> Row:
    """Load a data set and draw some training batches of it, several times.

    Args:
        config: Says which, with what augmentation, in what batches, on what device.
        count: Batches of a pass at most; at least two, for the first one's time, which includes starting workers, is
            kept apart.
        repeats: Passes.

    Raises:
        ConfigError: The device is not there.
        ValueError: The data set is damaged, or has fewer than two batches.
    """
    config, device = config.resolved(), resolve_device(config.device)
    started = time.perf_counter()
    data = load_data(config, device)
    _wait(device)
    loaded = time.perf_counter() - started
    if len(data.train) < 2 * config.batch_size:
        raise ValueError(
            f"{config.data}: {len(data.train)} training images make fewer than two batches of {config.batch_size}; "
            "lower --batch."
        )
    augmentation = Augmentation(
        bool(config.augment.mirror), config.augment.crop_padding or 0, config.augment.cyclic_shift
    )
    firsts, rates = [], []
    for seed in range(repeats):
        first, rate = _pass(data, config.batch_size, augmentation, count, seed, device)
        firsts.append(first)
        rates.append(rate)
    return {
        "data": config.data,
        "images": len(data.train),
        "shape": "x".join(map(str, data.image_shape)),
        "batch": config.batch_size,
        "threads": torch.get_num_threads(),
        "workers": getattr(data, "workers", None),
        "load_seconds": loaded,
        "first_ms": 1000 * statistics.median(firsts),
        "images_per_second": statistics.median(rates),
        "images_per_second_least": min(rates),
        "images_per_second_most": max(rates),
        "batches": min(count, len(data.train) // config.batch_size),
        "repeats": repeats,
    }


def _pass(
    data: Dataset, batch_size: int, augmentation: Augmentation, count: int, seed: int, device: torch.device
) -> tuple[float, float]:
    """Seconds to the first batch, and images a second from there on."""
    generator = torch.Generator(device).manual_seed(seed)
    order = itertools.islice(batches(len(data.train), batch_size, generator), count)
    started = time.perf_counter()
    drawn = iter(data.training_batches(order, augmentation, generator))
    next(drawn)
    _wait(device)
    first = time.perf_counter()
    images = sum(len(labels) for _, labels in drawn)
    _wait(device)
    return first - started, images / (time.perf_counter() - first)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
