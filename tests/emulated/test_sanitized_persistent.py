"""The persistent driver: clean under sanitizers, the same bits under every schedule, and no fault goes unnoticed.

kernels/layer.h says what each case checks. To ThreadSanitizer words are relaxed atomics: it lets them pass, and they
order nothing, so whatever else one thread leaves for another needs a barrier of their block, or is a race. That words
are right it cannot see: a fault of theirs shows in values, or as a poll that never ends. Under some schedules one block
is slow: the others run ahead of it as far as words let them.
"""

import itertools
import re

import faults
import pytest

TRAIN = (
    "persistent_one_segment",
    "persistent_images",
    "persistent_bands",
    "persistent_eights",
    "persistent_turns",
    "persistent_ring",
)
SMALL = (*(f"{case}{mode}" for case in TRAIN for mode in ("", "_given")), "persistent_units")
CASES = (
    *SMALL,
    "persistent_streamed",
    "persistent_streamed_bands_given",
    "persistent_ring_streamed",
    "persistent_ring_turns",
    "persistent_wide",
    "persistent_wide_no_shortcut",
    "persistent_eights_channels_last",
    "persistent_no_input",
    "persistent_no_parameters",
    "persistent_given_no_parameters",
    "persistent_turns_no_input",
    "persistent_turns_no_parameters",
)
DTYPES = ("bfloat16", "tensor_float32")  # of each size of values
BUILT = tuple((dtype, flavour) for dtype in DTYPES for flavour in ("plain", "thread", "address"))


def of(dtype, cases):
    """Those that the dtype has: of two units in 16 bits only."""
    return tuple(case for case in cases if dtype != "tensor_float32" or "units" not in case)


SLOW = [{"slow": block} for block in range(4)]  # the last of four is a clerk
SCHEDULES = [{}, {"seed": 1}, *SLOW, {"slow": 0, "seed": 2}, {"slow": 1, "seed": 3}, {"slow": 2, "seed": 4}]

SPARE: tuple[str, ...] = ()  # by a part of their own line, or of the next
DEADLOCKS = ("edges take no turns", "a column of statistics without a clerk", "a column of sums without a clerk")
EDGES = (
    "edges take no turns",
    "the row above is left out",
    "the row below is left out",
    "the first row goes out twice",
)
OVERRUNS = ("no room for results", "room for one turn of edges")  # the other faults show in values


def lines_with(pattern):
    return [
        pytest.param(line, any(text in code for text in SPARE), id=line)
        for line, code in faults.lines_with(pattern).items()
    ]


BARRIERS = lines_with(r"__sync(threads|warp)\(\)")
WAITS = lines_with(r"\bcopy_async_wait<")
SENT, RECEIVED = lines_with(r"\bsend(_bits)?\("), lines_with(r"\breceive\(")
LAUNCHES = sorted(
    {
        name
        for file in (*faults.HOST, "prepare.cuh")
        for name in re.findall(r'(?:by_\w+\(|[{])"(\w+)"', (faults.CUDA / file).read_text())
    }
)


@pytest.fixture(scope="module")
def programs(emulated):
    """All that are needed, being built from now on."""
    for dtype, flavour in (*BUILT, ("float16", "plain")):  # to ThreadSanitizer float16 is the same templates again
        emulated.compile(f"layer_{dtype}", flavour)
    return emulated


@pytest.fixture
def layer(programs, monkeypatch):
    """Runs cases of one dtype."""
    monkeypatch.setenv("TSAN_OPTIONS", "atexit_sleep_ms=0 halt_on_error=1")

    def run(dtype, flavour, *arguments, **settings):
        return programs.run(f"layer_{dtype}", flavour, *arguments, **settings)

    return run


def hashes(result):
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    return dict(line.split() for line in result.stdout.splitlines())


@pytest.fixture(scope="module")
def expected(programs):
    return {dtype: hashes(programs.run(f"layer_{dtype}", "plain", *of(dtype, CASES))) for dtype in (*DTYPES, "float16")}


@pytest.fixture
def shown(layer, expected):
    """How a fault shows under any schedule: as a ``deadlock``, in ``values``, or not at all (None).

    Most show without a ring, whose cases take longer than all others together.
    """
    rings = tuple(case for case in SMALL if "ring" in case or "units" in case)
    others = tuple(case for case in SMALL if case not in rings)

    def shown(planted, dtype="bfloat16"):
        for settings, cases in itertools.product(SCHEDULES, filter(None, (others, of(dtype, rings)))):
            result = layer(dtype, "plain", f"planted={planted}", *cases, **settings)
            if result.returncode == 3:
                assert re.search(r"deadlock: .*: poll for ", result.stderr, re.DOTALL), result.stderr
                return "deadlock"
            if result.returncode == 1:
                assert re.search(r"is not finite|depends on", result.stderr), result.stderr
                return "values"
            if any(expected[dtype][case] != found for case, found in hashes(result).items()):
                return "values"
        return None

    return shown


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [*(("bfloat16", settings) for settings in SCHEDULES[1:]), ("tensor_float32", {"slow": 1, "seed": 3})],
    ids=str,
)
def test_bits_depend_on_nothing_but_the_input(layer, expected, settings, dtype):
    """Not on who is fast or slow; nor, within a process, on what lay in the workspace."""
    assert hashes(layer(dtype, "plain", *of(dtype, CASES), **settings)) == expected[dtype]


@pytest.mark.parametrize(
    ("dtype", "flavour", "settings"),
    [
        *((*built, {}) for built in BUILT if built[1] != "plain"),
        ("bfloat16", "thread", {"seed": 4, "workers": 2}),
        ("bfloat16", "address", {"slow": 1}),
    ],
    ids=str,
)
def test_passes_are_clean_under_sanitizers(layer, expected, dtype, flavour, settings):
    chosen = of(dtype, CASES)
    passes = "passes=1" if settings or flavour == "thread" else "passes=2"
    found = hashes(layer(dtype, flavour, passes, *chosen, **settings))
    assert found == {case: expected[dtype][case] for case in chosen}


@pytest.mark.parametrize(("barrier", "spare"), BARRIERS)
def test_a_barrier_left_out_is_found(layer, barrier, spare):
    result = layer("bfloat16", "thread", f"planted={barrier}", "passes=1", *(CASES if spare else SMALL))
    if spare:
        hashes(result)
    else:
        assert result.returncode == 66, result.stdout + result.stderr
        assert re.search(r"data race.*cuda/\w+\.cuh", result.stderr, re.DOTALL), result.stderr


@pytest.mark.parametrize(("wait", "spare"), WAITS)
def test_copies_that_nobody_waits_for_are_found(shown, wait, spare):
    """Not waited for at all, or for all groups but one that should have come as well."""
    assert [shown(wait), shown(f"late:{wait}")] == [None if spare else "values"] * 2


@pytest.mark.parametrize(("line", "spare"), SENT)
def test_a_word_that_does_not_come_is_found(shown, line, spare):
    """One word of one thread in the second segment: not sent, or with the epoch before."""
    assert [shown(line), shown(f"stale:{line}")] == [None if spare else "deadlock"] * 2


@pytest.mark.parametrize(("line", "spare"), RECEIVED)
def test_a_word_taken_too_early_is_found(shown, line, spare):
    """Results are made and sent on before all blocks have taken part, so values are wrong; or,
    where a clerk runs far ahead, somebody waits for an epoch that has gone by."""
    assert (shown(line) is None) == spare


@pytest.mark.parametrize("fault", [fault for fault in faults.FAULTS if fault not in OVERRUNS])
def test_faults_are_found(shown, fault):
    assert shown(fault) == ("deadlock" if fault in DEADLOCKS else "values")


@pytest.mark.parametrize("fault", EDGES)
def test_faults_of_edges_are_found_where_a_word_has_one_value(shown, fault):
    """TF32 has twice as many of these words, and of no others."""
    assert shown(fault, "tensor_float32") == ("deadlock" if fault in DEADLOCKS else "values")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", OVERRUNS)
def test_words_behind_their_piece_of_workspace_are_found(layer, fault, dtype):
    result = layer(dtype, "address", f"planted={fault}", "passes=1", *of(dtype, SMALL))
    assert result.returncode in (1, 66), result.stdout + result.stderr
    assert re.search(r"AddressSanitizer.*cuda/words\.cuh", result.stderr, re.DOTALL), result.stderr


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_launch_left_out_is_found(shown, name):
    """Words that were not cleared are an earlier pass's."""
    assert shown(f"launch:{name}") == "values"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_byte_too_few_of_workspace_is_found(layer, dtype):
    """The last of each piece, in a layer without padding; of the channels that are streamed, in one with."""
    cases = ("persistent_eights", "persistent_eights_given", "persistent_streamed")
    pieces = range(64)
    found = {}
    for piece in pieces:
        for case in cases:
            result = layer(dtype, "address", f"planted=piece:{piece}", "passes=1", case)
            if result.returncode:
                assert re.search(r"use-after-poison.*cuda/", result.stderr, re.DOTALL), result.stderr
                found[piece] = case
    assert [*found] == [*range(len(found))]
    assert 8 < len(found) < len(pieces)
    assert found[len(found) - 1] == "persistent_streamed"
