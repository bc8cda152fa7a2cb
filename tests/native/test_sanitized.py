"""The CPU kernels under sanitizers: clean as they are, and not without any one of their barriers."""

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
    done = native.run("thread", native.widest, f"planted={place}", "one_image", "units")
    assert "data race" in done.stderr, place
