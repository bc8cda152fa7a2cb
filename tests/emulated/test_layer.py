"""The layer on the CUDA kernels, emulated: the laws of every device, and what these kernels in particular must mind."""

from dataclasses import replace

import laws
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from laws import INTEGERS, LAYOUTS, OPTIONS, PRECISIONS, SMALL, TINY, layer_of, sample_for
from test_layer import cases
from test_steps import (  # noqa: F401
    backward_in_steps,
    forward_in_steps,
    nothing,
    test_a_step_of_a_segment_that_is_not_there_raises,
    test_steps_give_the_same_bits_as_the_whole_pass,
    test_two_ranks_that_share_statistics_are_one_batch,
)
from tolerance import (
    Case,
    TensorFloatConvolutions,
    assert_within_rule,
    check,
    relative_error,
    run,
    run_sample,
    sample,
    tensor_float,
)

from gunn_ext import GunnLayer, ReferenceGunnLayer, ops

NARROW = [torch.bfloat16, torch.float16]
DTYPES = [torch.float64, torch.float32, *NARROW]
MODES = ["train", "eval", "frozen"]
PARTIAL_TILES = Case(8, 2, batch=3, height=7, width=11)  # of 64 pixels: 4, the last one of 39
TWO_LEVELS = Case(2, 1, shortcut=False, batch=1, height=46, width=46)  # of the tree of statistics: 34 tiles
LARGE_TILES = [  # of 128 pixels x 160 columns
    Case(12, 2, units=2, batch=2, height=7, width=11),  # two tiles of pixels, the last one of 26
    Case(60, 1, batch=1, height=9, width=15),  # k + s = 184: two tiles of columns, the second with two batch norms
    Case(168, 8, expansion=1, batch=1, height=2, width=65),  # two tiles of the state's channels
    Case(12, 2, shortcut=False, batch=1, height=17, width=31),  # weight gradients: 17 chunks in five windows
]
IN_EIGHTS = Case(16, 2, batch=2, height=3, width=5)  # channels: pixel-major tensors are taken as they are
NOT_IN_EIGHTS = Case(12, 2, batch=2, height=3, width=5)
SHAPES = [
    Case(8, 2, batch=1, height=8, width=8),  # 64 pixels, one tile
    Case(8, 2, batch=1, height=9, width=7),
    Case(8, 2, batch=5, height=13, width=1),
    Case(8, 2, batch=2, height=8, width=8),
    Case(8, 2, batch=3, height=1, width=43),
    Case(8, 2, batch=2, height=5, width=7),
    Case(10, 5, batch=70, height=1, width=1),
    Case(10, 5, batch=1, height=2, width=2),
    Case(9, 9, batch=2, height=5, width=7),  # P = N
    Case(16, 1, batch=2, height=6, width=5),  # P = 1
    Case(1, 1, batch=4, height=4, width=5),
    Case(2, 2, expansion=1, batch=1, height=3, width=65),
    Case(48, 2, batch=1, height=5, width=7),  # k + s = 72: the second tile of columns has two batch norms
    Case(128, 2, expansion=1, batch=1, height=3, width=5),  # k = s = 64: a tile for each batch norm
    Case(70, 1, expansion=1, batch=1, height=4, width=5),  # two tiles of every kind of column
    Case(26, 1, expansion=3, units=2, shortcut=False, batch=2, height=4, width=9),
    IN_EIGHTS,
]


@pytest.fixture(autouse=True)
def emulated_kernels(core, monkeypatch):
    """Tensors of the CPU run on the CUDA kernels; float32 is not multiplied as TF32."""
    monkeypatch.setitem(ops._BACKENDS, "cpu", ops.CudaBackend(core))
    with tensor_float(False):
        yield


def rule_holds_for(case, precision, seed=0, **options):
    laws.rule_holds(sample_for(precision, case, seed), precision, **options)


def told(core, case):
    """A training pass of a case as the core is told of it: shape and options."""
    names = ("batch", "channels", "height", "width", "segments", "expansion", "units", "shortcut", "residual")
    shape = core.LayerShape(**{name: getattr(case, name) for name in names})
    return shape, core.Options(shape, batch_statistics=True, eps=1e-5, threads=1, device=0)


# --- values and gradients ---------------------------------------------------------------------------------------------


def test_the_emulated_kernels_are_the_ones_that_run():
    assert {ops.backend("cpu", dtype) for dtype in DTYPES} == {"cuda/chosen"}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("mode", "recompute"), [("train", True), ("train", False), ("eval", True), ("frozen", False)])
@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_options(case, mode, precision, recompute):
    rule_holds_for(replace(case, mode=mode), precision, recompute=recompute)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_awkward_shapes(case, mode, precision):
    rule_holds_for(replace(case, mode=mode), precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("mode", ["eval", "frozen"])
def test_one_pixel(mode, precision):
    rule_holds_for(Case(10, 5, batch=1, height=1, width=1, mode=mode), precision)


@pytest.fixture
def large_tiles(monkeypatch):
    """Products in 16 bits take large tiles, however few they are."""
    monkeypatch.setenv("GUNN_CUDA_TILE", "large")


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize(("mode", "dtype"), [("train", "bfloat16"), ("train", "float16"), ("frozen", "bfloat16")])
@pytest.mark.parametrize("case", LARGE_TILES, ids=str)
def test_large_tiles(case, mode, dtype):
    rule_holds_for(replace(case, mode=mode), dtype, recompute=mode == "train")


@pytest.mark.usefixtures("large_tiles")
def test_two_levels_of_statistics_from_large_tiles():
    rule_holds_for(replace(TWO_LEVELS, batch=2, height=47, width=47), "bfloat16")  # 35 tiles


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize(("precision", "limit"), [("bfloat16", 2**8), ("float16", 2**11)])
@pytest.mark.parametrize("case", [INTEGERS[2], INTEGERS[5]], ids=str)
def test_large_tiles_are_exact_on_small_integers(case, precision, limit):
    laws.small_integers_are_exact(laws.small_integers(case, limit), PRECISIONS[precision][0], True)


@pytest.mark.parametrize("case", [LARGE_TILES[0], LARGE_TILES[3]], ids=str)
def test_large_tiles_change_no_bit_of_what_is_no_sum_over_pixels(case, monkeypatch):
    """Products add in the order of small ones. Statistics are given here, and gradients of weights close."""
    values, results = sample(replace(case, mode="frozen")), []
    for tile in ("small", "large"):
        monkeypatch.setenv("GUNN_CUDA_TILE", tile)
        results.append(run_sample(values, GunnLayer, torch.bfloat16))
    small, large = results
    assert torch.equal(small.y, large.y)
    assert torch.equal(small.gradients["x"], large.gradients["x"])
    for name, gradient in small.gradients.items():
        assert relative_error(large.gradients[name], gradient) < 1e-2, name


def test_the_tile_is_a_function_of_sizes_and_dtype(core, monkeypatch):
    """By number of tiles on an H200 and by columns: of GUNN-24, GUNN-18 and GUNN-15."""

    def large(case, dtype="bfloat16"):
        return core.drivers(*told(core, case), dtype, False)[2]

    weights = "weight_gradient of reduce, weight_gradient of spatial"
    everything = f"reduce, spatial, spatial_backward, input_backward, {weights}"
    first = Case(720, 20, expansion=3, units=2, batch=64, height=32, width=32)
    assert large(first) == large(first, "float16") == everything
    assert large(replace(first, channels=900, segments=25, height=16, width=16)) == everything
    assert large(replace(first, channels=1080, segments=30, height=8, width=8)) == f"input_backward, {weights}"
    assert large(replace(first, batch=1)) == weights
    assert large(Case(400, 10, shortcut=False, batch=32, height=56, width=56)) == everything
    assert large(Case(240, 20, batch=64, height=32, width=32)) == "input_backward"
    assert large(first, "float32") == large(first, "float64") == ""
    monkeypatch.setenv("GUNN_CUDA_TILE", "small")
    assert large(first) == ""
    monkeypatch.setenv("GUNN_CUDA_TILE", "large")
    assert large(TINY) == everything
    assert large(TINY, "float32") == ""


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("case", LARGE_TILES[:2], ids=str)
def test_recomputation_in_large_tiles_changes_no_bit(case):
    laws.recomputation_changes_no_bit(sample(case), torch.bfloat16)


def test_an_unknown_tile_is_named(monkeypatch):
    monkeypatch.setenv("GUNN_CUDA_TILE", "huge")
    with pytest.raises(RuntimeError, match="GUNN_CUDA_TILE=huge: unknown tile; expected small or large, or nothing"):
        run_sample(sample(TINY), GunnLayer, torch.bfloat16)


@pytest.mark.parametrize("precision", [precision for precision in PRECISIONS if precision != "float64"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_two_levels_of_statistics(mode, precision):
    rule_holds_for(replace(TWO_LEVELS, mode=mode), precision)


def test_three_levels_of_statistics():
    case = Case(1, 1, expansion=1, shortcut=False, batch=1, height=250, width=263)  # 1028 tiles
    laws.rule_holds(sample(case), "float32")


@pytest.mark.parametrize("case", [TWO_LEVELS, replace(TWO_LEVELS, mode="eval"), PARTIAL_TILES], ids=str)
def test_float64_of_many_pixels_is_close_to_the_reference(case):
    """Of many pixels the oracle's own sums are no better than ours: the rule does not apply."""
    values = sample(case)
    laws.assert_close(*(run(layer, values.x.double(), values.grad.double()) for layer in laws.both(values)))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_autocast(case, mode, dtype):
    laws.rule_holds_under_autocast(replace(case, mode=mode), dtype)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases(), seed=st.integers(0, 9), precision=st.sampled_from(list(PRECISIONS)), recompute=st.booleans())
def test_any_case(case, seed, precision, recompute):
    if precision == "float64":
        values = sample(case, seed)
        ours, expected = laws.both(values, recompute=recompute)
        laws.assert_close(*(run(layer, values.x.double(), values.grad.double()) for layer in (ours, expected)))
    else:
        rule_holds_for(case, precision, seed, recompute=recompute)


def test_channels_of_one_value():
    """Their variance is 0: batch norm makes 300 times as much of every rounding, one after another."""
    values = sample(SMALL)
    values = replace(values, x=values.x[:1, :, :1, :1].expand_as(values.x).contiguous())
    ours, expected = (run(layer, values.x.double(), values.grad.double()) for layer in laws.both(values))
    assert relative_error(ours.y, expected.y) < 1e-9
    assert all(relative_error(ours.gradients[name], wanted) < 1e-9 for name, wanted in expected.gradients.items())


@pytest.mark.parametrize("offset", [3.0, 30.0])
def test_statistics_of_channels_far_from_zero(offset):
    laws.rule_holds(sample(SMALL, offset=offset), "float32")


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize(
    ("precision", "limit"),
    [("float64", 2**16), ("float32", 2**16), ("tf32", 2**11), ("bfloat16", 2**8), ("float16", 2**11)],
)
@pytest.mark.parametrize("case", INTEGERS, ids=str)
def test_exact_on_small_integers(case, precision, limit, recompute):
    dtype, fast = PRECISIONS[precision]
    with tensor_float(fast):
        laws.small_integers_are_exact(laws.small_integers(case, limit), dtype, recompute)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize("units", [1, 2])
@pytest.mark.parametrize("expansion", [1, 2, 3])
def test_gradcheck_of_every_option(expansion, units, shortcut, residual, mode):
    case = replace(TINY, expansion=expansion, units=units, shortcut=shortcut, residual=residual, mode=mode)
    assert laws.gradcheck(sample(case, margin=1e-3), recompute=units == 1, fast_mode=True)


@pytest.mark.parametrize(
    "case",
    [
        replace(TINY, expansion=1),
        Case(2, 2, units=2, shortcut=False, residual=False, height=3, width=2, mode="eval"),
    ],
    ids=str,
)
def test_gradcheck_entry_by_entry(case):
    assert laws.gradcheck(sample(case, margin=1e-3), recompute=True, fast_mode=False)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "grad"])
def test_a_value_that_is_not_finite_spreads_as_in_torch(mode, value, where):
    laws.values_that_are_not_finite_spread_as_in_torch(sample(replace(SMALL, mode=mode)), value, where)


def test_backward_of_more_segments_than_its_workspace_holds(core, monkeypatch):
    """They are taken in blocks, here of two and one. Steps take blocks of one."""
    monkeypatch.setenv("GUNN_EMULATOR_WORKERS", "2")
    case = Case(3, 3, expansion=24, shortcut=False, batch=1, height=150, width=170)
    rows, pixels, _, workspace = core.sizes(*told(core, case), "float64", True)
    of_a_segment = 8 * rows * pixels  # without a shortcut, as many gradients as pre-activations
    assert 2 * of_a_segment < workspace < 3 * of_a_segment
    values = sample(case)
    layers = laws.both(values, recompute=False)
    laws.assert_close(*(run(layer, values.x.double(), values.grad.double()) for layer in layers))


# --- TF32 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", [*OPTIONS, PARTIAL_TILES, Case(48, 2, batch=1, height=5, width=7)], ids=str)
def test_tensor_float_is_float32_with_rounded_factors(case, mode):
    """Sharp: oracle and plain torch round every factor to TF32 and nothing else, so what is left is float32's error."""
    with TensorFloatConvolutions():
        values = sample(replace(case, mode=mode), margin=2e-4)  # a factor that rounds the other way moves others so far
        with tensor_float(True):
            check(values, lambda draw: run_sample(draw, GunnLayer, torch.float32), torch.float32)


@pytest.mark.parametrize("recompute", [True, False])
def test_the_switch_is_asked_once(recompute):
    values = sample(SMALL)
    exact = run_sample(values, GunnLayer, torch.float32)
    with tensor_float(True):
        expected = run_sample(values, GunnLayer, torch.float32)
    for at_first in (True, False):
        layer, x = layer_of(values, recompute=recompute), values.x.clone().requires_grad_()
        with tensor_float(at_first):
            y = layer(x)
        with tensor_float(not at_first):
            y.backward(values.grad)
        wanted = expected if at_first else exact
        assert torch.equal(x.grad, wanted.gradients["x"])
        assert all(torch.equal(p.grad, wanted.gradients[name]) for name, p in layer.named_parameters())
    assert not torch.equal(exact.y, expected.y)
    assert not any(torch.equal(exact.gradients[name], gradient) for name, gradient in expected.gradients.items())


@pytest.mark.parametrize("dtype", [torch.float64, *NARROW], ids=str)
def test_the_switch_is_for_float32_alone(dtype):
    values = sample(SMALL)
    expected = run_sample(values, GunnLayer, dtype)
    with tensor_float(True):
        assert run_sample(values, GunnLayer, dtype).equal(expected)


# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", [*OPTIONS, PARTIAL_TILES], ids=str)
def test_recomputation_changes_no_bit(case, precision):
    dtype, fast = PRECISIONS[precision]
    with tensor_float(fast):
        laws.recomputation_changes_no_bit(sample(case), dtype)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", [Case(12, 2, units=2, batch=2, height=7, width=11), TWO_LEVELS], ids=str)
def test_every_schedule_gives_the_same_bits(case, precision, monkeypatch):
    dtype, fast = PRECISIONS[precision]
    values = sample(case)
    with tensor_float(fast):
        expected = run_sample(values, GunnLayer, dtype)
        assert run_sample(values, GunnLayer, dtype).equal(expected)
        for seed in range(1, 4):
            monkeypatch.setenv("GUNN_EMULATOR_SEED", str(seed))
            monkeypatch.setenv("GUNN_EMULATOR_WORKERS", str(1 + seed % 3))
            assert run_sample(values, GunnLayer, dtype).equal(expected)


def test_schedules_are_the_ones_asked_for(monkeypatch):
    """The emulator reads its settings at every launch: one that makes no sense is complained of."""
    monkeypatch.setenv("GUNN_EMULATOR_SEED", "dice")
    with pytest.raises(RuntimeError, match="GUNN_EMULATOR_SEED=dice"):
        run_sample(sample(TINY), GunnLayer, torch.float32)


@pytest.mark.parametrize(
    "case",
    [IN_EIGHTS, NOT_IN_EIGHTS, replace(IN_EIGHTS, batch=1), replace(IN_EIGHTS, batch=1, height=1, mode="eval")],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_input_and_gradient_changes_no_bit(layout, dtype, case):
    laws.layout_of_input_and_gradient_changes_no_bit(sample(case), layout, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [IN_EIGHTS, NOT_IN_EIGHTS], ids=str)
def test_memory_format_of_the_output_is_the_input_s(case, dtype):
    laws.memory_format_of_the_output_is_the_inputs(sample(case), dtype)


def test_expanded_input_and_gradient():
    laws.expanded_input_and_gradient_are_taken_as_they_are(sample(SMALL))


def test_parameters_of_any_strides():
    laws.strides_of_parameters_change_no_bit(sample(replace(SMALL, units=2)))


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_input_and_output_gradient_are_not_modified(mode, recompute):
    laws.input_and_output_gradient_are_not_modified(sample(replace(SMALL, mode=mode)), recompute)


def far_apart(t, dimension):
    """A copy whose neighbours along a dimension are more than 2^31 elements apart; only touched pages cost memory."""
    strides = list(t.stride())
    strides[dimension] = 2**31 + 2 * t.numel()
    count = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, strides, strict=True))
    try:
        return torch.empty(count, dtype=t.dtype).as_strided(t.shape, strides).copy_(t)
    except RuntimeError as error:
        pytest.skip(f"no {count * t.element_size():,} bytes of untouched memory: {error}")


@pytest.mark.parametrize("dimension", range(4))
def test_strides_of_more_than_32_bits(dimension):
    values = sample(Case(2, 2, batch=2, height=2, width=2))
    layer, x, grad = layer_of(values), values.x.bfloat16(), values.grad.bfloat16()
    assert run(layer_of(values), far_apart(x, dimension), far_apart(grad, dimension)).equal(run(layer, x, grad))

    arguments, parameters, options = laws.operator_arguments(replace(values, x=x), layer)
    y, statistics, _ = ops.layer_forward(*arguments)
    far = far_apart(y, dimension)
    expected, ours = (
        ops.layer_backward(grad, x, out, parameters, statistics, None, *options, True, True, True) for out in (y, far)
    )
    assert torch.equal(ours[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(ours[1], expected[1], strict=True))


# --- running statistics -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
@pytest.mark.parametrize("case", [SMALL, replace(SMALL, units=2, shortcut=False)], ids=str)
def test_running_statistics_after_several_steps(case, momentum):
    laws.running_statistics_are_those_of_the_reference_after_several_steps(sample(case), momentum)


def test_evaluation_and_frozen_batch_norm_leave_the_running_statistics_alone():
    laws.evaluation_and_frozen_batch_norm_leave_the_running_statistics_alone(sample(SMALL))


def test_two_forwards_before_two_backwards():
    laws.two_forwards_may_come_before_two_backwards(sample(SMALL))


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_around_the_layer(use_reentrant, recompute):
    laws.activation_checkpointing_changes_no_bit(sample(SMALL), use_reentrant, recompute)


def test_twenty_steps_of_training_follow_the_reference():
    laws.twenty_steps_of_training_follow_the_reference(sample(replace(SMALL, batch=8)))


@pytest.mark.parametrize("outlier", [0.0, 20.0])
def test_statistics_of_a_large_image_are_as_good_as_those_of_torch(outlier):
    """The first pixel far off, and many pixels: sums around it, or in float alone, would lose digits."""
    torch.manual_seed(0)
    x = torch.randn(1, 2, 160, 160)
    x[0, :, 0, 0] += outlier
    layers = [kind(2, 1) for kind in (GunnLayer, ReferenceGunnLayer, ReferenceGunnLayer)]
    for layer in layers[1:]:
        layer.load_state_dict(layers[0].state_dict())
    layers[2].double()
    with torch.no_grad():
        ours, plain, oracle = layers[0](x), layers[1](x), layers[2](x.double())
    assert_within_rule(ours, oracle, plain, factor=2, name="y")


# --- autograd ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_the_gradients_asked_for(dtype):
    laws.only_the_gradients_asked_for_are_computed(sample(SMALL), dtype)


def test_nothing_is_recorded_without_gradients():
    laws.nothing_is_recorded_without_gradients(sample(SMALL))


@pytest.mark.parametrize("mode", ["train", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
@pytest.mark.parametrize("case", [SMALL, replace(SMALL, units=2, shortcut=False)], ids=str)
def test_bytes_saved_for_backward(case, dtype, mode):
    laws.input_output_parameters_and_statistics_are_saved(sample(replace(case, mode=mode)), dtype)


def test_bytes_saved_for_backward_with_narrow_parameters():
    laws.narrow_parameters_are_saved_as_they_are(sample(SMALL))


@pytest.mark.parametrize("changed", ["x", "y"])
def test_overwriting_what_backward_needs_is_an_error(changed):
    laws.overwriting_what_backward_needs_is_an_error(sample(SMALL), changed)


def test_double_backward_is_refused_by_name():
    laws.double_backward_is_refused_by_name(sample(TINY))


@pytest.mark.parametrize("recompute", [True, False])
def test_backward_twice_through_a_retained_graph(recompute):
    laws.backward_may_run_twice_through_a_retained_graph(sample(SMALL), recompute)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_batch_in_evaluation(dtype):
    layer = replace(SMALL, mode="eval").layer(GunnLayer, dtype)
    laws.an_empty_batch_gives_an_empty_output(layer, torch.empty(0, 12, 6, 10, dtype=dtype, requires_grad=True))


# --- the operators ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "keep"), [("train", False), ("train", True), ("eval", False)])
def test_opcheck_of_bfloat16_beside_float32_parameters(mode, keep):
    values = sample(replace(TINY, mode=mode))
    laws.operators_pass_opcheck(replace(values, x=values.x.bfloat16(), grad=values.grad.bfloat16()), keep)


@pytest.mark.parametrize("recompute", [True, False])
def test_compiled_layer_equals_eager(recompute):
    laws.compiled_layer_equals_eager(sample(SMALL), recompute, backend="aot_eager")


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("case", [SMALL, replace(SMALL, units=2, shortcut=False)], ids=str)
def test_steps_of_narrow_layers_give_the_same_bits_as_the_whole_pass(case, dtype):
    values = sample(case)
    layer, x, grad = layer_of(values), values.x.to(dtype), values.grad.to(dtype)
    expected = run(layer_of(values), x, grad)
    parameters, static = ops.parameter_list(layer), ops.layer_options(layer)
    forward = ops.ForwardSteps(x, parameters, static)
    forward.layer = layer
    forward_in_steps([forward], nothing)
    assert torch.equal(forward.y, expected.y)

    backward = ops.BackwardSteps(grad, x, forward.y, parameters, forward.statistics, static)
    backward.layer = layer
    backward_in_steps([backward], nothing)
    assert torch.equal(backward.grad_x, expected.gradients["x"])
    names = {id(p): name for name, p in layer.named_parameters()}
    for parameter, gradient in zip(ops.parameter_list(layer), backward.grads, strict=True):
        assert torch.equal(gradient, expected.gradients[names[id(parameter)]])


# --- bad input --------------------------------------------------------------------------------------------------------


def operands(dtype):
    """Arguments of both operators, in a dtype beside float32 parameters."""
    values = sample(SMALL)
    values = replace(values, x=values.x.to(dtype), grad=values.grad.to(dtype))
    forward, parameters, options = laws.operator_arguments(values, layer_of(values))
    y, statistics, _ = ops.layer_forward(*forward)
    return values.x, values.grad, y, parameters, statistics, options


@pytest.mark.parametrize("wrong", [torch.float64, torch.float16], ids=str)
def test_parameters_of_another_dtype_are_named(wrong):
    x, grad, y, parameters, statistics, options = operands(torch.bfloat16)
    bad = [*parameters[:4], parameters[4].to(wrong), *parameters[5:]]
    message = rf"parameters\[4\] must be torch.bfloat16 or torch.float32 on cpu beside x, got {wrong} on cpu"
    with pytest.raises(ValueError, match=message):
        ops.layer_forward(x, bad, None, *options, False)
    with pytest.raises(ValueError, match=message):
        ops.layer_backward(grad, x, y, bad, statistics, None, *options, True, True, True)


def test_other_tensors_of_another_dtype_are_named():
    x, grad, y, parameters, statistics, options = operands(torch.bfloat16)
    needs = (True, True, True)
    with pytest.raises(ValueError, match="statistics must be torch.float32 on cpu beside x, got torch.bfloat16"):
        ops.layer_forward(x, parameters, statistics.bfloat16(), *options, False)
    with pytest.raises(ValueError, match="grad_y must be torch.bfloat16 on cpu beside x, got torch.float32"):
        ops.layer_backward(grad.float(), x, y, parameters, statistics, None, *options, *needs)
    with pytest.raises(ValueError, match="y must be torch.bfloat16 on cpu beside x, got torch.float16"):
        ops.layer_backward(grad, x, y.half(), parameters, statistics, None, *options, *needs)
    saved = ops.layer_forward(x, parameters, None, *options, True)[2].float()
    with pytest.raises(ValueError, match="saved must be torch.bfloat16 on cpu beside x, got torch.float32"):
        ops.layer_backward(grad, x, y, parameters, statistics, saved, *options, *needs)


def test_dtypes_that_have_no_kernels_are_named(core):
    x, _, _, parameters, _, options = operands(torch.float32)
    with pytest.raises(TypeError, match="float64, float32, bfloat16, float16, got torch.int32"):
        ops.layer_forward(x.int(), parameters, None, *options, False)
    with pytest.raises(TypeError, match="float64, float32, bfloat16 or float16.*torch.float8_e4m3fn"):
        layer_of(sample(SMALL))(x.to(torch.float8_e4m3fn))
    with pytest.raises(RuntimeError, match="the CUDA kernels take .*, got int8"):
        core.sizes(*told(core, SMALL), "int8", False)


def test_parameters_of_another_dtype_or_device_than_the_input_are_named():
    layer, x = layer_of(sample(SMALL)), sample(SMALL).x
    layer.units[0].project.double()
    with pytest.raises(TypeError, match="input is torch.float32, but the layer's parameters are torch.float64"):
        layer(x)
    layer.units[0].reduce.to("meta")
    with pytest.raises(RuntimeError, match="input is on cpu, but the layer's parameters are on meta"):
        layer(x)


@pytest.mark.parametrize(
    ("size", "named"),
    [({"batch": 2**31}, "batch 2147483648"), ({"height": 2**16, "width": 2**15}, "pixels of an image 2147483648")],
)
def test_sizes_that_leave_32_bits_are_named(core, size, named):
    case = replace(Case(2, 2, batch=1, height=1, width=1), **size)
    with pytest.raises(RuntimeError, match=f"sizes below 2.30: .*{named}"):
        core.sizes(*told(core, case), "bfloat16", False)


def test_room_for_copies_is_taken_only_where_there_are_copies(core):
    """Forward: copies of x and y; backward: and in float32 the gradient of the state is grad_x itself."""
    shape, _ = told(core, Case(64, 4, batch=2, height=16, width=16))
    x_bytes = 2 * 64 * 16 * 16 * 4

    def workspaces(**promise):
        options = core.Options(shape, batch_statistics=True, eps=1e-5, threads=1, device=0, **promise)
        return core.sizes(shape, options, "float32", False)[2:]

    saved = [a - b for a, b in zip(workspaces(), workspaces(pixel_major=True), strict=True)]
    assert saved == [2 * x_bytes, 3 * x_bytes]


def test_a_wrong_word_about_layouts_is_refused(core, monkeypatch):
    """Without room for a copy nothing is copied."""
    monkeypatch.setattr(ops, "_pixel_major", lambda *tensors: True)
    x = torch.randn(2, 16, 4, 4, requires_grad=True)
    with pytest.raises(core.CoreError, match="pixel_major, but a feature map is not channels-last"):
        GunnLayer(16, 2)(x)


def test_kept_pre_activations_may_lie_anywhere():
    laws.kept_pre_activations_may_lie_anywhere(sample(SMALL))
