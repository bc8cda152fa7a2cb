"""GunnLayer: values and gradients under the tolerance rule, and its behaviour as a torch module."""

import copy
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerance import Case, Result, Sample, assert_within_rule, check, check_layer, run, run_sample, sample, threads
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from gunn_ext import GunnLayer, ReferenceGunnLayer, ops

DTYPES = [torch.float32, torch.float64]
TINY = Case(4, 2, batch=2, height=2, width=3)
SMALL = Case(12, 3, batch=3, height=6, width=10)
OPTIONS = [
    SMALL,
    replace(SMALL, shortcut=False),
    replace(SMALL, residual=False),
    replace(SMALL, units=2),
    replace(SMALL, units=3, expansion=1, shortcut=False),
    replace(SMALL, expansion=3),
]
SHAPES = [
    *(Case(8, 2, batch=2, height=3, width=width) for width in (1, 2, 3, 4, 5, 6, 7, 8, 9, 14, 16, 17, 31, 32, 33)),
    *(Case(2 * s, 2, batch=2, height=4, width=6) for s in (1, 2, 5, 7, 12, 13, 40)),
    Case(8, 2, batch=1, height=3, width=65),
    Case(8, 2, batch=2, height=40, width=1),
    Case(10, 5, batch=6, height=1, width=1),
    Case(10, 5, batch=4, height=1, width=5),
    Case(10, 5, batch=4, height=5, width=1),
    Case(10, 5, batch=1, height=2, width=2),
    Case(10, 2, batch=1, height=5, width=7),
    Case(15, 3, batch=3, height=11, width=13),
    Case(9, 9, batch=2, height=6, width=6),  # P = N
    Case(9, 9, expansion=3, batch=2, height=5, width=4),
    Case(16, 1, batch=2, height=6, width=5),  # P = 1
    Case(1, 1, batch=4, height=4, width=4),
    Case(10, 2, expansion=1, batch=2, height=8, width=8),
    Case(10, 2, expansion=3, batch=2, height=7, width=7),
    Case(10, 2, expansion=5, shortcut=False, batch=2, height=6, width=6),
    Case(12, 3, units=2, batch=2, height=5, width=6),
    Case(12, 3, units=3, shortcut=False, batch=2, height=6, width=7),
    Case(12, 3, units=2, residual=False, batch=3, height=3, width=5),
    Case(4, 4, units=2, expansion=3, residual=False, shortcut=False, batch=3, height=4, width=7),
    Case(60, 5, batch=3, height=8, width=8),
    Case(36, 3, batch=2, height=16, width=16),
    Case(24, 2, batch=1, height=32, width=32),
    Case(80, 2, shortcut=False, batch=2, height=7, width=7),
    Case(40, 4, shortcut=False, batch=1, height=14, width=14),
    Case(400, 10, shortcut=False, batch=1, height=4, width=4),
]


GUNN_15 = [
    Case(240, 20, batch=1, height=32, width=32),
    Case(300, 25, batch=2, height=16, width=16),
    Case(360, 30, batch=2, height=8, width=8),
]


@pytest.fixture(autouse=True)
def parallel_however_small(monkeypatch):
    """Small layers run on one thread, to be fast; here they take the threads they are given."""
    monkeypatch.setattr(ops, "_SERIAL_WORK", 0)


def layer_of(values: Sample, dtype=torch.float32, **options):
    return values.layer(GunnLayer, dtype, **options)


def both(values: Sample, dtype=torch.float64, **options):
    """GunnLayer and ReferenceGunnLayer with the same state."""
    return (values.layer(kind, dtype, **options) for kind in (GunnLayer, ReferenceGunnLayer))


def assert_close(ours, expected, rtol=1e-9, atol=1e-11):
    """Float64 tensors, dictionaries of them, or results, of well-conditioned values."""
    if isinstance(ours, Result):
        ours, expected = vars(ours), vars(expected)
    torch.testing.assert_close(ours, expected, rtol=rtol, atol=atol)


# --- values and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_awkward_shapes(case, mode, dtype):
    def ours(values):
        with threads(2):
            return run_sample(values, GunnLayer, dtype)

    check(sample(replace(case, mode=mode)), ours, dtype)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", GUNN_15, ids=str)
def test_layers_of_gunn15(case, mode):
    def ours(values):
        with threads(2):
            return run_sample(values, GunnLayer, torch.float32)

    check(sample(replace(case, mode=mode)), ours, torch.float32)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_any_number_of_threads(mode, batch, count):
    def ours(values):
        with threads(count):
            return run_sample(values, GunnLayer, torch.float32)

    check(sample(replace(SMALL, batch=batch, mode=mode)), ours, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_pre_activations_kept_instead_of_recomputed(case, mode, dtype):
    check_layer(replace(case, mode=mode), GunnLayer, dtype, recompute=False)


@st.composite
def cases(draw):
    width, segments = draw(st.integers(1, 14)), draw(st.integers(1, 4))
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


def small_integers(case: Case) -> Sample:
    """Values that leave every result a small integer: sparse weights of -1, 0, 1, batch norms ±(z - mean) + bias."""
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)

        def integers(shape, low=-1, high=1, generator=generator):
            return torch.randint(low, high + 1, shape, generator=generator).float()

        state = {}
        for name, tensor in case.layer().state_dict().items():
            if name.endswith("running_var"):
                state[name] = torch.full(tensor.shape, 0.5)
            elif name.endswith("_bn.weight"):
                state[name] = integers(tensor.shape, 0) * 2 - 1
            elif name.endswith("weight"):
                kept = torch.rand(tensor.shape, generator=generator) < 1.5 / tensor[0, 0].numel()
                state[name] = integers(tensor.shape) * kept
            else:
                state[name] = integers(tensor.shape) if tensor.dim() else tensor
        shape = (case.batch, case.channels, case.height, case.width)
        values = Sample(case, state, integers(shape, -2, 2), integers(shape, -2, 2))
        oracle = run_sample(values, ReferenceGunnLayer, torch.float64, eps=0.5)
        size = max(t.abs().max().item() for t in (oracle.y, *oracle.gradients.values()))
        if size < 2**16 and all(t.abs().max() > 0 for t in oracle.gradients.values()):
            return values
    raise AssertionError(f"{case}: no seed gives small integers")


@pytest.mark.parametrize(
    "case",
    [
        Case(12, 3, batch=2, height=6, width=8, mode="frozen"),
        Case(15, 3, batch=2, height=5, width=7, mode="frozen"),
        Case(24, 2, batch=1, height=8, width=8, mode="frozen"),
        Case(24, 2, shortcut=False, residual=False, batch=1, height=4, width=16, mode="frozen"),
        Case(14, 2, expansion=3, batch=3, height=3, width=33, mode="frozen"),
        Case(12, 2, units=2, batch=2, height=4, width=5, mode="frozen"),
    ],
    ids=str,
)
@pytest.mark.parametrize("recompute", [True, False])
def test_exact_on_small_integers(case, recompute):
    """Zero pre-activations abound here: the gradient of ReLU at 0 is 0."""
    values = small_integers(case)
    expected = run_sample(values, ReferenceGunnLayer, torch.float64, eps=0.5)
    ours = run_sample(values, GunnLayer, torch.float32, eps=0.5, recompute=recompute)
    assert torch.equal(ours.y.double(), expected.y)
    for name, gradient in expected.gradients.items():
        assert torch.equal(ours.gradients[name].double(), gradient), name


def gradcheck(case: Case, recompute: bool, fast_mode: bool) -> bool:
    values = sample(case, margin=1e-3)
    layer = layer_of(values, torch.float64, recompute=recompute)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def function(x, *tensors):
        return torch.func.functional_call(layer, dict(zip(names, tensors, strict=True)), (x,))

    inputs = (values.x.double().requires_grad_(), *parameters)
    return torch.autograd.gradcheck(function, inputs, fast_mode=fast_mode)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize("units", [1, 2])
@pytest.mark.parametrize("expansion", [1, 2, 3])
def test_gradcheck_of_every_option(expansion, units, shortcut, residual, mode, recompute):
    case = replace(TINY, expansion=expansion, units=units, shortcut=shortcut, residual=residual, mode=mode)
    assert gradcheck(case, recompute, fast_mode=True)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    "case",
    [replace(TINY, expansion=1), Case(2, 2, units=2, shortcut=False, residual=False, height=3, width=2)],
    ids=str,
)
def test_gradcheck_entry_by_entry(case, mode, recompute):
    assert gradcheck(replace(case, mode=mode), recompute, fast_mode=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_simultaneous_layer(case, mode, dtype):
    check_layer(replace(case, mode=mode, gradual=False), GunnLayer, dtype)


# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_recomputation_changes_no_bit(case, dtype, count):
    values = sample(case)
    with threads(count):
        assert run_sample(values, GunnLayer, dtype, recompute=True).equal(
            run_sample(values, GunnLayer, dtype, recompute=False)
        )


@pytest.mark.parametrize("recompute", [True, False])
def test_runs_are_bitwise_equal(recompute):
    values = sample(Case(60, 5, batch=5, height=9, width=12))
    with threads(2):
        first, *others = (run_sample(values, GunnLayer, torch.float32, recompute=recompute) for _ in range(6))
    assert all(first.equal(other) for other in others)


def in_buffer(t, shape, *index):
    """``t`` as a view into a larger tensor of ``shape``."""
    view = torch.full(shape, float("nan"), dtype=t.dtype)[index]
    return view.copy_(t)


LAYOUTS = {
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "every other channel": lambda t: in_buffer(
        t, (t.shape[0], 2 * t.shape[1], *t.shape[2:]), slice(None), slice(1, None, 2)
    ),
    "a window": lambda t: in_buffer(t, (*t.shape[:2], t.shape[2] + 2, t.shape[3] + 3), ..., slice(1, -1), slice(2, -1)),
    "every other column": lambda t: in_buffer(t, (*t.shape[:3], 2 * t.shape[3]), ..., slice(None, None, 2)),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "batch last": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "unaligned": lambda t: in_buffer(t.flatten(), (t.numel() + 1,), slice(1, None)).view(t.shape),
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_input_and_gradient_changes_no_bit(layout, mode):
    values = sample(replace(SMALL, mode=mode))
    expected = run_sample(values, GunnLayer, torch.float32)
    x, grad = LAYOUTS[layout](values.x), LAYOUTS[layout](values.grad)
    assert torch.equal(x, values.x)
    for inputs in ((x, values.grad), (values.x, grad), (x, grad)):
        assert run(layer_of(values), *inputs).equal(expected)


@pytest.mark.parametrize("case", [SMALL, replace(SMALL, gradual=False)], ids=str)
def test_memory_format_of_the_output_is_the_input_s(case):
    layer, x = layer_of(sample(case)), sample(case).x
    assert layer(x).is_contiguous()
    assert layer(x.to(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)
    assert layer(LAYOUTS["every other channel"](x)).is_contiguous()


def test_expanded_input_and_gradient():
    values = sample(SMALL)
    layer = layer_of(values)
    x = values.x[:1].expand_as(values.x)
    expected = run(layer, x.contiguous(), torch.ones_like(x))
    layer = layer_of(values)
    assert run(layer, x, torch.ones(()).expand_as(x)).equal(expected)

    x = x.contiguous().requires_grad_()
    layer = layer_of(values)
    layer(x).sum().backward()
    assert torch.equal(x.grad, expected.gradients["x"])
    assert torch.equal(layer.units[0].spatial.weight.grad, expected.gradients["units.0.spatial.weight"])


def test_parameters_of_any_strides():
    values = sample(replace(SMALL, units=2))
    expected = run_sample(values, GunnLayer, torch.float32)
    layer = layer_of(values)
    for parameter in layer.parameters():
        parameter.data = parameter.data.transpose(0, 1).contiguous().transpose(0, 1)
        assert not parameter.is_contiguous()
    assert run(layer, values.x, values.grad).equal(expected)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_input_and_output_gradient_are_not_modified(mode, recompute):
    values = sample(replace(SMALL, mode=mode))
    x, grad = values.x.clone(), values.grad.clone()
    result = run(layer_of(values, recompute=recompute), x, grad)
    assert torch.equal(x, values.x)
    assert torch.equal(grad, values.grad)
    assert len({t.untyped_storage().data_ptr() for t in (x, grad, result.y, result.gradients["x"])}) == 4


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
    values = sample(case)
    layers = list(both(values, momentum=momentum))
    for step in range(4):
        x = values.x.double() * (step + 1) + step
        for layer in layers:
            with torch.set_grad_enabled(step != 2):
                layer(x)
    ours, expected = (dict(layer.named_buffers()) for layer in layers)
    assert ours["num_batches_tracked"] == 4
    assert_close(ours, expected, rtol=1e-12, atol=1e-13)
    assert_close(*(layer.eval()(x).detach() for layer in layers))


def test_evaluation_and_frozen_batch_norm_leave_the_running_statistics_alone():
    values = sample(SMALL)
    for layer in (layer_of(values).eval(), layer_of(values).freeze_batch_norm().train()):
        result = run(layer, values.x, values.grad)
        assert all(torch.equal(buffer, values.state[name]) for name, buffer in result.buffers.items())
    assert layer_of(values).freeze_batch_norm().training


def test_two_forwards_before_two_backwards():
    values = sample(SMALL)
    results = []
    for layer in both(values):
        inputs = [(values.x.double() * scale).requires_grad_() for scale in (1, 2)]
        first, second = (layer(x) for x in inputs)
        first.backward(values.grad.double())
        second.backward(values.grad.double().flip(0))
        gradients = {name: p.grad for name, p in layer.named_parameters()}
        results.append((gradients, [x.grad for x in inputs], dict(layer.named_buffers())))
    for ours, expected in zip(*results, strict=True):
        assert_close(ours, expected)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_around_the_layer(use_reentrant, recompute):
    """As for ordinary batch norm, the running statistics are then updated by both forward passes."""
    values = sample(SMALL)
    plain = run_sample(values, GunnLayer, torch.float64)
    ours, expected = (
        run(
            layer,
            values.x.double(),
            values.grad.double(),
            lambda x, layer=layer: checkpoint(layer, x, use_reentrant=use_reentrant),
        )
        for layer in both(values, recompute=recompute)
    )
    assert ours.buffers["num_batches_tracked"] == 2
    assert_close(ours, expected)
    assert torch.equal(ours.y, plain.y)
    assert all(torch.equal(ours.gradients[name], gradient) for name, gradient in plain.gradients.items())


# --- autograd ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradual", [True, False])
def test_only_the_gradients_asked_for(gradual):
    values = sample(replace(SMALL, gradual=gradual))
    expected = run_sample(values, GunnLayer, torch.float32)

    layer = layer_of(values)
    layer(values.x).backward(values.grad)  # the input needs none
    assert all(torch.equal(p.grad, expected.gradients[name]) for name, p in layer.named_parameters())

    layer = layer_of(values).requires_grad_(False)
    x = values.x.clone().requires_grad_()
    layer(x).backward(values.grad)  # the parameters need none
    assert torch.equal(x.grad, expected.gradients["x"])
    assert all(p.grad is None for p in layer.parameters())

    layer = layer_of(values).requires_grad_(False)
    layer.units[0].spatial.weight.requires_grad_()
    layer(values.x).backward(values.grad)
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {"units.0.spatial.weight"}
    assert torch.equal(layer.units[0].spatial.weight.grad, expected.gradients["units.0.spatial.weight"])

    assert not layer_of(values).requires_grad_(False)(values.x).requires_grad


def test_nothing_is_recorded_without_gradients():
    values = sample(SMALL)
    expected = run_sample(values, GunnLayer, torch.float32)
    x = values.x.clone().requires_grad_()
    for no_gradients in (torch.no_grad, torch.inference_mode):
        layer = layer_of(values)
        with no_gradients():
            y = layer(x)
        assert not y.requires_grad
        assert torch.equal(y, expected.y)
        assert torch.equal(layer.units[0].project_bn.running_var, expected.buffers["units.0.project_bn.running_var"])


def saved_storages(layer, x):
    """Bytes of every storage kept for the backward."""
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    assert y.requires_grad
    return storages, y


@pytest.mark.parametrize("mode", ["train", "frozen"])
@pytest.mark.parametrize("case", [SMALL, replace(SMALL, units=2, shortcut=False)], ids=str)
def test_bytes_saved_for_backward(case, mode):
    """Input, output, parameters and statistics, whatever the number of segments."""
    values = sample(replace(case, mode=mode))
    layer, x = layer_of(values), values.x.clone().requires_grad_()
    storages, y = saved_storages(layer, x)
    statistics = 2 * sum(bn.running_mean.numel() for bn in layer.batch_norms())
    elements = 2 * x.numel() + sum(p.numel() for p in layer.parameters()) + statistics
    assert sum(storages.values()) == 4 * elements
    assert {t.untyped_storage().data_ptr() for t in (x, y, *layer.parameters())} <= storages.keys()

    kept, _ = saved_storages(layer_of(values, recompute=False), x)
    rows = statistics // 2  # of pre-activations, one per batch norm channel; at least those before a ReLU are kept
    hidden = sum(2 * layer.segments * layer.hidden for _ in layer.units)
    pixels = 4 * x.numel() // layer.channels
    assert hidden * pixels <= sum(kept.values()) - 4 * elements <= 4 * rows * pixels


@pytest.mark.parametrize("changed", ["x", "y"])
def test_overwriting_what_backward_needs_is_an_error(changed):
    values = sample(SMALL)
    x = values.x.clone()
    y = layer_of(values)(x)
    {"x": x, "y": y.detach()}[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation|has been modified inplace"):
        y.backward(values.grad)


def test_double_backward_is_refused_by_name():
    values = sample(TINY)
    x = values.x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(layer_of(values)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="(?i)double backward|twice"):
        gradient.sum().backward()


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
    values = sample(replace(SMALL, mode=mode))
    x, grad = values.x.double(), values.grad.double()
    {"x": x, "grad": grad}[where][1, 2, 0, 1] = value
    ours, expected = (run(layer, x, grad) for layer in both(values))
    for got, wanted in [
        (ours.y, expected.y),
        *((ours.gradients[n], expected.gradients[n]) for n in expected.gradients),
    ]:
        assert torch.equal(got.isfinite(), wanted.isfinite())


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


@pytest.mark.parametrize("recompute", [True, False])
def test_backward_twice_through_a_retained_graph(recompute):
    values = sample(SMALL)
    layer, x = layer_of(values, recompute=recompute), values.x.clone().requires_grad_()
    y, inputs = layer(x), [x, *layer.parameters()]
    first = torch.autograd.grad(y, inputs, values.grad, retain_graph=True)
    second = torch.autograd.grad(y, inputs, values.grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("gradual", [True, False])
def test_empty_batch_in_evaluation(gradual):
    case = replace(SMALL, mode="eval", gradual=gradual)
    layer = case.layer(GunnLayer)
    x = torch.empty(0, 12, 6, 10, requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all((p.grad == 0).all() for p in layer.parameters() if p.grad is not None)


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


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_equal_and_independent(duplicate):
    values = sample(SMALL)
    layer = layer_of(values, momentum=None, recompute=False)
    layer(values.x)
    twin = duplicate(layer)
    assert repr(twin) == repr(layer)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    result = run(twin, values.x, values.grad)
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())
    assert run(layer, values.x, values.grad).equal(result)


def test_twenty_steps_of_training_follow_the_reference():
    values = sample(replace(SMALL, batch=8))
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(20, 8, 12, 6, 10, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, (20, 8), generator=generator)
    heads = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    histories = []
    for layer in both(values):
        head = heads.clone().requires_grad_()
        optimizer = torch.optim.SGD([head, *layer.parameters()], 0.05, momentum=0.9, nesterov=True, weight_decay=1e-4)
        losses = []
        for x, label in zip(images, labels, strict=True):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(layer(x).mean((2, 3)) @ head, label)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        histories.append((torch.tensor(losses, dtype=torch.float64), layer.state_dict()))
    (our_losses, ours), (losses, expected) = histories
    assert losses[-1] != losses[0]
    assert_close(our_losses, losses, rtol=1e-8)
    assert_close(ours, expected, rtol=1e-7, atol=1e-9)


# --- narrow dtypes ----------------------------------------------------------------------------------------------------


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
    expected = run(reference, values.x.bfloat16(), values.grad.bfloat16())
    assert (y.detach().float() - expected.y.float()).norm() < 0.02 * expected.y.float().norm()
    for name, gradient in expected.gradients.items():
        assert (gradients[name] - gradient.float()).norm() < 0.05 * gradient.float().norm(), name


# --- the operators ----------------------------------------------------------------------------------------------------


def operator_arguments(values: Sample, layer, keep=False):
    """What layer_forward takes, and the options it shares with layer_backward."""
    case = values.case
    options = (case.segments, case.expansion, case.units, case.shortcut, case.residual, layer.eps)
    parameters = [p.detach() for p in ops.parameter_list(layer)]
    return (values.x, parameters, statistics_of(layer), *options, keep), parameters, options


def statistics_of(layer):
    """The running statistics in the order of the operators, None where the batch's own are used."""
    if layer.uses_batch_statistics():
        return None
    order = []
    for unit in layer.units:
        order += [bn for bn in (unit.reduce_bn, unit.shortcut_bn, unit.spatial_bn, unit.project_bn) if bn is not None]
    return torch.stack([torch.cat([getattr(bn, name) for bn in order], 1) for name in ("running_mean", "running_var")])


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
    values = sample(replace(TINY, mode=mode))
    arguments, parameters, options = operator_arguments(values, layer_of(values), keep)
    torch.library.opcheck(torch.ops.gunn_ext.layer_forward.default, arguments)
    y, batch_statistics, saved = torch.ops.gunn_ext.layer_forward(*arguments)
    statistics = batch_statistics if mode == "train" else arguments[2]
    common = (values.grad, values.x, y, parameters, statistics, saved, *options, mode == "train")
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(torch.ops.gunn_ext.layer_backward.default, (*common, *needs))


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
    values = sample(replace(SMALL, mode=mode))
    layer, eager = (layer_of(values, recompute=recompute) for _ in range(2))
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for x in (values.x, values.x.flip(0)):
        ours = run(layer, x, values.grad, compiled)
        assert ours.equal(run(eager, x, values.grad))


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


SIMD_FLAGS = {"avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"}, "avx2": {"avx2", "fma"}, "baseline": set()}

SIMD_SCRIPT = """
import sys
import torch
from dataclasses import replace
from tolerance import Case, check_layer
from gunn_ext import GunnLayer, ops

torch.set_num_threads(1)
for dtype in (torch.float32, torch.float64):
    assert ops.backend(torch.device("cpu"), dtype) == f"cpu/{sys.argv[1]}", ops.backend(torch.device("cpu"), dtype)
    for case in (
        Case(24, 2, batch=2, height=8, width=8),
        Case(24, 2, batch=1, height=3, width=33),
        Case(15, 3, units=2, shortcut=False, batch=2, height=5, width=7),
        Case(6, 6, expansion=3, residual=False, batch=2, height=4, width=6),
    ):
        for mode in ("train", "eval"):
            check_layer(replace(case, mode=mode), GunnLayer, dtype)
"""


@pytest.mark.parametrize("level", SIMD_FLAGS)
def test_every_instruction_set(level):
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")).split()
    if not SIMD_FLAGS[level] <= set(flags):
        pytest.skip(f"this processor has no {level}")
    run_script(SIMD_SCRIPT, level, GUNN_SIMD=level)


def test_narrow_dtypes_fall_back_to_the_reference_and_say_so_once():
    script = """
import logging
import torch
from gunn_ext import GunnLayer, ops

messages = []
handler = logging.Handler()
handler.emit = lambda record: messages.append(record.getMessage())
logging.getLogger("gunn_ext").addHandler(handler)
for _ in range(2):
    layer = GunnLayer(4, 2).bfloat16()
    layer(torch.randn(2, 4, 3, 3, dtype=torch.bfloat16))
assert ops.backend(torch.device("cpu"), torch.bfloat16) == "reference"
assert len(messages) == 1, messages
assert "bfloat16" in messages[0] and "reference" in messages[0], messages
"""
    run_script(script)


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
