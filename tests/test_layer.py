"""GunnLayer: values and gradients under the tolerance rule, and its behaviour as a torch module."""

import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import laws
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from laws import GUNN_15, OPTIONS, SHAPES, SMALL, TINY, both, layer_of, operator_arguments, statistics_of
from tolerance import Case, assert_within_rule, check, check_layer, run, run_sample, sample, threads
from torch.autograd import forward_ad

from gunn_ext import GunnLayer, ReferenceGunnLayer, ops

DTYPES = [torch.float32, torch.float64]
NARROW = ["bfloat16", "float16"]  # their samples are settled (laws.sample_for): a rounding flips no ReLU
MODES = ["train", "eval", "frozen"]


@pytest.fixture(autouse=True)
def parallel_however_small(monkeypatch):
    """Small layers run on one thread, to be fast; here they take the threads they are given."""
    monkeypatch.setattr(ops, "_SERIAL_WORK", 0)


# --- values and gradients ---------------------------------------------------------------------------------------------


def check_on_threads(case, count, dtype=torch.float32, **options):
    """`check_layer` on so many threads."""

    def ours(values):
        with threads(count):
            return run_sample(values, GunnLayer, dtype, **options)

    check(sample(case), ours, dtype)


# Rows of two and of one and a half vectors' patches, blocks of 24, 12 and 4 rows, halves of vectors, odd heights; and
# weight gradients of 72 rows, more than three vectors of any width, the last of AVX-512 a half one.
PATCHES = [
    Case(40, 2, batch=1, height=5, width=40),
    Case(24, 2, batch=2, height=9, width=56),
    Case(20, 1, shortcut=False, batch=3, height=6, width=24),
    Case(28, 2, batch=2, height=7, width=8),
    Case(12, 2, batch=2, height=13, width=3),
    Case(12, 2, expansion=3, batch=2, height=4, width=100),
    Case(48, 2, batch=1, height=3, width=9),
]


# The evaluation in float64 differs in the vectors' width alone, and that is the training's as well.
@pytest.mark.parametrize(
    ("mode", "dtype"), [("train", torch.float32), ("eval", torch.float32), ("train", torch.float64)], ids=str
)
@pytest.mark.parametrize("case", SHAPES + PATCHES, ids=str)
def test_awkward_shapes(case, mode, dtype):
    check_on_threads(replace(case, mode=mode), 2, dtype)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", GUNN_15, ids=str)
def test_layers_of_gunn15(case, mode):
    check_on_threads(replace(case, mode=mode), 2)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_any_number_of_threads(mode, batch, count):
    check_on_threads(replace(SMALL, batch=batch, mode=mode), count)


# Images of several bands of rows: several tiles to a row, odd heights, two rows to a vector, few bands; the last two
# without padding, so that rows are cut.
CUT = [
    Case(12, 3, batch=1, height=7, width=33),
    Case(12, 3, units=2, batch=3, height=9, width=16),
    Case(12, 3, units=2, residual=False, shortcut=False, batch=1, height=21, width=7),
    Case(6, 6, expansion=3, batch=5, height=11, width=6),
    Case(8, 1, batch=1, height=40, width=1),
    Case(8, 2, batch=2, height=3, width=65),
    Case(16, 2, batch=1, height=14, width=14),
    Case(12, 3, units=2, batch=3, height=20, width=3),
]

# Segments of few channels, more than make one panel; the last panel is short.
PANELS = [
    Case(14, 14, batch=3, height=5, width=6),
    Case(14, 14, units=2, batch=2, height=3, width=17),
    Case(20, 20, shortcut=False, residual=False, batch=2, height=4, width=5),
    Case(28, 14, batch=1, height=9, width=8),
    Case(27, 9, expansion=1, units=2, shortcut=False, batch=2, height=4, width=6),
    Case(30, 30, batch=2, height=4, width=4),
]


@pytest.mark.parametrize(("count", "recompute"), [(2, True), (3, True), (7, True), (3, False), (4, False)])
@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("case", CUT, ids=str)
def test_threads_share_images(case, mode, count, recompute):
    check_on_threads(replace(case, mode=mode), count, recompute=recompute)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CUT, *PANELS, Case(60, 5, batch=3, height=16, width=16)], ids=str)
def test_evaluation_does_not_depend_on_threads(case, dtype):
    layer = layer_of(sample(replace(case, mode="eval")), dtype)
    x = torch.randn(case.batch, case.channels, case.height, case.width, dtype=dtype)
    with torch.no_grad():
        expected = layer(x)
        for count in (2, 3, 4, 5, 8):
            with threads(count):
                assert all(torch.equal(layer(x), expected) for _ in range(3)), count


@pytest.mark.parametrize(("count", "recompute"), [(1, True), (2, True), (2, False)])
@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("case", PANELS, ids=str)
def test_panels_of_segments(case, mode, count, recompute):
    check_on_threads(replace(case, mode=mode), count, recompute=recompute)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_pre_activations_kept_instead_of_recomputed(case, mode, dtype):
    check_layer(replace(case, mode=mode), GunnLayer, dtype, recompute=False)


@st.composite
def cases(draw):
    few, many = st.integers(1, 4), st.integers(5, 16)
    width, segments = draw(st.tuples(st.integers(1, 14), few) | st.tuples(st.integers(1, 3), many))
    case = Case(
        width * segments,
        segments,
        expansion=draw(st.integers(1, 3)),
        units=draw(st.integers(1, 3)),
        shortcut=draw(st.booleans()),
        residual=draw(st.booleans()),
        batch=draw(st.integers(1, 4)),
        height=draw(st.integers(1, 10)),
        width=draw(st.integers(1, 18)),
        mode=draw(st.sampled_from(["train", "eval", "frozen"])),
    )
    # Statistics of fewer values leave little but rounding in the gradients.
    return case if case.batch * case.height * case.width >= 4 else replace(case, mode="eval")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    case=cases(),
    seed=st.integers(0, 9),
    dtype=st.sampled_from(DTYPES),
    recompute=st.booleans(),
    count=st.integers(1, 3),
)
def test_any_case(case, seed, dtype, recompute, count):
    def ours(values):
        with threads(count):
            return run_sample(values, GunnLayer, dtype, recompute=recompute)

    check(sample(case, seed), ours, dtype)


@pytest.mark.parametrize("offset", [3.0, 30.0])
def test_statistics_of_channels_far_from_zero(offset):
    check(sample(SMALL, offset=offset), lambda values: run_sample(values, GunnLayer, torch.float32), torch.float32)


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 2**16), (torch.bfloat16, 2**8), (torch.float16, 2**11)], ids=str
)
@pytest.mark.parametrize("case", laws.INTEGERS, ids=str)
@pytest.mark.parametrize("recompute", [True, False])
def test_exact_on_small_integers(case, recompute, dtype, limit):
    laws.small_integers_are_exact(laws.small_integers(case, limit), dtype, recompute)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize("units", [1, 2])
@pytest.mark.parametrize("expansion", [1, 3])
def test_gradcheck_of_every_option(expansion, units, shortcut, residual, mode, recompute):
    case = replace(TINY, expansion=expansion, units=units, shortcut=shortcut, residual=residual, mode=mode)
    assert laws.gradcheck(sample(case, margin=1e-3), recompute, fast_mode=True)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    "case",
    [replace(TINY, expansion=1), Case(2, 2, units=2, shortcut=False, residual=False, height=3, width=2)],
    ids=str,
)
def test_gradcheck_entry_by_entry(case, mode, recompute):
    assert laws.gradcheck(sample(replace(case, mode=mode), margin=1e-3), recompute, fast_mode=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_simultaneous_layer(case, mode, dtype):
    check_layer(replace(case, mode=mode, gradual=False), GunnLayer, dtype)


@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
def test_gradcheck_of_panels(mode, residual, shortcut):
    case = Case(20, 20, shortcut=shortcut, residual=residual, batch=2, height=1, width=2, mode=mode)
    assert laws.gradcheck(sample(case, margin=1e-3), True, fast_mode=True)


# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*OPTIONS, *PANELS[:3]], ids=str)
def test_recomputation_changes_no_bit(case, dtype, count):
    with threads(count):
        laws.recomputation_changes_no_bit(sample(case), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("segments", [5, 30])
@pytest.mark.parametrize("recompute", [True, False])
def test_runs_are_bitwise_equal(recompute, segments, batch, count, dtype):
    values = sample(Case(60, segments, batch=batch, height=9, width=12))
    with threads(count):
        laws.runs_are_bitwise_equal(values, dtype, recompute, runs=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("layout", laws.LAYOUTS)
def test_layout_of_input_and_gradient_changes_no_bit(layout, mode, dtype):
    laws.layout_of_input_and_gradient_changes_no_bit(sample(replace(SMALL, mode=mode)), layout, dtype)


@pytest.mark.parametrize("case", [SMALL, replace(SMALL, gradual=False)], ids=str)
def test_memory_format_of_the_output_is_the_input_s(case):
    laws.memory_format_of_the_output_is_the_inputs(sample(case))


def test_expanded_input_and_gradient():
    laws.expanded_input_and_gradient_are_taken_as_they_are(sample(SMALL))


def test_parameters_of_any_strides():
    laws.strides_of_parameters_change_no_bit(sample(replace(SMALL, units=2)))


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_input_and_output_gradient_are_not_modified(mode, recompute):
    laws.input_and_output_gradient_are_not_modified(sample(replace(SMALL, mode=mode)), recompute)


# --- running statistics -----------------------------------------------------------------------------------------------


def test_running_statistics_are_updated_once_though_backward_recomputes():
    values = sample(SMALL)
    layer = layer_of(values)
    y = layer(values.x.clone().requires_grad_())
    after_forward = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    y.backward(values.grad)
    assert all(torch.equal(buffer, after_forward[name]) for name, buffer in layer.named_buffers())
    assert layer.num_batches_tracked == 1
    assert not torch.equal(layer.units[0].reduce_bn.running_mean, values.state["units.0.reduce_bn.running_mean"])


@pytest.mark.parametrize("momentum", [0.1, 0.9, 0.0, 1.0, None])
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


# --- autograd ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradual", [True, False])
def test_only_the_gradients_asked_for(gradual):
    laws.only_the_gradients_asked_for_are_computed(sample(replace(SMALL, gradual=gradual)))


def test_nothing_is_recorded_without_gradients():
    laws.nothing_is_recorded_without_gradients(sample(SMALL))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["train", "frozen"])
@pytest.mark.parametrize("case", [SMALL, replace(SMALL, units=2, shortcut=False)], ids=str)
def test_bytes_saved_for_backward(case, mode, dtype):
    laws.input_output_parameters_and_statistics_are_saved(sample(replace(case, mode=mode)), dtype)


def test_bytes_saved_for_backward_with_narrow_parameters():
    laws.narrow_parameters_are_saved_as_they_are(sample(SMALL))


def test_pre_activations_of_narrow_layers_are_kept_in_float32():
    x = sample(SMALL).x.bfloat16()
    arguments, _, _ = operator_arguments(sample(SMALL), layer_of(sample(SMALL)), True)
    assert torch.ops.gunn_ext.layer_forward(x, *arguments[1:])[2].dtype == torch.float32


@pytest.mark.parametrize("changed", ["x", "y"])
def test_overwriting_what_backward_needs_is_an_error(changed):
    laws.overwriting_what_backward_needs_is_an_error(sample(SMALL), changed)


def test_double_backward_is_refused_by_name():
    laws.double_backward_is_refused_by_name(sample(TINY))


def test_forward_mode_is_refused_by_name():
    values = sample(TINY)
    layer = layer_of(values)
    with pytest.raises(NotImplementedError, match="forward-mode differentiation"):
        torch.func.jvp(layer, (values.x,), (values.grad,))
    with forward_ad.dual_level(), torch.no_grad(), pytest.raises(NotImplementedError, match="ReferenceGunnLayer"):
        layer(forward_ad.make_dual(values.x, values.grad))


@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "grad"])
def test_a_value_that_is_not_finite_spreads_as_in_torch(mode, value, where):
    laws.values_that_are_not_finite_spread_as_in_torch(
        sample(replace(SMALL, mode=mode)), value, where, taps_as_one=True
    )


@pytest.mark.parametrize("outlier", [0.0, 20.0])
def test_statistics_of_a_large_image_are_as_good_as_those_of_torch(outlier):
    """The first pixel far off, and many pixels: sums around it, or in float alone, would lose digits."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 160, 160)
    x[0, :, 0, 0] += outlier
    layers = [kind(4, 1) for kind in (GunnLayer, ReferenceGunnLayer, ReferenceGunnLayer)]
    for layer in layers[1:]:
        layer.load_state_dict(layers[0].state_dict())
    layers[2].double()
    with torch.no_grad():
        ours, plain, oracle = layers[0](x), layers[1](x), layers[2](x.double())
    assert_within_rule(ours, oracle, plain, factor=2, name="y")


@pytest.mark.parametrize("case", [Case(1600, 40, height=4, width=4), Case(240, 3, expansion=4)], ids=str)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_long_sums_do_not_lose_digits(case, mode):
    """1,600 channels in a 1x1 convolution, 2,880 products in a 3x3: summed one after another they cost over twice."""
    case = replace(case, mode=mode, shortcut=False)
    torch.manual_seed(0)
    reference = case.layer()
    ours, oracle = case.layer(GunnLayer), case.layer(dtype=torch.float64)
    for layer in (ours, oracle):
        layer.load_state_dict(reference.state_dict())
    x = torch.randn(case.batch, case.channels, case.height, case.width)
    with torch.no_grad():
        assert_within_rule(ours(x), oracle(x.double()), reference(x), factor=2, name="y")


@pytest.mark.parametrize("recompute", [True, False])
def test_backward_twice_through_a_retained_graph(recompute):
    laws.backward_may_run_twice_through_a_retained_graph(sample(SMALL), recompute)


@pytest.mark.parametrize("gradual", [True, False])
def test_empty_batch_in_evaluation(gradual):
    layer = replace(SMALL, mode="eval", gradual=gradual).layer(GunnLayer)
    laws.an_empty_batch_gives_an_empty_output(layer, torch.empty(0, 12, 6, 10, requires_grad=True))


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.randn(12, 6, 6), ValueError, r"expected a 4-D input \(B, 12, H, W\), got shape \(12, 6, 6\)"),
        (torch.randn(2, 13, 6, 6), ValueError, "expected 12 channels, got 13"),
        (torch.ones(2, 12, 6, 6, dtype=torch.int64), TypeError, "float64, float32, bfloat16 or float16.*torch.int64"),
        (torch.randn(2, 12, 0, 6), ValueError, r"at least 1.*\(2, 12, 0, 6\)"),
        (torch.randn(1, 12, 1, 1), ValueError, r"more than 1 value per channel when training.*\(1, 12, 1, 1\)"),
        (torch.randn(0, 12, 6, 6), ValueError, r"more than 1 value per channel when training.*\(0, 12, 6, 6\)"),
        (torch.randn(2, 12, 6, 6).double(), (TypeError, ValueError), "float64.*float32|float32.*float64"),
        (torch.randn(2, 12, 6, 6, device="meta"), (TypeError, ValueError, RuntimeError), "meta.*cpu|cpu.*meta"),
    ],
    ids=["rank", "channels", "dtype", "height", "one value", "empty", "other dtype", "other device"],
)
@pytest.mark.parametrize("gradual", [True, False])
def test_bad_input_is_named_and_changes_nothing(x, error, message, gradual):
    layer = replace(SMALL, gradual=gradual).layer(GunnLayer)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(error, match=f"(?s){message}"):
        layer(x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_one_value_per_channel_is_fine_without_batch_statistics():
    for layer in (SMALL.layer(GunnLayer).eval(), SMALL.layer(GunnLayer).freeze_batch_norm()):
        assert layer(torch.randn(1, 12, 1, 1)).isfinite().all()


def test_segments_must_divide_channels():
    with pytest.raises(ValueError, match=r"GunnLayer: channels \(250\) must be divisible by segments \(20\)"):
        GunnLayer(250, 20)


def test_mixed_batch_norm_modes_are_refused():
    layer = SMALL.layer(GunnLayer)
    layer.units[0].spatial_bn.eval()
    with pytest.raises(
        RuntimeError, match="some batch norms of this layer are in training mode and some in evaluation"
    ):
        layer(torch.randn(2, 12, 3, 3))


def test_parameters_of_mixed_dtypes_are_refused():
    layer = SMALL.layer(GunnLayer)
    layer.units[0].project.double()
    with pytest.raises((TypeError, ValueError), match="(?s)float64"):
        layer(torch.randn(2, 12, 3, 3))


def test_state_dict_of_another_shape_is_refused_by_name():
    state = GunnLayer(12, 4, shortcut=True).state_dict()
    with pytest.raises(RuntimeError, match=r"size mismatch for units.0.reduce.weight"):
        SMALL.layer(GunnLayer).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Missing key.*units.0.shortcut.weight"):
        SMALL.layer(GunnLayer).load_state_dict(GunnLayer(12, 3).state_dict())


# --- as a module ------------------------------------------------------------------------------------------------------


def test_state_dicts_go_back_and_forth():
    values = sample(replace(SMALL, units=2))
    layer, reference = layer_of(values), ReferenceGunnLayer(12, 3, units=2, shortcut=True)
    reference.load_state_dict(layer.state_dict())
    again = replace(SMALL, units=2).layer(GunnLayer)
    again.load_state_dict(reference.state_dict())
    assert layer.state_dict().keys() == reference.state_dict().keys()
    assert run(again, values.x, values.grad).equal(run(layer, values.x, values.grad))


@pytest.mark.parametrize("duplicate", laws.DUPLICATES)
def test_copies_are_equal_and_independent(duplicate):
    laws.copies_are_equal_and_independent(sample(SMALL), duplicate)


def test_twenty_steps_of_training_follow_the_reference():
    laws.twenty_steps_of_training_follow_the_reference(sample(replace(SMALL, batch=8)))


# --- narrow dtypes ----------------------------------------------------------------------------------------------------


def rule_holds_for(case, precision, seed=0, count=2, **options):
    with threads(count):
        laws.rule_holds(laws.sample_for(precision, case, seed), precision, **options)


# float16 has float32's factors and bfloat16's rounding of the state: one mode shows its conversions.
@pytest.mark.parametrize(("mode", "precision"), [("train", "bfloat16"), ("eval", "bfloat16"), ("train", "float16")])
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_awkward_shapes_of_narrow_layers(case, mode, precision):
    rule_holds_for(replace(case, mode=mode), precision)


@pytest.mark.parametrize("precision", NARROW)
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", [*OPTIONS, PANELS[0]], ids=str)
def test_options_of_narrow_layers(case, mode, recompute, precision):
    rule_holds_for(replace(case, mode=mode), precision, recompute=recompute)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", GUNN_15, ids=str)
def test_layers_of_gunn15_in_bfloat16(case, mode):
    rule_holds_for(replace(case, mode=mode), "bfloat16")


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_any_number_of_threads_for_narrow_layers(mode, batch, count):
    rule_holds_for(replace(SMALL, batch=batch, mode=mode), "bfloat16", count=count)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    case=cases(),
    seed=st.integers(0, 9),
    precision=st.sampled_from(NARROW),
    recompute=st.booleans(),
    count=st.integers(1, 3),
)
def test_any_case_of_narrow_layers(case, seed, precision, recompute, count):
    rule_holds_for(case, precision, seed, count, recompute=recompute)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_rule_holds_under_autocast(case, mode, dtype):
    laws.rule_holds_under_autocast(replace(case, mode=mode), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_only_the_gradients_asked_for_of_narrow_layers(dtype):
    laws.only_the_gradients_asked_for_are_computed(sample(SMALL), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_narrow_number_passes_unchanged(dtype):
    """Through the edges and a write-back that adds zero: subnormal numbers, infinities and NaN, too."""
    layer = GunnLayer(1, 1, expansion=1).eval()
    torch.nn.init.zeros_(layer.units[0].project_bn.weight)
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).reshape(-1, 1, 16, 32)
    finite = x.isfinite().flatten(1).all(1)
    normal = x.float().abs() >= torch.finfo(dtype).tiny  # products in bfloat16 take smaller numbers for zero
    with torch.no_grad():
        y = layer(x)
    kept = normal if dtype == torch.bfloat16 else torch.ones_like(normal)
    assert torch.equal(y[finite][kept[finite]], x[finite][kept[finite]])
    assert not y[x.isnan()].isfinite().any()


@pytest.mark.parametrize("value", [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 65519.996, 65520.0, 2.0**-25, 3e-7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_write_back_is_rounded_as_torch_rounds(dtype, value):
    layer = GunnLayer(1, 1, expansion=1, residual=False).eval()
    torch.nn.init.zeros_(layer.units[0].project_bn.weight)
    with torch.no_grad():
        layer.units[0].project_bn.bias.copy_(torch.tensor([[value]]))
        x = torch.ones(1, 1, 2, 2)
        assert torch.equal(layer(x.to(dtype)), layer(x).to(dtype))
        layer.units[0].project_bn.bias.neg_()
        assert torch.equal(layer(x.to(dtype)), layer(x).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_parameters_keep_float32_running_statistics(dtype):
    values = sample(SMALL)
    layer = layer_of(values).to(dtype)
    result = run(layer, values.x.to(dtype), values.grad.to(dtype))
    assert {bn.running_mean.dtype for bn in layer.batch_norms()} == {torch.float32}
    assert {result.y.dtype, *(g.dtype for g in result.gradients.values())} == {dtype}
    check(values, lambda values: run_sample(values, GunnLayer, dtype), dtype)


@pytest.mark.parametrize("gradual", [True, False])
def test_autocast_runs_in_its_dtype_with_float32_parameters(gradual):
    values = sample(replace(SMALL, gradual=gradual))
    layer, reference = both(values, torch.float32)
    x = values.x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.backward(values.grad.bfloat16())
    gradients = {"x": x.grad} | {name: p.grad for name, p in layer.named_parameters()}
    assert {g.dtype for g in gradients.values()} == {torch.float32}
    assert layer.units[0].reduce_bn.running_mean.dtype == torch.float32
    torch_s = run(reference, values.x.bfloat16(), values.grad.bfloat16())
    oracle = run(values.layer(ReferenceGunnLayer, torch.float64), values.x.double(), values.grad.double())

    def no_worse(got, peer, wanted, name):
        assert (got - wanted).norm() < 1.5 * (peer - wanted).norm() + 1e-3 * wanted.norm(), name

    no_worse(y.detach(), torch_s.y, oracle.y, "y")
    for name, gradient in oracle.gradients.items():
        no_worse(gradients[name], torch_s.gradients[name], gradient, name)


# --- the operators ----------------------------------------------------------------------------------------------------


def test_order_of_the_parameters():
    layer = GunnLayer(6, 3, units=2, shortcut=True)
    expected = []
    for m, stages in enumerate((("reduce", "shortcut", "spatial", "project"), ("reduce", "spatial", "project"))):
        for stage in stages:
            expected += [f"units.{m}.{stage}.weight", f"units.{m}.{stage}_bn.weight", f"units.{m}.{stage}_bn.bias"]
    names = {id(p): name for name, p in layer.named_parameters()}
    assert [names[id(p)] for p in ops.parameter_list(layer)] == expected


@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_operator_returns_the_batch_statistics(case):
    """Mean and biased variance, as a reference layer of momentum 1 finds them."""
    values = sample(case)
    reference = values.layer(ReferenceGunnLayer, momentum=1.0)
    expected_y = reference(values.x)
    mean, unbiased = statistics_of(reference.eval())
    count = values.x[:, 0].numel()
    arguments, _, _ = operator_arguments(values, layer_of(values))
    y, statistics, saved = torch.ops.gunn_ext.layer_forward(*arguments)
    torch.testing.assert_close(y, expected_y.detach(), rtol=1e-4, atol=1e-4)
    expected = torch.stack([mean, unbiased * (count - 1) / count])
    torch.testing.assert_close(statistics, expected, rtol=1e-4, atol=1e-5)
    assert saved.numel() == 0


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_opcheck(mode, keep):
    laws.operators_pass_opcheck(sample(replace(TINY, mode=mode)), keep)


def test_operators_refuse_tensors_that_do_not_fit():
    script = """
import torch
from gunn_ext import GunnLayer, ops

layer, x = GunnLayer(12, 3), torch.randn(2, 12, 4, 4)
parameters = [p.detach() for p in ops.parameter_list(layer)]
options = (3, 2, 1, False, True, 1e-5)
forward, backward = torch.ops.gunn_ext.layer_forward, torch.ops.gunn_ext.layer_backward
y, statistics, saved = forward(x, parameters, None, *options, False)
needs = (True, True, True)
wrong = {
    "too few parameters": lambda: forward(x, parameters[:-1], None, *options, False),
    "a parameter's shape": lambda: forward(x, [parameters[0][:1], *parameters[1:]], None, *options, False),
    "a parameter's dtype": lambda: forward(x, [parameters[0].double(), *parameters[1:]], None, *options, False),
    "the statistics' shape": lambda: forward(x, parameters, statistics[:1], *options, False),
    "no statistics": lambda: backward(y, x, y, parameters, x.new_empty(0), saved, *options, *needs),
    "the gradient's shape": lambda: backward(y[:1], x, y, parameters, statistics, saved, *options, *needs),
    "the output's shape": lambda: backward(y, x, y[:, :, :2], parameters, statistics, saved, *options, *needs),
    "the pre-activations' shape": lambda: backward(y, x, y, parameters, statistics, x.new_ones(8), *options, *needs),
}
for name, call in wrong.items():
    print(name, flush=True)
    try:
        call()
    except (RuntimeError, TypeError, ValueError):
        continue
    raise AssertionError(name + " was accepted")
"""
    run_script(script)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_compiled_layer_equals_eager(mode, recompute):
    laws.compiled_layer_equals_eager(sample(replace(SMALL, mode=mode)), recompute, backend="aot_eager")


def test_exported_layer_equals_eager():
    values = sample(replace(SMALL, mode="eval"))
    layer = layer_of(values)
    exported = torch.export.export(layer, (values.x,)).module()
    assert torch.equal(exported(values.x), layer(values.x))


# --- the process ------------------------------------------------------------------------------------------------------


def run_script(script: str, *arguments: str, **environment: str) -> str:
    """Run Python code in a process that imports what this one does; return what it prints."""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
SIMD_FLAGS = {
    "avx512bf16": {*AVX512, "avx512_bf16"},
    "avx512": AVX512,
    "avx2": {"avx2", "fma"},
    "baseline": set(),
}

SIMD_SCRIPT = """
import sys
import torch
import laws
from dataclasses import replace
from tolerance import Case
from gunn_ext import GunnLayer, ops

torch.set_num_threads(1)
for precision in ("float32", "float64", "bfloat16", "float16"):
    dtype = laws.PRECISIONS[precision][0]
    assert ops.backend(torch.device("cpu"), dtype) == f"cpu/{sys.argv[1]}", ops.backend(torch.device("cpu"), dtype)
    for case in (
        Case(24, 2, batch=2, height=8, width=8),
        Case(24, 2, batch=1, height=3, width=33),
        Case(40, 2, batch=1, height=6, width=20),
        Case(12, 2, batch=2, height=6, width=3),
        Case(15, 3, units=2, shortcut=False, batch=2, height=5, width=7),
        Case(6, 6, expansion=3, residual=False, batch=2, height=4, width=6),
    ):
        for mode in ("train", "eval"):
            laws.rule_holds(laws.sample_for(precision, replace(case, mode=mode)), precision)
"""


@pytest.mark.parametrize("level", SIMD_FLAGS)
def test_every_instruction_set(level):
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")).split()
    if not SIMD_FLAGS[level] <= set(flags):
        pytest.skip(f"this processor has no {level}")
    run_script(SIMD_SCRIPT, level, GUNN_SIMD=level)


def test_one_openmp_runtime_in_the_process():
    script = """
import torch
from gunn_ext import GunnLayer, ops

ops._SERIAL_WORK = 0
torch.set_num_threads(2)
GunnLayer(4, 2)(torch.randn(4, 4, 3, 3))
torch.randn(500, 500) @ torch.randn(500, 500)
print("\\n".join({line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.rsplit("/", 1)[-1]}))
"""
    runtimes = [
        name for name in run_script(script).split() if Path(name).name.startswith(("libgomp", "libiomp", "libomp"))
    ]
    assert len(runtimes) == 1, runtimes


def test_layer_runs_in_a_forked_child():
    script = """
import os
import signal
import torch
from gunn_ext import GunnLayer, ops

ops._SERIAL_WORK = 0
torch.set_num_threads(2)
layer, x = GunnLayer(12, 3, shortcut=True).eval(), torch.randn(4, 12, 8, 8)
expected = layer(x)
expected.sum().backward()
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    with torch.no_grad():
        os._exit(0 if torch.allclose(layer(x), expected, rtol=1e-5, atol=1e-5) else 3)
signal.alarm(30)
_, status = os.waitpid(child, 0)
assert status == 0, status
"""
    run_script(script)


def test_kept_pre_activations_may_lie_anywhere():
    laws.kept_pre_activations_may_lie_anywhere(sample(SMALL))
