"""Nothing is timed before it is known to be right: every peer is held to the reference in float64."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gunn_ext.analysis.performance import LayerSizes
from gunn_ext.bench.cases import build
from gunn_ext.bench.steps import LayerStep
from gunn_ext.reference import ReferenceGunnLayer

FACTOR = 3
FEW = 2  # images


class WrongResult(RuntimeError):
    """A peer computes something else than the reference."""


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Of the whole tensor, by its 2-norm."""
    norm = expected.norm().clamp_min(torch.finfo(torch.float64).tiny)
    return float((found.double() - expected).norm() / norm)


def rounding(dtype: torch.dtype, device: torch.device) -> float:
    """What plain torch's own luck may not fall below: a few roundings of what is multiplied."""
    if dtype == torch.float64:
        return 1e-12
    if dtype == torch.float32:
        precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
        tensor_float = device.type == "cuda" and precision == "tf32"
        return 1e-2 if tensor_float else 4 * torch.finfo(torch.float32).eps
    return torch.finfo(dtype).eps


class Yardstick:
    """The reference's results in float64, and the error of the reference in the dtype of the pass.

    A result may be `FACTOR` times as far from float64 as plain torch in the same dtype, plus `rounding`; gradients plus
    1e-2 or 16 roundings, for at these sizes a ReLU or two falls on the other side of 0 in any implementation, and each
    changes small gradients by several per cent. The tests, on values without such flips, hold the kernels to a tighter
    rule.

    Args:
        sizes: Of the layer.
        state: Its parameters and buffers.
        x: Input in the dtype of the pass.
        grad: Gradient of the output.
        training: Which pass.
        gradual: GUNN or SUNN.

    Raises:
        ValueError: The reference itself is not finite.
    """

    def __init__(
        self, sizes: LayerSizes, state: Mapping[str, Tensor], x: Tensor, grad: Tensor, training: bool, gradual: bool
    ) -> None:
        """Compute both; arguments as the class says."""
        self.state = state
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.expected = self._run(sizes, x.double(), grad.double(), training, gradual, torch.float64)
        plain = self._run(sizes, x, grad, training, gradual, wide)
        floor = rounding(x.dtype, x.device)
        for name, value in (*self.expected.items(), *plain.items()):
            if not value.isfinite().all():
                raise ValueError(f"{name} of the reference is not finite in {value.dtype}: nothing to compare with")
        self.allowed = {
            name: FACTOR * relative_error(value, self.expected[name])
            + floor
            + (0 if name == "y" else max(1e-2, 16 * floor))
            for name, value in plain.items()
        }

    def _run(
        self, sizes: LayerSizes, x: Tensor, grad: Tensor, training: bool, gradual: bool, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        layer = build(ReferenceGunnLayer, sizes, gradual=gradual, device=x.device, dtype=dtype)
        layer.load_state_dict(self.state)
        step = LayerStep(layer, x, grad, training)
        return {name: value.detach() for name, value in step.named(step()).items()}

    def hold(self, outputs: Mapping[str, Tensor]) -> tuple[float, float]:
        """The error of ``y``, and the largest share of what is allowed.

        Raises:
            WrongResult: Something is farther off than allowed, or not finite.
        """
        shares = {}
        for name, expected in self.expected.items():
            error = relative_error(outputs[name], expected)
            shares[name] = error / self.allowed[name]
            if not error <= self.allowed[name]:
                raise WrongResult(
                    f"wrong result, not timed: {name} has relative error {error:.1e} against the reference in float64, "
                    f"allowed {self.allowed[name]:.1e}"
                )
        return relative_error(outputs["y"], self.expected["y"]), max(shares.values())


def initial_state(sizes: LayerSizes, x: Tensor) -> dict[str, Tensor]:
    """The parameters and buffers that every peer of a layer has.

    Running statistics are those of a few images of ``x``: with those of a fresh layer the state would grow from segment
    to segment, beyond all numbers where there are hundreds.
    """
    torch.manual_seed(0)
    layer = build(ReferenceGunnLayer, sizes, momentum=None).to(x.device)  # the average of one batch is that batch
    few = x[:FEW].float()
    if few[:, 0].numel() > 1:
        with torch.no_grad():
            layer.train()(few)
    return dict(layer.state_dict())
