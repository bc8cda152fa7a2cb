"""Evaluation that counts every image exactly once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gunn_ext.training.distributed import World
from gunn_ext.training.precision import widened

TOP = 5


@dataclass(frozen=True)
class Evaluation:
    """Counts of one pass over a split.

    Attributes:
        count: Images seen.
        correct: Images whose largest logit is their class.
        loss: Mean cross-entropy; NaN for no images.
        correct5: Images whose class is among the five of largest logits; of fewer classes, all.
    """

    count: int
    correct: int
    loss: float
    correct5: int

    @property
    def accuracy(self) -> float:
        """Share of correct images, 0 … 1; NaN for no images."""
        return self.correct / self.count if self.count else math.nan

    @property
    def accuracy5(self) -> float:
        """Share of images whose class is among the first five, 0 … 1; NaN for no images."""
        return self.correct5 / self.count if self.count else math.nan


class Ensemble(nn.Module):
    """Networks whose softmax is averaged; its logits are the logarithm of that average.

    Args:
        members: Map ``(B, C, H, W)`` to logits ``(B, classes)``.
    """

    def __init__(self, members: Iterable[nn.Module]) -> None:
        """Take the members."""
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        """``log(mean of softmax)``, ``(B, classes)``."""
        logs = torch.stack([F.log_softmax(widened(member(x)), 1) for member in self.members])
        return torch.logsumexp(logs, 0) - math.log(len(self.members))


def classify(model: nn.Module, inputs: Tensor) -> Tensor:
    """Logits of images, or of several views of each: then the logarithm of the mean of their softmax.

    Args:
        model: Maps ``(B, C, H, W)`` to logits ``(B, classes)``.
        inputs: ``(B, C, H, W)``, or V views of each image, ``(B, V, C, H, W)``.

    Returns:
        ``(B, classes)``.
    """
    if inputs.dim() != 5:
        return model(inputs)
    logits = model(inputs.flatten(0, 1)).unflatten(0, inputs.shape[:2])
    return torch.logsumexp(F.log_softmax(widened(logits), 2), 1) - math.log(inputs.shape[1])


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    context: AbstractContextManager | None = None,
    world: World | None = None,
) -> Evaluation:
    """Classify every image of some batches, in evaluation mode; the mode of ``model`` is restored.

    Args:
        model: Maps ``(B, C, H, W)`` to logits ``(B, classes)``.
        batches: Inputs, as for `classify`, and labels, on the device of ``model``; may be empty, then the result counts
            none.
        context: Entered while the network computes, such as autocast.
        world: The processes that each classify batches of their own; the result counts those of all.
    """
    count, correct, correct5 = 0, torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    loss = torch.zeros((), dtype=torch.float64)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for inputs, labels in batches:
            with context or nullcontext():
                logits = classify(model, inputs)
            device = logits.device
            count += len(labels)
            among = logits.topk(min(TOP, logits.shape[1]), 1).indices == labels[:, None]
            correct = correct.to(device) + (logits.argmax(1) == labels).sum()
            correct5 = correct5.to(device) + among.sum()
            loss = loss.to(device) + F.cross_entropy(widened(logits), labels, reduction="sum")
    finally:
        for module, mode in modes:
            module.training = mode
    sums = [count, int(correct), int(correct5), float(loss)]
    images, first, fifth, summed = sums if world is None else world.total(sums)
    return Evaluation(int(images), int(first), summed / images if images else math.nan, int(fifth))
