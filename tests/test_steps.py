"""The steps of a pass: run one by one they are the whole pass, and what stands between two of them can be shared."""

import pytest
import torch

from gunn_ext import GunnLayer, ReferenceGunnLayer, ops

PANELS = {"channels": 14, "segments": 14}  # more than one panel of the CPU's kernels
OPTIONS = [
    {"shortcut": True},
    {"shortcut": False, "units": 2},
    {"shortcut": True, "units": 3, "residual": False},
]


def make(options, batch=4, dtype=torch.float64):
    torch.manual_seed(3)
    layer = GunnLayer(**{"channels": 12, "segments": 3, **options}, dtype=dtype)
    x = torch.randn(batch, layer.channels, 5, 6, dtype=dtype)
    return layer, x, torch.randn_like(x)


def forward_in_steps(passes, share):
    """Runs several ranks' passes side by side; ``share(passes, rows...)`` stands where an all-reduce would."""
    for rank in passes:
        rank.step("begin")
    layer = passes[0].layer
    for segment in range(layer.segments):
        for unit in range(layer.num_units):
            for name in ("reduce", "spatial", "project"):
                for rank in passes:
                    rank.step(name, segment, unit)
                share(passes, segment, unit, name)
    for rank in passes:
        rank.step("finish")


def backward_in_steps(passes, share):
    for rank in passes:
        rank.step("begin")
    layer = passes[0].layer
    for segment in reversed(range(layer.segments)):
        for unit in reversed(range(layer.num_units)):
            for name in ("project", "spatial", "reduce", "input"):
                for rank in passes:
                    rank.step(name, segment, unit)
                if name != "input":
                    share(passes, segment, unit, name)
    for rank in passes:
        rank.step("finish")


class Forward(ops.ForwardSteps):
    def __init__(self, x, layer):
        super().__init__(x, ops.parameter_list(layer), ops.layer_options(layer))
        self.layer = layer


class Backward(ops.BackwardSteps):
    def __init__(self, grad, x, y, statistics, layer, count=0):
        parameters, static = ops.parameter_list(layer), ops.layer_options(layer)
        super().__init__(grad, x, y, parameters, statistics, static, count=count)
        self.layer = layer


def nothing(*_):
    """One rank has nothing to share."""


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("options", [*OPTIONS, *(PANELS | options for options in OPTIONS)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_steps_give_the_same_bits_as_the_whole_pass(options, dtype, count, monkeypatch):
    monkeypatch.setattr(ops, "_SERIAL_WORK", 0)
    torch.set_num_threads(count)
    layer, x, grad = make(options, batch=3, dtype=dtype)
    static = ops.layer_options(layer)
    parameters = [p.detach() for p in ops.parameter_list(layer)]
    y, statistics, _ = ops.layer_forward(x, parameters, None, *static, False)
    grad_x, grads = ops.layer_backward(grad, x, y, parameters, statistics, None, *static, True, True, True)

    forward = Forward(x, layer)
    forward_in_steps([forward], nothing)
    assert torch.equal(forward.y, y)
    assert torch.equal(forward.statistics, statistics)

    backward = Backward(grad, x, y, statistics, layer)
    backward_in_steps([backward], nothing)
    assert torch.equal(backward.grad_x, grad_x)
    assert all(torch.equal(ours.to(dtype), whole) for ours, whole in zip(backward.grads, grads, strict=True))


def rows_of(layer, unit, name):
    """The rows of the statistics that a step leaves, by name of the step."""
    k, s = layer.hidden, layer.width
    first = 2 * k + s + (s if layer.shortcut else 0)
    start = 0 if unit == 0 else first + (unit - 1) * (2 * k + s)
    reduce = k + (s if layer.shortcut and unit == 0 else 0)
    return {
        "reduce": list(range(start, start + reduce)),
        "spatial": list(range(start + reduce, start + reduce + k)),
        "project": list(range(start + reduce + k, start + reduce + k + s)),
    }


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_two_ranks_that_share_statistics_are_one_batch(options, counted):
    """What synchronised batch norm needs: exchanging between the steps makes half batches equal the whole one."""
    layer, x, grad = make(options, batch=5)
    sizes = [2, 3]
    xs, grads = x.split(sizes), grad.split(sizes)
    weights = [size / sum(sizes) for size in sizes]

    def share_statistics(passes, segment, unit, name):
        rows = rows_of(layer, unit, name)[name]
        means = [rank.statistics[0, segment, rows] for rank in passes]
        variances = [rank.statistics[1, segment, rows] for rank in passes]
        mean = sum(w * m for w, m in zip(weights, means, strict=True))
        var = sum(w * (v + (m - mean) ** 2) for w, m, v in zip(weights, means, variances, strict=True))
        for rank in passes:
            rank.statistics[0, segment, rows] = mean
            rank.statistics[1, segment, rows] = var

    def share_sums(passes, segment, unit, name):
        found = rows_of(layer, unit, name)
        rows = found[name]
        if name == "project" and unit == 0 and layer.shortcut:
            rows = rows + found["reduce"][layer.hidden :]
        elif name == "reduce":
            rows = rows[: layer.hidden]
        total = sum(rank.sums[:, segment, rows] for rank in passes)
        for rank, share in zip(passes, weights, strict=True):
            # A rank that does not know the count of all divides by its own.
            rank.sums[:, segment, rows] = total if counted else total * share

    ranks = [Forward(part, layer) for part in xs]
    forward_in_steps(ranks, share_statistics)
    count = x.shape[0] * x.shape[2] * x.shape[3] if counted else 0
    backs = [
        Backward(g, part, rank.y, rank.statistics, layer, count) for g, part, rank in zip(grads, xs, ranks, strict=True)
    ]
    backward_in_steps(backs, share_sums)

    oracle = ReferenceGunnLayer(12, 3, dtype=torch.float64, **options)
    oracle.load_state_dict(layer.state_dict())
    whole = x.clone().requires_grad_()
    y = oracle(whole)
    y.backward(grad)
    torch.testing.assert_close(torch.cat([rank.y for rank in ranks]), y, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.cat([back.grad_x for back in backs]), whole.grad, rtol=1e-8, atol=1e-10)
    for ours, parameter in zip(
        zip(*(back.grads for back in backs), strict=True), ops.parameter_list(oracle), strict=True
    ):
        torch.testing.assert_close(sum(ours), parameter.grad, rtol=1e-8, atol=1e-9)


def test_a_step_of_a_segment_that_is_not_there_raises():
    layer, x, _ = make({"shortcut": True})
    steps = Forward(x, layer)
    with pytest.raises(RuntimeError, match="segment 3 is not one of the layer's 3"):
        steps.step("reduce", segment=3)
    with pytest.raises(RuntimeError, match="unknown step 'shrink'"):
        steps.step("shrink")


def test_steps_say_what_they_take():
    layer, x = GunnLayer(12, 3), torch.randn(2, 12, 4, 4)
    statistics = torch.ones(2, 3, 20)
    with pytest.raises(ValueError, match=r"grad_y must have shape \(2, 12, 4, 4\), got \(1, 12, 4, 4\)"):
        Backward(x[:1], x, x, statistics, layer)
    with pytest.raises(ValueError, match=r"statistics must have shape \(2, 3, 20\), got \(1,\)"):
        Backward(x, x, x, torch.zeros(1), layer)
    with pytest.raises(ValueError, match=r"expected a non-empty tensor, float64, .* or .*, got \(0, 12, 4, 4\)"):
        Forward(torch.zeros(0, 12, 4, 4), layer)
