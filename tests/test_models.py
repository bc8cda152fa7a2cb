"""The model zoo: parameter counts of the paper, topology, protocol, errors."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import pytest
import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from gunn_ext.layers import GunnLayer
from gunn_ext.models import GunnNet, Spec, create_model, list_models, model_spec, register_model, registry
from gunn_ext.reference import reference_layer

# Qiao et al. 2018, tables 1 to 3 and 5.
PARAMETERS = {
    ("gunn15", 10): 1_585_746,
    ("gunn15", 100): 1_618_236,
    ("sunn15", 10): 1_585_746,
    ("sunn15", 100): 1_618_236,
    ("gunn15_nores", 10): 1_585_746,
    ("gunn15_nores", 100): 1_618_236,
    ("gunn24", 10): 29_534_106,
    ("gunn24", 100): 29_631_396,
    ("sunn24", 10): 29_534_106,
    ("sunn24", 100): 29_631_396,
    ("gunn18", 1000): 28_909_736,
    ("sunn18", 1000): 28_909_736,
    ("wide_gunn18", 1000): 45_624_936,
}
NAMES = ["gunn15", "gunn15_nores", "gunn18", "gunn24", "gunn_tiny", "sunn15", "sunn18", "sunn24", "wide_gunn18"]

CIFAR = Spec(stem=4, channels=(4, 6), segments=(2, 3), expansion=3, units=2, shortcut=True, num_classes=5)
IMAGENET = Spec(stem=4, channels=(4, 6, 8), segments=(2, 3, 2), layout="imagenet", num_classes=5, input_size=(48, 48))
SPECS = [pytest.param(spec, id=spec.layout) for spec in (CIFAR, IMAGENET)]


def net(spec: Spec, **kw) -> GunnNet:
    """A net in float64 whose batch norms, running statistics included, are not at their initial values."""
    model = GunnNet(spec, dtype=torch.float64, **kw)
    for name, tensor in model.state_dict().items():
        if "bn" in name and tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    return model


@pytest.fixture
def own_registry(monkeypatch):
    """Lets a test register models that are gone after it."""
    monkeypatch.setattr(registry, "_MODELS", dict(registry._MODELS))


# ---------------------------------------------------------------------------------------------------------- registry


def test_the_zoo_has_the_models_of_the_paper():
    assert set(NAMES) <= set(list_models())
    assert list_models() == sorted(list_models())
    narrow = ["gunn15_narrow", "gunn15_narrow_nores"]
    assert list_models("gunn*") == ["gunn15", *narrow, "gunn15_nores", "gunn18", "gunn24", "gunn_tiny"]
    assert list_models("*unn1[58]") == ["gunn15", "gunn18", "sunn15", "sunn18", "wide_gunn18"]
    assert list_models("resnet*") == []


@pytest.mark.parametrize(("name", "classes"), PARAMETERS, ids=str)
def test_parameters_are_those_of_the_paper(name, classes):
    model = create_model(name, num_classes=classes, device="meta")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name, classes]
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("name", NAMES)
def test_specs_know_their_defaults(name):
    spec, model = model_spec(name), create_model(name, device="meta")
    small = "18" not in name
    assert (spec.num_classes, spec.input_size) == ((10, (32, 32)) if small else (1000, (224, 224)))
    assert model.num_classes == model.get_classifier().out_features == spec.num_classes
    assert model.in_chans == 3
    assert model.training


def test_specs_are_plain_data():
    for name in NAMES:
        spec = model_spec(name)
        assert Spec(**json.loads(json.dumps(dataclasses.asdict(spec)))) == spec
        with pytest.raises(dataclasses.FrozenInstanceError):
            spec.stem = 3


def test_the_baselines_differ_in_one_switch():
    assert dataclasses.replace(model_spec("gunn15"), gradual=False) == model_spec("sunn15")
    assert dataclasses.replace(model_spec("gunn24"), gradual=False) == model_spec("sunn24")
    assert dataclasses.replace(model_spec("gunn18"), gradual=False) == model_spec("sunn18")
    assert dataclasses.replace(model_spec("gunn15"), residual=False) == model_spec("gunn15_nores")


def test_a_spec_can_be_registered(own_registry):
    register_model("my_gunn_7", CIFAR)
    assert "my_gunn_7" in list_models("my_*")
    assert isinstance(create_model("my_gunn_7"), GunnNet)
    with pytest.raises(ValueError, match=r"'my_gunn_7' is registered already, as Spec\(stem=4, .*choose another name"):
        register_model("my_gunn_7", IMAGENET)
    assert model_spec("my_gunn_7") is CIFAR


@pytest.mark.parametrize("name", ["", "GUNN", "gunn-15", "gunn15.c10", "15gunn", "gunn15\n", None])
def test_names_have_one_form(own_registry, name):
    with pytest.raises(ValueError, match="is not a valid name; use lower-case letters, digits and underscores"):
        register_model(name, CIFAR)


def test_only_specs_can_be_registered(own_registry):
    with pytest.raises(TypeError, match="the spec of 'my_gunn', a dict, has no num_classes, input_size, build"):
        register_model("my_gunn", {"stem": 4})
    assert "my_gunn" not in list_models()


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("gun15", "Did you mean gunn15 or "),
        ("GUNN-15", "Did you mean gunn15 or "),
        ("gunn_18_wide", "Did you mean .*gunn18"),
        ("xyz", r"Unknown model 'xyz'\. list_models\(\)"),
    ],
)
def test_unknown_names_get_the_nearest(name, hint):
    with pytest.raises(ValueError, match=rf"Unknown model '{name}'.*list_models\(\) names all \d+\.") as error:
        create_model(name)
    with pytest.raises(ValueError, match=hint):
        raise error.value


def test_unknown_options_are_named():
    message = r"'gunn15' has no option 'momentun'; its options are recompute, eps, momentum\. Did you mean 'momentum'\?"
    with pytest.raises(TypeError, match=message):
        create_model("gunn15", device="meta", momentun=0.1)
    with pytest.raises(TypeError, match="has no option 'pretrained'"):
        create_model("gunn15", device="meta", pretrained=True)


def test_options_reach_every_layer():
    model = create_model("gunn15", device="meta", recompute=False, eps=1e-3, momentum=None)
    for module in model.modules():
        if isinstance(module, (GunnLayer, nn.BatchNorm2d)):
            assert (module.eps, module.momentum) == (1e-3, None)
        if isinstance(module, GunnLayer):
            assert not module.recompute
    with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\]"):
        create_model("gunn15", device="meta", momentum=2.0)


# -------------------------------------------------------------------------------------------------------------- specs


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"segments": (2,)}, r"one entry for each stage, got channels=\(4, 6\) and segments=\(2,\)"),
        ({"channels": (), "segments": ()}, "one entry for each stage"),
        ({"layout": "svhn"}, "layout must be 'cifar' or 'imagenet', got 'svhn'"),
        ({"input_size": (3, 32, 32)}, r"input_size must be \(height, width\), got \(3, 32, 32\)"),
        ({"stem": 0}, "stem must be an integer of at least 1, got 0"),
        ({"num_classes": -1}, "num_classes must be an integer of at least 0, got -1"),
    ],
)
def test_specs_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CIFAR, **fields)


def test_sizes_that_do_not_divide_are_refused_by_the_layer():
    with pytest.raises(ValueError, match=r"channels \(6\) must be divisible by segments \(4\); nearest valid: 4 or 8"):
        GunnNet(dataclasses.replace(CIFAR, segments=(2, 4)))


# ----------------------------------------------------------------------------------------------------------- topology


def kinds(model: nn.Module) -> list[str]:
    return [type(module).__name__ for module in model.children()]


def test_modules_are_in_execution_order():
    transition = ["Conv2d", "BatchNorm2d", "ReLU"]

    model = create_model("gunn15", device="meta")
    assert [name for name, _ in model.named_children()] == ["stem", "stages", "final", "global_pool", "classifier"]
    assert kinds(model.stem) == transition
    assert [kinds(stage) for stage in model.stages] == [
        [*transition, "GunnLayer"],
        [*transition, "AvgPool2d", "GunnLayer"],
        [*transition, "AvgPool2d", "GunnLayer"],
    ]
    assert kinds(model.final) == transition
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.kernel_size[0]) for c in convolutions] == [
        (3, 64, 3),
        (64, 240, 1),
        (240, 300, 1),
        (300, 360, 1),
        (360, 360, 1),
    ]

    model = create_model("gunn18", device="meta")
    assert [name for name, _ in model.named_children()] == ["stem", "stages", "global_pool", "classifier"]
    assert kinds(model.stem) == transition
    assert [kinds(stage) for stage in model.stages] == [
        ["MaxPool2d", *transition, "GunnLayer"],
        *[["AvgPool2d", *transition, "GunnLayer"]] * 3,
    ]
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.kernel_size[0]) for c in convolutions] == [
        (3, 64, 7),
        (64, 400, 1),
        (400, 800, 1),
        (800, 1600, 1),
        (1600, 2000, 1),
    ]
    assert all(c.bias is None for c in convolutions)


def by_hand(model: GunnNet, x: Tensor) -> Tensor:
    """The network as the paper's tables print it, from the tensors of the state dict."""
    state = model.state_dict()

    def conv(x: Tensor, path: str, stride: int = 1) -> Tensor:
        weight = state[f"{path}.conv.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        mean, var = state[f"{path}.bn.running_mean"], state[f"{path}.bn.running_var"]
        return F.relu(F.batch_norm(x, mean, var, state[f"{path}.bn.weight"], state[f"{path}.bn.bias"]))

    layers = [stage.layer for stage in model.stages]
    if model.spec.layout == "cifar":
        x = conv(x, "stem")
        x = reference_layer(conv(x, "stages.0"), layers[0])
        for i in range(1, len(layers)):
            x = reference_layer(F.avg_pool2d(conv(x, f"stages.{i}"), 2), layers[i])
        x = conv(x, "final")
    else:
        x = F.max_pool2d(conv(x, "stem", stride=2), 3, stride=2, padding=1)
        x = reference_layer(conv(x, "stages.0"), layers[0])
        for i in range(1, len(layers)):
            x = reference_layer(conv(F.avg_pool2d(x, 2), f"stages.{i}"), layers[i])
    return F.linear(F.adaptive_avg_pool2d(x, 1).flatten(1), state["classifier.weight"], state["classifier.bias"])


@pytest.mark.parametrize("gradual", [True, False], ids=["gunn", "sunn"])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("size", [(48, 48), (45, 51)], ids=str)
def test_the_network_is_the_printed_one(spec, gradual, size):
    model = net(dataclasses.replace(spec, gradual=gradual), in_chans=2).eval()
    x = torch.randn(2, 2, *size, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), by_hand(model, x))


def test_the_switches_change_the_result_and_not_the_state_dict():
    model = net(CIFAR).eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        for switch in ("gradual", "residual"):
            other = net(dataclasses.replace(CIFAR, **{switch: False})).eval()
            other.load_state_dict(model.state_dict())
            assert not torch.allclose(model(x), other(x))


def test_initialisation():
    model = create_model("gunn15")
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            std = math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels))
            assert module.weight.std().item() == pytest.approx(std, rel=0.1), name
            assert abs(module.weight.mean().item()) < 0.1 * std, name
        elif isinstance(module, nn.BatchNorm2d):
            assert module.weight.eq(1).all(), name
            assert module.bias.eq(0).all(), name
    reduce = model.stages[0].layer.units[0].reduce.weight  # 2 * 12 output channels a segment
    assert reduce.std().item() == pytest.approx(math.sqrt(2 / 24), rel=0.02)
    assert model.classifier.bias.eq(0).all()
    assert model.classifier.weight.std().item() == pytest.approx(1 / math.sqrt(3 * 360), rel=0.1)


# ----------------------------------------------------------------------------------------------------------- protocol


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gunn15", [(64, 1, "stem.act"), (240, 1, "stages.0"), (300, 2, "stages.1"), (360, 4, "stages.2")]),
        (
            "gunn18",
            [
                (64, 2, "stem.act"),
                (400, 4, "stages.0"),
                (800, 8, "stages.1"),
                (1600, 16, "stages.2"),
                (2000, 32, "stages.3"),
            ],
        ),
    ],
)
def test_feature_info(name, expected):
    model = create_model(name, device="meta")
    assert [(tap["num_chs"], tap["reduction"], tap["module"]) for tap in model.feature_info] == expected
    assert model.num_features == expected[-1][0]


@pytest.mark.parametrize("spec", SPECS)
def test_features_are_the_outputs_of_the_modules_named(spec):
    model = net(spec).eval()
    x = torch.randn(2, 3, 64, 32, dtype=torch.float64)
    seen: dict[str, Tensor] = {}
    for tap in model.feature_info:
        path = tap["module"]
        model.get_submodule(path).register_forward_hook(lambda m, a, out, path=path: seen.update({path: out.clone()}))
    with torch.no_grad():
        maps = model.features(x)
    assert len(maps) == len(spec.channels)
    for tap, tensor in zip(model.feature_info, [seen["stem.act"], *maps], strict=True):
        assert tensor.shape == (2, tap["num_chs"], 64 // tap["reduction"], 32 // tap["reduction"])
        assert torch.equal(tensor, seen[tap["module"]])  # not written into by what came after


@pytest.mark.parametrize("spec", SPECS)
def test_forward_is_features_then_head(spec):
    model = net(spec).eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        features, logits = model.forward_features(x), model(x)
        pooled = model.forward_head(features, pre_logits=True)
        assert features.shape == (2, model.num_features, *[32 // model.feature_info[-1]["reduction"]] * 2)
        assert torch.equal(pooled, features.mean((2, 3)))
        assert torch.equal(logits, model.get_classifier()(pooled))
        assert torch.equal(logits, model.forward_head(features))
        model.reset_classifier(0)
        assert torch.equal(model(x), pooled)


def test_reset_classifier_keeps_device_and_dtype():
    model = GunnNet(CIFAR, device="meta", dtype=torch.bfloat16).eval()
    for classes in (7, 0, 3):  # from identity as well
        model.reset_classifier(classes)
        assert model.num_classes == classes
        assert not model.get_classifier().training
    head = model.get_classifier()
    assert isinstance(head, nn.Linear)
    assert (head.weight.shape, head.weight.dtype, head.weight.device.type) == ((3, 6), torch.bfloat16, "meta")
    assert head.bias.dtype == torch.bfloat16

    model = GunnNet(CIFAR)
    model.reset_classifier(4)
    assert model.get_classifier().bias.eq(0).all()
    model.classifier.double()
    model.reset_classifier(2)
    assert model.get_classifier().weight.dtype == torch.float64


def test_no_classifier():
    model = GunnNet(CIFAR, num_classes=0).eval()
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 6)


def test_everything_has_the_dtype_asked_for():
    model = GunnNet(CIFAR, dtype=torch.float64)
    assert {t.dtype for n, t in model.state_dict().items() if "num_batches" not in n} == {torch.float64}


def test_copies_and_state_dicts_round_trip():
    model = net(CIFAR).eval()
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    other = net(CIFAR).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(x), other(x))
        assert torch.equal(model(x), copy.deepcopy(model)(x))


def test_symbolic_traces_agree():
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module: nn.Module, path: str) -> bool:
            return isinstance(module, GunnLayer) or super().is_leaf_module(module, path)

    model = net(CIFAR).eval()
    traced = torch.fx.GraphModule(model, Tracer().trace(model))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(traced(x), model(x))
    with pytest.raises(ValueError, match="expected 3 input channels, got 1"):
        traced(x[:, :1])


# ------------------------------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize("value", [-1, 2.0, True, "10"])
def test_counts_are_checked(value):
    with pytest.raises(ValueError, match=rf"num_classes must be an integer of at least 0 .*, got {value!r}"):
        GunnNet(CIFAR, num_classes=value)
    with pytest.raises(ValueError, match=rf"in_chans must be an integer of at least 1, got {value!r}"):
        GunnNet(CIFAR, in_chans=value)
    model = GunnNet(CIFAR)
    with pytest.raises(ValueError, match="num_classes"):
        model.reset_classifier(value)
    assert model.num_classes == model.get_classifier().out_features == 5


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 32, 32), r"expected a 4-D input \(B, 3, H, W\), got shape \(3, 32, 32\)"),
        ((2, 1, 32, 32), r"expected 3 input channels, got 1 \(input shape \(2, 1, 32, 32\)\); .*in_chans=1"),
        ((0, 3, 32, 32), r"an empty batch \(input shape \(0, 3, 32, 32\)\) has no batch statistics to train on"),
    ],
)
def test_wrong_inputs_are_refused(shape, message):
    model = GunnNet(CIFAR)
    for method in (model, model.features, model.forward_features):
        with pytest.raises(ValueError, match=message):
            method(torch.zeros(shape))


def test_integer_images_are_refused():
    with pytest.raises(TypeError, match=r"expected a floating-point input, got torch\.uint8"):
        GunnNet(CIFAR)(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))


@pytest.mark.parametrize(("name", "smallest"), [("gunn15", 4), ("gunn_tiny", 4), ("gunn18", 29)])
def test_the_smallest_size_of_the_models(name, smallest):
    assert create_model(name, device="meta").smallest_size == smallest


@pytest.mark.parametrize(("spec", "smallest"), [(CIFAR, 2), (IMAGENET, 13)], ids=["cifar", "imagenet"])
def test_the_smallest_size_works_and_less_is_refused(spec, smallest):
    model = GunnNet(spec).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, smallest, smallest)).shape == (1, 5)
        assert model.features(torch.randn(1, 3, smallest, smallest))[-1].shape[2:] == (1, 1)
        message = rf"an input of {smallest + 5}x{smallest - 1} is too small .* smallest that works is {smallest}x"
        with pytest.raises(ValueError, match=message):
            model(torch.randn(1, 3, smallest + 5, smallest - 1))


@pytest.mark.parametrize("spec", SPECS)
def test_an_empty_batch_evaluates_to_an_empty_result(spec):
    with torch.no_grad():
        assert GunnNet(spec).eval()(torch.zeros(0, 3, 32, 32)).shape == (0, 5)


def test_one_value_per_channel_in_training_is_refused():
    with pytest.raises(ValueError, match="more than 1 value per channel when training"):
        GunnNet(CIFAR)(torch.randn(1, 3, 2, 2))


# ----------------------------------------------------------------------------------------------------------- real runs


def test_gunn_tiny_trains_on_grey_digits():
    model = create_model("gunn_tiny", in_chans=1)
    x, target = torch.randn(8, 1, 16, 16), torch.randint(10, (8,))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = model(x)
    F.cross_entropy(logits, target).backward()
    assert logits.shape == (8, 10)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.norm() > 0, name
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            assert tensor == before[name] + 1, name  # once, whatever the backward recomputes
        elif "running" in name:
            assert not torch.equal(tensor, before[name]), name


def test_gunn15_classifies_cifar_images():
    model = create_model("gunn15", num_classes=100).eval()
    with torch.no_grad():
        logits = model(torch.randn(1, 3, 32, 32))
    assert logits.shape == (1, 100)
    assert logits.isfinite().all()
