"""How processes divide batches and splits among themselves."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One of the equal contiguous parts that processes divide a batch or a split among themselves.

    Attributes:
        index: Which one, counted from 0.
        of: How many there are.
    """

    index: int = 0
    of: int = 1

    def range(self, count: int) -> slice:
        """Where it lies in ``count`` things; where they cannot be divided equally, parts differ by one."""
        return slice(count * self.index // self.of, count * (self.index + 1) // self.of)


WHOLE = Part()
