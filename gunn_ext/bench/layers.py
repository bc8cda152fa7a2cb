"""``gunn bench layer`` and ``sweep``: layers against their peers."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from gunn_ext import ops
from gunn_ext.analysis.performance import DeviceLimits, LayerSizes, fused, persistent, simultaneous, staged
from gunn_ext.bench.cases import Case, build, custom_case
from gunn_ext.bench.contest import Contest, Entry, Settings
from gunn_ext.bench.memory import peak_bytes, saved_bytes
from gunn_ext.bench.peers import Peer, asking, asking_for, peers_of, served_by
from gunn_ext.bench.rows import Row
from gunn_ext.bench.steps import FORMATS, LayerStep
from gunn_ext.bench.timing import Work
from gunn_ext.bench.verify import Yardstick, initial_state
from gunn_ext.graph import Replay


def predicted_ms(
    peer: Peer, driver: str | None, sizes: LayerSizes, batch: int, dtype: str, which: str, limits: DeviceLimits | None
) -> float | None:
    """What the performance model says of a peer, where it says something."""
    if limits is None or dtype not in limits.peak_flops or peer.compiled or peer.checkpointed:
        return None
    if limits.launch > 0 and not peer.graphed:  # launches from the host are not in the model
        return None
    models = {"fused": fused, "staged": staged, "persistent": persistent}
    if peer.ours and driver in models:
        return 1e3 * models[driver](sizes, batch, dtype, limits, recompute=peer.recompute).seconds(which)
    if not peer.gradual and limits.launch > 0:
        return 1e3 * simultaneous(sizes, batch, dtype, limits).seconds(which)
    return None


class _Cell:
    """One layer in one dtype and pass: data and yardsticks that its contestants share."""

    def __init__(self, case: Case, settings: Settings, dtype: str, which: str, limits: DeviceLimits | None) -> None:
        self.case, self.settings, self.which, self.limits = case, settings, which, limits
        self.name, self.dtype, self.training = dtype, getattr(torch, dtype), which == "training"
        size = case.sizes.size
        torch.manual_seed(1)
        shape = (settings.batch, case.sizes.channels, size, size)
        self.x, self.grad = (torch.randn(shape, device=settings.device).to(self.dtype) for _ in range(2))
        self.state = initial_state(case.sizes, self.x)
        self.yardsticks: dict[bool, Yardstick] = {}

    def yardstick(self, gradual: bool) -> Yardstick:
        if gradual not in self.yardsticks:
            self.yardsticks[gradual] = Yardstick(self.case.sizes, self.state, self.x, self.grad, self.training, gradual)
        return self.yardsticks[gradual]

    def entries(self) -> list[Entry]:
        found = []
        peers = peers_of(self.settings.device, self.settings.peers)
        for peer, layout in itertools.product(peers, self.settings.formats):
            if self.training or not peer.only_training:
                row = self.row(peer, layout)
                found.append(Entry(row, functools.partial(self.prepare, peer, layout, row)))
        return found

    def row(self, peer: Peer, layout: str) -> Row:
        settings = self.settings
        return (
            {"layer": self.case.name}
            | asdict(self.case.sizes)
            | {"batch": settings.batch, "dtype": self.name, "pass": self.which, "peer": peer.name, "format": layout}
            | {"backend": "torch", "threads": settings.threads if settings.device == "cpu" else None}
        )

    def layer(self, peer: Peer) -> Any:
        wide = self.dtype if self.dtype == torch.float64 else torch.float32
        layer = build(
            peer.kind,
            self.case.sizes,
            gradual=peer.gradual,
            recompute=peer.recompute,
            device=self.settings.device,
            dtype=wide,
        )
        layer.load_state_dict(self.state)
        return layer.train(self.training)

    def prepare(self, peer: Peer, layout: str, row: Row) -> Work:
        """Build the peer, verify what will be timed, and note backend, memory and prediction."""
        layer = self.layer(peer)
        x, grad = (t.contiguous(memory_format=FORMATS[layout]) for t in (self.x, self.grad))
        call = torch.compile(layer, dynamic=False) if peer.compiled else None
        step = LayerStep(layer, x, grad, self.training, checkpointed=peer.checkpointed, call=call)
        with asking_for(peer.driver):
            if peer.ours:
                row["backend"] = ops.backend(x.device, self.dtype)
                row |= served_by(layer, x)
                if peer.driver and row["driver"] != peer.driver:
                    raise ValueError(f"the {peer.driver} driver does not take this layer; {row['driver']} would")
            size = (self.case.sizes, self.settings.batch, self.name, self.which)
            row["predicted_ms"] = predicted_ms(peer, row.get("driver"), *size, self.limits)
            work: Work = step
            outputs: list[Tensor] = step()
            if self.training:
                row["saved_bytes"] = saved_bytes(step.forward)
            row["peak_bytes"] = peak_bytes(step, self.settings.device)
            if peer.graphed:
                work = replay = Replay(step)
                replay()
                outputs = replay.outputs
        found = self.yardstick(peer.gradual).hold(step.named(outputs))
        row["relative_error"], row["share_of_tolerance"] = found
        return work if peer.graphed else asking(peer.driver, step)


def measure_layers(contest: Contest, cases: Sequence[Case], batch: int | None = None) -> None:
    """Fill ``contest`` with the rows of these layers: for every dtype and pass, layer by layer.

    Args:
        contest: Takes the rows.
        cases: The layers.
        batch: Images; by default as the contest's settings say.
    """
    settings = contest.settings if batch is None else replace(contest.settings, batch=batch)
    for dtype, which, case in itertools.product(settings.dtypes, settings.passes, cases):
        training = which == "training"
        limits = contest.limits()
        # Feature maps: x and y; in training also dy, dx, and x and y again.
        moved = (6 if training else 2) * case.sizes.state_bytes(settings.batch, dtype)
        work = case.sizes.flops(settings.batch) * (3 if training else 1)

        def entries(
            case: Case = case, dtype: str = dtype, which: str = which, limits: DeviceLimits | None = limits
        ) -> list[Entry]:
            return _Cell(case, settings, dtype, which, limits).entries()

        print(_verdict(contest.run(entries, work, moved, dtype)), end="", flush=True)
        torch.compiler.reset()


def _verdict(rows: Sequence[Row]) -> str:
    """The best of ours against the best of every other family."""
    best: dict[str, float] = {}
    for row in rows:
        family = row["peer"].split()[0].rstrip(",")
        if row.get("ms"):
            best[family] = min(best.get(family, row["ms"]), row["ms"])
    ours = best.pop("ours", None)
    if ours is None or not best:
        return ""
    return "   best of each: " + ", ".join(f"{family}/ours {ms / ours:.2f}" for family, ms in best.items()) + "\n"


def sweep_segments(sizes: LayerSizes, values: Sequence[int]) -> list[Case]:
    """The layer with other numbers of segments."""
    return [custom_case(replace(sizes, segments=value)) for value in values]
