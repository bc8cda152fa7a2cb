"""The optimiser that a configuration names."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Optimizer

from gunn_ext.training.optimization_config import OptimizerConfig


def make_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimizerConfig, lr: float, *, scaled: bool = False
) -> Optimizer:
    """Build an optimiser.

    Args:
        parameters: What it changes.
        config: Which one, with its options.
        lr: Learning rate of the first step.
        scaled: A `torch.amp.GradScaler` will call it. Fused kernels then skip a step whose gradients overflow without
            the CPU asking whether they did; torch has none for rmsprop.
    """
    parameters = list(parameters)
    fused = True if scaled else None
    if config.name == "rmsprop":
        return torch.optim.RMSprop(parameters, lr, alpha=config.alpha, eps=config.eps, weight_decay=config.weight_decay)
    if config.name in ("adam", "adamw"):
        kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
        return kind(parameters, lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=fused)
    optimizer = torch.optim.SGD(
        parameters,
        lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        fused=fused,
    )
    if scaled and config.momentum:
        # Left to itself, fused SGD makes these in the first step, and keeps what the memory held where it skips that.
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer
