"""The CPU kernels under sanitizers: clean as they are, and not without any one of their barriers."""

import re

import pytest
from native_program import barriers


@pytest.mark.parametrize("vectors", ["widest", "baseline"])
def test_memory_and_undefined_behaviour(native, vectors):
    done = native.run("address", native.widest if vectors == "widest" else vectors)
    assert (done.returncode, done.stderr) == (0, "")


def test_no_races(native):
    done = native.run("thread", native.widest)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("place", barriers())
def test_a_barrier_left_out_is_found(native, place):
    """As a race, or where threads happened to meet elsewhere in what they computed; which one, time decides."""
    for _ in range(3):
        done = native.run("thread", native.widest, f"planted={place}", "one_image", "units")
        if re.search("data race|bits depend", done.stderr):
            return
    raise AssertionError(f"{place}: {done}")
