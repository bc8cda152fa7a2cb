"""The persistent driver: which layers it takes, that it computes what the staged driver does, in every way it can."""

import itertools
from dataclasses import replace

import laws
import pytest
import torch
from laws import INTEGERS, PRECISIONS, layer_of, sample_for
from tolerance import (
    FORWARD,
    Case,
    TensorFloatReferenceLayer,
    assert_within_rule,
    run_sample,
    tensor_float,
)

from gunn_ext import GunnLayer, ReferenceGunnLayer, ops

WIDE = Case(36, 3, batch=2, height=8, width=8)  # k 24, s 12: blocks of 64 pixels, one image each
NARROW = Case(9, 9, batch=3, height=6, width=6)  # k 2, s 1
BANDS = Case(36, 3, batch=2, height=16, width=16)  # four bands of 4 rows
UNEVEN = Case(24, 2, batch=1, height=33, width=17)  # eleven bands of 3 rows: 51 of 64 pixels
RING = Case(120, 3, shortcut=False, batch=2, height=8, width=8)  # k 80, s 40: weights come through a ring
CASES = [
    WIDE,
    NARROW,
    BANDS,
    UNEVEN,
    replace(BANDS, shortcut=False),
    replace(WIDE, residual=False),
    Case(12, 2, expansion=1, batch=3, height=5, width=7),
    Case(10, 2, expansion=1, shortcut=False, batch=1, height=1, width=43),
    Case(48, 4, batch=2, height=9, width=8),  # two bands, of 5 rows and of 4
    RING,
    replace(RING, batch=1, height=11, width=14),  # three bands of 4, 4 and 3 rows
    Case(38, 1, shortcut=False, batch=1, height=1, width=43),
    Case(114, 3, shortcut=False, residual=False, batch=2, height=5, width=7),  # k 76, s 38
    Case(400, 10, shortcut=False, batch=1, height=5, width=5),
]
# On three processors, one of them for clerks: two blocks take turns at the bands of all images.
TURNS = [
    Case(36, 3, batch=3, height=2, width=130),  # six bands of one row
    Case(36, 3, shortcut=False, residual=False, batch=2, height=33, width=17),  # six bands of 11 rows
    Case(9, 9, batch=5, height=6, width=6),  # five whole images
    replace(RING, batch=2, height=3, width=86),  # four bands of two rows and of one
    Case(114, 3, shortcut=False, residual=False, batch=3, height=5, width=7),
]
# Two units: k 112, s 40. Blocks of 128 pixels and of 256.
UNITS = [
    Case(108, 3, expansion=3, units=2, batch=3, height=5, width=6),
    Case(72, 2, expansion=3, units=2, batch=1, height=3, width=60),  # two bands
    Case(72, 2, expansion=3, units=2, residual=False, batch=1, height=3, width=130),  # three bands of two blocks
]
OF_EACH_SIZE = ["bfloat16", "tf32"]


def each(cases, of_float16=()):
    """Cases in a precision of each size of values. float16 is bfloat16's templates again: a few will do."""
    return [*itertools.product(cases, OF_EACH_SIZE), *itertools.product(of_float16, ["float16"])]


@pytest.fixture(autouse=True)
def emulated_kernels(core, monkeypatch):
    """Tensors of the CPU run on the CUDA kernels, of a device with 16 multiprocessors."""
    monkeypatch.setitem(ops._BACKENDS, "cpu", ops.CudaBackend(core))
    monkeypatch.setenv("GUNN_CUDA_DRIVER", "persistent")
    with tensor_float(False):
        yield


@pytest.fixture
def driver(core):
    def driver(case, precision="bfloat16", keep=False, **chosen):
        shape = core.LayerShape(
            batch=case.batch,
            channels=case.channels,
            height=case.height,
            width=case.width,
            segments=case.segments,
            expansion=case.expansion,
            units=case.units,
            shortcut=case.shortcut,
            residual=case.residual,
        )
        dtype, fast = PRECISIONS[precision]
        options = core.Options(
            shape,
            batch_statistics=case.mode == "train",
            eps=1e-5,
            threads=1,
            device=0,
            tensor_float=fast,
            **chosen,
        )
        forward, backward, _, driver.turns = core.drivers(shape, options, str(dtype).removeprefix("torch."), keep)
        return forward if forward == backward else f"{forward}, {backward}"

    return driver


def processors(monkeypatch, count):
    monkeypatch.setenv("GUNN_EMULATOR_PROCESSORS", str(count))


@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize(("case", "precision"), each(CASES, of_float16=[WIDE, NARROW, BANDS, RING]), ids=str)
def test_values_and_gradients(driver, case, mode, precision):
    case = replace(case, mode=mode)
    assert driver(case, precision) == "persistent"
    laws.rule_holds(sample_for(precision, case, 0), precision)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize(("precision", "limit"), [("bfloat16", 2**8), ("float16", 2**11), ("tf32", 2**11)])
@pytest.mark.parametrize(
    "case",
    [
        INTEGERS[0],
        INTEGERS[2],
        INTEGERS[3],
        Case(120, 3, shortcut=False, batch=1, height=11, width=14, mode="frozen"),
    ],
    ids=str,
)
def test_exact_on_small_integers(driver, case, precision, limit, recompute):
    assert driver(case, precision) == "persistent"
    dtype, fast = PRECISIONS[precision]
    with tensor_float(fast):
        laws.small_integers_are_exact(laws.small_integers(case, limit), dtype, recompute)


@pytest.mark.parametrize(("case", "precision"), each([BANDS, RING]), ids=str)
@pytest.mark.parametrize("count", [2, 3, 5, 9])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_block_grows_where_processors_are_few(monkeypatch, driver, case, mode, count, precision):
    """One image of 256 pixels in blocks of 256, 128 or 64 pixels' worth of rows."""
    processors(monkeypatch, count)
    case = replace(case, batch=1, height=16, width=16, mode=mode)
    assert driver(case, precision) == "persistent"
    laws.rule_holds(sample_for(precision, case, 0), precision)


@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize(("case", "precision"), each(TURNS, of_float16=[TURNS[0], TURNS[2], TURNS[3]]), ids=str)
def test_blocks_take_turns(monkeypatch, driver, case, mode, precision):
    processors(monkeypatch, 3)
    case = replace(case, mode=mode)
    assert driver(case, precision) == "persistent"
    # The forward, in evaluation, of images that one block can have: all at once, as nobody waits.
    assert driver.turns in ("forward, backward", "backward" if mode != "train" else "")
    laws.rule_holds(sample_for(precision, case, 0), precision)


@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize(
    ("case", "precision"), [*((case, "bfloat16") for case in UNITS), (UNITS[1], "float16")], ids=str
)
def test_two_units(monkeypatch, driver, case, mode, precision):
    """With exchanges; evaluation has none."""
    processors(monkeypatch, 3)
    case = replace(case, mode=mode)
    assert driver(case, precision) == ("persistent" if mode == "train" else "staged, persistent")
    laws.rule_holds(sample_for(precision, case, 0), precision)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 9, 10])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_any_number_of_blocks_shares_the_bands(monkeypatch, driver, count, mode):
    """Two images of 675 pixels: one block has all of their bands, some take turns, or each has its own."""
    processors(monkeypatch, count)
    case = Case(36, 3, batch=2, height=25, width=27, mode=mode)
    assert driver(case) == "persistent"
    laws.rule_holds(sample_for("bfloat16", case, 0), "bfloat16")


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize(("precision", "limit"), [("bfloat16", 2**8), ("tf32", 2**11)])
def test_exact_on_small_integers_in_turns(monkeypatch, driver, precision, limit, recompute):
    """Given statistics: the forward does one image after the other, the gradients' chain a step of all of them."""
    processors(monkeypatch, 2)
    case = INTEGERS[0]
    assert driver(case, precision) == "persistent"
    dtype, fast = PRECISIONS[precision]
    with tensor_float(fast):
        laws.small_integers_are_exact(laws.small_integers(case, limit), dtype, recompute)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    ("case", "count", "precision"),
    [
        (Case(240, 20, batch=1, height=32, width=32), 3, "bfloat16"),
        (Case(240, 20, batch=1, height=32, width=32), 3, "tf32"),
        (Case(2000, 50, shortcut=False, batch=1, height=7, width=7), 2, "bfloat16"),
        (Case(2000, 50, shortcut=False, batch=1, height=7, width=7), 2, "tf32"),
    ],
    ids=str,
)
def test_channels_that_find_no_room_are_streamed(monkeypatch, driver, case, count, mode, precision):
    """The 32x32 layer of GUNN-15 on two blocks and a clerk; the 7x7 layer of GUNN-18."""
    processors(monkeypatch, count)
    case = replace(case, mode=mode)
    assert driver(case, precision) == "persistent"
    dtype, fast = PRECISIONS[precision]
    values = sample_for(precision, case, 0)
    x = values.x.to(dtype)
    with torch.no_grad():
        with tensor_float(fast):
            ours = layer_of(values, dtype)(x)
        plain = values.layer(TensorFloatReferenceLayer if fast else ReferenceGunnLayer, dtype)(x)
        oracle = values.layer(ReferenceGunnLayer, torch.float64)(x.double())
    assert_within_rule(ours, oracle, plain, FORWARD, "y")


@pytest.mark.parametrize(("mode", "shared_kb"), [("train", 112), ("train", 92), ("eval", 92)])
def test_gradients_of_channels_that_are_streamed(monkeypatch, driver, mode, shared_kb):
    """A third of them stay on the chip, or none."""
    processors(monkeypatch, 2)
    monkeypatch.setenv("GUNN_EMULATOR_SHARED_KB", str(shared_kb))
    case = replace(BANDS, batch=1, mode=mode)
    assert driver(case, "tf32") == "persistent"
    laws.rule_holds(sample_for("tf32", case, 0), "tf32")


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    ("precision", "shared"), [("bfloat16", 90), ("bfloat16", 80), ("bfloat16", 74), ("tf32", 112), ("tf32", 92)]
)
def test_beside_a_ring_any_number_of_channels_is_streamed(monkeypatch, driver, shared, mode, precision):
    """The backward has room for all of them, for some and for none."""
    monkeypatch.setenv("GUNN_EMULATOR_SHARED_KB", str(shared))
    case = replace(RING, mode=mode)
    assert driver(case, precision) == "persistent"
    laws.rule_holds(sample_for(precision, case, 0), precision)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    ("case", "precision"),
    [*each([WIDE, BANDS, replace(NARROW, batch=2), RING, TURNS[0], TURNS[3]]), (UNITS[1], "bfloat16")],
    ids=str,
)
def test_kept_pre_activations(monkeypatch, driver, case, mode, precision):
    if case in TURNS:
        processors(monkeypatch, 3)
    case = replace(case, mode=mode)
    expected = "staged, persistent" if case.units == 2 and mode == "eval" else "persistent"
    assert driver(case, precision, keep=True) == expected
    dtype, fast = PRECISIONS[precision]
    with tensor_float(fast):
        laws.recomputation_changes_no_bit(sample_for(precision, case, 0), dtype)


@pytest.mark.parametrize(
    "case",
    [
        Case(24, 2, batch=1, height=2, width=300),
        Case(432, 36, batch=1, height=4, width=4),
        replace(RING, batch=1, height=2, width=130),
    ],
    ids=str,
)
def test_products_that_do_not_fit_are_the_staged_driver_s(driver, case):
    """Rows that are too wide, or too many channels, for the products that follow the chain."""
    assert driver(case) == "persistent"
    laws.rule_holds(sample_for("bfloat16", case, 0), "bfloat16")


def test_what_it_does_not_take(monkeypatch, driver):
    assert driver(WIDE, "float32") == "staged"
    assert driver(WIDE, "float64") == "staged"
    assert driver(replace(WIDE, units=2)) == "staged"
    assert driver(UNITS[0], "tf32") == "staged"
    assert driver(replace(UNITS[0], units=3)) == "staged"
    assert driver(replace(UNITS[0], shortcut=False)) == "staged"
    assert driver(replace(UNITS[0], mode="eval")) == "staged, persistent"
    assert driver(replace(WIDE, expansion=3)) == "staged"
    assert driver(replace(RING, shortcut=True)) == "staged"
    assert driver(replace(RING, channels=117)) == "staged"  # segments of 39 channels
    processors(monkeypatch, 1)
    assert driver(WIDE) == "staged"  # no place for a clerk
    # In evaluation nobody waits for anybody; but sums for the gradients of batch norms need a clerk.
    assert driver(replace(WIDE, mode="eval")) == "persistent, staged"
    assert driver(Case(240, 20, batch=2, height=32, width=32, mode="eval")) == "staged"  # two bands of an image


@pytest.mark.parametrize("precision", OF_EACH_SIZE)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    "case",
    [
        Case(240, 20, batch=64, height=32, width=32),
        Case(300, 25, batch=64, height=16, width=16),
        Case(360, 30, batch=64, height=8, width=8),
        Case(240, 240, batch=64, height=32, width=32),
    ],
    ids=str,
)
def test_an_h200_takes_the_layers_of_gunn_15(monkeypatch, driver, case, mode, precision):
    """And one of single channels: 132 processors with 227 kB of shared memory each. In turns of any batch."""
    processors(monkeypatch, 132)
    assert driver(replace(case, mode=mode), precision) == "persistent"
    large_in_tf32 = precision == "tf32" and case.segments == 20  # of 512 pixels a block would have not enough registers
    assert driver.turns == ("backward" if large_in_tf32 else "")
    assert driver(replace(case, mode=mode, batch=1000), precision) == "persistent"
    assert driver.turns == ("backward" if mode == "eval" and case.width <= 16 else "forward, backward")


@pytest.mark.parametrize(
    "case",
    [
        Case(720, 20, expansion=3, units=2, height=32, width=32),
        Case(900, 25, expansion=3, units=2, height=16, width=16),
        Case(1080, 30, expansion=3, units=2, height=8, width=8),
    ],
    ids=str,
)
@pytest.mark.parametrize("batch", [1, 64, 1000])
def test_an_h200_takes_the_layers_of_gunn_24(monkeypatch, driver, case, batch):
    processors(monkeypatch, 132)
    assert driver(replace(case, batch=batch)) == "persistent"


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    "case",
    [
        Case(400, 10, shortcut=False, height=56, width=56),
        Case(800, 20, shortcut=False, height=28, width=28),
        Case(1600, 40, shortcut=False, height=14, width=14),
        Case(2000, 50, shortcut=False, height=7, width=7),
    ],
    ids=str,
)
@pytest.mark.parametrize("batch", [1, 32, 128, 1000])
@pytest.mark.parametrize("precision", OF_EACH_SIZE)
def test_an_h200_takes_the_layers_of_gunn_18(monkeypatch, driver, case, batch, mode, precision):
    """All of their blocks at once, or in turns."""
    processors(monkeypatch, 132)
    assert driver(replace(case, batch=batch, mode=mode), precision) == "persistent"


def test_it_serves_only_where_it_is_asked_for(monkeypatch, core, driver):
    monkeypatch.delenv("GUNN_CUDA_DRIVER")
    assert driver(WIDE) == "staged"
    assert driver(WIDE, persistent=True) == "persistent"  # by the table
    monkeypatch.setenv("GUNN_CUDA_DRIVER", "staged")
    assert driver(WIDE, persistent=True) == "staged"
    monkeypatch.setenv("GUNN_CUDA_DRIVER", "fast")
    with pytest.raises(
        core.CoreError, match="GUNN_CUDA_DRIVER=fast: unknown driver; expected staged or persistent, or nothing"
    ):
        driver(WIDE)


def test_more_images_than_processors_in_evaluation(monkeypatch):
    processors(monkeypatch, 2)
    laws.rule_holds(sample_for("bfloat16", replace(WIDE, batch=5, mode="eval"), 0), "bfloat16")


@pytest.mark.parametrize(
    ("case", "precision"),
    [
        *each([WIDE, BANDS, replace(BANDS, mode="eval"), RING, replace(RING, mode="eval"), TURNS[0]]),
        (UNITS[1], "bfloat16"),
    ],
    ids=str,
)
def test_bits_do_not_depend_on_the_schedule(monkeypatch, case, precision):
    if case in TURNS:
        processors(monkeypatch, 3)
    dtype, fast = PRECISIONS[precision]
    values = sample_for(precision, case, 0)

    def results():
        with tensor_float(fast):
            result = run_sample(values, GunnLayer, dtype)
        return [result.y, *result.gradients.values()]

    expected = results()
    for seed in (1, 2, 3):
        monkeypatch.setenv("GUNN_EMULATOR_SEED", str(seed))
        assert all(torch.equal(a, b) for a, b in zip(results(), expected, strict=True))


@pytest.mark.parametrize(("case", "precision"), each([WIDE, BANDS, RING]), ids=str)
def test_layouts(case, precision):
    dtype, fast = PRECISIONS[precision]
    values = sample_for(precision, case, 0)
    layer = layer_of(values, dtype).eval()
    x = values.x.to(dtype)
    with torch.no_grad(), tensor_float(fast):
        expected = layer(x)
        nhwc = layer(x.contiguous(memory_format=torch.channels_last))
        view = layer(torch.cat([x, x], dim=1)[:, case.channels :].transpose(2, 3).contiguous().transpose(2, 3))
    assert nhwc.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(nhwc, expected)
    assert torch.equal(view, expected)
