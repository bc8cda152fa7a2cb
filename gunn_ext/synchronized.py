"""Synchronised batch norm: the gradual layer in steps with an exchange between them, and the conversion of models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gunn_ext import ops
from gunn_ext.parameters import StackedLayer
from gunn_ext.ranks import Ranks, SharedStatistics, shared_batch_norm


def _rows(static: ops.LayerOptions, channels: int, unit: int) -> dict[str, slice]:
    """The rows that each batch norm of a unit has in the statistics of a segment."""
    segments, expansion, _, shortcut, *_ = static
    s = channels // segments
    k = expansion * s
    sizes = {"reduce": k, "shortcut": s if shortcut and unit == 0 else 0, "spatial": k, "project": s}
    start = 0 if unit == 0 else 2 * k + s + (s if shortcut else 0) + (unit - 1) * (2 * k + s)
    rows = {}
    for name, size in sizes.items():
        rows[name] = slice(start, start + size)
        start += size
    return rows


def _forward(
    x: Tensor, parameters: list[Tensor], static: ops.LayerOptions, tensor_float: bool, shared: SharedStatistics
) -> tuple[Tensor, Tensor]:
    """Output and statistics of all ranks."""
    steps = ops.ForwardSteps(x, parameters, static, tensor_float)
    steps.step("begin")
    for segment in range(static[0]):
        for unit in range(static[2]):
            rows = _rows(static, x.shape[1], unit)
            # The shortcut's rows follow the reduce stage's, which computes both.
            left = {
                "reduce": slice(rows["reduce"].start, rows["shortcut"].stop),
                "spatial": rows["spatial"],
                "project": rows["project"],
            }
            for name, where in left.items():
                steps.step(name, segment, unit)
                own = steps.statistics[:, segment, where]
                own.copy_(shared.combine(own))
    steps.step("finish")
    return steps.y, steps.statistics


class _SynchronizedFunction(torch.autograd.Function):
    """Ties y to x and the parameters. Saves x, y, the parameters and the statistics of all ranks."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, statistics: Tensor, static: ops.LayerOptions, mode: tuple, *parameters: Tensor
    ) -> Tensor:
        ctx.static = static
        ctx.tensor_float, ctx.shared = mode
        ctx.save_for_backward(x, y, statistics, *parameters)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, y, statistics, *parameters = ctx.saved_tensors
        need_input, need_parameters = ctx.needs_input_grad[0], ctx.needs_input_grad[5:]
        steps = ops.BackwardSteps(
            grad_y,
            x,
            y,
            parameters,
            statistics,
            ctx.static,
            ctx.tensor_float,
            need_input=need_input,
            need_parameters=any(need_parameters),
        )
        steps.step("begin")
        for segment in reversed(range(ctx.static[0])):
            for unit in reversed(range(ctx.static[2])):
                rows = _rows(ctx.static, x.shape[1], unit)
                left = {
                    "project": [rows["project"], rows["shortcut"]],
                    "spatial": [rows["spatial"]],
                    "reduce": [rows["reduce"]],
                }
                for name, where in left.items():
                    steps.step(name, segment, unit)
                    own = [steps.sums[:, segment, part] for part in where]
                    # The next step divides by this rank's count where that of all ranks is due.
                    total = ctx.shared.sum(torch.cat(own, dim=1)) * ctx.shared.share
                    for part, new in zip(own, total.split([part.shape[1] for part in own], dim=1), strict=True):
                        part.copy_(new)
                steps.step("input", segment, unit)
        steps.step("finish")
        grad_x = steps.grad_x if need_input else None
        if not any(need_parameters):
            return grad_x, None, None, None, None, *(None for _ in parameters)
        wanted = [
            grad.to(p.dtype) if needed else None
            for grad, p, needed in zip(steps.grads, parameters, need_parameters, strict=True)
        ]
        return grad_x, None, None, None, None, *wanted


@torch.compiler.disable
def synchronized_layer(x: Tensor, layer: StackedLayer, ranks: Ranks) -> Tensor:
    """Update the segments of ``x`` with batch statistics over the batches of all ranks.

    Runs the steps of the kernels with an exchange after each stage, three for every segment and unit each way. Keeps
    for the backward what `ops.gunn_layer` keeps when it recomputes, whatever ``layer.recompute`` says.

    Args:
        x: Feature map ``(B, N, H, W)``, checked by the layer; B, H and W may differ between ranks.
        layer: In training mode.
        ranks: Who shares.

    Returns:
        ``(B, N, H, W)``, dtype and memory format of ``x``.

    Raises:
        RuntimeError: The ranks run different layers, or no kernel serves the device.
    """
    parameters = ops.parameter_list(layer)
    ops.check_call(x, parameters)
    static = ops.layer_options(layer)
    mode = ops.may_use_tensor_float(x), ranks.share(x.shape[0] * x.shape[2] * x.shape[3], x.device)
    with torch.no_grad():
        y, statistics = _forward(x, parameters, static, *mode)
    ops.update_running_statistics(layer, statistics, mode[1].total)
    if not torch.is_grad_enabled():
        return y
    return _SynchronizedFunction.apply(x, y, statistics, static, mode, *parameters)


class SynchronizedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """``torch.nn.BatchNorm1d``, ``2d`` and ``3d`` with batch statistics over all ranks, on CPUs as on GPUs.

    Made by `convert_sync_batchnorm`. In evaluation mode, and with one process, it is ordinary batch norm.
    """

    ranks: Ranks

    @classmethod
    def of(cls, module: nn.modules.batchnorm._BatchNorm, ranks: Ranks) -> SynchronizedBatchNorm:
        """The synchronised batch norm with the options, parameters, buffers and mode of ``module``."""
        made = cls(module.num_features, module.eps, module.momentum, False, False)
        made.affine, made.track_running_stats, made.training = (
            module.affine,
            module.track_running_stats,
            module.training,
        )
        made.weight, made.bias = module.weight, module.bias
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            made.register_buffer(name, getattr(module, name))
        made.ranks = ranks
        return made

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2 or input.shape[1] != self.num_features:
            raise ValueError(
                f"SynchronizedBatchNorm: expected (B, {self.num_features}, …), got shape {tuple(input.shape)}."
            )

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``input (B, C, …)``.

        Raises:
            ValueError: The shape does not fit, or this rank has an empty batch.
            RuntimeError: In training: there is no process group, or the ranks run different modules.
        """
        self._check_input_dim(input)
        name = type(self).__name__
        ranks = self.ranks.present(name) if self.training else None
        if ranks is None:
            return super().forward(input)
        ranks.agree(f"{name}({self.extra_repr()})", input.device)
        factor = 0.0 if self.momentum is None else self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked)
        like: dict[str, Any] = {"device": input.device, "dtype": torch.promote_types(input.dtype, torch.float32)}
        weight = torch.ones(self.num_features, **like) if self.weight is None else self.weight
        bias = torch.zeros(self.num_features, **like) if self.bias is None else self.bias
        return shared_batch_norm(input, self.running_mean, self.running_var, weight, bias, factor, self.eps, ranks)


def convert_sync_batchnorm(module: nn.Module, process_group: Any = None) -> nn.Module:
    """Let every batch norm of a model, those within GUNN layers included, take its statistics over all ranks.

    What ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` is to ordinary models: call it before the model is wrapped
    in DistributedDataParallel, and before or after ``init_process_group``. Ordinary batch norms become
    `SynchronizedBatchNorm`, which runs on CPUs too; batch norms that torch has converted already stay what they are.

    Args:
        module: A model, a GUNN layer or a batch norm. Changed in place, unless it is a batch norm itself.
        process_group: Who shares; None is all processes.

    Returns:
        ``module``, or what replaces it. Parameters and buffers are the same tensors.

    Raises:
        TypeError: ``module`` is no module.
        ValueError: A lazy batch norm does not know its channels yet.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"convert_sync_batchnorm: expected a torch.nn.Module, got {type(module).__name__}.")
    return _convert(module, process_group, {})


def _convert(module: nn.Module, group: Any, done: dict[int, nn.Module]) -> nn.Module:
    if id(module) in done:  # shared between two places, and to stay so
        return done[id(module)]
    converted = module
    if isinstance(module, (StackedLayer, SynchronizedBatchNorm)):
        module.ranks = Ranks(group)
    elif isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, nn.SyncBatchNorm):
        if isinstance(module, nn.modules.lazy.LazyModuleMixin):
            raise ValueError(
                "convert_sync_batchnorm: a lazy batch norm does not know its channels yet; run one batch through the "
                "model first."
            )
        converted = SynchronizedBatchNorm.of(module, Ranks(group))
    done[id(module)] = converted
    for name, child in list(converted._modules.items()):
        if child is not None:
            setattr(converted, name, _convert(child, group, done))
    return converted
