"""Faults that tests/emulated plants in the persistent driver, and the lines where it leaves something out.

Its programs are compiled from copies of these files in which `planted("name")`, a question to the command line, chooses
between what stands there and what is wrong.
"""

import re
from pathlib import Path

CUDA = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
KERNELS = (
    "pixel_block.cuh",
    "persistent_forward.cuh",
    "persistent_backward.cuh",
    "turns_forward.cuh",
    "turns_backward.cuh",
    "weight_products.cuh",
)  # what runs in a persistent launch
HOST = ("persistent.cuh",)  # what launches it, with prepare.cuh

# An expression of one line, between the texts that tell where it stands, and a wrong one instead.
FAULTS = {
    "edges take no turns": ("base_.edges + ((", "epoch % 2", "0", " * base_.all_bands + band)"),
    "the row above is left out": ("begin = ", "band == 0", "true", " ? words : 0"),
    "the row below is left out": ("end = ", "band == base_.bands - 1", "true", " ? words : 2 * words"),
    "the first row goes out twice": ("column = ", "lower ? m - (count_ - width) : m", "m", ";"),
    "a block too few in statistics": ("if (", "j < pairs.count", "j < pairs.count - 1", ") sum += values"),
    "deviations of a block too few": ("if (", "j >= pairs.count", "j >= pairs.count - 1", ") break;"),
    "a block too few in sums": ("if (", "j < pairs.count", "j < pairs.count - 1", ") sum += pairs"),
    "a column of statistics without a clerk": (
        "if (",
        "place.row < 0",
        "place.row < 0 || column == 3",
        ") continue;  // nobody's column",
    ),
    "a column of sums without a clerk": (
        "if (",
        "place.row < 0",
        "place.row < 0 || column == 3",
        ") continue;  // padding",
    ),
    "half of the words is cleared": ("(chain.words[0]), ", "2 * words_", "words_", ");"),
    "words are not cleared": ("if (", "how_.cooperative", "false", ") preparation.clear"),
    "no room for results": ("words_ += 2 * each * (", "chain.blocks + 1", "chain.blocks", ")"),
    "room for one turn of edges": ("words_ += int64_t{", "4", "2", "} * chain.all_bands"),
}


def lines_with(pattern: str) -> dict[str, str]:
    """The lines of the kernels whose code matches, as ``file:number``; each with the next, where it may say why."""
    found = {}
    for name in KERNELS:
        lines = (CUDA / name).read_text().splitlines()
        for number, (line, following) in enumerate(zip(lines, [*lines[1:], ""], strict=True), 1):
            if re.search(pattern, line.split("//")[0]):
                found[f"{name}:{number}"] = line + following
    return found


def write_sources(folder: Path) -> None:
    """The copies with faults to choose from, as ``folder/cuda/….cuh``."""
    places: dict[tuple[str, str, str], str] = {}
    for name, (before, right, wrong, after) in FAULTS.items():
        place = before, right, after
        places[place] = f'::gunn::test::planted("{name}") ? ({wrong}) : {places.get(place, f"({right})")}'
    texts = {name: (CUDA / name).read_text() for name in (*KERNELS, *HOST)}
    for (before, right, after), choice in places.items():
        where = [name for name, text in texts.items() for _ in range(text.count(before + right + after))]
        assert len(where) == 1, f"{before + right + after!r} stands in {where}, expected one place"
        texts[where[0]] = texts[where[0]].replace(before + right + after, f"{before}({choice}){after}")
    (folder / "cuda").mkdir(parents=True)
    for name, text in texts.items():
        (folder / "cuda" / name).write_text(text)
