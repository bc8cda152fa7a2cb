"""Time the layers of GUNN-15 on a GPU against eager per-segment GUNN and SUNN, and say where our time goes.

    python benchmarks/gpu_layers.py --json rows.json --profile kernels.txt --minutes 3

Ours, in torch's own launches and in a CUDA graph, in both memory formats; SUNN as grouped convolutions, graphed, in
both formats; eager graphed too. Every peer is verified before it is timed, and what could not run has an error in its
row instead of a figure. The cache is flushed between repetitions. Rows are written as they come, the most important
first, until the minutes are over.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from environment import gpu_environment, gpu_state
from layers import EXPANSION, LAYERS, flops
from torch import Tensor, nn

from gunn_ext import GunnLayer, ReferenceGunnLayer, ops

FLUSHED_BYTES = 256 * 1024**2
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
# Name: constructor, its options, in a graph. The name of ours says where it asks for another driver.
PEERS = {
    "ours graphed": (GunnLayer, {}, True),
    "ours graphed, persistent": (GunnLayer, {}, True),
    "sunn graphed": (GunnLayer, {"gradual": False}, True),
    "ours": (GunnLayer, {}, False),
    "ours graphed, recompute=False": (GunnLayer, {"recompute": False}, True),
    "eager graphed": (ReferenceGunnLayer, {}, True),
    "eager": (ReferenceGunnLayer, {}, False),
}


class Step:
    """One pass of a layer: evaluation, or training forward and backward; autocast for narrow dtypes."""

    def __init__(self, layer: nn.Module, x: Tensor, grad: Tensor, dtype: torch.dtype, training: bool) -> None:
        self.layer = layer.train(training)
        self.x, self.grad, self.dtype, self.training = x, grad, dtype, training
        # The input of a layer inside a network is already in autocast's dtype.
        self.inputs = x.to(dtype).requires_grad_(training)

    def __call__(self) -> Tensor:
        kind = self.x.device.type
        with (
            torch.autocast(kind, self.dtype, enabled=self.dtype != torch.float32),
            torch.set_grad_enabled(self.training),
        ):
            y = self.layer(self.inputs)
        if self.training:
            torch.autograd.grad(y, (self.inputs, *self.layer.parameters()), self.grad.to(y.dtype))
        return y.detach()

    def forward(self) -> Tensor:
        """Only the forward, as it is timed."""
        training, self.training = self.training, False
        try:
            return self()
        finally:
            self.training = training


def graphed(work: Callable[[], Tensor]) -> Callable[[], None]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def milliseconds(work: Callable[[], object], least_seconds: float = 0.4, most: int = 60) -> list[float]:
    """20 %, median and 80 % of single repetitions, the cache flushed before each."""
    flush = torch.empty(FLUSHED_BYTES // 4, device="cuda")
    for _ in range(3):
        work()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 10 or (len(times) < most and time.perf_counter() - began < least_seconds):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    ordered = sorted(times)
    return [ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.5, 0.8)]


def relative_error(ours: Tensor, expected: Tensor) -> float:
    return ((ours.double() - expected).norm() / expected.norm()).item()


def verified(layer: nn.Module, x: Tensor, dtype: torch.dtype, training: bool) -> float:
    """Relative error of the forward against the reference in float64 on four images, held to that dtype's roundoff."""
    few = x[:4]
    oracle = ReferenceGunnLayer(**{**layer.arguments(), "recompute": True}).to(x.device)
    oracle.load_state_dict(layer.state_dict())
    oracle = oracle.double().train(training)
    with torch.no_grad():
        expected = oracle(few.to(dtype).double())
    step = Step(copy.deepcopy(layer), few, few, dtype, training)
    error = relative_error(step.forward(), expected)
    # TF32, which torch's convolutions use by default, has the mantissa of float16.
    allowed = 40 * torch.finfo(torch.float16 if dtype == torch.float32 else dtype).eps
    if not error < allowed:
        raise RuntimeError(f"wrong result: relative error {error:.1e}, allowed {allowed:.1e}")
    return error


def make(name: str, channels: int, segments: int) -> nn.Module:
    kind, options, _ = PEERS[name]
    torch.manual_seed(0)
    return kind(channels, segments, EXPANSION, shortcut=True, **options).cuda()


def time_peer(name: str, row: dict, shape: tuple[int, int, int], batch: int, dtype: torch.dtype) -> None:
    """Fill in one row."""
    channels, segments, size = shape
    training = row["pass"] == "training"
    os.environ["GUNN_CUDA_DRIVER"] = "persistent" if "persistent" in name else "staged"
    memory_format = FORMATS[row["format"]]
    layer = make(name, channels, segments)
    torch.manual_seed(1)
    x, grad = (
        torch.randn(batch, channels, size, size, device="cuda").contiguous(memory_format=memory_format)
        for _ in range(2)
    )
    row["relative_error"] = verified(layer, x, dtype, training)
    step = Step(layer, x, grad, dtype, training)
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    row["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    work = graphed(step) if PEERS[name][2] else step
    row["ms_20"], row["ms"], row["ms_80"] = milliseconds(work)
    work_flops = flops(channels, segments, batch * size * size) * (3 if training else 1)
    row["tflops"] = work_flops / row["ms"] / 1e9


def describe(row: dict) -> str:
    head = f"{row['layer']:16} {row['dtype']:9} {row['pass']:10} {row['format']} {row['peer']:30}"
    if "ms" not in row:
        return f"{head} {row['error']}"
    return f"{head} {row['ms']:8.3f} ms [{row['ms_20']:.3f} {row['ms_80']:.3f}] {row['tflops']:6.1f} TFLOP/s"


def profile(batch: int) -> str:
    """Where a training step of each layer spends its time, kernel by kernel."""
    text = []
    for label, (channels, segments, size) in LAYERS.items():
        layer = make("ours", channels, segments)
        x = torch.randn(batch, channels, size, size, device="cuda").contiguous(memory_format=torch.channels_last)
        step = Step(layer, x, x, torch.bfloat16, True)
        for _ in range(3):
            step()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
            step()
            torch.cuda.synchronize()
        table = recorded.key_averages().table(sort_by="cuda_time_total", row_limit=20, max_name_column_width=70)
        text.append(f"== {label}, bfloat16, channels_last, training step\n{table}")
    return "\n".join(text)


def main() -> None:
    """Write rows and profile; see the module's head."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--profile", type=Path)
    arguments = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    end = time.monotonic() + 60 * arguments.minutes
    where = gpu_environment() | {"backend": ops.backend("cuda", torch.bfloat16), "before": gpu_state()}
    rows: list[dict] = []
    skipped = 0
    if arguments.profile:
        arguments.profile.write_text(profile(arguments.batch))
    cells = itertools.product(("bfloat16", "float32"), ("training", "evaluation"), PEERS, ("nhwc", "nchw"), LAYERS)
    for dtype, mode, peer, layout, label in cells:
        if time.monotonic() > end:
            skipped += 1
            continue
        row = {"layer": label, "batch": arguments.batch, "dtype": dtype, "pass": mode, "format": layout, "peer": peer}
        try:
            time_peer(peer, row, LAYERS[label], arguments.batch, getattr(torch, dtype))
        except Exception as error:  # a peer that fails must not take the others with it
            row["error"] = f"{type(error).__name__}: {error}"[:500]
            torch.cuda.synchronize()
        rows.append(row)
        print(describe(row), flush=True)
        arguments.json.write_text(json.dumps({"environment": where, "rows": rows}, indent=1) + "\n")
    if skipped:
        print(f"{skipped} rows were not reached in {arguments.minutes} minutes")


if __name__ == "__main__":
    main()
