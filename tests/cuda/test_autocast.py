"""Mixed precision on a GPU: autocast over float32 parameters, and the loss scaler."""

import copy
from dataclasses import replace

import laws
import pytest
import torch
from laws import GUNN_15, OPTIONS, SMALL
from tolerance import check, run, sample, settled_sample
from torch import nn

from gunn_ext import GunnLayer, ReferenceGunnLayer

NARROW = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("case", [*OPTIONS, GUNN_15[2]], ids=str)
def test_rule_holds_under_autocast(case, dtype, mode, recompute, device):
    def ours(draw):
        layer = laws.layer_of(draw, recompute=recompute)
        with torch.autocast(device.type, dtype):
            return run(layer, draw.x.to(dtype), draw.grad.to(dtype))

    check(settled_sample(replace(case, mode=mode), dtype).to(device), ours, dtype, parameters=torch.float32)


@pytest.mark.parametrize("gradual", [True, False])
@pytest.mark.parametrize("input_dtype", [torch.float32, None], ids=str)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_dtypes_under_autocast(dtype, input_dtype, gradual, device):
    values = sample(replace(SMALL, gradual=gradual)).to(device)
    layer, x = laws.layer_of(values), values.x.to(input_dtype or dtype).requires_grad_()
    with torch.autocast(device.type, dtype):
        y = layer(x)
    assert y.dtype == dtype
    y.backward(values.grad.to(dtype))
    assert x.grad.dtype == x.dtype
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}
    assert {bn.running_mean.dtype for bn in layer.batch_norms()} == {torch.float32}


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_autocast_leaves_float64_alone(dtype, device):
    values = sample(SMALL).to(device)
    layer = laws.layer_of(values, torch.float64)
    with torch.autocast(device.type, dtype):
        assert layer(values.x.double()).dtype == torch.float64


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_narrow_parameters_keep_float32_running_statistics(dtype, device):
    values = sample(SMALL).to(device)
    layer = laws.layer_of(values).to(dtype)
    result = run(layer, values.x.to(dtype), values.grad.to(dtype))
    assert {bn.running_mean.dtype for bn in layer.batch_norms()} == {torch.float32}
    assert {result.y.dtype, *(g.dtype for g in result.gradients.values())} == {dtype}


def network(kind, device):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 24, 3, padding=1), kind(24, 3, shortcut=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(24, 5)).to(device)


def train(model, scaler, steps, device, dtype):
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    losses = []
    for _ in range(steps):
        images = torch.randn(16, 3, 12, 12, generator=generator).to(device)
        labels = torch.randint(5, (16,), generator=generator).to(device)
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype):
            loss = nn.functional.cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return losses


def test_steps_with_a_loss_scaler_follow_the_reference(device):
    model = network(GunnLayer, device)
    reference = network(ReferenceGunnLayer, device)
    reference.load_state_dict(model.state_dict())
    before = copy.deepcopy(model.state_dict())
    scalers = [torch.amp.GradScaler(device.type, init_scale=1024.0) for _ in range(2)]
    ours, expected = (
        train(m, scaler, 6, device, torch.float16) for m, scaler in zip((model, reference), scalers, strict=True)
    )
    assert [scaler.get_scale() for scaler in scalers] == [1024.0] * 2  # no step overflowed
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    torch.testing.assert_close(ours, expected, rtol=0.05, atol=0.05)


def test_a_loss_scaler_sees_gradients_that_overflow(device):
    model = network(GunnLayer, device)
    before = copy.deepcopy(dict(model.named_parameters()))
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**40)
    train(model, scaler, 1, device, torch.float16)
    assert scaler.get_scale() == 2.0**39
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
