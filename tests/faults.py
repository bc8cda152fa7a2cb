"""Faults that tests/emulated plants in the persistent driver, and the lines where it leaves something out.

Its programs are compiled from copies of these files in which `planted("name")`, a question to the command line, chooses
between what stands there and what is wrong.
"""

import re
from pathlib import Path

CUDA = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
KERNELS = ("persistent.cuh",)  # what runs in a persistent launch
HOST = ("whole.cuh",)  # what launches it

# An expression of one line, between the texts that tell where it stands, and a wrong one instead.
FAULTS = {
    "edges take no turns": ("chain_.edges + ((", "epoch % 2", "0", " * chain_.blocks + block)"),
    "the row above is left out": (
        "if (band == (",
        "lower ? chain_.bands - 1 : 0",
        "lower ? chain_.bands - 1 : band",
        ")",
    ),
    "the row below is left out": ("if (band == (", "lower ? chain_.bands - 1 : 0", "lower ? band : 0", ")"),
    "the first row goes out twice": ("m / width != (", "lower ? rows - 1 : 0", "0", "))"),
    "means of a block too few": ("b < ", "blocks", "blocks - 1", "; b += 32) sum +="),
    "deviations of a block too few": ("b < ", "blocks", "blocks - 1", "; b += 32) {"),
    "a column without a clerk": ("if (", "place.row < 0", "place.row < 0 || column == 3", ") continue;"),
    "half of the words is cleared": ("clear_words_ = ", "2 * words", "words", ";"),
    "no room for results": ("words += 2 * each * (", "chain_.blocks + 1", "chain_.blocks", ")"),
    "room for one turn of edges": ("words += int64_t{", "4", "2", "} * chain_.blocks"),
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
