"""``gunn bench step``: where the time of a training step goes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from gunn_ext.bench.rows import Row
from gunn_ext.bench.timing import clock_for, summary
from gunn_ext.data import Augmentation, Dataset, batches
from gunn_ext.models import create_model
from gunn_ext.training.config import Config
from gunn_ext.training.datasets import load_data
from gunn_ext.training.device import resolve_device
from gunn_ext.training.step import TrainingStep

PHASES = ("data", "forward", "backward", "optimizer")
_WARM_UP = 2


class SplitStep:
    """A training step of a run in its phases, each to be called in turn.

    Args:
        config: Of the run; accumulate is not looked at, the batch is computed as a whole.
    """

    def __init__(self, config: Config) -> None:
        """Build data, network and step as a run does."""
        config = config.resolved()
        self.config, self.device = config, resolve_device(config.device)
        self.data: Dataset = load_data(config, self.device)
        torch.manual_seed(config.seed)
        model = create_model(config.model, self.data.classes, self.data.image_shape[0]).to(self.device)
        if config.channels_last:
            torch.nn.utils.convert_conv2d_weight_memory_format(model, torch.channels_last)
        network = torch.compile(model) if config.compile else model
        self.step = TrainingStep(model, config, self.device, network)
        self._batches = self._endless()

    def _endless(self) -> Iterator[tuple[Tensor, Tensor]]:
        augment, generator = self.config.augment, torch.Generator(self.device).manual_seed(0)
        augmentation = Augmentation(bool(augment.mirror), augment.crop_padding or 0, augment.cyclic_shift)
        while True:
            order = batches(len(self.data.train), self.config.batch_size, generator)
            yield from self.data.training_batches(order, augmentation, generator)

    def phases(self) -> dict[str, Any]:
        """What each of `PHASES` does; in order they make a step."""
        return {"data": self._load, "forward": self._forward, "backward": self._backward, "optimizer": self._update}

    def _load(self) -> None:
        self.inputs, self.labels = next(self._batches)

    def _forward(self) -> None:
        self.loss, _ = self.step.forward(self.inputs, self.labels)

    def _backward(self) -> None:
        self.step.optimizer.zero_grad(set_to_none=True)
        self.step.backward(self.loss)

    def _update(self) -> None:
        self.step.update(0.0)  # the work of a step, and the same weights in every one


def measure_step(config: Config, repeats: int) -> list[Row]:
    """Time the phases of a training step, in turns.

    Args:
        config: Of the run.
        repeats: Steps that count.

    Returns:
        A row for each of `PHASES`, and one for ``step``, the sum of each step's phases.
    """
    split = SplitStep(config)
    clock = clock_for(split.device.type)
    times: dict[str, list[float]] = {name: [] for name in (*PHASES, "step")}
    for turn in range(_WARM_UP + repeats):
        found = {name: clock(work) for name, work in split.phases().items()}
        found["step"] = sum(found.values())
        if turn >= _WARM_UP:
            for name, milliseconds in found.items():
                times[name].append(milliseconds)
    whole = asdict(split.config)
    facts = {name: whole[name] for name in ("model", "data", "precision", "channels_last", "compile", "ema")}
    return [
        {
            "layer": config.model,
            "batch": len(split.labels),
            "dtype": config.precision,
            "pass": "training",
            "peer": name,
            "threads": torch.get_num_threads(),
            **summary(times[name]),
            "share_of_step": sum(times[name]) / sum(times["step"]),
            **facts,
        }
        for name in times
    ]
