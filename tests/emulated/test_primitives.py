"""Everything a kernel may use does what CUDA says, under every schedule and without a complaint of a sanitizer."""

import pytest

PROGRAMS = ("block", "warp", "grid", "tensor")


def assert_clean(result):
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""


@pytest.mark.parametrize("settings", [{}, {"workers": 2}, {"seed": 1}, {"seed": 2}, {"seed": 3, "workers": 2}], ids=str)
@pytest.mark.parametrize("program", PROGRAMS)
def test_primitives(emulated, program, settings):
    cases = emulated.cases(program, "plain")
    assert len(cases) >= 4
    assert_clean(emulated.run(program, "plain", *cases, **settings))


@pytest.mark.parametrize("settings", [{}, {"seed": 4}], ids=str)
@pytest.mark.parametrize("flavour", ["address", "thread"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_primitives_are_clean_under_sanitizers(emulated, program, flavour, settings):
    assert_clean(emulated.run(program, flavour, *emulated.cases(program, flavour), **settings))


def test_portable_fibers(emulated):
    assert_clean(emulated.run("block", "portable", *emulated.cases("block", "portable")))
