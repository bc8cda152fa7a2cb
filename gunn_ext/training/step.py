"""One training step: the gradients of a batch, in parts where asked for, and what the optimiser does with them.

Nothing in it waits for the device (but rmsprop in float16, see `make_optimizer`): loss and counts stay there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from gunn_ext.graph import Replay
from gunn_ext.training.average import WeightAverage
from gunn_ext.training.config import Config
from gunn_ext.training.distributed import without_exchange
from gunn_ext.training.optimization import make_optimizer
from gunn_ext.training.precision import autocast, loss_scaler, widened


class TrainingStep:
    """What a run does with a batch, and all state of it but the weights.

    Args:
        model: Holds the weights that are trained.
        config: Settings.
        device: Of the model.
        network: Called in place of ``model``, whose weights it shares, such as a compiled one.

    Attributes:
        optimizer: As configured.
        scaler: Of float16 gradients, else None.
        average: Moving average of the weights, where configured, else None.
        taken: Optimiser steps that were not skipped, a scalar on the device.
    """

    def __init__(
        self, model: nn.Module, config: Config, device: torch.device, network: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """Build optimiser, scaler and average."""
        self.model, self.network, self.config, self.device = model, network or model, config, device
        self.dtype = getattr(torch, config.precision)
        self.scaler = loss_scaler(device, config.precision)
        scaled = self.scaler is not None
        self.optimizer: Optimizer = make_optimizer(model.parameters(), config.optimizer, config.lr, scaled=scaled)
        self.average = WeightAverage(model, config.ema) if config.ema else None
        self.taken = torch.zeros((), dtype=torch.int64, device=device)
        self.optimizer.register_step_post_hook(self._count)
        self._gradients = _GraphedGradients(self) if config.cuda_graph else self.gradients

    def __call__(self, inputs: Tensor, labels: Tensor, rate: float) -> tuple[Tensor, Tensor]:
        """Train on a batch.

        Args:
            inputs: ``(B, C, H, W)``.
            labels: ``(B,)``.
            rate: Learning rate.

        Returns:
            Mean loss, and number of correctly classified images, before the update; scalars on the device.
        """
        found = self._gradients(inputs, labels)
        self.update(rate)
        return found

    def gradients(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gradients of the mean loss, part by part; returns what a call does."""
        self.optimizer.zero_grad(set_to_none=True)
        count = len(labels)
        size = -(-count // self.config.accumulate)
        total = torch.zeros((), device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        parts = list(zip(inputs.split(size), labels.split(size), strict=True))
        for some, their in parts:
            # Gradients of other ranks are added once, with those of the last part.
            with nullcontext() if their is parts[-1][1] else without_exchange(self.network):
                loss, right = self.forward(some, their)
                loss = loss * (len(their) / count)
                self.backward(loss)
            total, correct = total + loss.detach(), correct + right
        return total, correct

    def forward(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss and number of correctly classified images."""
        if self.config.channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        with autocast(self.device, self.dtype):
            logits = self.network(inputs)
        loss = F.cross_entropy(widened(logits), labels, label_smoothing=self.config.label_smoothing)
        return loss, (logits.detach().argmax(1) == labels).sum()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss``, scaled in float16."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def update(self, rate: float) -> None:
        """Clip the gradients, where configured, and change the weights; in float16 not where gradients overflowed."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.config.clip_norm is not None:
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def _count(self, optimizer: Optimizer, _arguments: Any, _keywords: Any) -> None:
        """After a step of the optimiser. A fused one is called for skipped steps, too, and then carries found_inf."""
        overflowed = getattr(optimizer, "found_inf", None)
        taken = 1 if overflowed is None else (overflowed == 0).to(torch.int64)
        self.taken += taken
        if self.average is not None:
            self.average.update(self.model, self.taken, taken)

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors, for `load_state_dict`."""
        return {
            "optimizer_state": self.optimizer.state_dict(),
            "scaler_state": None if self.scaler is None else self.scaler.state_dict(),
            "average_state": None if self.average is None else dict(self.average.model.state_dict()),
            "steps_taken": int(self.taken),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state.

        Raises:
            ValueError: It is one of another optimiser or precision.
            KeyError: Likewise.
        """
        self.optimizer.load_state_dict(state["optimizer_state"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler_state"])
        if self.average is not None:
            self.average.model.load_state_dict(state["average_state"])
        self.taken.fill_(state["steps_taken"])


class _GraphedGradients:
    """`TrainingStep.gradients`, captured at the first batch and replayed for all others, which have its shape."""

    def __init__(self, step: TrainingStep) -> None:
        self.step = step
        self.replay: Replay | None = None

    def __call__(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if self.replay is None:
            self.inputs, self.labels = inputs.clone(), labels.clone()
            buffers = list(self.step.model.buffers())
            before = [buffer.clone() for buffer in buffers]
            with torch.random.fork_rng([self.step.device]):
                self.replay = Replay(lambda: self.step.gradients(self.inputs, self.labels))
            for buffer, value in zip(buffers, before, strict=True):  # warming up trained batch norm
                buffer.copy_(value)
        self.inputs.copy_(inputs)
        self.labels.copy_(labels)
        self.replay()
        return self.replay.outputs
