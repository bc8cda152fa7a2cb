"""An exponential moving average of a network's weights and buffers, evaluated in their place."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class WeightAverage:
    """``average += (1 - d) * (weights - average)`` after every optimiser step.

    The decay of step t, counted from 1, is ``d = min(decay, (1 + t) / (10 + t))``, so that the first weights, which
    nobody wants, are soon forgotten. Buffers of floating point are averaged too, others copied.

    Args:
        model: Starts the average; not changed.
        decay: Of the average, below 1.

    Attributes:
        model: A copy of the network that holds the average, in evaluation mode.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Copy the network."""
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, steps: Tensor, taken: Tensor | int) -> None:
        """Move towards the weights of ``model``; nothing here waits for the device.

        Args:
            model: The network that is trained.
            steps: Optimiser steps so far, this one included, a scalar on its device.
            taken: 0 where the step was skipped, else 1.
        """
        steps = steps.to(torch.float64)
        weight = (1 - ((1 + steps) / (10 + steps)).clamp(max=self.decay)) * taken
        averages = self.model.state_dict()
        for name, value in model.state_dict().items():
            average = averages[name]
            if average.is_floating_point():
                average.lerp_(value, weight.to(average.dtype))
            else:
                average.copy_(value)
