"""Who is measured against whom: the ways to compute a layer."""

from __future__ import annotations

import contextlib
import fnmatch
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gunn_ext import ops
from gunn_ext.layers import GunnLayer
from gunn_ext.parameters import StackedLayer
from gunn_ext.reference import ReferenceGunnLayer

DRIVER = "GUNN_CUDA_DRIVER"


@dataclass(frozen=True)
class Peer:
    """One way to compute a layer.

    Attributes:
        name: For rows.
        ours: Whether the kernels of this package compute it.
        gradual: False is SUNN.
        recompute: As in `GunnLayer`.
        driver: Of the CUDA kernels, asked for through the variable GUNN_CUDA_DRIVER; None leaves it as it is.
        compiled: By ``torch.compile``.
        checkpointed: Under activation checkpointing, the layer as a whole.
        graphed: Replayed from a CUDA graph.
    """

    name: str
    ours: bool = False
    gradual: bool = True
    recompute: bool = True
    driver: str | None = None
    compiled: bool = False
    checkpointed: bool = False
    graphed: bool = False

    @property
    def kind(self) -> type[StackedLayer]:
        """The layer's class: SUNN comes as grouped convolutions, eager GUNN segment by segment."""
        return GunnLayer if self.ours or not self.gradual else ReferenceGunnLayer

    @property
    def only_training(self) -> bool:
        """Whether it differs from others in training alone."""
        return self.checkpointed or not self.recompute


# The most important first.
CPU_PEERS = (
    Peer("ours", ours=True),
    Peer("ours, recompute=False", ours=True, recompute=False),
    Peer("sunn", gradual=False),
    Peer("eager"),
    Peer("eager checkpointed", checkpointed=True),
    Peer("sunn compiled", gradual=False, compiled=True),
    Peer("eager compiled", compiled=True),
)
CUDA_PEERS = (
    Peer("ours staged, graphed", ours=True, driver="staged", graphed=True),
    Peer("ours persistent, graphed", ours=True, driver="persistent", graphed=True),
    Peer("sunn graphed", gradual=False, graphed=True),
    Peer("ours staged", ours=True, driver="staged"),
    Peer("ours persistent", ours=True, driver="persistent"),
    Peer("ours staged, recompute=False, graphed", ours=True, recompute=False, driver="staged", graphed=True),
    Peer("eager graphed", graphed=True),
    Peer("sunn", gradual=False),
    Peer("eager"),
    Peer("eager checkpointed", checkpointed=True),
    Peer("sunn compiled, graphed", gradual=False, compiled=True, graphed=True),
    Peer("sunn compiled", gradual=False, compiled=True),
    Peer("eager compiled, graphed", compiled=True, graphed=True),
    Peer("eager compiled", compiled=True),
)


def peers_of(device: str, patterns: Sequence[str] = ()) -> list[Peer]:
    """The peers on a device whose names match one of the patterns; all of them without patterns.

    Raises:
        ValueError: A pattern matches none.
    """
    known = CUDA_PEERS if device == "cuda" else CPU_PEERS
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(peer.name, pattern) for peer in known):
            names = "; ".join(peer.name for peer in known)
            raise ValueError(f"--peers: no peer on {device} matches {pattern!r}; expected wildcards for: {names}.")
    return [peer for peer in known if not patterns or any(fnmatch.fnmatchcase(peer.name, p) for p in patterns)]


@contextlib.contextmanager
def asking_for(driver: str | None) -> Iterator[None]:
    """With the CUDA driver ``driver`` asked for; None changes nothing."""
    before = os.environ.get(DRIVER)
    if driver is not None:
        os.environ[DRIVER] = driver
    try:
        yield
    finally:
        if driver is not None:
            if before is None:
                del os.environ[DRIVER]
            else:
                os.environ[DRIVER] = before


def asking(driver: str | None, work: Callable[[], Any]) -> Callable[[], Any]:
    """Work that asks for ``driver`` whenever it is called; work itself where None is asked for."""
    if driver is None:
        return work

    def asked() -> None:
        with asking_for(driver):
            work()

    return asked


def served_by(layer: StackedLayer, x: Tensor) -> dict[str, str]:
    """Columns of a row: which ``driver`` the kernels take for ``x``, as asked for now (two where they differ).

    And which kernels of the staged CUDA driver take ``large_tiles``, which passes of the persistent one ``turns``.
    """
    forward, backward, large_tiles, turns = ops.drivers(
        x,
        layer.segments,
        layer.expansion,
        layer.num_units,
        layer.shortcut,
        layer.residual,
        batch_statistics=layer.training,
        keep=layer.training and not layer.recompute,
    )
    driver = forward if forward == backward or not layer.training else f"{forward}, {backward}"
    return {"driver": driver, "large_tiles": large_tiles, "turns": turns}
