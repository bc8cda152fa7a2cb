"""What the device can do, measured in the same run: a large matrix product and a large copy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from gunn_ext import ops
from gunn_ext.analysis.performance import H200, DeviceLimits, cpu_limits
from gunn_ext.bench.timing import Work, clock_for

_RUNS = 5


@dataclass(frozen=True)
class Peak:
    """The best of a few runs.

    Attributes:
        gflops: Of a square matrix product in one dtype.
        gbps: Of a copy, bytes read and written.
        register_gflops: Of float32 multiply-adds between a CPU's registers, which no kernel can exceed.
    """

    gflops: float
    gbps: float
    register_gflops: float | None = None


def measure_peak(device: str, dtype: torch.dtype, *, reduced: bool = False) -> Peak:
    """Measure both on ``device``; ``reduced`` takes small operands, whose figures say nothing."""
    cuda = device == "cuda"
    side = 64 if reduced else 8192 if cuda else 2048 if dtype == torch.float32 else 512
    elements = 2**12 if reduced else 2**28 if cuda else 2**26
    clock = clock_for(device)
    product = _product(side, device, dtype)
    seconds = min(clock(product) for _ in range(_RUNS)) / 1e3
    source = torch.zeros(elements, device=device)
    target = torch.empty_like(source)
    copied = min(clock(lambda: target.copy_(source)) for _ in range(_RUNS)) / 1e3
    registers = None
    if not cuda and dtype == torch.float32:
        rounds = 1000 if reduced else 2_000_000
        best = min(clock(lambda: ops.multiply_adds(rounds)) for _ in range(_RUNS)) / 1e3
        registers = rounds * ops.multiply_adds(1) / best / 1e9
    return Peak(2.0 * side**3 / seconds / 1e9, 2.0 * 4 * elements / copied / 1e9, registers)


def _product(side: int, device: str, dtype: torch.dtype) -> Work:
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    if device == "cuda" and dtype == torch.float32:
        # As a convolution, which may run as TF32 where a matrix product may not.
        image, weight = a.t()[None, :, :, None].to(memory_format=torch.channels_last), b[:, :, None, None]
        return lambda: F.conv2d(image, weight)
    return lambda: a @ b


def limits_of_cpu(peak: Peak, threads: int) -> DeviceLimits:
    """Limits to predict with, from what was measured in float32 with so many threads."""
    return cpu_limits(1e9 * peak.gflops, 1e9 * peak.gbps, threads)


def limits_of_gpu() -> DeviceLimits | None:
    """Limits to predict with: the preset of this GPU, if it has one."""
    return H200 if H200.name in torch.cuda.get_device_name() else None
