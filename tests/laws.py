"""Laws that `GunnLayer` obeys on every device, and the cases they are tried on.

A law takes its values from a `Sample` and runs where that sample is (`Sample.to`), so that the tests of the CPU's
kernels, of the emulated and of the real CUDA kernels state each of them once.
"""

from __future__ import annotations

import copy
import operator
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from tolerance import (
    Case,
    Result,
    Sample,
    TensorFloatReferenceLayer,
    check,
    run,
    run_sample,
    sample,
    settled_sample,
    tensor_float,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gunn_ext import GunnLayer, ReferenceGunnLayer, ops
from gunn_ext.parameters import StackedLayer

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
INTEGERS = [
    Case(12, 3, batch=2, height=6, width=8, mode="frozen"),
    Case(15, 3, batch=2, height=5, width=7, mode="frozen"),
    Case(24, 2, batch=1, height=8, width=8, mode="frozen"),
    Case(24, 2, shortcut=False, residual=False, batch=1, height=4, width=16, mode="frozen"),
    Case(14, 2, expansion=3, batch=3, height=3, width=33, mode="frozen"),
    Case(12, 2, units=2, batch=2, height=4, width=5, mode="frozen"),
]


def layer_of(values: Sample, dtype: torch.dtype = torch.float32, **options) -> GunnLayer:
    return values.layer(GunnLayer, dtype, **options)


def both(values: Sample, dtype: torch.dtype = torch.float64, **options) -> Iterator[StackedLayer]:
    """GunnLayer and ReferenceGunnLayer with the same state."""
    return (values.layer(kind, dtype, **options) for kind in (GunnLayer, ReferenceGunnLayer))


def assert_close(ours, expected, rtol=1e-9, atol=1e-11):
    """Float64 tensors, dictionaries of them, or results, of well-conditioned values."""
    if isinstance(ours, Result):
        ours, expected = vars(ours), vars(expected)
    torch.testing.assert_close(ours, expected, rtol=rtol, atol=atol)


# --- values and gradients ---------------------------------------------------------------------------------------------


def small_integers(case: Case, limit: int = 2**16) -> Sample:
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
        if size < limit and all(t.abs().max() > 0 for t in oracle.gradients.values()):
            return values
    raise AssertionError(f"{case}: no seed gives small integers")


def small_integers_are_exact(values: Sample, dtype: torch.dtype, recompute: bool) -> None:
    """Zero pre-activations abound in `small_integers`: the gradient of ReLU at 0 is 0."""
    expected = run_sample(values.to("cpu"), ReferenceGunnLayer, torch.float64, eps=0.5)
    ours = run_sample(values, GunnLayer, dtype, eps=0.5, recompute=recompute)
    assert torch.equal(ours.y.double().cpu(), expected.y)
    for name, gradient in expected.gradients.items():
        assert torch.equal(ours.gradients[name].double().cpu(), gradient), name


def gradcheck(values: Sample, recompute: bool, fast_mode: bool) -> bool:
    """torch.autograd.gradcheck in float64, over the input and every parameter."""
    layer = layer_of(values, torch.float64, recompute=recompute)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def function(x, *tensors):
        return torch.func.functional_call(layer, dict(zip(names, tensors, strict=True)), (x,))

    inputs = (values.x.double().requires_grad_(), *parameters)
    return torch.autograd.gradcheck(function, inputs, fast_mode=fast_mode)


def values_that_are_not_finite_spread_as_in_torch(
    values: Sample, value: float, where: str, *, taps_as_one: bool = False
) -> None:
    """``taps_as_one``: of a 3x3's gradient all taps, where Winograd's form makes them from the same sums."""
    x, grad = values.x.double(), values.grad.double()
    {"x": x, "grad": grad}[where][1, 2, 0, 1] = value
    ours, expected = (run(layer, x, grad) for layer in both(values))
    assert torch.equal(ours.y.isfinite(), expected.y.isfinite())
    for name, wanted in expected.gradients.items():
        got, wanted = ours.gradients[name].isfinite(), wanted.isfinite()
        if taps_as_one and name.endswith("spatial.weight"):
            got, wanted = got.all(-1).all(-1), wanted.all(-1).all(-1)
        assert torch.equal(got, wanted), name


# --- the same bits ----------------------------------------------------------------------------------------------------


def recomputation_changes_no_bit(values: Sample, dtype: torch.dtype) -> None:
    kept, recomputed = (run_sample(values, GunnLayer, dtype, recompute=recompute) for recompute in (False, True))
    assert kept.equal(recomputed)


def runs_are_bitwise_equal(values: Sample, dtype: torch.dtype, recompute: bool, runs: int) -> None:
    first = run_sample(values, GunnLayer, dtype, recompute=recompute)
    for _ in range(runs - 1):
        assert first.equal(run_sample(values, GunnLayer, dtype, recompute=recompute))


def in_buffer(t: Tensor, shape: tuple[int, ...], *index) -> Tensor:
    """``t`` as a view into a larger tensor of ``shape``."""
    view = torch.full(shape, float("nan"), dtype=t.dtype, device=t.device)[index]
    return view.copy_(t)


def among_pixels(t: Tensor, larger: tuple[int, ...], *index) -> Tensor:
    """``t`` as a view into a tensor whose channels are neighbours, ``larger`` times as large in each dimension."""
    t = t.permute(0, 2, 3, 1)
    return in_buffer(t, tuple(map(operator.mul, t.shape, larger)), *index).permute(0, 3, 1, 2)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "every other channel": lambda t: in_buffer(
        t, (t.shape[0], 2 * t.shape[1], *t.shape[2:]), slice(None), slice(1, None, 2)
    ),
    "a window": lambda t: in_buffer(t, (*t.shape[:2], t.shape[2] + 2, t.shape[3] + 3), ..., slice(1, -1), slice(2, -1)),
    "every other column": lambda t: in_buffer(t, (*t.shape[:3], 2 * t.shape[3]), ..., slice(None, None, 2)),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "batch last": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "unaligned": lambda t: in_buffer(t.flatten(), (t.numel() + 1,), slice(1, None)).view(t.shape),
    "channels_last, every other image": lambda t: among_pixels(t, (2, 1, 1, 1), slice(None, None, 2)),
    "channels_last, every other row": lambda t: among_pixels(t, (1, 2, 1, 1), slice(None), slice(1, None, 2)),
    "channels_last, every other column": lambda t: among_pixels(t, (1, 1, 2, 1), ..., slice(1, None, 2), slice(None)),
    "channels_last, of more channels": lambda t: among_pixels(t, (1, 1, 1, 2), ..., slice(t.shape[1])),
    "channels_last, unaligned": lambda t: LAYOUTS["unaligned"](t.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
}


def layout_of_input_and_gradient_changes_no_bit(
    values: Sample, layout: str, dtype: torch.dtype = torch.float32
) -> None:
    expected = run_sample(values, GunnLayer, dtype)
    x, grad = values.x.to(dtype), values.grad.to(dtype)
    other_x, other_grad = LAYOUTS[layout](x), LAYOUTS[layout](grad)
    assert torch.equal(x, other_x)
    for inputs in ((other_x, grad), (x, other_grad), (other_x, other_grad)):
        assert run(layer_of(values, dtype), *inputs).equal(expected)


def memory_format_of_the_output_is_the_inputs(values: Sample, dtype: torch.dtype = torch.float32) -> None:
    layer, x = layer_of(values, dtype), values.x.to(dtype)
    assert layer(x).is_contiguous()
    assert layer(x.to(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)
    assert layer(LAYOUTS["every other channel"](x)).is_contiguous()


def expanded_input_and_gradient_are_taken_as_they_are(values: Sample) -> None:
    x = values.x[:1].expand_as(values.x)
    expected = run(layer_of(values), x.contiguous(), torch.ones_like(x))
    assert run(layer_of(values), x, torch.ones((), device=x.device).expand_as(x)).equal(expected)

    x = x.contiguous().requires_grad_()
    layer = layer_of(values)
    layer(x).sum().backward()
    assert torch.equal(x.grad, expected.gradients["x"])
    assert torch.equal(layer.units[0].spatial.weight.grad, expected.gradients["units.0.spatial.weight"])


def strides_of_parameters_change_no_bit(values: Sample) -> None:
    expected = run_sample(values, GunnLayer, torch.float32)
    layer = layer_of(values)
    for parameter in layer.parameters():
        parameter.data = parameter.data.transpose(0, 1).contiguous().transpose(0, 1)
        assert not parameter.is_contiguous()
    assert run(layer, values.x, values.grad).equal(expected)


def input_and_output_gradient_are_not_modified(values: Sample, recompute: bool) -> None:
    x, grad = values.x.clone(), values.grad.clone()
    result = run(layer_of(values, recompute=recompute), x, grad)
    assert torch.equal(x, values.x)
    assert torch.equal(grad, values.grad)
    assert len({t.untyped_storage().data_ptr() for t in (x, grad, result.y, result.gradients["x"])}) == 4


# --- running statistics -----------------------------------------------------------------------------------------------


def running_statistics_are_those_of_the_reference_after_several_steps(values: Sample, momentum: float | None) -> None:
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


def evaluation_and_frozen_batch_norm_leave_the_running_statistics_alone(values: Sample) -> None:
    for layer in (layer_of(values).eval(), layer_of(values).freeze_batch_norm().train()):
        result = run(layer, values.x, values.grad)
        assert all(torch.equal(buffer.cpu(), values.state[name]) for name, buffer in result.buffers.items())
    assert layer_of(values).freeze_batch_norm().training


def two_forwards_may_come_before_two_backwards(values: Sample) -> None:
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


def activation_checkpointing_changes_no_bit(values: Sample, use_reentrant: bool, recompute: bool) -> None:
    """As for ordinary batch norm, the running statistics are then updated by both forward passes."""
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


def only_the_gradients_asked_for_are_computed(values: Sample, dtype: torch.dtype = torch.float32) -> None:
    expected = run_sample(values, GunnLayer, dtype)
    grad = values.grad.to(dtype)

    layer = layer_of(values, dtype)
    layer(values.x.to(dtype)).backward(grad)  # the input needs none
    assert all(torch.equal(p.grad, expected.gradients[name]) for name, p in layer.named_parameters())

    layer = layer_of(values, dtype).requires_grad_(False)
    x = values.x.to(dtype, copy=True).requires_grad_()
    layer(x).backward(grad)  # the parameters need none
    assert torch.equal(x.grad, expected.gradients["x"])
    assert all(p.grad is None for p in layer.parameters())

    layer = layer_of(values, dtype).requires_grad_(False)
    layer.units[0].spatial.weight.requires_grad_()
    layer(values.x.to(dtype)).backward(grad)
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {"units.0.spatial.weight"}
    assert torch.equal(layer.units[0].spatial.weight.grad, expected.gradients["units.0.spatial.weight"])

    assert not layer_of(values, dtype).requires_grad_(False)(values.x.to(dtype)).requires_grad


def nothing_is_recorded_without_gradients(values: Sample) -> None:
    expected = run_sample(values, GunnLayer, torch.float32)
    x = values.x.clone().requires_grad_()
    for no_gradients in (torch.no_grad, torch.inference_mode):
        layer = layer_of(values)
        with no_gradients():
            y = layer(x)
        assert not y.requires_grad
        assert torch.equal(y, expected.y)
        assert torch.equal(layer.units[0].project_bn.running_var, expected.buffers["units.0.project_bn.running_var"])


def saved_storages(layer: StackedLayer, x: Tensor) -> tuple[dict[int, int], Tensor]:
    """Bytes of every storage kept for the backward, by address; the output."""
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    assert y.requires_grad
    return storages, y


def input_output_parameters_and_statistics_are_saved(values: Sample, dtype: torch.dtype = torch.float32) -> None:
    """Whatever the number of segments. Parameters are float32, as under autocast."""
    layer, x = layer_of(values), values.x.to(dtype, copy=True).requires_grad_()
    storages, y = saved_storages(layer, x)
    statistics = 2 * sum(bn.running_mean.numel() for bn in layer.batch_norms())
    expected = 2 * x.numel() * x.element_size() + 4 * (sum(p.numel() for p in layer.parameters()) + statistics)
    assert sum(storages.values()) == expected
    assert {t.untyped_storage().data_ptr() for t in (x, y, *layer.parameters())} <= storages.keys()

    kept, _ = saved_storages(layer_of(values, recompute=False), x)
    rows = statistics // 2  # of pre-activations, one per batch norm channel; at least those before a ReLU are kept
    hidden = sum(2 * layer.segments * layer.hidden for _ in layer.units)
    pixels = x.element_size() * x.numel() // layer.channels
    assert hidden * pixels <= sum(kept.values()) - expected <= 4 * rows * pixels


def overwriting_what_backward_needs_is_an_error(values: Sample, changed: str) -> None:
    x = values.x.clone()
    y = layer_of(values)(x)
    {"x": x, "y": y.detach()}[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation|has been modified inplace"):
        y.backward(values.grad)


def double_backward_is_refused_by_name(values: Sample) -> None:
    x = values.x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(layer_of(values)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="(?i)double backward|twice"):
        gradient.sum().backward()


def backward_may_run_twice_through_a_retained_graph(values: Sample, recompute: bool) -> None:
    layer, x = layer_of(values, recompute=recompute), values.x.clone().requires_grad_()
    y, inputs = layer(x), [x, *layer.parameters()]
    first = torch.autograd.grad(y, inputs, values.grad, retain_graph=True)
    second = torch.autograd.grad(y, inputs, values.grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def an_empty_batch_gives_an_empty_output(layer: StackedLayer, x: Tensor) -> None:
    assert x.numel() == 0
    y = layer(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all((p.grad == 0).all() for p in layer.parameters() if p.grad is not None)


# --- as a module ------------------------------------------------------------------------------------------------------

DUPLICATES = [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))]


def copies_are_equal_and_independent(values: Sample, duplicate: Callable[[GunnLayer], GunnLayer]) -> None:
    layer = layer_of(values, momentum=None, recompute=False)
    layer(values.x)
    twin = duplicate(layer)
    assert repr(twin) == repr(layer)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    result = run(twin, values.x, values.grad)
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())
    assert run(layer, values.x, values.grad).equal(result)


def twenty_steps_of_training_follow_the_reference(values: Sample) -> None:
    """In float64; ``values`` of `SMALL` with a batch of 8."""
    device, generator = values.x.device, torch.Generator().manual_seed(1)
    images = torch.randn(20, *values.x.shape, generator=generator, dtype=torch.float64).to(device)
    labels = torch.randint(5, (20, values.case.batch), generator=generator).to(device)
    heads = torch.randn(values.case.channels, 5, generator=generator, dtype=torch.float64).to(device)
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


# --- the operators ----------------------------------------------------------------------------------------------------


def operator_arguments(values: Sample, layer: StackedLayer, keep: bool = False):
    """What layer_forward takes, and the options it shares with layer_backward."""
    case = values.case
    options = (case.segments, case.expansion, case.units, case.shortcut, case.residual, layer.eps)
    parameters = [p.detach() for p in ops.parameter_list(layer)]
    return (values.x, parameters, statistics_of(layer), *options, keep), parameters, options


def statistics_of(layer: StackedLayer) -> Tensor | None:
    """The running statistics in the order of the operators, None where the batch's own are used."""
    if layer.uses_batch_statistics():
        return None
    order = []
    for unit in layer.units:
        order += [bn for bn in (unit.reduce_bn, unit.shortcut_bn, unit.spatial_bn, unit.project_bn) if bn is not None]
    return torch.stack([torch.cat([getattr(bn, name) for bn in order], 1) for name in ("running_mean", "running_var")])


def kept_pre_activations_may_lie_anywhere(values: Sample) -> None:
    """Strided, and at an address that is no multiple of 16: the backward reads what is meant."""
    arguments, parameters, options = operator_arguments(values, layer_of(values), True)
    y, statistics, saved = torch.ops.gunn_ext.layer_forward(*arguments)

    def gradients(kept: Tensor) -> list[Tensor]:
        common = (values.grad, values.x, y, parameters, statistics, kept, *options, True, True, True)
        grad_x, grads = torch.ops.gunn_ext.layer_backward(*common)
        return [grad_x, *grads]

    shifted = torch.cat([saved.new_zeros(1), saved.flatten()])[1:].view(saved.shape)
    for kept in (saved.transpose(2, 3).contiguous().transpose(2, 3), shifted):
        for found, expected in zip(gradients(kept), gradients(saved), strict=True):
            assert torch.equal(found, expected)


def operators_pass_opcheck(values: Sample, keep: bool) -> None:
    arguments, parameters, options = operator_arguments(values, layer_of(values), keep)
    torch.library.opcheck(torch.ops.gunn_ext.layer_forward.default, arguments)
    y, batch_statistics, saved = torch.ops.gunn_ext.layer_forward(*arguments)
    training = values.case.mode == "train"
    statistics = batch_statistics if training else arguments[2]
    common = (values.grad, values.x, y, parameters, statistics, saved, *options, training)
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(torch.ops.gunn_ext.layer_backward.default, (*common, *needs))


def compiled_layer_equals_eager(
    values: Sample, recompute: bool, same_statistics=torch.equal, rounds: int = 1, **compilation
) -> None:
    """Bitwise; ``same_statistics`` compares the running ones, whose update a compiler may fuse."""
    layer, eager = (layer_of(values, recompute=recompute) for _ in range(2))
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, **compilation)
    for x in (values.x, values.x.flip(0)) * rounds:
        ours, expected = run(layer, x, values.grad, compiled), run(eager, x, values.grad)
        assert torch.equal(ours.y, expected.y)
        assert all(torch.equal(ours.gradients[name], gradient) for name, gradient in expected.gradients.items())
        assert all(same_statistics(ours.buffers[name], buffer) for name, buffer in expected.buffers.items())


def rule_holds_under_autocast(case: Case, dtype: torch.dtype) -> None:
    """Parameters stay float32: where the narrow dtype cannot hold them, only the factors of products are rounded."""
    values = settled_sample(case, torch.float32)

    def ours(draw: Sample) -> Result:
        layer = layer_of(draw)

        def call(x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype):
                return layer(x)

        return run(layer, draw.x, draw.grad.to(dtype), call)

    check(values, ours, dtype, parameters=torch.float32)
    result = ours(values)
    assert result.y.dtype == dtype
    assert {gradient.dtype for gradient in result.gradients.values()} == {torch.float32}
    assert torch.equal(result.y, run_sample(values, GunnLayer, dtype, torch.float32).y)


def narrow_parameters_are_saved_as_they_are(values: Sample) -> None:
    layer, x = values.case.layer(GunnLayer, torch.bfloat16), values.x.bfloat16().requires_grad_()
    storages, _ = saved_storages(layer, x)
    narrow = 2 * x.numel() + sum(p.numel() for p in layer.parameters())
    statistics = 2 * sum(bn.running_mean.numel() for bn in layer.batch_norms())
    assert sum(storages.values()) == 2 * narrow + 4 * statistics


# --- under the rule, in any precision ---------------------------------------------------------------------------------

# What the CUDA kernels compute in: dtype, and whether float32 is multiplied as TF32.
PRECISIONS = {
    "float64": (torch.float64, False),
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
}


def sample_for(precision: str, case: Case, seed: int = 0) -> Sample:
    """Values whose pre-activations the roundings of a precision leave on their side of 0."""
    if precision in ("float64", "float32"):
        return sample(case, seed)
    return settled_sample(case, torch.bfloat16 if precision == "bfloat16" else torch.float16, seed)  # as TF32: 11 bits


def rule_holds(values: Sample, precision: str, **options) -> None:
    """`check` for `GunnLayer` on the values' device."""
    dtype, fast = PRECISIONS[precision]

    def ours(draw: Sample) -> Result:
        with tensor_float(fast):
            return run_sample(draw, GunnLayer, dtype, **options)

    with tensor_float(False):
        check(values, ours, dtype, plain=TensorFloatReferenceLayer if fast else ReferenceGunnLayer)
