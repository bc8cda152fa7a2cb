"""One pass as it is timed: of a layer, forward and backward or evaluation; plain, or replayed from a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

FORMATS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}
_WARM_UP = 3


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Autocast for 16-bit dtypes, disabled for others."""
    narrow = dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(device.type, dtype if narrow else torch.bfloat16, enabled=narrow)


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


class Replay:
    """``work`` captured in a CUDA graph; a call replays it.

    Holds ``work``, hence everything the graph reads, for as long as it can be replayed.

    Attributes:
        outputs: What ``work`` returned; filled in anew by every replay.
    """

    def __init__(self, work: Callable[[], Any]) -> None:
        """Warm up on a side stream, as capturing asks for, and capture."""
        self.work = work
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                work()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = work()

    def __call__(self) -> None:
        """Replay."""
        self.graph.replay()
