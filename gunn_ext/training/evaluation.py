"""Evaluation that counts every image exactly once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Evaluation:
    """Counts of one pass over a split.

    Attributes:
        count: Images seen.
        correct: Images whose largest logit is their class.
        loss: Mean cross-entropy; NaN for no images.
    """

    count: int
    correct: int
    loss: float

    @property
    def accuracy(self) -> float:
        """Share of correct images, 0 … 1; NaN for no images."""
        return self.correct / self.count if self.count else math.nan


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Evaluation:
    """Classify every image of some batches, in evaluation mode; the mode of ``model`` is restored.

    Args:
        model: Maps ``(B, C, H, W)`` to logits ``(B, classes)``.
        batches: Inputs and labels, on the device of ``model``; may be empty, then the result counts none.
    """
    count, correct, loss = 0, torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.float64)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for inputs, labels in batches:
            logits = model(inputs)
            count += len(labels)
            correct = correct.to(logits.device) + (logits.argmax(1) == labels).sum()
            loss = loss.to(logits.device) + F.cross_entropy(logits, labels, reduction="sum")
    finally:
        for module, mode in modes:
            module.training = mode
    return Evaluation(count, int(correct), float(loss) / count if count else math.nan)
