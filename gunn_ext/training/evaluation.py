"""Evaluation that counts every image exactly once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gunn_ext.data import Split


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
def evaluate(
    model: nn.Module, split: Split, normalize: Callable[[Tensor], Tensor], batch_size: int = 256
) -> Evaluation:
    """Classify every image of a split once, in evaluation mode; the mode of ``model`` is restored.

    Args:
        model: Maps ``(B, C, H, W)`` to logits ``(B, classes)``; on the device of the split.
        split: Images and labels; may be empty, then the result counts none.
        normalize: Maps uint8 images to the model's input.
        batch_size: Images at a time; the last batch may be smaller.
    """
    device = split.images.device
    correct = torch.zeros((), dtype=torch.int64, device=device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for start in range(0, len(split), batch_size):
            labels = split.labels[start : start + batch_size]
            logits = model(normalize(split.images[start : start + batch_size]))
            correct += (logits.argmax(1) == labels).sum()
            loss += F.cross_entropy(logits, labels, reduction="sum")
    finally:
        for module, mode in modes:
            module.training = mode
    count = len(split)
    return Evaluation(count, int(correct), float(loss) / count if count else math.nan)
