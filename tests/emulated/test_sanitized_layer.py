"""Whole passes of the layer on its CUDA kernels: clean under sanitizers, and with the same bits under every schedule.

kernels/layer.h says what each case checks. Then one thing at a time is left out of the kernels (a barrier, an order of
memory, a launch, a byte of workspace), to show that these checks would miss none of them.
"""

import re
from pathlib import Path

import faults
import pytest

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
DTYPES = ("float32", "bfloat16", "tensor_float32", "float64", "float16")
BUILT = {"plain": DTYPES, "thread": DTYPES[:2], "address": DTYPES[:3]}  # the others are the same templates again
TWO_BLOCKS = "two_blocks_of_segments"
SMALL = ("shortcut", "units_with_shortcut", "given_statistics", "eights_channels_last")

# What only large tiles have: lines that say so, in 16 bits.
LARGE = ("large: ", "the first window is set", "the window is set")
# Both order what other barriers order as well: the first, the operands' second one; the other, those of the tree's next
# level. By a part of their own line, or of the next.
SPARE = ("the chunk before has been multiplied", "level += entries")
STAGED = [path for path in sorted(CUDA.glob("*.cuh")) if path.name not in faults.KERNELS]  # what these cases run
LINES = {path.name: path.read_text().splitlines() for path in STAGED}
BARRIERS = [
    pytest.param(
        f"{name}:{number}",
        any(text in line + following for text in SPARE),
        any(text in line for text in LARGE),
        id=f"{name}:{number}",
    )
    for name, lines in LINES.items()
    for number, (line, following) in enumerate(zip(lines, [*lines[1:], ""], strict=True), 1)
    if "__syncthreads()" in line.split("//")[0]
]
LARGE_CASES = ["large_units", "large_windows"]
COPIES = [  # the small tiles' wait and the large ones'
    f"products.cuh:{number}" for number, line in enumerate(LINES["products.cuh"], 1) if "copy_async_wait<0>()" in line
]
NAMED = r'(?:\bby_\w+(?:<\w+>)?\(|\blaunch_forward<\w+>\(|\bLaunch\{)\s*"(\w+)"'
LAUNCHES = sorted(set(re.findall(NAMED, "\n".join(LINES["staged.cuh"] + LINES["host.cuh"]))))


@pytest.fixture(scope="module")
def layer(emulated):
    """Runs cases of one dtype. All programs are being built from now on."""
    for flavour, dtypes in BUILT.items():
        for dtype in dtypes:
            emulated.compile(f"layer_{dtype}", flavour)

    def run(dtype, flavour, *arguments, **settings):
        return emulated.run(f"layer_{dtype}", flavour, *arguments, **settings)

    return run


def hashes(result):
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    return dict(line.split() for line in result.stdout.splitlines())


def cases(layer, dtype):
    listed = layer(dtype, "plain", "--list").stdout.split()
    return [case for case in listed if case != TWO_BLOCKS and not case.startswith("persistent")]


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_depend_on_nothing_but_the_input(layer, dtype):
    """Not on the schedule; nor, within a process, on what lay in the workspace, on keeping, on steps."""
    expected = hashes(layer(dtype, "plain", *cases(layer, dtype)))
    assert len(expected) == (19 if dtype in ("bfloat16", "float16") else 16)
    for settings in {"workers": 2}, {"seed": 1}, {"seed": 2, "workers": 2}:
        assert hashes(layer(dtype, "plain", "passes=1", *expected, **settings)) == expected, settings


def test_blocks_of_segments_give_the_bits_of_single_segments(layer):
    """A backward in two blocks of segments, and the same in steps, which take one at a time."""
    assert len(hashes(layer("float64", "plain", "passes=2", TWO_BLOCKS))) == 1


@pytest.mark.parametrize("settings", [{}, {"seed": 3, "workers": 2}], ids=str)
@pytest.mark.parametrize(
    ("flavour", "dtype"), [(flavour, dtype) for flavour in ("thread", "address") for dtype in BUILT[flavour]]
)
def test_passes_are_clean_under_sanitizers(layer, dtype, flavour, settings):
    chosen = SMALL if settings else cases(layer, dtype)
    passes = 1 if settings else 2 if flavour == "thread" else 4
    assert len(hashes(layer(dtype, flavour, f"passes={passes}", *chosen, **settings))) == len(chosen)


@pytest.mark.parametrize(("barrier", "spare", "large"), BARRIERS)
def test_a_barrier_left_out_is_found(layer, barrier, spare, large):
    chosen = ["units_with_shortcut", "two_levels"] if spare else ["units_with_shortcut"]
    dtype = "bfloat16" if large else "float32"
    result = layer(dtype, "thread", f"planted={barrier}", "passes=1", *(LARGE_CASES if large else chosen))
    if spare:
        hashes(result)
    else:
        assert result.returncode == 66, result.stdout + result.stderr
        assert re.search(r"data race.*csrc/cuda/", result.stderr, re.DOTALL), result.stderr


@pytest.mark.parametrize("copies", COPIES)
def test_a_wait_for_copies_left_out_is_found(layer, copies):
    """The emulator delivers copies when they are waited for: NaNs that lay in shared memory are multiplied instead."""
    case = "large_units" if copies == COPIES[-1] else "units_with_shortcut"
    result = layer("bfloat16", "plain", f"planted={copies}", "passes=1", case)
    assert result.returncode == 1, result.stdout + result.stderr
    assert re.search(r"\w+: [\w ]+\[\d+\] is not finite", result.stderr), result.stderr


def test_a_relaxed_addition_in_the_tree_is_found(layer):
    """Right values all the same: only the race detector sees that partial results are read before they are there."""
    planted = ("planted=relaxed", "passes=1", "units_with_shortcut")
    result = layer("float32", "thread", *planted)
    assert result.returncode == 66, result.stdout + result.stderr
    assert re.search(r"data race.*in bool gunn::climb.*exchange\.cuh", result.stderr, re.DOTALL), result.stderr
    assert hashes(layer("float32", "plain", *planted)) == hashes(layer("float32", "plain", *planted[1:]))


@pytest.mark.parametrize("planted", ["counter", *(f"launch:{name}" for name in LAUNCHES)])
def test_what_was_never_written_is_found(layer, planted):
    """A counter that is not reset, a kernel that does not run: some case finds the NaNs that lay there before."""
    results = [layer("bfloat16", "plain", f"planted={planted}", case) for case in SMALL]
    found = [result.stderr for result in results if result.returncode == 1]
    assert found, results
    assert all(re.search(r"\w+: [\w ]+\[\d+\] is not finite", text) for text in found)


def test_a_byte_too_few_of_workspace_is_found(layer):
    """In a layer without padding, the last byte of each piece of the workspace, of the forward's or the backward's."""
    pieces = range(32)
    results = [layer("bfloat16", "address", f"planted=piece:{number}", "passes=1", "eights") for number in pieces]
    found = [number for number in pieces if results[number].returncode]
    assert found == [*range(len(found))]
    assert 15 < len(found) < 32
    assert all(re.search(r"use-after-poison.*csrc/cuda/", results[n].stderr, re.DOTALL) for n in found)
