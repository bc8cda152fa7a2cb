"""Nets of others to compare whole networks with, from torch's own layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def _conv(fan_in: int, fan_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(fan_in, fan_out, kernel, stride, kernel // 2, groups=groups, bias=False)


def _conv_bn(fan_in: int, fan_out: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [_conv(fan_in, fan_out, kernel, stride, groups), nn.BatchNorm2d(fan_out)]


def _bn_relu(channels: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(channels), nn.ReLU()]


class _Sum(nn.Module):
    """Branch plus shortcut, then perhaps a ReLU."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.branch, self.shortcut, self.after = branch, shortcut, after

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.after(self.branch(x) + self.shortcut(x))
        return out


class _Dense(nn.Module):
    """Input and branch, beside each other."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.branch(x)], 1)


def _head(channels: int, classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]


def _bottlenecks(
    stem: Iterable[nn.Module], stages: Iterable[tuple[int, int, int]], first: int, groups: int, classes: int
) -> nn.Sequential:
    """Residual bottlenecks; each stage is (blocks, inner channels, outer channels), the first without stride."""
    layers, channels = list(stem), first
    for stage, (blocks, inner, outer) in enumerate(stages):
        for block in range(blocks):
            stride = 2 if block == 0 and stage > 0 else 1
            branch = [*_conv_bn(channels, inner, 1), nn.ReLU(), *_conv_bn(inner, inner, 3, stride, groups), nn.ReLU()]
            branch += _conv_bn(inner, outer, 1)
            same = channels == outer and stride == 1
            shortcut = nn.Identity() if same else nn.Sequential(*_conv_bn(channels, outer, 1, stride))
            layers.append(_Sum(nn.Sequential(*branch), shortcut, nn.ReLU()))
            channels = outer
    return nn.Sequential(*layers, *_head(channels, classes))


def resnext29(classes: int = 10, groups: int = 16, width: int = 64) -> nn.Module:
    """ResNeXt-29, 16x64d (Xie et al. 2017)."""
    stages = [(3, groups * width * 2**i, 256 * 2**i) for i in range(3)]
    return _bottlenecks([*_conv_bn(3, 64, 3), nn.ReLU()], stages, 64, groups, classes)


def resnet50(classes: int = 1000) -> nn.Module:
    """ResNet-50 (He et al. 2016), the stride at the 3x3."""
    stem = [*_conv_bn(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    stages = [(blocks, 64 * 2**i, 256 * 2**i) for i, blocks in enumerate((3, 4, 6, 3))]
    return _bottlenecks(stem, stages, 64, 1, classes)


def wide_resnet28(classes: int = 10, widen: int = 10) -> nn.Module:
    """WideResNet-28-10 (Zagoruyko & Komodakis 2016), without dropout."""
    layers: list[nn.Module] = [_conv(3, 16, 3)]
    channels = 16
    for stage in range(3):
        outer = 16 * 2**stage * widen
        for block in range(4):
            stride = 2 if block == 0 and stage > 0 else 1
            branch = [nn.ReLU(), _conv(channels, outer, 3, stride), *_bn_relu(outer), _conv(outer, outer, 3)]
            if block == 0:  # batch norm and ReLU before both branches
                layers += _bn_relu(channels)
                layers.append(_Sum(nn.Sequential(*branch[1:]), _conv(channels, outer, 1, stride), nn.Identity()))
            else:
                inner = nn.Sequential(nn.BatchNorm2d(channels), *branch)
                layers.append(_Sum(inner, nn.Identity(), nn.Identity()))
            channels = outer
    return nn.Sequential(*layers, *_bn_relu(channels), *_head(channels, classes))


def densenet_bc(classes: int = 10, depth: int = 190, growth: int = 40) -> nn.Module:
    """DenseNet-BC with growth rate 40 and 190 layers (Huang et al. 2017), without dropout."""
    channels = 2 * growth
    layers: list[nn.Module] = [_conv(3, channels, 3)]
    for stage in range(3):
        for _ in range((depth - 4) // 6):
            branch = [*_bn_relu(channels), _conv(channels, 4 * growth, 1)]
            branch += [*_bn_relu(4 * growth), _conv(4 * growth, growth, 3)]
            layers.append(_Dense(nn.Sequential(*branch)))
            channels += growth
        if stage < 2:
            layers += [*_bn_relu(channels), _conv(channels, channels // 2, 1), nn.AvgPool2d(2)]
            channels //= 2
    return nn.Sequential(*layers, *_bn_relu(channels), *_head(channels, classes))


# Name: how to build it, classes, height and width of its images.
OTHERS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "resnext29-16x64d": (resnext29, 10, 32),
    "densenet-bc-190-k40": (densenet_bc, 10, 32),
    "wideresnet-28-10": (wide_resnet28, 10, 32),
    "resnet50": (resnet50, 1000, 224),
}
