"""Work captured in a CUDA graph and replayed: one launch in place of hundreds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_WARM_UP = 3


class Replay:
    """``work`` captured in a CUDA graph; a call replays it.

    Holds ``work``, hence everything the graph reads, for as long as it can be replayed.

    Attributes:
        outputs: What ``work`` returned; filled in anew by every replay.
    """

    def __init__(self, work: Callable[[], Any]) -> None:
        """Warm up on a side stream, as capturing asks for, and capture."""
        self.work = work
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                work()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = work()

    def __call__(self) -> None:
        """Replay."""
        self.graph.replay()
