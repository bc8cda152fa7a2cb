"""The training step with small doubles: a batch in parts and whole, clipping, skipped steps, averages, no waiting."""

import copy
import json
import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gunn_ext.bench import training as bench
from gunn_ext.cli import main
from gunn_ext.training import Config, ConfigError, FakeConfig, OptimizerConfig
from gunn_ext.training import step as step_module
from gunn_ext.training.optimization import make_optimizer
from gunn_ext.training.step import TrainingStep

CPU = torch.device("cpu")
PLAIN = OptimizerConfig(momentum=0.0, nesterov=False, weight_decay=0.0)


def net(dtype=torch.float32):
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).to(dtype)


def batch(count=6, dtype=torch.float32):
    torch.manual_seed(4)
    return torch.randn(count, 1, 2, 2, dtype=dtype), torch.randint(3, (count,))


def make(model=None, **settings):
    return TrainingStep(model or net(), Config(**{"optimizer": PLAIN, "batch_size": 6, **settings}), CPU)


class NoWaiting(TorchDispatchMode):
    """Fails where a value is read off the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(function), "a value was read off the device"
        return function(*args, **(kwargs or {}))


# optimisers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "rmsprop"])
def test_two_steps_follow_the_formula_of_the_optimiser(name):
    config = OptimizerConfig(name=name, momentum=0.9, nesterov=True, weight_decay=0.1, betas=(0.8, 0.9), alpha=0.7)
    p = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = make_optimizer([p], config, 0.05)
    w, m, v = p.detach().clone(), torch.zeros(2), torch.zeros(2)
    for t, g in enumerate((torch.tensor([0.3, -0.5]).double(), torch.tensor([-0.2, 0.4]).double()), 1):
        p.grad = g.clone()
        optimizer.step()
        decayed = g if name == "adamw" else g + 0.1 * w
        if name == "sgd":
            m = 0.9 * m + decayed
            w = w - 0.05 * (decayed + 0.9 * m)
        elif name == "rmsprop":
            v = 0.7 * v + 0.3 * decayed**2
            w = w - 0.05 * decayed / (v.sqrt() + 1e-8)
        else:
            w = w * (1 - 0.05 * 0.1) if name == "adamw" else w
            m, v = 0.8 * m + 0.2 * decayed, 0.9 * v + 0.1 * decayed**2
            w = w - 0.05 * (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-8)
        torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"name": "adamm"},
            "optimizer.name must be one of sgd, adam, adamw, rmsprop, got 'adamm'.",
        ),
        ({"betas": (0.9,)}, "optimizer.betas must be two numbers, got [0.9]."),
        ({"betas": (0.9, 1.0)}, "optimizer.betas must be a finite number at least 0 and below 1, got 1.0."),
        ({"eps": 0.0}, "optimizer.eps must be a finite number above 0"),
    ],
)
def test_impossible_optimisers_are_refused_by_name(changes, message):
    with pytest.raises(ConfigError) as caught:
        OptimizerConfig(**changes)
    assert str(caught.value).startswith(message)


# gradients ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("parts", "count"), [(2, 6), (3, 6), (6, 6), (3, 5)])
def test_a_batch_in_parts_trains_as_the_whole_does(parts, count):
    whole, split = make(net(torch.float64)), make(net(torch.float64), accumulate=parts)
    for _ in range(3):
        found, expected = (step(*batch(count, torch.float64), rate=0.5) for step in (split, whole))
        torch.testing.assert_close(found[0], expected[0], rtol=1e-13, atol=0)
        assert found[1] == expected[1]
    assert (int(split.taken), int(whole.taken)) == (3, 3)
    for ours, theirs in zip(split.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


def test_parts_see_batch_statistics_of_their_own():
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(len(x))
            return x

    make(nn.Sequential(Spy(), *net()), accumulate=3)(*batch(), rate=0.1)
    assert seen == [2, 2, 2]


def test_a_step_descends_along_the_gradient_of_the_smoothed_loss():
    step, (x, y) = make(label_smoothing=0.2), batch()
    before = copy.deepcopy(step.model)
    logs = F.log_softmax(before(x), 1)
    expected = -(0.8 * logs.gather(1, y[:, None]).mean() + 0.2 * logs.mean())
    expected.backward()
    loss, right = step(x, y, rate=0.25)
    torch.testing.assert_close(loss, expected.detach())
    assert right == (before(x).argmax(1) == y).sum()
    for ours, old in zip(step.model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(ours.detach(), old.detach() - 0.25 * old.grad)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_gradients_are_clipped_by_their_norm_after_unscaling(precision):
    free, clipped = make(precision=precision), make(precision=precision, clip_norm=0.01)
    before = [p.detach().clone() for p in free.model.parameters()]
    for step in (free, clipped):
        step(*batch(), rate=1.0)
    moved = [torch.cat([(p.detach() - b).flatten() for p, b in zip(s.model.parameters(), before, strict=True)])
             for s in (free, clipped)]  # fmt: skip
    assert moved[0].norm() > 0.1
    torch.testing.assert_close(moved[1].norm(), torch.tensor(0.01), rtol=1e-3, atol=0)
    torch.testing.assert_close(F.cosine_similarity(moved[0], moved[1], 0), torch.tensor(1.0))


# float16 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "rmsprop"])
def test_an_overflow_skips_the_step_halves_the_scale_and_leaves_all_state(name):
    options = OptimizerConfig(name=name)
    step = make(precision="float16", optimizer=options, ema=0.9)
    x, y = batch()
    before = copy.deepcopy(step.model.state_dict())
    step(x * 1e30, y, rate=0.1)
    assert (int(step.taken), step.scaler.get_scale()) == (0, 32768.0)
    for state in (step.model.state_dict(), step.average.model.state_dict()):
        for key, value in state.items():
            assert torch.equal(value, before[key]), key
    step(x, y, rate=0.1)
    assert (int(step.taken), step.scaler.get_scale()) == (1, 32768.0)

    unbroken = make(precision="float16", optimizer=options)  # the skipped step left nothing behind
    unbroken.scaler.load_state_dict(step.scaler.state_dict())
    unbroken(x, y, rate=0.1)
    for ours, theirs in zip(step.model.parameters(), unbroken.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


class Counting:
    """A scaler that skips every second step."""

    def __init__(self):
        self.calls = []

    def scale(self, loss):
        self.calls.append("scale")
        return loss * 8

    def unscale_(self, optimizer):
        self.calls.append("unscale")
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad /= 8

    def step(self, optimizer):
        self.calls.append("step")
        if self.calls.count("step") % 2:
            optimizer.step()

    def update(self):
        self.calls.append("update")


def test_a_step_scales_every_part_and_unscales_steps_and_updates_once():
    step = make(accumulate=3, clip_norm=1e9)
    step.scaler = scaler = Counting()
    plain = make(accumulate=3)
    for _ in range(4):
        step(*batch(), rate=0.1)
    assert scaler.calls == ["scale", "scale", "scale", "unscale", "step", "update"] * 4
    assert int(step.taken) == 2
    for _ in range(2):
        plain(*batch(), rate=0.1)
    for ours, theirs in zip(step.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_autocast_computes_narrow_and_keeps_weights_and_loss_wide(precision):
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(x.dtype)
            return x

    step = make(nn.Sequential(*net(), Spy()), precision=precision)
    loss, _ = step(*batch(), rate=0.1)
    assert seen == [getattr(torch, precision)]
    assert loss.dtype == torch.float32
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in step.model.parameters())


@pytest.mark.parametrize(
    ("name", "precision"),
    [("sgd", "float32"), ("sgd", "bfloat16"), ("sgd", "float16"), ("adam", "float16"), ("adamw", "float16")],
)  # Adam in float32 reads its own count of steps, which lies on the host
def test_a_step_does_not_wait_for_the_device(name, precision):
    settings = {"ema": 0.9, "clip_norm": 1.0, "accumulate": 2, "label_smoothing": 0.1}
    step = make(precision=precision, optimizer=OptimizerConfig(name=name), **settings)
    x, y = batch()
    with NoWaiting():
        step(x, y, rate=0.1)
        step(x, y, rate=0.1)
    with pytest.raises(AssertionError, match="read off"), NoWaiting():
        x.sum().item()


# averages -----------------------------------------------------------------------------------------------------------


def test_the_average_follows_its_recurrence_in_weights_and_buffers():
    model = nn.Sequential(nn.BatchNorm2d(1), *net())
    step = make(model, ema=0.3)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for t in range(1, 5):
        step(*batch(), rate=0.2)
        decay = min(0.3, (1 + t) / (10 + t))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                expected[name] += (1 - decay) * (value - expected[name])
            else:
                expected[name] = value.clone()
    assert [min(0.3, (1 + t) / (10 + t)) for t in (1, 4)] == [2 / 11, 0.3]
    for name, value in step.average.model.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    assert not torch.equal(step.average.model[2].weight, model[2].weight)
    assert not step.average.model.training
    assert math.isclose(float(step.average.model[0].num_batches_tracked), 4)


def test_a_state_continues_bitwise_and_a_foreign_one_is_refused():
    settings = {"precision": "float16", "ema": 0.9, "optimizer": OptimizerConfig(name="adamw")}
    straight, first, second = (make(**settings) for _ in range(3))
    for step in (straight, straight, straight, first, first):
        step(*batch(), rate=0.1)
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second(*batch(), rate=0.1)
    assert second.state_dict()["steps_taken"] == 3
    assert second.scaler.state_dict() == straight.scaler.state_dict()
    for ours, theirs in ((second.model, straight.model), (second.average.model, straight.average.model)):
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value), name
    with pytest.raises((KeyError, ValueError)):
        make(optimizer=OptimizerConfig(name="adam")).load_state_dict({"optimizer_state": {}})


# the time of a step -------------------------------------------------------------------------------------------------


def test_bench_step_runs_the_phases_of_a_step_in_order_and_splits_its_time(monkeypatch, tmp_path, capsys):
    clock, done = iter([0.0] * 8 + [1.0, 2.0, 5.0, 2.0, 3.0, 4.0, 7.0, 6.0]), []

    def timed(work):
        done.append(work.__name__)
        work()
        return next(clock)

    monkeypatch.setattr(bench, "clock_for", lambda device: timed)
    arguments = ["--data=fake", "--fake.shape=[3,8,8]", "--fake.train_images=8", "--batch-size=4", "--device=cpu",
                 "--precision=bfloat16", "--repeats=2", f"--json={tmp_path}/r.json"]  # fmt: skip
    assert main(["bench", "step", *arguments]) == 0
    assert done == ["_load", "_forward", "_backward", "_update"] * 4
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [(row["peer"], row["ms"]) for row in rows] == [
        ("data", 2.0), ("forward", 3.0), ("backward", 6.0), ("optimizer", 4.0), ("step", 15.0)]  # fmt: skip
    assert [row["share_of_step"] for row in rows] == pytest.approx([4 / 30, 6 / 30, 12 / 30, 8 / 30, 1], rel=1e-4)
    assert {(row["layer"], row["batch"], row["dtype"]) for row in rows} == {("gunn_tiny", 4, "bfloat16")}
    assert "backward       6.000 ms" in capsys.readouterr().out


def test_the_phases_make_the_step_of_a_run():
    config = Config(data="fake", fake=FakeConfig(shape=(3, 8, 8), train_images=8), batch_size=4, device="cpu")
    split = bench.SplitStep(config)
    split.step.update = lambda rate: TrainingStep.update(split.step, 0.1)
    whole = copy.deepcopy(split.step.model)
    for work in split.phases().values():
        work()
    TrainingStep(whole, config, CPU)(split.inputs, split.labels, rate=0.1)
    assert int(split.step.taken) == 1
    for ours, theirs in zip(split.step.model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


# CUDA graphs, the graph itself feigned ------------------------------------------------------------------------------


class Feigned:
    """Stands for `Replay`: warms up, and replays by doing the work again, into the tensors of the capture."""

    def __init__(self, work):
        for _ in range(3):
            work()
        self.work, self.outputs = work, work()

    def __call__(self):
        for output, value in zip(self.outputs, self.work(), strict=True):
            output.copy_(value)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_replayed_step_reads_every_batch_and_warming_up_leaves_no_trace(monkeypatch, precision):
    monkeypatch.setattr(step_module, "Replay", Feigned)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())
    models = [nn.Sequential(nn.BatchNorm2d(1), *net()) for _ in range(2)]
    graphed, plain = (make(m, precision=precision, cuda_graph=g) for m, g in zip(models, (True, False), strict=True))
    for count in range(3):
        x, y = batch()
        outputs = [step(x + count, y, rate=0.1) for step in (graphed, plain)]
        assert torch.equal(outputs[0][0], outputs[1][0])
        assert outputs[0][1] == outputs[1][1]
    for name, value in models[1].state_dict().items():
        assert torch.equal(models[0].state_dict()[name], value), name
    assert int(graphed.taken) == 3
