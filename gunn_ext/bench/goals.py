"""What the CPU kernels are to reach, and what `benchmarks/cpu_check.sh` measured: ratios of medians."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gunn_ext.bench.rows import read_json

GUNN15 = ("gunn15-32", "gunn15-16", "gunn15-8")
GUNN18 = ("gunn18-1", "gunn18-2", "gunn18-3", "gunn18-4")


@dataclass(frozen=True)
class Goal:
    """A ratio for each of some layers.

    Attributes:
        work: Of ours.
        against: What it is compared with, and how.
        limits: One for each value, or one for all.
        values: Measured.
        least: Whether a limit is the least that will do, not the most.
    """

    work: str
    against: str
    limits: Sequence[float]
    values: Sequence[float]
    least: bool = False

    def cells(self) -> tuple[str, str, str, str, str]:
        """A line of the table."""
        limits = self.limits if len(self.limits) > 1 else list(self.limits) * len(self.values)
        met = [
            value >= limit if self.least else value <= limit for value, limit in zip(self.values, limits, strict=True)
        ]
        verdict = "yes" if all(met) else "no" if not any(met) else " / ".join("yes" if each else "no" for each in met)
        sign = "≥" if self.least else "≤"
        return (
            self.work,
            self.against,
            f"{sign} {' / '.join(f'{limit:g}' for limit in self.limits)}",
            " / ".join(f"{value:.2f}" for value in self.values),
            verdict,
        )


class Results:
    """The files of one run of cpu_check.sh."""

    def __init__(self, folder: Path) -> None:
        """Read them all; a file that is missing is an error."""
        self.folder = folder

    def ms(self, file: str, layer: str, which: str, peer: str = "ours") -> float:
        """The median of a peer, in the better memory format."""
        _, rows = read_json(self.folder / f"{file}.json")
        return min(r["ms"] for r in rows if (r["layer"], r["pass"], r["peer"]) == (layer, which, peer) and "ms" in r)

    def registers(self, layer: str) -> float:
        """Share of what the cores multiply between registers, in evaluation."""
        _, rows = read_json(self.folder / "layers.json")
        return max(
            r["share_of_registers"] for r in rows if (r["layer"], r["pass"], r["peer"]) == (layer, "evaluation", "ours")
        )

    def memory(self, peer: str) -> float:
        """Bytes that a training step grew the process by."""
        _, rows = read_json(self.folder / "memory.json")
        return next(float(r["resident_bytes"]) for r in rows if r["peer"] == peer)


def goals(folder: Path) -> Iterator[Goal]:
    """All of them, in the order of the kernels' plan."""
    found = Results(folder)
    layers = found.ms

    def over(which: str, ours: str, other: str, file: str = "layers", names: Sequence[str] = GUNN15) -> list[float]:
        return [layers(file, name, which, ours) / layers(file, name, which, other) for name in names]

    off = "ours, recompute=False"
    yield Goal("training", "SUNN's time", (0.55, 0.7, 0.75), over("training", "ours", "sunn"))
    yield Goal("training, `recompute=False`", "SUNN's time", (0.45, 0.55, 0.6), over("training", off, "sunn"))
    yield Goal("training", "eager, times faster", (2.5, 3, 5.5), over("training", "eager", "ours"), least=True)
    compiled = over("training", "eager compiled", "ours", "compiled", GUNN15[:1])
    yield Goal("training, 32x32", "eager compiled, times faster", (2,), compiled, least=True)
    yield Goal("evaluation", "SUNN's time", (0.52, 0.62, 0.7), over("evaluation", "ours", "sunn"))
    yield Goal("evaluation", "eager, times faster", (3.7, 3.5, 6.8), over("evaluation", "eager", "ours"), least=True)
    shares = [found.registers(name) for name in GUNN15]
    yield Goal(
        "evaluation, FLOPs counted as direct", "multiply-adds between registers", (1.1, 1.05, 0.92), shares, least=True
    )
    for batch in (1, 2, 16):
        for which in ("evaluation", "training") if batch == 16 else ("evaluation",):
            gain = [
                layers(f"threads-1-batch-{batch}", name, which) / layers(f"threads-2-batch-{batch}", name, which)
                for name in GUNN15
            ]
            yield Goal(f"{which}, batch {batch}", "2 threads over 1", (1.9 if batch == 16 else 1.7,), gain, least=True)
    for file, names in (("gunn24", ("gunn24-1",)), ("gunn18-batch-2", GUNN18), ("gunn18-batch-8", GUNN18)):
        work = {"gunn24": "GUNN-24's first layer, batch 4"}.get(file, f"GUNN-18's layers, batch {file[-1]}")
        for which in ("training", "evaluation"):
            yield Goal(f"{work}, {which}", "SUNN's time", (0.9,), over(which, "ours", "sunn", file, names))
            yield Goal(
                f"{work}, {which}", "eager, times faster", (1.5,), over(which, "eager", "ours", file, names), least=True
            )
    for which in ("evaluation", "training"):
        gain = [layers("layers", name, which) / layers("bfloat16", name, which) for name in GUNN15]
        yield Goal(f"bfloat16, {which}", "float32, times faster", (1.6,), gain, least=True)
        yield Goal(f"bfloat16, {which}", "SUNN in bfloat16", (0.7,), over(which, "ours", "sunn", "bfloat16"))
    for which, limit in (("evaluation", 1.1), ("training", 1.3)):
        ratio = layers("p-equals-n", "p-equals-n", which) / layers("layers", GUNN15[0], which)
        yield Goal(f"P = N = 240, 32x32, {which}", "P = 20", (limit,), [ratio])
    share = found.memory("ours") / found.memory("eager")
    yield Goal("memory of a training step of GUNN-15, batch 64", "eager", (0.2,), [share])
