"""Time the three GUNN-15 layers on the CPU: fused, eager per segment, and simultaneous (SUNN) as grouped convolutions.

    python benchmarks/layers.py --batch 16 --threads 2 --json benchmarks/results/layers.json

Each layer is verified before it is timed. Peers take turns within one run, so that they see the same machine.
GFLOP/s count algorithmic work: 2 B H W (K N^2 + 9 K^2 s N + K s N + N^2) forward, three times that for a training pass
(forward, and two products of that size in the backward). Recomputation is work, but not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from environment import environment
from torch import Tensor

from gunn_ext import GunnLayer, ReferenceGunnLayer
from gunn_ext.parameters import StackedLayer

LAYERS = {"240x32x32/P20": (240, 20, 32), "300x16x16/P25": (300, 25, 16), "360x8x8/P30": (360, 30, 8)}
PEERS = {
    "ours": (GunnLayer, {}),
    "ours, recompute=False": (GunnLayer, {"recompute": False}),
    "eager": (ReferenceGunnLayer, {}),
    "sunn NCHW": (GunnLayer, {"gradual": False}),
    "sunn NHWC": (GunnLayer, {"gradual": False}),
}
EXPANSION = 2


def flops(channels: int, segments: int, pixels: int) -> float:
    """Of one forward pass with projection shortcut (multiplication and addition counted apart)."""
    width = channels // segments
    per_pixel = EXPANSION * channels**2 + 9 * EXPANSION**2 * width * channels + EXPANSION * width * channels
    return 2.0 * pixels * (per_pixel + channels**2)


def relative_error(ours: Tensor, oracle: Tensor) -> float:
    return ((ours.double() - oracle).norm() / oracle.norm()).item()


def verify(channels: int, segments: int, size: int) -> float:
    """Compare with the reference in float64, training and evaluation; return the share of the forward tolerance used.

    Forward: at most twice the error of the reference in float32, plus the unit roundoff. Gradients: at these sizes a
    ReLU or two lands on the other side of 0 than in float64, in any implementation, which costs up to 3e-3; here they
    are held to 1e-2, and in the tests, on values without such flips, to the rule.
    """
    torch.manual_seed(0)
    state = ReferenceGunnLayer(channels, segments, EXPANSION, shortcut=True).state_dict()
    x, grad = torch.randn(2, 1, channels, size, size).unbind()

    def run(kind: type[StackedLayer], dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        layer = kind(channels, segments, EXPANSION, shortcut=True, dtype=dtype)
        layer.load_state_dict(state)
        inputs = x.to(dtype, copy=True).requires_grad_()
        y = layer(inputs)
        y.backward(grad.to(dtype))
        gradients = {"x": inputs.grad} | {name: p.grad for name, p in layer.named_parameters()}
        return {"training": y.detach(), "evaluation": layer.eval()(inputs).detach()}, gradients

    ours, our_gradients = run(GunnLayer, torch.float32)
    plain, _ = run(ReferenceGunnLayer, torch.float32)
    oracle, oracle_gradients = run(ReferenceGunnLayer, torch.float64)
    floor = torch.finfo(torch.float32).eps / 2
    shares = {
        mode: relative_error(ours[mode], y) / (2 * relative_error(plain[mode], y) + floor) for mode, y in oracle.items()
    }
    if max(shares.values()) > 1:
        raise SystemExit(f"wrong results, nothing timed: forward error over tolerance {shares}")
    for name, gradient in oracle_gradients.items():
        error = relative_error(our_gradients[name], gradient)
        if error > 1e-2:
            raise SystemExit(f"wrong results, nothing timed: gradient of {name} has relative error {error:.1e}")
    return max(shares.values())


def passes(channels: int, segments: int, size: int, batch: int) -> dict[tuple[str, str], Callable[[], object]]:
    """What is timed, by pass and peer."""
    torch.manual_seed(0)
    x, grad = torch.randn(2, batch, channels, size, size).unbind()
    timed: dict[tuple[str, str], Callable[[], object]] = {}
    for peer, (kind, options) in PEERS.items():
        layout = torch.channels_last if peer.endswith("NHWC") else torch.contiguous_format
        inputs = x.contiguous(memory_format=layout).requires_grad_()
        output_grad = grad.contiguous(memory_format=layout)
        trained = kind(channels, segments, EXPANSION, shortcut=True, **options)
        evaluated = kind(channels, segments, EXPANSION, shortcut=True, **options).eval()

        def train(layer=trained, inputs=inputs, output_grad=output_grad):
            inputs.grad = None
            layer.zero_grad(set_to_none=True)
            layer(inputs).backward(output_grad)

        @torch.no_grad()
        def evaluate(layer=evaluated, inputs=inputs):
            layer(inputs)

        timed["train", peer] = train
        if "recompute" not in options:
            timed["eval", peer] = evaluate
    return timed


def measure(timed: dict[tuple[str, str], Callable[[], object]], repeats: int, warm_up: int = 2):
    """Milliseconds of each, taken in turn."""
    times: dict[tuple[str, str], list[float]] = {key: [] for key in timed}
    for repeat in range(warm_up + repeats):
        for key, function in timed.items():
            start = time.perf_counter()
            function()
            if repeat >= warm_up:
                times[key].append(1e3 * (time.perf_counter() - start))
    return times


def summary(milliseconds: list[float], work: float) -> dict[str, float]:
    low, *_, high = statistics.quantiles(milliseconds, n=5, method="inclusive")
    median = statistics.median(milliseconds)
    figures = {"ms": median, "ms_20": low, "ms_80": high, "ms_min": min(milliseconds), "gflops": work / median / 1e6}
    return {name: round(value, 4) for name, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the GUNN-15 layers on the CPU against their peers.")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=9, help="timed rounds, at least 2 (default: 9)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the rows to this file")
    args = parser.parse_args()
    if args.repeats < 2 or args.batch < 1 or args.threads < 1:
        parser.error("--repeats must be at least 2, --batch and --threads at least 1")
    torch.set_num_threads(args.threads)
    facts = environment()
    print(", ".join(f"{name} {value}" for name, value in facts.items()), f"threads {args.threads}", sep=", ")
    rows = []
    for name, (channels, segments, size) in LAYERS.items():
        share = verify(channels, segments, size)
        times = measure(passes(channels, segments, size, args.batch), args.repeats)
        forward = flops(channels, segments, args.batch * size * size)
        found = {key: summary(value, forward * (3 if key[0] == "train" else 1)) for key, value in times.items()}
        print(f"\nlayer={name} batch={args.batch} dtype=float32  max err {share:.1f} of tolerance")
        for (kind, peer), figures in sorted(found.items(), reverse=True, key=lambda item: item[0][0]):
            print(
                f"  {kind:5} {peer:22} {figures['ms']:8.2f} ms [{figures['ms_20']:.2f} {figures['ms_80']:.2f}]"
                f" min {figures['ms_min']:.2f}  {figures['gflops']:6.1f} GFLOP/s"
            )
            rows.append(
                {"layer": name, "pass": kind, "peer": peer, "batch": args.batch, "threads": args.threads}
                | {"dtype": "float32", **figures, "share_of_tolerance": round(share, 3), **facts}
            )
        for kind in ("train", "eval"):
            ours, eager = found[kind, "ours"]["ms"], found[kind, "eager"]["ms"]
            sunn = min(found[kind, peer]["ms"] for peer in PEERS if peer.startswith("sunn"))
            print(f"  {kind:5} eager/ours {eager / ours:.2f}  ours/sunn {ours / sunn:.2f} (best format)")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
