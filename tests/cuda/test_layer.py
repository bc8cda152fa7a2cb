"""The layer on a GPU: values and gradients under the tolerance rule, the laws of every device."""

from dataclasses import replace

import laws
import pytest
import torch
from laws import GUNN_15, LAYOUTS, OPTIONS, PRECISIONS, SHAPES, SMALL, TINY
from tolerance import Case, assert_within_rule, run, run_sample, sample, tensor_float

from gunn_ext import GunnLayer, ReferenceGunnLayer, create_model, ops

MODES = ["train", "eval", "frozen"]
NARROW = [torch.bfloat16, torch.float16]
# In pixels and channels, what crosses the borders of tiles and the levels of the tree that combines statistics.
TILES = [
    Case(8, 2, batch=1, height=8, width=8),
    Case(8, 2, batch=1, height=5, width=13),
    Case(8, 2, batch=9, height=7, width=1),
    Case(8, 2, batch=3, height=7, width=11),
    Case(10, 5, batch=70, height=1, width=1),
    Case(48, 2, batch=1, height=5, width=7),
    Case(128, 2, expansion=1, batch=1, height=3, width=5),
    Case(70, 1, expansion=1, batch=1, height=4, width=5),
    Case(140, 2, shortcut=False, batch=1, height=9, width=8),
]
MANY_TILES = [Case(4, 2, batch=1, height=46, width=46), Case(4, 2, batch=2, height=190, width=180)]


# --- values and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_options(case, mode, precision, recompute, device):
    laws.rule_holds(laws.sample_for(precision, replace(case, mode=mode)).to(device), precision, recompute=recompute)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", [*TILES, *SHAPES], ids=str)
def test_awkward_shapes(case, mode, precision, device):
    laws.rule_holds(laws.sample_for(precision, replace(case, mode=mode)).to(device), precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", MANY_TILES, ids=str)
def test_levels_of_the_tree_of_statistics(case, mode, precision, device):
    values = laws.sample_for(precision, replace(case, mode=mode)).to(device)
    if precision == "float64":  # the oracle's own sums over so many pixels are no better
        ours, oracle = (
            run_sample(values.to(where), kind, torch.float64)
            for where, kind in ((device, GunnLayer), ("cpu", ReferenceGunnLayer))
        )
        laws.assert_close(ours.to("cpu"), oracle)
    else:
        laws.rule_holds(values, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", GUNN_15, ids=str)
def test_layers_of_gunn15(case, mode, precision, device):
    values = laws.sample_for(precision, replace(case, mode=mode)).to(device)
    laws.rule_holds(values, precision)
    dtype, fast = PRECISIONS[precision]
    with tensor_float(fast):
        laws.layout_of_input_and_gradient_changes_no_bit(values, "channels_last", dtype)
        laws.recomputation_changes_no_bit(values, dtype)


@pytest.mark.parametrize("offset", [3.0, 30.0])
def test_statistics_of_channels_far_from_zero(offset, device):
    laws.rule_holds(sample(SMALL, offset=offset).to(device), "float32")


@pytest.mark.parametrize("outlier", [0.0, 20.0])
def test_statistics_of_a_large_image_are_as_good_as_those_of_torch(outlier, device):
    """The first pixel far off, and many pixels: sums around it, or in float alone, would lose digits."""
    x = torch.randn(2, 4, 160, 160)
    x[0, :, 0, 0] += outlier
    oracle = ReferenceGunnLayer(4, 1, dtype=torch.float64)
    ours, plain = (kind(4, 1, device=device) for kind in (GunnLayer, ReferenceGunnLayer))
    for layer in (ours, plain):
        layer.load_state_dict(oracle.state_dict())
    oracle.load_state_dict(ours.state_dict())
    with torch.no_grad():
        y = ours(x.to(device)), oracle(x.double()), plain(x.to(device))
    assert_within_rule(*y, factor=2, name="y")


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize(
    ("precision", "limit"),
    [("float64", 2**16), ("float32", 2**16), ("tf32", 2**11), ("bfloat16", 2**8), ("float16", 2**11)],
)
@pytest.mark.parametrize("case", laws.INTEGERS, ids=str)
def test_exact_on_small_integers(case, precision, limit, recompute, device):
    dtype, fast = PRECISIONS[precision]
    values = laws.small_integers(case, limit)
    with tensor_float(fast):
        laws.small_integers_are_exact(values.to(device), dtype, recompute)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize("units", [1, 2])
def test_gradcheck_of_every_option(units, shortcut, residual, mode, recompute, device):
    case = replace(TINY, units=units, shortcut=shortcut, residual=residual, mode=mode)
    assert laws.gradcheck(sample(case, margin=1e-3).to(device), recompute, fast_mode=True)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_gradcheck_entry_by_entry(mode, recompute, device):
    case = Case(2, 2, units=2, shortcut=False, residual=False, height=3, width=2, mode=mode)
    assert laws.gradcheck(sample(case, margin=1e-3).to(device), recompute, fast_mode=False)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "grad"])
def test_a_value_that_is_not_finite_spreads_as_in_torch(mode, value, where, device):
    laws.values_that_are_not_finite_spread_as_in_torch(sample(replace(SMALL, mode=mode)).to(device), value, where)


# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_recomputation_changes_no_bit(case, precision, device):
    dtype, fast = PRECISIONS[precision]
    with tensor_float(fast):
        laws.recomputation_changes_no_bit(sample(case).to(device), dtype)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_twenty_runs_are_bitwise_equal(precision, recompute, device):
    dtype, fast = PRECISIONS[precision]
    with tensor_float(fast):
        values = sample(Case(60, 5, batch=5, height=29, width=24)).to(device)
        laws.runs_are_bitwise_equal(values, dtype, recompute, runs=20)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *NARROW], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_input_and_gradient_changes_no_bit(layout, dtype, mode, device):
    laws.layout_of_input_and_gradient_changes_no_bit(sample(replace(SMALL, mode=mode)).to(device), layout, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [SMALL, replace(SMALL, gradual=False)], ids=str)
def test_memory_format_of_the_output_is_the_input_s(case, dtype, device):
    laws.memory_format_of_the_output_is_the_inputs(sample(case).to(device), dtype)


def test_expanded_input_and_gradient(device):
    laws.expanded_input_and_gradient_are_taken_as_they_are(sample(SMALL).to(device))


def test_parameters_of_any_strides(device):
    laws.strides_of_parameters_change_no_bit(sample(replace(SMALL, units=2)).to(device))


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_input_and_output_gradient_are_not_modified(mode, recompute, device):
    laws.input_and_output_gradient_are_not_modified(sample(replace(SMALL, mode=mode)).to(device), recompute)


# --- running statistics -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
@pytest.mark.parametrize("case", [SMALL, replace(SMALL, units=2, shortcut=False)], ids=str)
def test_running_statistics_after_several_steps(case, momentum, device):
    laws.running_statistics_are_those_of_the_reference_after_several_steps(sample(case).to(device), momentum)


def test_evaluation_and_frozen_batch_norm_leave_the_running_statistics_alone(device):
    laws.evaluation_and_frozen_batch_norm_leave_the_running_statistics_alone(sample(SMALL).to(device))


def test_two_forwards_before_two_backwards(device):
    laws.two_forwards_may_come_before_two_backwards(sample(SMALL).to(device))


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_around_the_layer(use_reentrant, recompute, device):
    laws.activation_checkpointing_changes_no_bit(sample(SMALL).to(device), use_reentrant, recompute)


# --- autograd ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradual", [True, False])
def test_only_the_gradients_asked_for(gradual, device):
    if not gradual:
        torch.backends.cudnn.deterministic = True
    try:
        laws.only_the_gradients_asked_for_are_computed(sample(replace(SMALL, gradual=gradual)).to(device))
    finally:
        torch.backends.cudnn.deterministic = False


def test_nothing_is_recorded_without_gradients(device):
    laws.nothing_is_recorded_without_gradients(sample(SMALL).to(device))


@pytest.mark.parametrize("changed", ["x", "y"])
def test_overwriting_what_backward_needs_is_an_error(changed, device):
    laws.overwriting_what_backward_needs_is_an_error(sample(SMALL).to(device), changed)


def test_double_backward_is_refused_by_name(device):
    laws.double_backward_is_refused_by_name(sample(TINY).to(device))


@pytest.mark.parametrize("recompute", [True, False])
def test_backward_twice_through_a_retained_graph(recompute, device):
    laws.backward_may_run_twice_through_a_retained_graph(sample(SMALL).to(device), recompute)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gradual", [True, False])
def test_empty_batch_in_evaluation(gradual, dtype, device):
    layer = replace(SMALL, mode="eval", gradual=gradual).layer(GunnLayer, dtype, device=device)
    x = torch.empty(0, 12, 6, 10, device=device, dtype=dtype, requires_grad=True)
    laws.an_empty_batch_gives_an_empty_output(layer, x)


def test_one_value_per_channel_is_fine_without_batch_statistics(device):
    for layer in (SMALL.layer(GunnLayer, device=device).eval(), SMALL.layer(GunnLayer, device=device)):
        layer.freeze_batch_norm()
        assert layer(torch.randn(1, 12, 1, 1, device=device)).isfinite().all()


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_opcheck(mode, keep, device):
    laws.operators_pass_opcheck(sample(replace(TINY, mode=mode)).to(device), keep)


# --- steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", [SMALL, replace(SMALL, units=2, shortcut=False)], ids=str)
def test_steps_give_the_same_bits_as_the_whole_pass(case, precision, device):
    dtype, fast = PRECISIONS[precision]
    values = sample(case).to(device)
    with tensor_float(fast):
        expected = run_sample(values, GunnLayer, dtype)
        layer, x, grad = laws.layer_of(values, dtype), values.x.to(dtype), values.grad.to(dtype)
        parameters, static = ops.parameter_list(layer), ops.layer_options(layer)
        forward = ops.ForwardSteps(x, parameters, static, fast)
        forward.step("begin")
        for segment in range(case.segments):
            for unit in range(case.units):
                for name in ("reduce", "spatial", "project"):
                    forward.step(name, segment, unit)
        forward.step("finish")
        assert torch.equal(forward.y, expected.y)

        backward = ops.BackwardSteps(grad, x, forward.y, parameters, forward.statistics, static, fast)
        backward.step("begin")
        for segment in reversed(range(case.segments)):
            for unit in reversed(range(case.units)):
                for name in ("project", "spatial", "reduce", "input"):
                    backward.step(name, segment, unit)
        backward.step("finish")
    assert torch.equal(backward.grad_x, expected.gradients["x"])
    names = {id(p): name for name, p in layer.named_parameters()}
    for parameter, gradient in zip(ops.parameter_list(layer), backward.grads, strict=True):
        assert torch.equal(gradient.to(dtype), expected.gradients[names[id(parameter)]])


# --- as a module ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("duplicate", laws.DUPLICATES, ids=["deepcopy", "pickle"])
def test_copies_are_equal_and_independent(duplicate, device):
    laws.copies_are_equal_and_independent(sample(SMALL).to(device), duplicate)


def test_twenty_steps_of_training_follow_the_reference(device):
    laws.twenty_steps_of_training_follow_the_reference(sample(replace(SMALL, batch=8)).to(device))


def test_layer_moves_between_devices(device):
    """Same result on both, under the rule; and back again with nothing lost."""
    values = sample(SMALL)
    layer = laws.layer_of(values)
    before = run(layer, values.x, values.grad)
    layer.load_state_dict(values.state)
    moved = layer.to(device)
    assert moved is layer
    assert {t.device.type for t in (*layer.parameters(), *layer.buffers())} == {device.type}
    there = run(layer, values.x.to(device), values.grad.to(device))
    oracle = run_sample(values, ReferenceGunnLayer, torch.float64)
    assert_within_rule(there.y, oracle.y, before.y, factor=2, name="y")
    layer.load_state_dict(values.state)
    layer.cpu()
    assert all(torch.equal(t, values.state[name]) for name, t in layer.state_dict().items())
    assert run(layer, values.x, values.grad).equal(before)


def test_a_model_moves_between_devices(device):
    torch.manual_seed(0)
    model = create_model("gunn_tiny", num_classes=10).double().eval()
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        here = model(images)
        there = model.to(device)(images.to(device))
        laws.assert_close(there.cpu(), here)
        assert torch.equal(model.cpu()(images), here)


def test_input_and_parameters_on_different_devices_are_named(device):
    layer = SMALL.layer(GunnLayer)
    with pytest.raises(RuntimeError, match=r"input is on cuda:0, but the layer's parameters are on cpu"):
        layer(torch.randn(2, 12, 4, 4, device=device))
