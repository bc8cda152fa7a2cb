"""SUNN, the simultaneous baseline: the layer with l = 1, as three grouped convolutions on the stacked parameters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gunn_ext.parameters import STATISTICS_DTYPES, StackedBatchNorm, StackedLayer
from gunn_ext.ranks import Ranks, batch_norm
from gunn_ext.reference import memory_format_of


def _batch_norm(z: Tensor, bn: StackedBatchNorm, factor: float, eps: float, ranks: Ranks | None) -> Tensor:
    wide = z.dtype if z.dtype in STATISTICS_DTYPES else torch.float32
    mean, var = bn.running_mean.view(-1), bn.running_var.view(-1)
    used_mean, used_var = mean.to(wide), var.to(wide)
    weight, bias = bn.weight.reshape(-1).to(wide), bn.bias.reshape(-1).to(wide)
    out = batch_norm(z.to(wide), used_mean, used_var, weight, bias, bn.training, factor, eps, ranks)
    if bn.training and mean.dtype != wide:
        mean.copy_(used_mean)
        var.copy_(used_var)
    return out.to(z.dtype)


def simultaneous_layer(x: Tensor, layer: StackedLayer) -> Tensor:
    """Update all segments of ``x`` from the original ``x``: SUNN (Qiao et al. 2018, section 5.1).

    Args:
        x: Feature map ``(B, N, H, W)``, any floating dtype and strides. Not modified.
        layer: Holds parameters, options and batch-norm modes; its running statistics are updated in training.

    Returns:
        ``(B, N, H, W)``, dtype and memory format of ``x``.
    """
    factor = layer.average_factor() if layer.uses_batch_statistics() else 0.0
    ranks = layer.sharing_ranks()
    segments, width, hidden = layer.segments, layer.width, layer.hidden

    def norm(z: Tensor, bn: StackedBatchNorm) -> Tensor:
        return _batch_norm(z, bn, factor, layer.eps, ranks)

    out = x
    for m, unit in enumerate(layer.unit_list()):
        rows = unit.reduce.weight.reshape(segments * hidden, -1)
        if unit.shortcut is not None:
            rows = torch.cat([rows, unit.shortcut.weight.reshape(segments * width, -1)])
        groups = 1 if m == 0 else segments
        z = F.conv2d(out, rows.to(x.dtype)[:, :, None, None], groups=groups)
        h = F.relu(norm(z[:, : segments * hidden], unit.reduce_bn))
        spatial = unit.spatial.weight.reshape(segments * hidden, hidden, 3, 3).to(x.dtype)
        h = F.relu(norm(F.conv2d(h, spatial, padding=1, groups=segments), unit.spatial_bn))
        project = unit.project.weight.reshape(segments * width, hidden, 1, 1).to(x.dtype)
        update = norm(F.conv2d(h, project, groups=segments), unit.project_bn)
        if unit.shortcut_bn is not None:
            update = update + norm(z[:, segments * hidden :], unit.shortcut_bn)
        out = update if m == 0 else update + out
    out = x + out if layer.residual else out
    return out.contiguous(memory_format=memory_format_of(x))
