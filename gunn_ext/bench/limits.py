"""What the device can do, measured in the same run: a large matrix product and a large copy."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gunn_ext.analysis.performance import H200, DeviceLimits, cpu_limits
from gunn_ext.bench.timing import clock_for

_RUNS = 5


@dataclass(frozen=True)
class Peak:
    """The best of a few runs.

    Attributes:
        gflops: Of a square matrix product in one dtype.
        gbps: Of a copy, bytes read and written.
    """

    gflops: float
    gbps: float


def measure_peak(device: str, dtype: torch.dtype, *, reduced: bool = False) -> Peak:
    """Measure both on ``device``; ``reduced`` takes small operands, whose figures say nothing."""
    cuda = device == "cuda"
    side = 64 if reduced else 8192 if cuda else 2048
    elements = 2**12 if reduced else 2**28 if cuda else 2**26
    clock = clock_for(device)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = min(clock(lambda: a @ b) for _ in range(_RUNS))
    source = torch.zeros(elements, device=device)
    target = torch.empty_like(source)
    copy = min(clock(lambda: target.copy_(source)) for _ in range(_RUNS))
    return Peak(gflops=2.0 * side**3 / product / 1e6, gbps=2.0 * 4 * elements / copy / 1e6)


def limits_for(device: str, peak: Peak, threads: int) -> DeviceLimits | None:
    """Limits to predict with: of a GPU that has a preset the preset, of a CPU what was measured; else None."""
    if device == "cpu":
        return cpu_limits(1e9 * peak.gflops, 1e9 * peak.gbps, threads)
    return H200 if H200.name in torch.cuda.get_device_name() else None
