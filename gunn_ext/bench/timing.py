"""Times: every contestant in turn, so that all see the same machine; medians with quantiles."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Work = Callable[[], Any]
_FLUSHED_BYTES = 256 * 2**20  # several times the last cache of a GPU
_WARM_UP = 2
_LEAST = 5


class CpuClock:
    """Milliseconds of one repetition, by the wall."""

    def __call__(self, work: Work) -> float:
        """Run ``work`` and time it."""
        start = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - start)


class CudaClock:
    """Milliseconds of one repetition between two events, the cache flushed before it."""

    def __init__(self) -> None:
        """Allocate what is written to flush the cache."""
        self.flush = torch.empty(_FLUSHED_BYTES // 4, device="cuda")

    def __call__(self, work: Work) -> float:
        """Run ``work`` and time it."""
        self.flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def clock_for(device: str) -> Callable[[Work], float]:
    """The clock of a device."""
    return CudaClock() if device == "cuda" else CpuClock()


def take_turns(
    works: Sequence[Work], clock: Callable[[Work], float], repeats: int, deadline: float = float("inf")
) -> list[list[float] | Exception]:
    """Milliseconds of each, one repetition of all after another; of one that fails, the exception.

    Args:
        works: What is timed.
        clock: Times one repetition.
        repeats: Rounds, after a few that do not count.
        deadline: By ``time.monotonic()``; past it, a handful of rounds is enough.
    """
    times: list[list[float] | Exception] = [[] for _ in works]
    for turn in range(_WARM_UP + repeats):
        if turn >= _WARM_UP + min(_LEAST, repeats) and time.monotonic() > deadline:
            break
        for i, work in enumerate(works):
            found = times[i]
            if isinstance(found, Exception):
                continue
            try:
                milliseconds = clock(work)
            except Exception as error:  # the others go on
                times[i] = error
                continue
            if turn >= _WARM_UP:
                found.append(milliseconds)
    return times


def summary(milliseconds: Sequence[float]) -> dict[str, float]:
    """Median, 20 and 80 %, and how many there were."""
    low, *_, high = statistics.quantiles(milliseconds, n=5, method="inclusive")
    return {"ms": statistics.median(milliseconds), "ms_20": low, "ms_80": high, "repeats": len(milliseconds)}
