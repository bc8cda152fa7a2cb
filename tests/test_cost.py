"""Costs of models: against counts by hand, against torch's own counter, against what autograd really keeps."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gunn_ext.analysis import ModelCost, layer_flops, model_cost
from gunn_ext.layers import GunnLayer
from gunn_ext.models import GunnNet, Spec
from gunn_ext.reference import ReferenceGunnLayer

TINY = Spec(stem=2, channels=(4, 8), segments=(2, 2), expansion=1, shortcut=True, num_classes=3, input_size=(4, 4))
DEEP = Spec(stem=4, channels=(6, 12), segments=(3, 2), expansion=3, units=3, shortcut=True, input_size=(6, 10))
IMAGENET = Spec(stem=4, channels=(6, 12), segments=(3, 2), units=2, layout="imagenet", input_size=(33, 40))
SPECS = [pytest.param(spec, id=name) for name, spec in {"deep": DEEP, "imagenet": IMAGENET, "tiny": TINY}.items()]

# TINY by hand: K = 1, so k = s: 2 in the first layer, 4 in the second.
FIRST_LAYER = 2 * (2 * 4 + 9 * 2 * 2 + 2 * 2) + 4 * 4  # per pixel: P (k N + 9 k k + s k) + N N = 112
SECOND_LAYER = 2 * (4 * 8 + 9 * 4 * 4 + 4 * 4) + 8 * 8  # 448
MULTIPLY_ADDS = (
    16 * 9 * 1 * 2  # stem 3x3, on 4x4 pixels
    + 16 * 2 * 4  # 1x1
    + 16 * FIRST_LAYER
    + 16 * 4 * 8  # 1x1, before the pooling
    + 4 * SECOND_LAYER  # on 2x2 pixels
    + 4 * 8 * 8  # final 1x1
    + 8 * 3  # classifier
)
KEPT = (
    16 * (1 + 2 + 2)  # stem: image, input of the batch norm, output of the ReLU, which is the next convolution's input
    + 16 * (4 + 4 + 4)  # batch norm, ReLU = x of the layer, y of the layer = input of the next convolution
    + 16 * (8 + 8)  # batch norm, ReLU = input of the pooling
    + 4 * (8 + 8)  # x, y
    + 4 * (8 + 8)  # final: batch norm, ReLU
    + 8  # classifier
)
PARAMETERS = (
    (9 * 2 + 2 * 2)  # stem and its batch norm
    + (2 * 4 + 2 * 4)
    + (FIRST_LAYER + 2 * 4 * 4)  # a weight for each multiply-add, and four batch norms of 4 channels
    + (4 * 8 + 2 * 8)
    + (SECOND_LAYER + 2 * 4 * 8)
    + (8 * 8 + 2 * 8)
    + (8 * 3 + 3)
)


def test_a_tiny_net_costs_what_it_costs_by_hand():
    assert (FIRST_LAYER, SECOND_LAYER, MULTIPLY_ADDS, KEPT) == (112, 448, 4792, 664)
    model = GunnNet(TINY, in_chans=1)
    assert model_cost(model) == ModelCost((1, 4, 4), PARAMETERS, 2 * 4792, 4 * 664)
    assert model_cost(GunnNet(TINY, in_chans=1, dtype=torch.bfloat16)).activation_bytes == 2 * 664


def test_without_recompute_the_convolutions_of_the_layer_are_kept_too():
    # Layer 1 on 16 pixels: reduce, spatial, project, shortcut, 4 channels each; layer 2 on 4 pixels, 8 each.
    cost = model_cost(GunnNet(TINY, in_chans=1, recompute=False))
    assert cost.activation_bytes == 4 * (664 + 16 * 16 + 4 * 32)
    assert cost.flops == 2 * 4792


@pytest.mark.parametrize("spec", SPECS)
def test_flops_are_those_that_torch_counts(spec):
    model = GunnNet(spec, in_chans=2).eval()
    for stage in model.stages:
        ours = stage.layer
        stage.layer = ReferenceGunnLayer(
            ours.channels, ours.segments, ours.expansion, ours.num_units, shortcut=ours.shortcut
        ).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, 2, *spec.input_size))
    assert model_cost(model).flops == counter.get_total_flops()
    assert model_cost(GunnNet(spec, in_chans=2)).flops == counter.get_total_flops()


@pytest.mark.parametrize("spec", SPECS)
def test_the_bytes_of_sunn_are_those_that_autograd_keeps(spec):
    batch = 5
    model = GunnNet(dataclasses.replace(spec, gradual=False))
    kept = {}

    def pack(x):
        if x.dim() in (2, 4) and x.shape[0] == batch:  # neither parameters nor statistics
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(torch.randn(batch, 3, *spec.input_size))
    assert sum(storage.nbytes() for storage in kept.values()) == batch * model_cost(model).activation_bytes


def test_recomputation_makes_memory_independent_of_the_number_of_segments():
    costs = [
        model_cost(GunnNet(dataclasses.replace(DEEP, segments=segments), device="meta")).activation_bytes
        for segments in [(1, 1), (3, 2), (6, 12)]
    ]
    assert costs[0] == costs[1] == costs[2]


def test_names_of_models_are_taken_too():
    cost = model_cost("gunn15", num_classes=100)
    assert cost.input_size == (3, 32, 32)
    assert cost.parameters == 1_618_236
    assert cost.uncounted == ()
    # The three layers of the design notes: 37, 13.3 and 4.5 GFLOP at batch 64.
    layers = [(240, 20, 32), (300, 25, 16), (360, 30, 8)]
    flops = [layer_flops(GunnLayer(n, p, shortcut=True, device="meta"), size, size) for n, p, size in layers]
    assert [round(64 * f / 1e9, 1) for f in flops] == [37.0, 13.3, 4.5]
    stem, transitions = 1024 * 27 * 64, 1024 * (64 * 240 + 240 * 300) + 256 * 300 * 360
    assert cost.flops == sum(flops) + 2 * (stem + transitions + 64 * 360 * 360 + 360 * 100)
    with pytest.raises(ValueError, match="Unknown model 'gun15'"):
        model_cost("gun15")


def test_the_cost_grows_with_the_image():
    small, large = model_cost("gunn_tiny", (16, 16)), model_cost("gunn_tiny", (1, 32, 32), in_chans=1)
    assert small.input_size == (3, 16, 16)
    assert large.input_size == (1, 32, 32)
    assert 3 < large.flops / small.flops <= 4
    with pytest.raises(ValueError, match="an input of 3x3 is too small"):
        model_cost("gunn_tiny", (3, 3))
    with pytest.raises(ValueError, match=r"input_size must be \(height, width\) or .*, got \(1, 2, 3, 4\)\."):
        model_cost("gunn_tiny", (1, 2, 3, 4))


def test_the_model_is_left_as_it_was():
    model = GunnNet(TINY)
    model.stem.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    model_cost(model)
    assert modes == [module.training for module in model.modules()]
    assert not any(module._forward_hooks for module in model.modules())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    with pytest.raises(TypeError, match="recompute can be chosen for a model given by name only"):
        model_cost(model, recompute=False)


def test_other_modules_are_counted_or_named():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(inplace=True), nn.PReLU(), nn.Flatten(), nn.Linear(36, 2)
    )
    cost = model_cost(model, (2, 5, 5))
    assert cost.flops == 2 * (9 * 4 * 9 + 36 * 2)
    # The image; the convolution's output, rectified in place; the linear layer's input.
    assert cost.activation_bytes == 4 * (50 + 36 + 36)
    assert cost.uncounted == ("2",)
    with pytest.raises(ValueError, match="got None; a Sequential does not say its own"):
        model_cost(model)


def test_a_single_layer_has_a_cost():
    cost = model_cost(GunnLayer(8, 2, units=2), (8, 3, 5))
    assert cost.flops == layer_flops(GunnLayer(8, 2, units=2), 3, 5) == 2 * 15 * (2 * 8 * (8 + 9 * 8 + 4) + 2 * 640)
    assert cost.activation_bytes == 4 * 15 * 16
