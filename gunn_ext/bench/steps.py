"""One pass as it is timed: of a layer, forward and backward or evaluation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gunn_ext.training.precision import autocast

FORMATS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}


class LayerStep:
    """One pass of a layer, with its outputs by name: ``y``; in training also ``grad x`` and every parameter's gradient.

    Args:
        layer: Parameters float32, or float64 for inputs of that dtype.
        x: Input in the dtype and memory format of the pass.
        grad: Gradient of the output, like ``x``.
        training: Forward and backward with batch statistics, or an evaluation.
        checkpointed: Recompute the forward in the backward, by torch's means.
        call: Computes the layer; by default the layer itself. A compiled one is given here.
    """

    def __init__(
        self,
        layer: nn.Module,
        x: Tensor,
        grad: Tensor,
        training: bool,
        *,
        checkpointed: bool = False,
        call: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Arguments as the class says."""
        layer.train(training)
        self.call = layer if call is None else call
        self.training, self.checkpointed = training, checkpointed
        self.x, self.grad = x.detach().requires_grad_(training), grad
        self.names, self.parameters = zip(*layer.named_parameters(), strict=True)
        self.dtype = x.dtype

    def forward(self) -> Tensor:
        """The output, with what the backward needs."""
        with autocast(self.x.device, self.dtype), torch.set_grad_enabled(self.training):
            if self.checkpointed:
                result: Tensor = checkpoint(self.call, self.x, use_reentrant=False, preserve_rng_state=False)
                return result
            return self.call(self.x)

    def __call__(self) -> list[Tensor]:
        """Run the pass; returns its outputs in the order of `named`."""
        y = self.forward()
        if not self.training:
            return [y]
        return [y.detach(), *torch.autograd.grad(y, (self.x, *self.parameters), self.grad)]

    def named(self, outputs: list[Tensor]) -> dict[str, Tensor]:
        """Outputs of a call by name."""
        names = ("y", "grad x", *self.names) if self.training else ("y",)
        return dict(zip(names, outputs, strict=True))
