"""The tolerance rule, and the layers and inputs it may be applied to.

Rule: with e(t) = |t - oracle| / |oracle| (L2 over a whole tensor) and the oracle in float64,

    e(ours) <= factor * e(plain) + unit roundoff,    factor 2 forward, 3 gradients

where `plain` is PyTorch running the same formulas in the same dtype, and the unit roundoff of that dtype is the floor:
no stored result can be asked to be better. For float64 no better oracle is at hand: e(plain) is then the float32 figure
scaled by the ratio of roundoffs, and the oracle's own error of that size is allowed for.

The rule presumes that no ReLU flips: a pre-activation within rounding of 0 changes gradients by 1e-4 and more, in any
implementation. `sample` therefore rejects seeds whose pre-activations come within `margin` of 0. With 8 or 11 bits of
mantissa no seed would be left: `settled_sample` biases the batch norms, so that a channel is on everywhere or off
everywhere.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

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
    expected = oracle.double().cpu()
    return (tensor.double().cpu() - expected).norm().item() / (expected.norm().item() or 1.0)


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
    """Values for a case: a state dict, an input and the gradient of the output.

    They are exact in ``dtype`` (running statistics: in float32) and keep every pre-activation ``margin`` away from 0.
    Layers of it are made where its input is.
    """

    case: Case
    state: dict[str, Tensor]
    x: Tensor
    grad: Tensor
    margin: float = 1e-6
    dtype: torch.dtype = torch.float32

    def layer(self, kind: type[StackedLayer] = ReferenceGunnLayer, dtype: torch.dtype = torch.float32, **options):
        layer = self.case.layer(kind, dtype, device=self.x.device, **options)
        layer.load_state_dict(self.state)
        return layer

    def to(self, device: torch.device | str) -> Sample:
        """The same values with input and gradient on ``device``."""
        return replace(self, x=self.x.to(device), grad=self.grad.to(device))


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


def is_clear_of_zero(values: Sample) -> bool:
    """Whether nothing that a ReLU of the reference sees in float64 is within the sample's margin of 0."""
    with torch.no_grad(), _SmallestReluInput() as smallest:
        values.layer(dtype=torch.float64)(values.x.double())
    return smallest.value > values.margin


def gradients_fit(values: Sample) -> bool:
    """Whether the sample's dtype has room for every gradient."""
    limit = torch.finfo(values.dtype).max / 4
    gradients = run_sample(values, ReferenceGunnLayer, torch.float64).gradients.values() if limit < 1e6 else ()
    return all(gradient.abs().max() < limit for gradient in gradients)


def sample(case: Case, seed: int = 0, margin: float = 1e-6, offset: float = 0.0) -> Sample:
    """Values for ``case`` of which no pre-activation is within ``margin`` of 0; ``offset`` shifts x."""
    shape = (case.batch, case.channels, case.height, case.width)
    for attempt in range(100):
        generator = torch.Generator().manual_seed(1000 * seed + attempt)
        x = torch.randn(shape, generator=generator) + offset
        values = Sample(case, random_state(case, generator), x, torch.randn(shape, generator=generator), margin)
        if is_clear_of_zero(values):
            return values
    raise AssertionError(f"{case}: no seed keeps every pre-activation {margin} away from 0; use a smaller shape.")


def _rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """What layers of ``dtype`` make of a tensor of float32."""
    return tensor if not tensor.is_floating_point() or "running_" in name else tensor.to(dtype).float()


def settled_sample(case: Case, dtype: torch.dtype, seed: int = 0, margin: float = 0.5) -> Sample:
    """Values for ``case``, exact in ``dtype``, with every channel that a ReLU sees far above or far below 0.

    The batch norms before a ReLU scale by 0.2 to 0.4 and shift by ±3.5. Running statistics are those of such
    values, lest evaluation shift the channels back.
    """
    shape = (case.batch, case.channels, case.height, case.width)
    for attempt in range(100):
        generator = torch.Generator().manual_seed(1000 * seed + attempt)
        state = random_state(case, generator)
        for name, tensor in state.items():
            if name.endswith(("reduce_bn.weight", "spatial_bn.weight")):
                tensor.copy_(tensor.sign() * (0.1 + 0.2 * tensor.abs()))
            elif name.endswith(("reduce_bn.bias", "spatial_bn.bias")):
                tensor.copy_(torch.where(tensor > -0.3, 3.5, -3.5))
                tensor[:, 0] = 3.5  # nothing but 0 has no variance, and batch norm makes much of that
        state = {name: _rounded(name, tensor, dtype) for name, tensor in state.items()}
        x, grad = (torch.randn(shape, generator=generator).to(dtype).float() for _ in range(2))
        if case.mode != "train":
            settled = replace(case, mode="train").layer(momentum=1.0)
            settled.load_state_dict(state)
            enough = max(case.batch, math.ceil(64 / (case.height * case.width)))
            with torch.no_grad():
                settled(torch.randn((enough, *shape[1:]), generator=generator))
            state = settled.state_dict()
        values = Sample(case, state, x, grad, margin, dtype)
        if is_clear_of_zero(values) and gradients_fit(values):
            return values
    raise AssertionError(f"{case}: no seed keeps every pre-activation {margin} away from 0; use a smaller shape.")


def neighbours(values: Sample) -> Iterator[Sample]:
    """The same values with changes of a few roundings of each: same conditioning, no ReLU flipped."""
    change = 8 * torch.finfo(values.dtype).eps
    for seed in itertools.count():
        generator = torch.Generator().manual_seed(seed)

        def shaken(name: str, t: Tensor, generator: torch.Generator = generator) -> Tensor:
            if not t.is_floating_point():
                return t
            return _rounded(name, t.cpu() * (1 + change * torch.randn(t.shape, generator=generator)), values.dtype)

        state = {name: shaken(name, tensor) for name, tensor in values.state.items()}
        neighbour = replace(values, state=state, x=shaken("x", values.x), grad=shaken("grad", values.grad))
        if is_clear_of_zero(neighbour):
            yield neighbour.to(values.x.device)


@dataclass
class Result:
    """What one forward and backward leaves."""

    y: Tensor
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> Result:
        """The same on another device."""
        parts = ({name: t.to(device) for name, t in part.items()} for part in (self.gradients, self.buffers))
        return Result(self.y.to(device), *parts)

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


def run_sample(
    values: Sample, kind: type[StackedLayer], dtype: torch.dtype, parameters: torch.dtype | None = None, **options
) -> Result:
    """`run` in ``dtype``, with parameters in a dtype of their own where one is given."""
    return run(values.layer(kind, parameters or dtype, **options), values.x.to(dtype), values.grad.to(dtype))


@contextmanager
def tensor_float(on: bool) -> Iterator[None]:
    """torch's switch for float32 convolutions on a GPU, for a while: TF32 or IEEE."""
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    conv.fp32_precision = "tf32" if on else "ieee"
    try:
        yield
    finally:
        conv.fp32_precision = before


def rounded_to_tensor_float(t: Tensor) -> Tensor:
    """To 10 bits of mantissa, halves away from 0, as the GPU does on the way to its tensor cores."""
    return ((t.float().contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).to(t.dtype)


class _TensorFloatConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, padding):
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        return torch.conv2d(rounded_to_tensor_float(x), rounded_to_tensor_float(weight), padding=padding)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        x, weight, grad = map(rounded_to_tensor_float, (x, weight, grad))
        grad_x = torch.nn.grad.conv2d_input(x.shape, weight, grad, padding=ctx.padding)
        return grad_x, torch.nn.grad.conv2d_weight(x, weight.shape, grad, padding=ctx.padding), None


class TensorFloatConvolutions(TorchFunctionMode):
    """torch's convolutions with operands rounded to TF32, forward and backward, whatever dtype they compute in."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.conv2d:
            return _TensorFloatConv.apply(*args, (kwargs or {}).get("padding", 0))
        return func(*args, **(kwargs or {}))


class TensorFloatReferenceLayer(ReferenceGunnLayer):
    """The reference with the operands of every convolution rounded to TF32.

    What cuDNN does under that switch is its own choice, which for small layers is not TF32.
    """

    def update(self, x: Tensor) -> Tensor:
        with TensorFloatConvolutions():
            return super().update(x)


def _errors(result: Result, oracle: Result) -> dict[str, float]:
    """Relative error of the output, every gradient ("grad ...") and every running statistic."""
    assert result.gradients.keys() == oracle.gradients.keys()
    assert result.buffers["num_batches_tracked"].item() == oracle.buffers["num_batches_tracked"].item()
    tensors, oracles = (
        {"y": r.y}
        | {f"grad {name}": g for name, g in r.gradients.items()}
        | {name: b for name, b in r.buffers.items() if b.is_floating_point()}
        for r in (result, oracle)
    )
    return {name: relative_error(tensors[name], oracles[name], name) for name in oracles}


def _is_only_rounding(values: Sample, name: str) -> bool:
    """Whether a gradient is that of weights which are alone in their rows, behind batch statistics.

    Such a weight scales what these divide by their deviation: its gradient is what eps leaves of a sum that cancels,
    and has no digit right in any implementation.
    """
    weight = values.state.get(name.removeprefix("grad "))
    return values.case.mode == "train" and weight is not None and weight.dim() == 3 and weight.shape[2] == 1


def _shares(ours: list[dict[str, float]], plain: list[dict[str, float]], dtypes: tuple[torch.dtype, torch.dtype]):
    """Share of the tolerance used by each tensor, errors taken as root mean squares over the draws."""

    def rms(draws: list[dict[str, float]], name: str) -> float:
        return math.sqrt(sum(errors[name] ** 2 for errors in draws) / len(draws))

    factors = {name: GRADIENT if name.startswith("grad ") else FORWARD for name in ours[0]}
    return {name: rms(ours, name) / allowed_error(rms(plain, name), *dtypes, factors[name]) for name in ours[0]}


def check(
    values: Sample,
    ours: Callable[[Sample], Result],
    dtype: torch.dtype,
    draws: int = 12,
    plain: type[StackedLayer] = ReferenceGunnLayer,
    parameters: torch.dtype | None = None,
) -> None:
    """Assert the rule for the output, every gradient and every running statistic of ``ours(values)``, run in ``dtype``.

    ``plain`` is the layer in plain PyTorch, run where the values are, its parameters in the dtype ``parameters`` where
    one is given; the oracle always runs on the CPU. For float64 on a GPU the larger counts of plain in float32 and in
    float64, in roundoffs: sums over many pixels differ from the oracle's by more than either alone tells.

    A tensor of few elements has an error of few roundings, in ours and in plain alike, and their ratio is a matter of
    luck. Where the rule fails on ``values`` alone it is therefore judged once more, unchanged, on the root mean squares
    of both errors over ``values`` and its neighbours.
    """
    plain_dtype = torch.float32 if dtype == torch.float64 else dtype
    our_errors: list[dict[str, float]] = []
    plain_errors: list[dict[str, float]] = []
    shares: dict[str, float] = {}
    for draw in itertools.islice(itertools.chain([values], neighbours(values)), draws):
        oracle = run_sample(draw.to("cpu"), ReferenceGunnLayer, torch.float64)
        our_errors.append(_errors(ours(draw), oracle))
        plain_errors.append(_errors(run_sample(draw, plain, plain_dtype, parameters), oracle))
        if dtype == torch.float64 and draw.x.device.type != "cpu":
            in_float64 = _errors(run_sample(draw, plain, torch.float64, parameters), oracle)
            scale = unit_roundoff(plain_dtype) / unit_roundoff(torch.float64)
            plain_errors[-1] = {name: max(e, in_float64[name] * scale) for name, e in plain_errors[-1].items()}
        shares = _shares(our_errors, plain_errors, (plain_dtype, dtype))
        shares = {name: share for name, share in shares.items() if not _is_only_rounding(values, name)}
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
