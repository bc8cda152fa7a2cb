"""The GUNN layer in plain PyTorch: slow, any dtype, and as close to the paper's formulas as code can be.

It is the oracle of the tests, the fallback where no kernel serves, and the documentation of what the kernels compute.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gunn_ext.parameters import STATISTICS_DTYPES, StackedBatchNorm, StackedConv, StackedLayer, Unit
from gunn_ext.ranks import batch_norm


def memory_format_of(x: Tensor) -> torch.memory_format:
    """``channels_last`` where ``x`` is laid out so and not contiguous as well, else ``contiguous_format``."""
    nhwc = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if nhwc else torch.contiguous_format


class _Pass:
    """One forward pass: carries the running average's factor, so that it is taken once for the whole layer."""

    def __init__(self, layer: StackedLayer, factor: float) -> None:
        self.eps = layer.eps
        self.factor = factor
        self.ranks = layer.sharing_ranks()

    def batch_norm(self, z: Tensor, bn: StackedBatchNorm, i: int) -> Tensor:
        wide = z.dtype if z.dtype in STATISTICS_DTYPES else torch.float32
        mean, var = bn.running_mean[i], bn.running_var[i]
        if not bn.training:
            mean, var = mean.to(wide), var.to(wide)
        elif mean.dtype != wide:
            mean, var = mean.to(wide), var.to(wide)  # copies: written back below
        weight, bias = bn.weight[i].to(wide), bn.bias[i].to(wide)
        out = batch_norm(z.to(wide), mean, var, weight, bias, bn.training, self.factor, self.eps, self.ranks)
        if bn.training and bn.running_mean.dtype != wide:
            with torch.no_grad():
                bn.running_mean[i].copy_(mean)
                bn.running_var[i].copy_(var)
        return out.to(z.dtype)

    @staticmethod
    def convolve(x: Tensor, conv: StackedConv, i: int) -> Tensor:
        weight = conv.weight[i].to(x.dtype)
        if weight.dim() == 2:
            return F.conv2d(x, weight[:, :, None, None])
        return F.conv2d(x, weight, padding=1)

    def unit(self, x: Tensor, unit: Unit, i: int) -> Tensor:
        h = F.relu(self.batch_norm(self.convolve(x, unit.reduce, i), unit.reduce_bn, i))
        h = F.relu(self.batch_norm(self.convolve(h, unit.spatial, i), unit.spatial_bn, i))
        out = self.batch_norm(self.convolve(h, unit.project, i), unit.project_bn, i)
        if unit.shortcut is not None and unit.shortcut_bn is not None:
            out = out + self.batch_norm(self.convolve(x, unit.shortcut, i), unit.shortcut_bn, i)
        return out

    def update(self, state: Tensor, layer: StackedLayer, i: int) -> Tensor:
        """U_i of the paper's equation 5: the M stacked units of segment i."""
        first, *others = layer.unit_list()
        h = self.unit(state, first, i)
        for unit in others:
            h = self.unit(h, unit, i) + h
        return h


def reference_layer(x: Tensor, layer: StackedLayer) -> Tensor:
    """Update the segments of ``x`` with the parameters of ``layer`` (Qiao et al. 2018, eq. 4-5).

    Args:
        x: Feature map ``(B, N, H, W)``, any floating dtype and strides. Not modified.
        layer: Holds parameters, options and batch-norm modes; its running statistics are updated in training.

    Returns:
        ``(B, N, H, W)``, dtype and memory format of ``x``.
    """
    this_pass = _Pass(layer, layer.average_factor() if layer.uses_batch_statistics() else 0.0)
    segments = list(x.split(layer.width, dim=1))
    updated: list[Tensor] = []
    for i, segment in enumerate(segments):
        # Gradual: the segments written back so far are seen by this one. Simultaneous: all see the original x.
        state = torch.cat(updated + segments[i:], dim=1) if layer.gradual else x
        update = this_pass.update(state, layer, i)
        updated.append(segment + update if layer.residual else update)
    return torch.cat(updated, dim=1).contiguous(memory_format=memory_format_of(x))


class ReferenceGunnLayer(StackedLayer):
    """`GunnLayer` in plain PyTorch, segment by segment: same constructor, same state dict, any dtype."""

    __doc__ = (__doc__ or "") + "\n\n" + (StackedLayer.__doc__ or "").split("\n\n", 1)[1]

    def update(self, x: Tensor) -> Tensor:
        """Compute the layer on a checked input, autocast already applied."""
        return reference_layer(x, self)
