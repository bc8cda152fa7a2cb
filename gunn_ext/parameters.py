"""The stacked parameters of a GUNN layer: names, shapes, initialisation, batch-norm modes.

Every tensor is stacked over the layer's P segments, so a layer holds few, large, contiguous tensors. `GunnLayer` and
`ReferenceGunnLayer` both derive from `StackedLayer`, hence share constructor and state dict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gunn_ext.ranks import Ranks, several_processes

STATISTICS_DTYPES = (torch.float32, torch.float64)
LAYER_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class StackedConv(nn.Module):
    """The P weights of one convolution, one per segment; no bias (paper section 5.1)."""

    def __init__(self, shape: tuple[int, ...], device: torch.device | None, dtype: torch.dtype | None) -> None:
        """Allocate and initialise the weight; ``shape`` is (P, out_channels, in_channels[, 3, 3])."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal(0, sqrt(2 / (kh kw out_channels))), out_channels those of one segment's convolution."""
        _, out_channels, _, *kernel = self.weight.shape
        nn.init.normal_(self.weight, std=math.sqrt(2.0 / (out_channels * math.prod(kernel))))

    def extra_repr(self) -> str:
        """The weight's shape."""
        return "x".join(map(str, self.weight.shape))


class StackedBatchNorm(nn.Module):
    """Tensors of the P batch norms after one stacked convolution, each ``(P, channels)``.

    It computes nothing. Its own ``training`` flag decides between batch and running statistics, so the usual ways of
    freezing batch norm work on it. The running buffers never go below float32, whatever the module is cast to.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, segments: int, channels: int, device: torch.device | None, dtype: torch.dtype | None) -> None:
        """Allocate P batch norms of ``channels`` channels."""
        super().__init__()
        shape = (segments, channels)
        statistics_dtype = dtype if dtype in (None, *STATISTICS_DTYPES) else torch.float32
        self.weight = nn.Parameter(torch.ones(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
        self.register_buffer("running_mean", torch.zeros(shape, device=device, dtype=statistics_dtype))
        self.register_buffer("running_var", torch.ones(shape, device=device, dtype=statistics_dtype))
        self.frozen = False

    def reset_parameters(self) -> None:
        """Weight 1, bias 0; running mean 0, variance 1."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        self.running_mean.zero_()
        self.running_var.fill_(1)

    def train(self, mode: bool = True) -> StackedBatchNorm:
        """Switch to batch statistics, unless frozen."""
        return super().train(mode and not self.frozen)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StackedBatchNorm:
        before = {"running_mean": self.running_mean, "running_var": self.running_var}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if new.dtype not in STATISTICS_DTYPES:
                # From the buffer as it was: a round trip through the narrow type would lose its low bits.
                setattr(self, name, old.to(device=new.device, dtype=torch.float32))
        return self

    def extra_repr(self) -> str:
        """Shape, and whether it is frozen."""
        return "{}x{}".format(*self.weight.shape) + (", frozen" if self.frozen else "")


class Unit(nn.Module):
    """One update unit of all P segments: 1x1 → BN → ReLU → 3x3 → BN → ReLU → 1x1 → BN (paper section 5.1)."""

    def __init__(
        self,
        segments: int,
        in_channels: int,
        hidden: int,
        out_channels: int,
        shortcut: bool,
        device: torch.device | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Allocate P units ``in_channels`` → ``hidden`` → ``out_channels``."""
        super().__init__()
        self.reduce = StackedConv((segments, hidden, in_channels), device, dtype)
        self.reduce_bn = StackedBatchNorm(segments, hidden, device, dtype)
        self.spatial = StackedConv((segments, hidden, hidden, 3, 3), device, dtype)
        self.spatial_bn = StackedBatchNorm(segments, hidden, device, dtype)
        self.project = StackedConv((segments, out_channels, hidden), device, dtype)
        self.project_bn = StackedBatchNorm(segments, out_channels, device, dtype)
        self.shortcut: StackedConv | None = None
        self.shortcut_bn: StackedBatchNorm | None = None
        if shortcut:
            self.shortcut = StackedConv((segments, out_channels, in_channels), device, dtype)
            self.shortcut_bn = StackedBatchNorm(segments, out_channels, device, dtype)


def _positive_int(owner: str, name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{owner}: {name} must be a positive integer, got {value!r}.")
    return value


class StackedLayer(nn.Module):
    """Constructor, parameters and state dict shared by `GunnLayer` and `ReferenceGunnLayer`.

    With s = channels / segments and k = expansion * s, unit m (n_in = channels for m = 0, else s) holds
    ``reduce.weight (P, k, n_in)``, ``spatial.weight (P, k, k, 3, 3)``, ``project.weight (P, s, k)``, their batch
    norms ``(P, k)``, ``(P, k)``, ``(P, s)``; with ``shortcut``, unit 0 also ``shortcut.weight (P, s, channels)``.

    Args:
        channels: N, the channels of the feature map.
        segments: P, the equal contiguous segments the channels are split into; must divide ``channels``.
        expansion: K, the hidden width of a unit over the width of a segment.
        units: M, the stacked units of one update; those after the first have an identity shortcut.
        shortcut: Add a projection 1x1 → BN beside the first unit (the CIFAR models).
        gradual: Update segments one after another (GUNN); False updates all from the same input (SUNN).
        residual: Add the update to the segment; False replaces the segment (NoRes, paper table 5).
        eps: Added to the variance in batch norm.
        momentum: Of the running statistics; None keeps the cumulative average, as in ``torch.nn.BatchNorm2d``.
        recompute: Keep only input and output for the backward and recompute the rest (paper algorithm 1); False
            keeps the pre-activations: faster, more memory.
        device: Of the parameters.
        dtype: Of the parameters; running statistics are kept in at least float32.

    Raises:
        ValueError: A size is not a positive integer, ``segments`` does not divide ``channels``, ``eps`` or
            ``momentum`` is out of range.
    """

    num_batches_tracked: Tensor

    def __init__(
        self,
        channels: int,
        segments: int,
        expansion: int = 2,
        units: int = 1,
        *,
        shortcut: bool = False,
        gradual: bool = True,
        residual: bool = True,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        recompute: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Check the sizes, allocate and initialise; arguments as the class says."""
        super().__init__()
        owner = type(self).__name__
        self.channels = _positive_int(owner, "channels", channels)
        self.segments = _positive_int(owner, "segments", segments)
        self.expansion = _positive_int(owner, "expansion", expansion)
        self.num_units = _positive_int(owner, "units", units)
        if channels % segments:
            below, above = channels // segments * segments, (channels // segments + 1) * segments
            nearest = f"{below} or {above}" if below else f"{above}"
            raise ValueError(
                f"{owner}: channels ({channels}) must be divisible by segments ({segments}); nearest valid: {nearest}."
            )
        if not (isinstance(eps, (int, float)) and math.isfinite(eps) and eps > 0):
            raise ValueError(f"{owner}: eps must be a finite number above 0, got {eps!r}.")
        if momentum is not None and not (isinstance(momentum, (int, float)) and 0 <= momentum <= 1):
            raise ValueError(f"{owner}: momentum must lie in [0, 1] or be None, got {momentum!r}.")
        self.shortcut = bool(shortcut)
        self.gradual = bool(gradual)
        self.residual = bool(residual)
        self.eps = float(eps)
        self.momentum = momentum
        self.recompute = bool(recompute)

        width = channels // segments
        place = torch.device(device) if device is not None else None
        self.units = nn.ModuleList(
            Unit(segments, channels if m == 0 else width, expansion * width, width, shortcut and m == 0, place, dtype)
            for m in range(units)
        )
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64, device=place))
        self.ranks: Ranks | None = None  # who shares the batch statistics; convert_sync_batchnorm() sets it
        self._passed_by = False

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Add a child; notes when one is put back where it was.

        That is how ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` goes through a model, in which it finds no batch
        norm of ours to convert.
        """
        if module is not None and self._modules.get(name) is module:
            self._passed_by = True
        super().add_module(name, module)

    @property
    def width(self) -> int:
        """s, the channels of one segment."""
        return self.channels // self.segments

    @property
    def hidden(self) -> int:
        """k, the hidden channels of a unit."""
        return self.expansion * self.width

    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments, device and dtype aside: what another layer of the same kind needs."""
        names = ("channels", "segments", "expansion", "shortcut", "gradual", "residual", "eps", "momentum", "recompute")
        return {name: getattr(self, name) for name in names} | {"units": self.num_units}

    def unit_list(self) -> list[Unit]:
        """The stacked units, as their type."""
        return [unit for unit in self.units if isinstance(unit, Unit)]

    def batch_norms(self) -> Iterator[StackedBatchNorm]:
        """All batch norms of the layer."""
        return (module for module in self.modules() if isinstance(module, StackedBatchNorm))

    def reset_parameters(self) -> None:
        """Initialise anew: convolutions as `StackedConv`, batch norms to 1 / 0, running statistics to 0 / 1."""
        for module in self.modules():
            if isinstance(module, (StackedConv, StackedBatchNorm)):
                module.reset_parameters()
        self.num_batches_tracked.zero_()

    def freeze_batch_norm(self, frozen: bool = True) -> StackedLayer:
        """Use the running statistics in training too, and keep doing so through later calls of ``train()``.

        Weights and biases of the batch norms go on being trained.
        """
        for bn in self.batch_norms():
            bn.frozen = frozen
            bn.train(self.training)
        return self

    def uses_batch_statistics(self) -> bool:
        """Whether the batch norms are in training mode.

        Raises:
            RuntimeError: Some are and some are not.
        """
        modes = {bn.training for bn in self.batch_norms()}
        if len(modes) > 1:
            raise RuntimeError(
                f"{type(self).__name__}: some batch norms of this layer are in training mode and some in evaluation "
                "mode; all of one layer must agree. Use freeze_batch_norm() or train()/eval() on the whole layer."
            )
        return modes.pop()

    def sharing_ranks(self) -> Ranks | None:
        """The processes whose batches this pass normalises together; None: this one's alone.

        Raises:
            RuntimeError: The layer is synchronised, but there is no process group that this process belongs to; or it
                is not, where torch's conversion left it out.
        """
        owner = type(self).__name__
        if not self.uses_batch_statistics():
            return None
        if self.ranks is not None:
            return self.ranks.present(owner)
        if self._passed_by and several_processes():
            raise RuntimeError(
                f"{owner}: torch.nn.SyncBatchNorm.convert_sync_batchnorm() does not know the batch norms of this layer "
                "and left them with the statistics of each process alone. Call "
                "gunn_ext.convert_sync_batchnorm(model) instead, which converts ordinary batch norms as well."
            )
        return None

    def check_input(self, x: Tensor) -> None:
        """Check ``x`` against this layer's sizes and modes.

        Raises:
            ValueError: Rank, channel count, an empty batch or one value per channel in training.
            TypeError: A dtype that no layer takes.
            RuntimeError: The batch norms are in mixed modes, or cannot be synchronised as they should be.
        """
        owner = type(self).__name__
        if x.dim() != 4:
            raise ValueError(f"{owner}: expected a 4-D input (B, {self.channels}, H, W), got shape {tuple(x.shape)}.")
        if x.shape[1] != self.channels:
            raise ValueError(
                f"{owner}: expected {self.channels} channels, got {x.shape[1]} (input shape {tuple(x.shape)}); "
                "build the layer with channels equal to dimension 1 of its input."
            )
        if x.dtype not in LAYER_DTYPES:
            raise TypeError(
                f"{owner}: expected a float64, float32, bfloat16 or float16 input, got {x.dtype}; convert it first."
            )
        if x.shape[2] == 0 or x.shape[3] == 0:
            raise ValueError(f"{owner}: height and width must be at least 1, got input shape {tuple(x.shape)}.")
        ranks = self.sharing_ranks()
        if ranks is not None:
            ranks.agree(f"{owner}({self.extra_repr()})", x.device)
        elif self.uses_batch_statistics() and x.shape[0] * x.shape[2] * x.shape[3] <= 1:
            raise ValueError(
                f"{owner}: expected more than 1 value per channel when training, got input shape {tuple(x.shape)}; "
                "use a larger batch, or call eval() or freeze_batch_norm()."
            )

    def check_parameters(self, x: Tensor) -> None:
        """Check that the parameters are where and what ``x`` is.

        Raises:
            RuntimeError: Devices differ.
            TypeError: Dtypes differ. Narrow inputs with float32 parameters are how autocast runs the layer.
        """
        allowed = {x.dtype} if x.dtype in STATISTICS_DTYPES else {x.dtype, torch.float32}
        owner = type(self).__name__
        for parameter in self.parameters():
            if parameter.device != x.device:
                raise RuntimeError(
                    f"{owner}: the input is on {x.device}, but the layer's parameters are on {parameter.device}; move "
                    "one of them with .to(device)."
                )
            if parameter.dtype not in allowed:
                raise TypeError(
                    f"{owner}: the input is {x.dtype}, but the layer's parameters are {parameter.dtype}; convert one "
                    "of them with .to(dtype), or use torch.autocast."
                )

    def update(self, x: Tensor) -> Tensor:
        """Compute the layer on a checked input, autocast already applied."""
        raise NotImplementedError(f"{type(self).__name__} must define update().")

    def forward(self, x: Tensor) -> Tensor:
        """Update the segments of a feature map.

        Args:
            x: ``(B, N, H, W)``; float64, float32, bfloat16 or float16; any strides. Not modified.

        Returns:
            ``(B, N, H, W)`` in the memory format of ``x`` and its dtype, or autocast's: under autocast the state is
            kept in the autocast dtype, parameters and statistics in float32.

        Raises:
            ValueError: Rank, channel count or size do not fit; one value per channel in training.
            TypeError: The dtype is not floating, or not that of the parameters.
            RuntimeError: The batch norms of the layer are in mixed modes, or no kernel was built for the device.
        """
        self.check_input(x)
        kind = x.device.type
        if kind == "meta" or not torch.is_autocast_enabled(kind):
            self.check_parameters(x)
            return self.update(x)
        # As autocast does with convolutions: float64 stays.
        narrow = x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(kind))
        self.check_parameters(narrow)
        with torch.autocast(kind, enabled=False):
            return self.update(narrow)

    def extra_repr(self) -> str:
        """Sizes, and the options that differ from their defaults."""
        text = f"{self.channels}, segments={self.segments}, expansion={self.expansion}, units={self.num_units}"
        defaults = {"shortcut": False, "gradual": True, "residual": True, "recompute": True}
        for name, default in defaults.items():
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return text if self.ranks is None else f"{text}, synchronized"

    def average_factor(self) -> float:
        """The weight of the newest batch in the running statistics; counts the batch.

        As in ``torch.nn.BatchNorm2d``: ``momentum``, or 1 / (batches seen) for None.
        """
        self.num_batches_tracked.add_(1)
        if self.momentum is not None:
            return self.momentum
        return 1.0 / float(self.num_batches_tracked)
