"""The tolerance rule, and the layers and inputs it may be applied to.

Rule: with e(t) = |t - oracle| / |oracle| (L2 over a whole tensor) and the oracle in float64,

    e(ours) <= factor * e(plain) + unit roundoff,    factor 2 forward, 3 gradients

where `plain` is PyTorch running the same formulas in the same dtype, and the unit roundoff of that dtype is the floor:
no stored result can be asked to be better. For float64 no better oracle is at hand: e(plain) is then the float32 figure
scaled by the ratio of roundoffs, and the oracle's own error of that size is allowed for.

The rule presumes that no ReLU flips: a pre-activation within rounding of 0 changes gradients by 1e-4 and more, in any
implementation. `sample` therefore rejects seeds whose pre-activations come within `margin` of 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gunn_ext.parameters import StackedLayer
from gunn_ext.reference import ReferenceGunnLayer

FORWARD, GRADIENT = 2.0, 3.0


def relative_error(tensor: Tensor, oracle: Tensor, name: str = "") -> float:
    """|tensor - oracle| / |oracle| in L2; absolute where the oracle is 0."""
    assert tensor.shape == oracle.shape, f"{name}: shape {tuple(tensor.shape)}, expected {tuple(oracle.shape)}"
    assert tensor.isfinite().all(), f"{name}: not finite"
    difference = (tensor.double() - oracle.double()).norm().item()
    return difference / (oracle.double().norm().item() or 1.0)


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def allowed_error(plain_error: float, plain: torch.dtype, ours: torch.dtype, factor: float) -> float:
    """The right-hand side of the rule, with the oracle's own error where that matters."""
    in_roundoffs = plain_error / unit_roundoff(plain)
    return (factor * in_roundoffs + 1) * unit_roundoff(ours) + in_roundoffs * unit_roundoff(torch.float64)


def assert_within_rule(ours: Tensor, oracle: Tensor, plain: Tensor, factor: float, name: str) -> float:
    """Assert the rule for one tensor; return the share of the tolerance that was used."""
    error = relative_error(ours, oracle, name)
    allowed = allowed_error(relative_error(plain, oracle, name), plain.dtype, ours.dtype, factor)
    print(f"{name}: error {error:.2e}, {error / allowed:.0%} of tolerance")
    assert error <= allowed, f"{name}: relative error {error:.3e}, allowed {allowed:.3e}"
    return error / allowed


@dataclass(frozen=True)
class Case:
    """A layer, the size of its input and the mode of its batch norms: train, eval or frozen."""

    channels: int
    segments: int
    expansion: int = 2
    units: int = 1
    shortcut: bool = True
    residual: bool = True
    batch: int = 2
    height: int = 5
    width: int = 7
    mode: str = "train"
    gradual: bool = True

    def __str__(self) -> str:
        flags = "".join(f"-{name}" for name, on in (("proj", self.shortcut), ("nores", not self.residual)) if on)
        sizes = f"{self.channels}P{self.segments}K{self.expansion}M{self.units}"
        return f"{sizes}-{self.batch}x{self.height}x{self.width}{flags}-{self.mode}" + "-sunn" * (not self.gradual)

    def layer(self, kind: type[StackedLayer] = ReferenceGunnLayer, dtype: torch.dtype = torch.float32, **options):
        """A layer of this case, its batch norms in this case's mode, its parameters those of its constructor."""
        layer = kind(
            self.channels,
            self.segments,
            self.expansion,
            self.units,
            shortcut=self.shortcut,
            gradual=self.gradual,
            residual=self.residual,
            dtype=dtype,
            **options,
        )
        if self.mode == "frozen":
            layer.freeze_batch_norm()
        return layer.train(self.mode != "eval")


@dataclass(frozen=True)
class Sample:
    """Values for a case, exact in float32: a state dict, an input and the gradient of the output."""

    case: Case
    state: dict[str, Tensor]
    x: Tensor
    grad: Tensor

    def layer(self, kind: type[StackedLayer] = ReferenceGunnLayer, dtype: torch.dtype = torch.float32, **options):
        layer = self.case.layer(kind, dtype, **options)
        layer.load_state_dict(self.state)
        return layer


def random_state(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    """Values of every tensor of a layer, batch norms included, of order 1; a quarter of the BN weights negative."""

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(like.shape, generator=generator) * (high - low) + low

    state = {}
    for name, tensor in case.layer().state_dict().items():
        if name.endswith("running_var"):
            state[name] = uniform(tensor, 0.5, 2)
        elif name.endswith("_bn.weight"):
            state[name] = uniform(tensor, 0.5, 1.5) * torch.where(uniform(tensor, 0, 1) < 0.25, -1.0, 1.0)
        elif name.endswith(("running_mean", "bias")):
            state[name] = 0.5 * torch.randn(tensor.shape, generator=generator)
        elif name.endswith("weight"):
            fan_in = tensor[0, 0].numel()
            state[name] = torch.randn(tensor.shape, generator=generator) / fan_in**0.5
        else:
            state[name] = tensor
    return state


class _SmallestReluInput(TorchFunctionMode):
    value = float("inf")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.relu and args[0].numel():
            self.value = min(self.value, args[0].abs().min().item())
        return func(*args, **(kwargs or {}))


def is_clear_of_zero(values: Sample, margin: float) -> bool:
    """Whether nothing that a ReLU of the reference sees in float64 is within ``margin`` of 0."""
    with torch.no_grad(), _SmallestReluInput() as smallest:
        values.layer(dtype=torch.float64)(values.x.double())
    return smallest.value > margin


def sample(case: Case, seed: int = 0, margin: float = 1e-6, offset: float = 0.0) -> Sample:
    """Values for ``case`` of which no pre-activation is within ``margin`` of 0; ``offset`` shifts x."""
    shape = (case.batch, case.channels, case.height, case.width)
    for attempt in range(100):
        generator = torch.Generator().manual_seed(1000 * seed + attempt)
        x = torch.randn(shape, generator=generator) + offset
        values = Sample(case, random_state(case, generator), x, torch.randn(shape, generator=generator))
        if is_clear_of_zero(values, margin):
            return values
    raise AssertionError(f"{case}: no seed keeps every pre-activation {margin} away from 0; use a smaller shape.")


def neighbours(values: Sample, margin: float = 1e-6) -> Iterator[Sample]:
    """The same values with changes of 1e-6 of each: new roundings, same conditioning, no ReLU flipped."""
    for seed in itertools.count():
        generator = torch.Generator().manual_seed(seed)

        def shaken(t: Tensor, generator: torch.Generator = generator) -> Tensor:
            return t * (1 + 1e-6 * torch.randn(t.shape, generator=generator)) if t.is_floating_point() else t

        state = {name: shaken(tensor) for name, tensor in values.state.items()}
        neighbour = Sample(values.case, state, shaken(values.x), shaken(values.grad))
        if is_clear_of_zero(neighbour, margin):
            yield neighbour


@dataclass
class Result:
    """What one forward and backward leaves."""

    y: Tensor
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor] = field(default_factory=dict)

    def equal(self, other: Result) -> bool:
        """Bitwise."""
        mine, yours = ({"y": r.y, **r.gradients, **r.buffers} for r in (self, other))
        return mine.keys() == yours.keys() and all(torch.equal(mine[name], yours[name]) for name in mine)


def run(layer: StackedLayer, x: Tensor, grad: Tensor | None, call: Callable | None = None) -> Result:
    """Forward and backward of ``layer`` (through ``call``, if given) on tensors as they are; gradients from zero."""
    x = x.detach().requires_grad_(grad is not None)
    layer.zero_grad(set_to_none=True)
    y = (layer if call is None else call)(x)
    gradients = {}
    if grad is not None:
        y.backward(grad)
        gradients = {"x": x.grad} | {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    return Result(y.detach(), {name: g.clone() for name, g in gradients.items()}, buffers)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch.set_num_threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_sample(values: Sample, kind: type[StackedLayer], dtype: torch.dtype, **options) -> Result:
    return run(values.layer(kind, dtype, **options), values.x.to(dtype), values.grad.to(dtype))


def _errors(result: Result, oracle: Result) -> dict[str, float]:
    """Relative error of the output, every gradient ("grad ...") and every running statistic."""
    assert result.gradients.keys() == oracle.gradients.keys()
    assert torch.equal(result.buffers["num_batches_tracked"], oracle.buffers["num_batches_tracked"])
    tensors, oracles = (
        {"y": r.y}
        | {f"grad {name}": g for name, g in r.gradients.items()}
        | {name: b for name, b in r.buffers.items() if b.is_floating_point()}
        for r in (result, oracle)
    )
    return {name: relative_error(tensors[name], oracles[name], name) for name in oracles}


def _shares(ours: list[dict[str, float]], plain: list[dict[str, float]], dtypes: tuple[torch.dtype, torch.dtype]):
    """Share of the tolerance used by each tensor, errors taken as root mean squares over the draws."""

    def rms(draws: list[dict[str, float]], name: str) -> float:
        return math.sqrt(sum(errors[name] ** 2 for errors in draws) / len(draws))

    factors = {name: GRADIENT if name.startswith("grad ") else FORWARD for name in ours[0]}
    return {name: rms(ours, name) / allowed_error(rms(plain, name), *dtypes, factors[name]) for name in ours[0]}


def check(values: Sample, ours: Callable[[Sample], Result], dtype: torch.dtype, draws: int = 12) -> None:
    """Assert the rule for the output, every gradient and every running statistic of ``ours(values)``, run in ``dtype``.

    A tensor of few elements has an error of few roundings, in ours and in plain alike, and their ratio is a matter of
    luck. Where the rule fails on ``values`` alone it is therefore judged once more, unchanged, on the root mean squares
    of both errors over ``values`` and its neighbours.
    """
    plain_dtype = torch.float32 if dtype == torch.float64 else dtype
    our_errors: list[dict[str, float]] = []
    plain_errors: list[dict[str, float]] = []
    shares: dict[str, float] = {}
    for draw in itertools.islice(itertools.chain([values], neighbours(values)), draws):
        oracle = run_sample(draw, ReferenceGunnLayer, torch.float64)
        our_errors.append(_errors(ours(draw), oracle))
        plain_errors.append(_errors(run_sample(draw, ReferenceGunnLayer, plain_dtype), oracle))
        shares = _shares(our_errors, plain_errors, (plain_dtype, dtype))
        if len(our_errors) == 1 and max(shares.values()) <= 1:
            break
    worst = max(shares, key=lambda name: shares[name])
    print(f"{values.case} {dtype}: {shares[worst]:.0%} of tolerance ({worst}, {len(our_errors)} draws)")
    failed = {
        name: f"{share:.2f} of tolerance, error {our_errors[0][name]:.2e} (plain {plain_errors[0][name]:.2e})"
        for name, share in shares.items()
        if share > 1
    }
    assert not failed, f"{values.case} {dtype}: {failed}"


def check_layer(case: Case, kind: type[StackedLayer], dtype: torch.dtype, seed: int = 0, **options) -> None:
    """`check` for a layer class on contiguous values."""
    check(sample(case, seed), lambda values: run_sample(values, kind, dtype, **options), dtype)
