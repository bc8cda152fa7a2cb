"""The reference against hand-computed values, loops over pixels, ordinary torch modules and numerical gradients."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tolerance import Case, run, run_sample, sample
from torch import nn

from gunn_ext import ReferenceGunnLayer
from gunn_ext.parameters import StackedBatchNorm

CASES = [
    Case(6, 3),
    Case(6, 3, shortcut=False),
    Case(6, 3, residual=False),
    Case(6, 3, gradual=False),
    Case(6, 3, gradual=False, residual=False, mode="eval"),
    Case(6, 2, expansion=1, units=2, shortcut=False),
    Case(6, 2, units=3, mode="eval"),
    Case(4, 4, expansion=3, mode="eval"),
    Case(4, 1, mode="frozen"),
    Case(4, 2, batch=1, height=1, width=3),
]


# --- values computed by hand ------------------------------------------------------------------------------------------


def transparent_layer(channels, segments, expansion, **options):
    """A layer in evaluation mode whose batch norms are exact identities (variance 1/2, eps 1/2) and weights 0."""
    layer = ReferenceGunnLayer(channels, segments, expansion, eps=0.5, dtype=torch.float64, **options).eval()
    for bn in layer.batch_norms():
        bn.running_var.fill_(0.5)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "_bn" not in name:
                parameter.zero_()
    return layer


@torch.no_grad()
def two_scalar_segments(**options):
    """N = P = 2, K = 1: U_1 = 3 relu(2 relu(x_1 - x_2)), U_2 = -relu(x_1 + x_2), on x = (5, 4)."""
    layer = transparent_layer(2, 2, 1, **options)
    unit = layer.units[0]
    unit.reduce.weight.copy_(torch.tensor([[[1.0, -1.0]], [[1.0, 1.0]]]))
    unit.spatial.weight[:, 0, 0, 1, 1] = torch.tensor([2.0, 1.0])
    unit.project.weight[:, 0, 0] = torch.tensor([3.0, -1.0])
    return layer, torch.tensor([5.0, 4.0], dtype=torch.float64).view(1, 2, 1, 1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [11, -11]),  # 5 + 3*2*(5-4) = 11; 4 - (11+4) = -11
        ({"gradual": False}, [11, -5]),  # 4 - (5+4) = -5
        ({"residual": False}, [6, -10]),  # 6; -(6+4)
        ({"residual": False, "gradual": False}, [6, -9]),
    ],
)
def test_two_segments_by_hand(options, expected):
    layer, x = two_scalar_segments(**options)
    assert layer(x).flatten().tolist() == expected


@torch.no_grad()
def test_projection_shortcut_by_hand():
    layer, x = two_scalar_segments(shortcut=True)
    layer.units[0].shortcut.weight.copy_(torch.tensor([[[1.0, 1.0]], [[0.0, 2.0]]]))
    layer.units[0].shortcut_bn.bias[1] = 100
    # 5 + 6 + (5+4) = 20; 4 - (20+4) + 2*4 + 100 = 88
    assert layer(x).flatten().tolist() == [20, 88]


@torch.no_grad()
def test_second_unit_adds_its_input_by_hand():
    layer, x = two_scalar_segments(units=2)
    for name in ("reduce", "spatial", "project"):
        weight = getattr(layer.units[1], name).weight
        weight[0].view(weight[0].numel())[weight[0].numel() // 2] = 2
    # U_1: h = 6, 2*2*2*6 + 6 = 54, y_1 = 59; U_2: h = -(59+4) = -63, second unit 0: h itself, y_2 = 4 - 63
    assert layer(x).flatten().tolist() == [59, -59]


@torch.no_grad()
def test_batch_norm_and_padding_by_hand():
    layer = transparent_layer(1, 1, 1)
    unit = layer.units[0]
    unit.reduce.weight.fill_(1)
    unit.spatial.weight.fill_(1)
    unit.project.weight.fill_(1)
    unit.reduce_bn.running_mean.fill_(1)  # z - 1
    unit.spatial_bn.running_var.fill_(3.5)  # z / 2
    unit.project_bn.weight.fill_(-2)
    unit.project_bn.bias.fill_(1)  # 1 - 2 z
    x = torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.0, 5.0]], dtype=torch.float64)
    # relu(x - 1) = [[0, 1, 2], [0, 0, 4]]; box sums [[1, 7, 7], [1, 7, 7]]; halved; y = x + 1 - 2 (sum / 2)
    assert layer(x.view(1, 1, 2, 3))[0, 0].tolist() == [[1.0, -4.0, -3.0], [1.0, -5.0, -1.0]]


# --- an implementation without convolutions, from the formulas --------------------------------------------------------


def loops(layer, x):
    """The layer by loops over pixels and taps, in numpy; returns the output only."""
    state_dict = {name: tensor.detach().numpy() for name, tensor in layer.state_dict().items()}
    width = layer.channels // layer.segments
    batch, _, rows, columns = x.shape

    def normalise(z, name, i):
        weight, bias, mean, var = (
            state_dict[f"{name}.{key}"][i] for key in ("weight", "bias", "running_mean", "running_var")
        )
        if next(layer.batch_norms()).training:
            mean, var = z.mean(axis=(0, 2, 3)), z.var(axis=(0, 2, 3))
        out = np.empty_like(z)
        for c in range(z.shape[1]):
            out[:, c] = weight[c] * (z[:, c] - mean[c]) / math.sqrt(var[c] + layer.eps) + bias[c]
        return out

    def pointwise(h, w):
        out = np.empty((batch, len(w), rows, columns))
        for b, r, c in np.ndindex(batch, rows, columns):
            out[b, :, r, c] = w @ h[b, :, r, c]
        return out

    def three_by_three(h, w):
        out = np.zeros((batch, len(w), rows, columns))
        for b, r, c, dr, dc in np.ndindex(batch, rows, columns, 3, 3):
            rr, cc = r + dr - 1, c + dc - 1
            if 0 <= rr < rows and 0 <= cc < columns:
                out[b, :, r, c] += w[:, :, dr, dc] @ h[b, :, rr, cc]
        return out

    def unit(h, m, i):
        name = f"units.{m}"
        z = normalise(pointwise(h, state_dict[f"{name}.reduce.weight"][i]), f"{name}.reduce_bn", i)
        z = normalise(
            three_by_three(np.maximum(z, 0), state_dict[f"{name}.spatial.weight"][i]), f"{name}.spatial_bn", i
        )
        z = normalise(pointwise(np.maximum(z, 0), state_dict[f"{name}.project.weight"][i]), f"{name}.project_bn", i)
        if m > 0:
            return z + h
        if layer.shortcut:
            z += normalise(pointwise(h, state_dict["units.0.shortcut.weight"][i]), "units.0.shortcut_bn", i)
        return z

    original = x.numpy()
    state = original.copy()
    for i in range(layer.segments):
        update = (state if layer.gradual else original).copy()
        for m in range(len(layer.units)):
            update = unit(update, m, i)
        part = slice(i * width, (i + 1) * width)
        state[:, part] = original[:, part] + update if layer.residual else update
    return torch.from_numpy(state)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_equals_loops_over_pixels(case):
    values = sample(case)
    layer, x = values.layer(dtype=torch.float64), values.x.double()
    torch.testing.assert_close(layer(x).detach(), loops(layer, x), rtol=1e-11, atol=1e-12)


# --- an implementation of ordinary torch modules ----------------------------------------------------------------------


class ModuleLayer(nn.Module):
    """The same layer of nn.Conv2d and nn.BatchNorm2d, one set per segment."""

    def __init__(self, layer):
        super().__init__()
        self.layer = [layer]  # not a submodule
        width, hidden = layer.width, layer.hidden
        self.parts = nn.ModuleDict()
        for i in range(layer.segments):
            for m in range(len(layer.units)):
                inputs = width if m else layer.channels
                for name, conv in (
                    ("reduce", nn.Conv2d(inputs, hidden, 1, bias=False)),
                    ("spatial", nn.Conv2d(hidden, hidden, 3, padding=1, bias=False)),
                    ("project", nn.Conv2d(hidden, width, 1, bias=False)),
                    ("shortcut", nn.Conv2d(inputs, width, 1, bias=False)),
                ):
                    bn = nn.BatchNorm2d(conv.out_channels, eps=layer.eps, momentum=layer.momentum)
                    self.parts[f"{i}{m}{name}"] = nn.Sequential(conv, bn).double()
        for key, (stacked_conv, stacked_bn), i in self.pairs():
            conv, bn = self.parts[key]
            conv.weight.data = stacked_conv.weight.detach()[i].view(conv.weight.shape).clone()
            for name in ("weight", "bias", "running_mean", "running_var"):
                getattr(bn, name).data = getattr(stacked_bn, name).detach()[i].clone()
        self.train(next(layer.batch_norms()).training)

    def pairs(self):
        for i in range(self.layer[0].segments):
            for m, unit in enumerate(self.layer[0].units):
                for name in ("reduce", "spatial", "project", "shortcut"):
                    if getattr(unit, name, None) is not None:
                        yield f"{i}{m}{name}", (getattr(unit, name), getattr(unit, f"{name}_bn")), i

    def forward(self, x):
        layer = self.layer[0]
        state = list(x.split(layer.width, dim=1))
        for i in range(layer.segments):
            h = torch.cat(state, dim=1) if layer.gradual else x
            for m in range(len(layer.units)):
                part = {name: self.parts[f"{i}{m}{name}"] for name in ("reduce", "spatial", "project", "shortcut")}
                out = part["project"](part["spatial"](part["reduce"](h).relu()).relu())
                h = out + h if m else out + part["shortcut"](h) if layer.shortcut else out
            state[i] = state[i] + h if layer.residual else h
        return torch.cat(state, dim=1)


@pytest.mark.parametrize("momentum", [0.1, 0.7, 0.0, None])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_gradients_and_running_statistics_equal_torch_modules(case, momentum):
    values = sample(case)
    layer = values.layer(dtype=torch.float64, momentum=momentum)
    modules = ModuleLayer(layer)
    for step in range(3):
        x = (values.x.double() * (1 + step)).requires_grad_()
        y, expected = layer(x), modules(x)
        torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-12)
    weights = [layer.units[0].reduce.weight, layer.units[0].project_bn.weight]
    names = [("reduce", 0), ("project", 1)]
    ours = torch.autograd.grad(y, [x, *weights], values.grad.double())
    parts = [modules.parts[f"{i}0{name}"][k].weight for name, k in names for i in range(case.segments)]
    theirs = torch.autograd.grad(expected, [x, *parts], values.grad.double())
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-9, atol=1e-10)
    for k, gradient in enumerate(ours[1:]):
        stacked = torch.stack(theirs[1 + k * case.segments : 1 + (k + 1) * case.segments])
        torch.testing.assert_close(gradient, stacked.view(gradient.shape), rtol=1e-9, atol=1e-10)
    for key, (_, bn), i in modules.pairs():
        theirs_bn = modules.parts[key][1]
        torch.testing.assert_close(bn.running_mean[i], theirs_bn.running_mean, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(bn.running_var[i], theirs_bn.running_var, rtol=1e-12, atol=1e-13)
        assert layer.num_batches_tracked == theirs_bn.num_batches_tracked


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize(
    "case",
    [
        Case(4, 2, 1, shortcut=True),
        Case(2, 2, 2, units=2, shortcut=False),
        Case(4, 2, 1, residual=False),
        Case(4, 2, 1, units=2, gradual=False),
    ],
    ids=str,
)
def test_gradcheck(case, mode):
    case = replace(case, mode=mode, height=2, width=3)
    values = sample(case, margin=1e-3)
    layer = values.layer(dtype=torch.float64)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def function(x, *tensors):
        return torch.func.functional_call(layer, dict(zip(names, tensors, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (values.x.double().requires_grad_(), *parameters))


# --- batch-norm modes, dtypes, memory formats -------------------------------------------------------------------------


def test_frozen_batch_norm_is_evaluation_with_gradients():
    frozen, evaluated = (sample(Case(6, 3, mode=mode)) for mode in ("frozen", "eval"))
    ours, expected = (run_sample(values, ReferenceGunnLayer, torch.float64) for values in (frozen, evaluated))
    assert ours.equal(expected)
    assert all(torch.equal(buffer, frozen.state[name].to(buffer)) for name, buffer in ours.buffers.items())
    assert ours.gradients["units.0.reduce_bn.weight"].abs().min() > 0


def test_freezing_survives_train_and_can_be_undone():
    layer = ReferenceGunnLayer(4, 2).freeze_batch_norm().train()
    assert layer.training
    assert not layer.uses_batch_statistics()
    assert layer.freeze_batch_norm(False).uses_batch_statistics()
    layer.eval().freeze_batch_norm(False)
    assert not layer.uses_batch_statistics()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_narrow_dtypes_keep_float32_statistics(dtype, mode):
    values = sample(Case(6, 3, mode=mode))
    layer = values.layer(dtype=torch.float32).to(dtype)
    assert {bn.running_var.dtype for bn in layer.batch_norms()} == {torch.float32}
    result = run(layer, values.x.to(dtype), values.grad.to(dtype))
    assert result.y.dtype == dtype
    assert {g.dtype for g in result.gradients.values()} == {dtype}
    assert result.buffers["units.0.reduce_bn.running_var"].dtype == torch.float32
    oracle = run_sample(values, ReferenceGunnLayer, torch.float64)
    error = (result.y.double() - oracle.y).norm() / oracle.y.norm()
    assert error < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("gradual", [True, False])
def test_memory_format_is_kept_and_does_not_change_values(gradual):
    values = sample(Case(6, 3, gradual=gradual))
    layer = values.layer(dtype=torch.float64).eval()
    x = values.x.double().to(memory_format=torch.channels_last)
    y = layer(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert layer(x.contiguous()).is_contiguous()
    torch.testing.assert_close(y, layer(x.contiguous()), rtol=1e-12, atol=1e-13)


# --- construction -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shortcut", [True, False])
def test_state_dict_names_and_shapes(shortcut):
    channels, segments, width, hidden = 12, 3, 4, 8
    layer = ReferenceGunnLayer(channels, segments, expansion=2, units=2, shortcut=shortcut)
    expected = {"num_batches_tracked": ()}
    for m, inputs in enumerate((channels, width)):
        convolutions = {
            "reduce": (segments, hidden, inputs),
            "spatial": (segments, hidden, hidden, 3, 3),
            "project": (segments, width, hidden),
        }
        if shortcut and m == 0:
            convolutions["shortcut"] = (segments, width, channels)
        for name, shape in convolutions.items():
            expected[f"units.{m}.{name}.weight"] = shape
            for tensor in ("weight", "bias", "running_mean", "running_var"):
                expected[f"units.{m}.{name}_bn.{tensor}"] = shape[:2]
    assert {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()} == expected
    assert {name for name, _ in layer.named_parameters()} == {
        name for name in expected if name.endswith(("weight", "bias"))
    }


def test_initial_values():
    layer = ReferenceGunnLayer(160, 4, expansion=2, units=2, shortcut=True)
    width, hidden = 40, 80
    expected = {"reduce": 2 / hidden, "spatial": 2 / (9 * hidden), "project": 2 / width, "shortcut": 2 / width}
    for name, parameter in layer.named_parameters():
        if "_bn." not in name:
            std = math.sqrt(expected[name.split(".")[2]])
            sigmas = math.sqrt(2 * parameter.numel())  # of the sample's standard deviation: std / sqrt(2 n)
            assert abs(parameter.std().item() / std - 1) < 5 / sigmas, name
            assert abs(parameter.mean().item()) < 5 * std / math.sqrt(parameter.numel()), name
    for bn in layer.batch_norms():
        assert (bn.weight == 1).all()
        assert (bn.bias == 0).all()
        assert (bn.running_mean == 0).all()
        assert (bn.running_var == 1).all()
    assert layer.num_batches_tracked == 0


def test_reset_parameters_starts_anew():
    layer = ReferenceGunnLayer(4, 2)
    weight = layer.units[0].reduce.weight.clone()
    layer(torch.randn(2, 4, 3, 3))
    layer.reset_parameters()
    assert not torch.equal(layer.units[0].reduce.weight, weight)
    assert (layer.units[0].reduce_bn.running_var == 1).all()
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((250, 20), r"channels \(250\) must be divisible by segments \(20\); nearest valid: 240 or 260"),
        ((3, 5), r"nearest valid: 5"),
        ((0, 1), "channels must be a positive integer, got 0"),
        ((4, 2.0), "segments must be a positive integer, got 2.0"),
        ((4, 2, -1), "expansion must be a positive integer, got -1"),
        ((4, 2, 2, True), "units must be a positive integer, got True"),
    ],
)
def test_bad_sizes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ReferenceGunnLayer(*arguments)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"eps": 0.0}, "eps must be a finite number above 0, got 0.0"),
        ({"eps": math.nan}, "eps must be a finite number above 0, got nan"),
        ({"momentum": math.inf}, r"momentum must lie in \[0, 1\] or be None, got inf"),
        ({"momentum": -0.1}, r"momentum must lie in \[0, 1\] or be None, got -0.1"),
    ],
)
def test_bad_options_are_named(option, message):
    with pytest.raises(ValueError, match=message):
        ReferenceGunnLayer(4, 2, **option)


def test_statistics_never_go_below_float32():
    layer = ReferenceGunnLayer(4, 2, dtype=torch.bfloat16)
    assert layer.units[0].reduce_bn.running_mean.dtype == torch.float32
    layer = ReferenceGunnLayer(4, 2)
    layer.units[0].reduce_bn.running_mean.fill_(1 / 3)
    layer.half()
    assert layer.units[0].reduce_bn.weight.dtype == torch.float16
    assert (layer.units[0].reduce_bn.running_mean == torch.tensor(1 / 3)).all()  # not rounded on the way
    assert layer.double().units[0].reduce_bn.running_mean.dtype == torch.float64
    assert StackedBatchNorm(2, 3, None, torch.float64).running_var.dtype == torch.float64


def test_arguments_build_the_like():
    layer = ReferenceGunnLayer(
        12, 3, 3, 2, shortcut=True, gradual=False, residual=False, eps=1e-3, momentum=None, recompute=False
    )
    twin = ReferenceGunnLayer(**layer.arguments())
    assert repr(twin) == repr(layer)
    assert twin.arguments() == layer.arguments()
