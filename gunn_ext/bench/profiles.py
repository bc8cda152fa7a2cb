"""Where a pass of ours spends its time: kernel by kernel on a GPU, stage by stage on the CPU."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from gunn_ext import ops
from gunn_ext.analysis.performance import LayerSizes
from gunn_ext.bench.cases import Case, build
from gunn_ext.bench.contest import Settings
from gunn_ext.bench.peers import asking_for, peers_of
from gunn_ext.bench.steps import LayerStep
from gunn_ext.layers import GunnLayer

_RUNS = 3


def profile_layers(cases: Sequence[Case], settings: Settings) -> str:
    """A table for each layer: a training step on the GPU with each driver that is measured, or both passes on the CPU.

    A layer that fails has the error in place of its table.
    """
    batch, dtype = settings.batch, settings.dtypes[0]
    asked = (peer.driver for peer in peers_of(settings.device, settings.peers))
    drivers = list(dict.fromkeys(driver for driver in asked if driver)) if settings.device == "cuda" else [""]
    tables = []
    for case in cases:
        for driver in drivers:
            try:
                tables.append(_kernels(case, batch, dtype, driver) if driver else _stages(case, batch, dtype))
            except Exception as error:  # the rows that follow are worth more than this table
                tables.append(f"== {case.name} {driver}: {type(error).__name__}: {error}\n")
    return "\n".join(tables)


def _kernels(case: Case, batch: int, dtype: str, driver: str) -> str:
    torch.manual_seed(0)
    narrow = getattr(torch, dtype)
    layer = build(GunnLayer, case.sizes, device="cuda", dtype=torch.float64 if dtype == "float64" else torch.float32)
    shape = (batch, case.sizes.channels, case.sizes.size, case.sizes.size)
    x, grad = (torch.randn(shape, device="cuda").to(narrow, memory_format=torch.channels_last) for _ in range(2))
    step = LayerStep(layer, x, grad, training=True)
    with asking_for(driver):
        for _ in range(_RUNS):
            step()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
            step()
            torch.cuda.synchronize()
    table = recorded.key_averages().table(sort_by="cuda_time_total", row_limit=25, max_name_column_width=70)
    return f"== {case.name}, batch {batch}, {dtype}, channels_last, training step, {driver} driver asked for\n{table}"


def _stages(case: Case, batch: int, dtype: str) -> str:
    """The CPU kernels in steps, each timed; a whole pass runs the same stages without coming back in between."""
    torch.manual_seed(0)
    sizes = case.sizes
    layer = build(GunnLayer, sizes, dtype=getattr(torch, dtype))
    x, grad = (torch.randn(batch, sizes.channels, sizes.size, sizes.size, dtype=getattr(torch, dtype)) for _ in "xg")
    parameters, static = ops.parameter_list(layer), ops.layer_options(layer)
    best: dict[str, float] = {}
    for _ in range(_RUNS):
        spent: dict[str, float] = {}
        forward = ops.ForwardSteps(x, parameters, static)
        order = [(i, m) for i in range(sizes.segments) for m in range(sizes.units)]
        _timed(forward, "forward", ("reduce", "spatial", "project"), order, spent)
        backward = ops.BackwardSteps(grad, x, forward.y, parameters, forward.statistics, static)
        _timed(backward, "backward", ("project", "spatial", "reduce", "input"), order[::-1], spent)
        best = {name: min(seconds, best.get(name, seconds)) for name, seconds in spent.items()}
    total = sum(best.values())
    work = _work_of_stages(sizes, batch, x.element_size())
    lines = []
    for name, seconds in best.items():
        line = f"{name:18} {1e3 * seconds:9.3f} ms  {100 * seconds / total:5.1f} %"
        if name in work:
            flops, moved = work[name]
            line += f"  {flops / seconds / 1e9:8.1f} GFLOP/s  {moved / 1e6:9.1f} MB"
        lines.append(line)
    head = f"== {case.name}, batch {batch}, {dtype}, {torch.get_num_threads()} threads, in steps, best of {_RUNS}"
    return "\n".join([head, *lines, f"{'all':18} {1e3 * total:9.3f} ms", ""])


def _work_of_stages(sizes: LayerSizes, batch: int, element_size: int) -> dict[str, tuple[float, float]]:
    """FLOPs of each stage, its recomputation included, and the least bytes it moves, each of its maps once.

    3x3 convolutions count as direct ones.
    """
    k, s = sizes.hidden, sizes.width
    work: dict[str, tuple[float, float]] = {}
    for n, made in sizes.units_in_order():
        side = made - k
        stages = {  # multiply-adds of a pixel; channels of the maps read and written
            "forward reduce": (n * made, n + made),
            "forward spatial": (9 * k * k, 2 * k),
            "forward project": (k * s, k + s),
            "backward project": (n * made + 9 * k * k + k * s, n + made + 4 * k + 2 * s),
            "backward spatial": (2 * k * s, 2 * k + 2 * s + 2 * side),
            "backward reduce": (18 * k * k, 4 * k),
            "backward input": (2 * n * made, 3 * n + made + k),
        }
        for name, (products, channels) in stages.items():
            flops, moved = work.get(name, (0.0, 0.0))
            pixels = batch * sizes.size**2 * sizes.segments
            work[name] = flops + 2.0 * products * pixels, moved + 1.0 * channels * pixels * element_size
    return work


def _timed(
    steps: ops.ForwardSteps | ops.BackwardSteps,
    which: str,
    stages: Sequence[str],
    order: Sequence[tuple[int, int]],
    spent: dict[str, float],
) -> None:
    def step(name: str, segment: int = 0, unit: int = 0) -> None:
        start = time.perf_counter()
        steps.step(name, segment, unit)
        label = f"{which} {name}"
        spent[label] = spent.get(label, 0.0) + time.perf_counter() - start

    step("begin")
    for segment, unit in order:
        for name in stages:
            step(name, segment, unit)
    step("finish")
