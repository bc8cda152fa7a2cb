"""``gunn bench model``: whole networks, a training step or an evaluation."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gunn_ext import ops
from gunn_ext.analysis.cost import model_cost
from gunn_ext.bench.contest import Contest, Entry, Settings
from gunn_ext.bench.memory import peak_bytes, saved_bytes
from gunn_ext.bench.networks import input_of, network
from gunn_ext.bench.others import OTHERS
from gunn_ext.bench.peers import Peer, asking, asking_for, peers_of
from gunn_ext.bench.rows import Row
from gunn_ext.bench.steps import FORMATS
from gunn_ext.bench.timing import Work
from gunn_ext.bench.verify import FACTOR, FEW, WrongResult, relative_error, rounding
from gunn_ext.graph import Replay
from gunn_ext.models import model_spec
from gunn_ext.training.precision import autocast

DEFAULT = ("gunn15",)


class ModelStep:
    """A training step (forward, loss, backward, SGD) or an evaluation of a network.

    The learning rate is zero: the work is the same, and every step sees the same weights.

    Args:
        model: Parameters float32, or float64 for that dtype.
        images: In the dtype of the pass and the memory format wanted.
        labels: Of the images.
        training: Which of the two.
    """

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, training: bool) -> None:
        """Arguments as the class says."""
        self.model, self.images, self.labels, self.training = model.train(training), images, labels, training
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, nesterov=True, weight_decay=1e-4)

    def forward(self) -> Tensor:
        """Loss in training, else the logits."""
        with autocast(self.images.device, self.images.dtype), torch.set_grad_enabled(self.training):
            logits: Tensor = self.model(self.images)
            return nn.functional.cross_entropy(logits.float(), self.labels) if self.training else logits

    def __call__(self) -> Tensor:
        """Run it."""
        if self.training:
            self.optimizer.zero_grad(set_to_none=True)
        result = self.forward()
        if self.training:
            result.backward()
            self.optimizer.step()
        return result.detach()


def _peers(name: str, settings: Settings) -> list[Peer]:
    """Those that make sense for a network: nothing compiled or checkpointed; of others' nets torch's way alone."""
    if name in OTHERS:
        graphs = (False, True) if settings.device == "cuda" else (False,)
        return [Peer("torch graphed" if graph else "torch", graphed=graph) for graph in graphs]
    gradual = getattr(model_spec(name), "gradual", True)
    return [
        peer
        for peer in peers_of(settings.device, settings.peers)
        if not (peer.compiled or peer.checkpointed) and (gradual or not peer.gradual)
    ]


def _build(name: str, peer: Peer) -> nn.Module:
    if name in OTHERS:
        torch.manual_seed(0)
        return OTHERS[name][0]()
    if not peer.ours and peer.gradual:
        return network(name, "eager")
    return network(name, "ours" if peer.recompute else "ours, recompute=False", gradual=peer.gradual)


def _take_statistics(model: nn.Module, images: Tensor) -> None:
    """Make running statistics those of a few images; a fresh network's would let the state grow without bound."""
    modules = [module for module in model.modules() if hasattr(module, "momentum")]
    before = [module.momentum for module in modules]
    for module in modules:
        module.momentum = None  # type: ignore[assignment]  # the average of one batch is that batch
    with torch.no_grad():
        model.train()(images[:FEW].float())
    for module, momentum in zip(modules, before, strict=True):
        module.momentum = momentum


def _verify(model: nn.Module, twin: nn.Module, images: Tensor, training: bool) -> tuple[float, float]:
    """Logits of a few images against the network with reference layers in float64; as `Yardstick`, forward only."""
    few = images[:FEW]

    def logits(net: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad(), autocast(x.device, x.dtype):
            out: Tensor = net.train(training)(x)
        return out.double()

    plain = logits(twin, few)
    expected = logits(twin.double(), few.double())
    allowed = FACTOR * relative_error(plain, expected) + 4 * rounding(images.dtype, images.device)
    error = relative_error(logits(model, few), expected)
    if not error <= allowed:
        raise WrongResult(
            f"wrong result, not timed: logits have relative error {error:.1e} against the reference in float64, "
            f"allowed {allowed:.1e}"
        )
    return error, error / allowed


def _flops(name: str, size: int) -> float:
    """Of one image's forward: convolutions and linear layers."""
    if name not in OTHERS:
        return float(model_cost(name, (size, size)).flops)
    with torch.device("meta"):
        model, image = OTHERS[name][0]().eval(), torch.empty(1, 3, size, size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return float(counter.get_total_flops())


class _Cell:
    """One network in one dtype and pass."""

    def __init__(self, name: str, size: int, settings: Settings, dtype: str, which: str) -> None:
        self.name, self.size, self.settings, self.which = name, size, settings, which
        self.dtype_name, self.dtype, self.training = dtype, getattr(torch, dtype), which == "training"
        torch.manual_seed(1)
        device = settings.device
        self.images = torch.randn(settings.batch, 3, size, size, device=device).to(self.dtype)
        self.labels = torch.randint(input_of(name)[0], (settings.batch,), device=device)

    def entries(self) -> list[Entry]:
        found = []
        for peer, layout in itertools.product(_peers(self.name, self.settings), self.settings.formats):
            if self.training or not peer.only_training:
                row = self.row(peer, layout)
                found.append(Entry(row, functools.partial(self.prepare, peer, layout, row)))
        return found

    def row(self, peer: Peer, layout: str) -> Row:
        settings = self.settings
        return {
            "layer": self.name,
            "size": self.size,
            "batch": settings.batch,
            "dtype": self.dtype_name,
            "pass": self.which,
            "peer": peer.name,
            "format": layout,
            "backend": "torch",
            "threads": settings.threads if settings.device == "cpu" else None,
        }

    def prepare(self, peer: Peer, layout: str, row: Row) -> Work:
        wide = self.dtype if self.dtype == torch.float64 else torch.float32
        device, memory_format = self.settings.device, FORMATS[layout]
        model = _build(self.name, peer).to(device, wide)
        images = self.images.contiguous(memory_format=memory_format)
        with asking_for(peer.driver):
            if self.name not in OTHERS:
                reference = network(self.name, "eager", gradual=peer.gradual).to(device)
                _take_statistics(reference, images)
                model.load_state_dict(reference.to(wide).state_dict())
                found = _verify(model, reference, images, self.training)
                row["relative_error"], row["share_of_tolerance"] = found
            if peer.ours:
                row["backend"], row["driver"] = ops.backend(device, self.dtype), peer.driver
            for module in model.modules():  # the others' parameters have no memory format
                if isinstance(module, nn.Conv2d):
                    module.weight.data = module.weight.data.contiguous(memory_format=memory_format)
            step = ModelStep(model, images, self.labels, self.training)
            work: Callable[[], Any] = step
            step()
            if self.training:
                row["saved_bytes"] = saved_bytes(step.forward)
            row["peak_bytes"] = peak_bytes(step, device)
            if peer.graphed:
                work = Replay(step)
        return work if peer.graphed else asking(peer.driver, step)


def measure_models(contest: Contest, names: Sequence[str], size: int | None = None) -> None:
    """Fill ``contest`` with the rows of these networks: for every dtype and pass, network by network.

    Args:
        contest: Takes the rows.
        names: Registered models, or nets of `OTHERS`.
        size: Height and width of the images; by default each network's own.
    """
    settings = contest.settings
    for dtype, which, name in itertools.product(settings.dtypes, settings.passes, names):
        training = which == "training"
        side = size or input_of(name)[1]
        images = settings.batch * (3 if training else 1)

        def entries(name: str = name, side: int = side, dtype: str = dtype, which: str = which) -> list[Entry]:
            return _Cell(name, side, settings, dtype, which).entries()

        contest.run(entries, _flops(name, side) * images, 0.0, dtype)
