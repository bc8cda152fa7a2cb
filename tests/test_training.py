"""The training engine: settings as numbers, resuming bit by bit, interruption, divergence, evaluation."""

import io
import json
import math
import os
import re
import signal

import pytest
import torch
import yaml
from rich.console import Console
from torch import nn

from gunn_ext import GunnLayer
from gunn_ext.data import ImageDataset, Split
from gunn_ext.training import (
    AugmentConfig,
    CheckpointError,
    Config,
    ConfigError,
    DigitsConfig,
    DivergenceError,
    FakeConfig,
    LineReporter,
    OptimizerConfig,
    RunDirectoryError,
    ScheduleConfig,
    SilentReporter,
    TrainingInterrupted,
    evaluate,
    evaluate_run,
    load_checkpoint,
    load_config,
    save_config,
    train,
)
from gunn_ext.training.data_config import DATASETS
from gunn_ext.training.progress import BarReporter, clock, epoch_line


def small_net(classes=4, channels=2):
    """A network of a gradual layer, dropout and little else; the same weights at every call."""
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1, bias=False),
        GunnLayer(8, 4, shortcut=True),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, classes),
    )


def small_config(output, **changes):
    fake = FakeConfig(shape=(2, 6, 6), classes=4, train_images=50, test_images=21)
    augment = AugmentConfig(mirror=True, crop_padding=1, cyclic_shift=True)
    values = {"data": "fake", "fake": fake, "augment": augment, "output": str(output), "device": "cpu"}
    return Config(**{**values, "epochs": 4, "batch_size": 16, "eval_batch_size": 8, **changes})


def read_metrics(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def repeatable(record):
    """A record without what depends on the clock."""
    return {name: value for name, value in record.items() if name not in ("seconds", "images_per_second")}


def assert_same(ours, theirs, path=""):
    """Bitwise equality of nested dicts, lists and tensors."""
    assert type(ours) is type(theirs), path
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), path
        for key in ours:
            assert_same(ours[key], theirs[key], f"{path}.{key}")
    elif isinstance(ours, list):
        assert len(ours) == len(theirs), path
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, f"{path}[{i}]")
    elif isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype, path
        assert torch.equal(ours, theirs), path
    else:
        assert ours == theirs, path


class SignalAt(SilentReporter):
    """Sends a signal to the process at one step of one epoch."""

    def __init__(self, number, epoch, step):
        self.number, self.at = number, (epoch, step)
        self.steps_after = 0

    def step(self, epoch, step, images_per_second):
        if (epoch, step) == self.at:
            os.kill(os.getpid(), self.number)
        elif (epoch, step) > self.at:
            self.steps_after += 1


# settings -----------------------------------------------------------------------------------------------------------


def test_a_configuration_survives_yaml(tmp_path):
    config = small_config(tmp_path / "run", lr=1e-5, schedule=ScheduleConfig(drops=(0.25,), factor=0.2))
    save_config(config, tmp_path / "c.yaml")
    assert load_config(tmp_path / "c.yaml") == config
    assert Config.from_dict(config.to_dict()) == config
    assert yaml.safe_load((tmp_path / "c.yaml").read_text())["fake"]["shape"] == [2, 6, 6]


def test_a_file_need_name_only_what_differs_and_may_write_numbers_shortly(tmp_path):
    (tmp_path / "c.yaml").write_text("lr: 1e-3\noptimizer:\n  momentum: 0.5\n")
    assert load_config(tmp_path / "c.yaml") == Config(lr=0.001, optimizer=OptimizerConfig(momentum=0.5))
    (tmp_path / "c.yaml").write_text("")
    assert load_config(tmp_path / "c.yaml") == Config()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lrr: 0.1", "unknown setting 'lrr'. Did you mean 'lr'?"),
        ("optimizer: {momentun: 0.1}", "unknown setting 'optimizer.momentun'. Did you mean 'optimizer.momentum'?"),
        ("momentum: 0.1", "unknown setting 'momentum'. Did you mean 'optimizer.momentum'?"),
        ("zzzzzz: 1", "unknown setting 'zzzzzz'. Known settings: model, data, data_path, epochs"),
        ("optimizer: 3", "optimizer must be a mapping of settings to values, got 3."),
        ("[1, 2]", "expected a mapping of settings to values, got [1, 2]."),
        ("lr: fast", "lr must be a number, got 'fast'."),
        ("lr: .nan", "lr must be a finite number above 0, got nan."),
        ("lr: -.inf", "lr must be a finite number above 0, got -inf."),
        ("a: [", "not YAML: "),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no\.yaml: cannot be read \(No such file or directory\)"):
        load_config(tmp_path / "no.yaml")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Config(epochs=0), "epochs must be at least 1, got 0."),
        (lambda: Config(epochs=2.0), "epochs must be an integer, got 2.0."),
        (lambda: Config(batch_size=True), "batch_size must be an integer, got True."),
        (lambda: Config(lr=math.inf), "lr must be a finite number above 0, got inf."),
        (lambda: Config(lr=0), "lr must be a finite number above 0, got 0."),
        (lambda: Config(seed=-1), "seed must be from 0 to 4294967295, got -1."),
        (
            lambda: Config(data="digit"),
            f"data must be one of {', '.join(DATASETS)}, got 'digit'. Did you mean 'digits'?",
        ),
        (lambda: Config(device="tpu"), "device must be auto, cpu, cuda or cuda:N, got 'tpu'."),
        (lambda: Config(model=""), "model must be a text, got ''."),
        (lambda: Config(optimizer={}), "optimizer must be a OptimizerConfig, got {}."),
        (
            lambda: OptimizerConfig(momentum=math.nan),
            "optimizer.momentum must be a finite number at least 0 and below 1, got nan.",
        ),
        (lambda: OptimizerConfig(momentum=0.0), "optimizer.nesterov needs a momentum above 0"),
        (lambda: OptimizerConfig(nesterov=1), "optimizer.nesterov must be true or false, got 1."),
        (lambda: OptimizerConfig(weight_decay=-1.0), "optimizer.weight_decay must be a finite number at least 0"),
        (lambda: ScheduleConfig(drops=(0.5, 0.5)), "schedule.drops must rise, got [0.5, 0.5]."),
        (lambda: ScheduleConfig(drops=(0.5, 2.0)), "schedule.drops must be a finite number above 0 and at most 1"),
        (lambda: ScheduleConfig(drops=0.5), "schedule.drops must be a list, got 0.5."),
        (lambda: FakeConfig(shape=(3, 4)), "fake.shape must be (channels, height, width), got [3, 4]."),
        (lambda: AugmentConfig(mirror="yes"), "augment.mirror must be true or false, got 'yes'."),
        (
            lambda: Config(augment=AugmentConfig(crop_padding=9), digits=DigitsConfig(image_size=8)),
            "augment.crop_padding (9) must not exceed the image size (8)",
        ),
    ],
)
def test_impossible_settings_are_refused_by_name(make, message):
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value).startswith(message)


def test_resolving_fills_what_depends_on_the_data():
    digits, fake = Config().resolved(), Config(data="fake", seed=3).resolved()
    assert digits.augment == AugmentConfig(mirror=False, crop_padding=1)
    assert fake.augment == AugmentConfig(mirror=True, crop_padding=4)
    assert (digits.output, fake.output) == ("runs/gunn_tiny-digits-seed0", "runs/gunn_tiny-fake-seed3")
    assert digits.resolved() == digits
    assert Config(augment=AugmentConfig(mirror=True, crop_padding=0)).resolved().augment.crop_padding == 0


# a whole run --------------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_files_and_returns_what_they_say(tmp_path):
    output = tmp_path / "a" / "run"
    config = small_config(output)
    result = train(config, model=small_net())

    assert sorted(os.listdir(output)) == ["best.pt", "config.yaml", "last.pt", "metrics.jsonl", "summary.json"]
    assert load_config(output / "config.yaml") == config.resolved()
    records = read_metrics(output)
    assert [record["epoch"] for record in records] == [0, 1, 2, 3]
    assert [record["lr"] for record in records] == pytest.approx([0.1, 0.01, 0.001, 0.001])

    summary = json.loads((output / "summary.json").read_text())
    assert summary == vars(result)
    accuracies = [record["test_accuracy"] for record in records]
    assert summary["test_accuracy"] == accuracies[-1]
    assert (summary["best_accuracy"], summary["best_epoch"]) == (max(accuracies), accuracies.index(max(accuracies)))
    assert (summary["epochs"], summary["seed"], summary["model"], summary["data"]) == (4, 0, "gunn_tiny", "fake")
    assert summary["parameters"] == sum(p.numel() for p in small_net().parameters())
    assert summary["train_seconds"] == pytest.approx(sum(record["seconds"] for record in records))
    assert summary["images_per_second"] > 0
    assert summary["backend"].startswith("cpu")
    assert summary["versions"]["torch"] == torch.__version__

    best = load_checkpoint(output / "best.pt")
    assert best["epoch"] == summary["best_epoch"] + 1
    assert best["best"]["accuracy"] == summary["best_accuracy"]


def test_the_summary_accuracy_is_that_of_the_last_checkpoint(tmp_path):
    config = small_config(tmp_path / "run")
    model = small_net()
    result = train(config, model=model)
    from gunn_ext.training import load_data

    data = load_data(config, "cpu")
    again = evaluate(model, data.evaluation_batches(data.test, 256))
    assert again.accuracy == result.test_accuracy
    assert result.test_count == again.count == 21


def test_training_repeats_bit_by_bit_but_not_across_seeds(tmp_path):
    states = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(small_config(tmp_path / name, seed=seed), model=small_net())
        states.append(load_checkpoint(tmp_path / name / "last.pt")["model_state"])
    assert_same(states[0], states[1])
    assert not torch.equal(states[0]["6.weight"], states[2]["6.weight"])


def test_training_learns(tmp_path):
    config = Config(epochs=3, digits=DigitsConfig(image_size=8), output=str(tmp_path / "run"), device="cpu")
    result = train(config, model=small_net(classes=10, channels=1))
    losses = [record["train_loss"] for record in read_metrics(tmp_path / "run")]
    assert losses[2] < losses[1] < losses[0] < math.log(10)
    assert result.test_accuracy > 0.3


def test_training_restores_the_global_random_state(tmp_path):
    model = small_net()
    torch.manual_seed(77)
    before = torch.get_rng_state()
    train(small_config(tmp_path / "run", epochs=1), model=model)
    assert torch.equal(before, torch.get_rng_state())


def test_a_registered_model_is_built_for_the_data(tmp_path):
    fake = FakeConfig(shape=(2, 8, 8), classes=3, train_images=8, test_images=4)
    config = Config(data="fake", fake=fake, epochs=1, batch_size=8, output=str(tmp_path / "run"), device="cpu")
    result = train(config)
    assert result.model == "gunn_tiny"
    state = load_checkpoint(tmp_path / "run" / "last.pt")
    assert state["model"] == {"name": "gunn_tiny", "num_classes": 3, "in_chans": 2}
    evaluation = evaluate_run(tmp_path / "run")
    assert (evaluation.count, evaluation.accuracy) == (4, result.test_accuracy)
    assert evaluation.loss == pytest.approx(result.test_loss, rel=1e-6)


def test_a_run_without_test_images_has_no_accuracy(tmp_path):
    fake = FakeConfig(shape=(2, 6, 6), classes=4, train_images=16, test_images=0)
    result = train(small_config(tmp_path / "run", epochs=2, fake=fake), model=small_net())
    assert (result.test_accuracy, result.best_accuracy, result.test_count) == (None, None, 0)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["test_accuracy"] is None
    assert load_checkpoint(tmp_path / "run" / "best.pt")["epoch"] == 2


# resuming -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "epoch", "step"), [(signal.SIGINT, 2, 1), (signal.SIGTERM, 0, 2)])
def test_an_interrupted_and_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, number, epoch, step):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    train(small_config(straight), model=small_net())

    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    reporter = SignalAt(number, epoch, step)
    with pytest.raises(TrainingInterrupted) as caught:
        train(small_config(broken), model=small_net(), reporter=reporter)
    assert caught.value.signal_number == number
    assert str(caught.value) == (
        f"interrupted; {broken}/last.pt holds the state after {epoch} of 4 epochs. Continue with: gunn train --resume "
        f"--output {broken}"
    )
    assert reporter.steps_after == 0
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert load_checkpoint(broken / "last.pt")["epoch"] == epoch
    assert not (broken / "summary.json").exists()

    torch.manual_seed(123)  # whatever the new process's random state is
    result = train(small_config(broken), resume=True, model=small_net())
    ours, theirs = load_checkpoint(broken / "last.pt"), load_checkpoint(straight / "last.pt")
    for part in ("model_state", "optimizer_state", "epoch", "best"):
        assert_same(ours[part], theirs[part], part)
    assert_same(
        load_checkpoint(broken / "best.pt")["model_state"], load_checkpoint(straight / "best.pt")["model_state"]
    )
    assert list(map(repeatable, read_metrics(broken))) == list(map(repeatable, read_metrics(straight)))
    summary = json.loads((straight / "summary.json").read_text())
    assert (result.test_accuracy, result.best_epoch) == (summary["test_accuracy"], summary["best_epoch"])


def test_a_crash_between_metrics_and_checkpoint_duplicates_nothing(tmp_path):
    output = tmp_path / "run"
    with pytest.raises(TrainingInterrupted):
        train(small_config(output), model=small_net(), reporter=SignalAt(signal.SIGINT, 2, 1))
    with (output / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "lr": 0.5}\n{"epoch": 3, "tra')
    train(small_config(output), resume=True, model=small_net())
    records = read_metrics(output)
    assert [record["epoch"] for record in records] == [0, 1, 2, 3]
    assert records[2]["lr"] == pytest.approx(0.001)


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    output = tmp_path / "run"
    first = train(small_config(output), model=small_net())
    files = {name: (output / name).read_bytes() for name in os.listdir(output)}
    assert train(small_config(output), resume=True, model=small_net()) == first
    assert {name: (output / name).read_bytes() for name in os.listdir(output)} == files


def test_a_second_signal_breaks_off_at_once_and_loses_no_epoch(tmp_path):
    class Impatient(SignalAt):
        def step(self, epoch, step, images_per_second):
            if (epoch, step) == self.at:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught:
        train(small_config(tmp_path / "run"), model=small_net(), reporter=Impatient(0, 1, 1))
    assert not isinstance(caught.value, TrainingInterrupted)
    assert load_checkpoint(tmp_path / "run" / "last.pt")["epoch"] == 1


# directories --------------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(tmp_path):
    """A finished run of two epochs and the bytes of its files."""
    output = tmp_path / "run"
    train(small_config(output, epochs=2), model=small_net())
    return output, {name: (output / name).read_bytes() for name in os.listdir(output)}


def assert_untouched(finished):
    output, files = finished
    assert {name: (output / name).read_bytes() for name in os.listdir(output)} == files


def test_a_taken_directory_is_not_overwritten(finished):
    output, _ = finished
    with pytest.raises(RunDirectoryError) as caught:
        train(small_config(output, epochs=2), model=small_net())
    assert str(caught.value) == (
        f"{output} holds a run already (model gunn_tiny, data fake, 2 of 2 epochs). Continue it with --resume, or "
        "choose another directory with --output."
    )
    assert_untouched(finished)


def test_a_run_with_other_settings_is_not_resumed(finished):
    output, _ = finished
    config = small_config(output, epochs=2, model="gunn15", optimizer=OptimizerConfig(momentum=0.5))
    with pytest.raises(RunDirectoryError) as caught:
        train(config, resume=True, model=small_net())
    text = str(caught.value)
    assert "model 'gunn_tiny' there, 'gunn15' now, optimizer.momentum 0.9 there, 0.5 now" in text
    assert "start a new run in another --output" in text
    assert_untouched(finished)


def test_other_weights_under_the_same_settings_are_not_resumed(finished):
    output, _ = finished
    wider = nn.Sequential(nn.Conv2d(2, 9, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 4))
    with pytest.raises(CheckpointError, match="weights of another model"):
        train(small_config(output, epochs=2), resume=True, model=wider)
    assert_untouched(finished)


def test_there_is_nothing_to_resume_in_an_empty_place(tmp_path):
    with pytest.raises(RunDirectoryError, match=r"none holds no run \(no config.yaml\)"):
        train(small_config(tmp_path / "none"), resume=True, model=small_net())
    assert os.listdir(tmp_path) == []


def test_a_directory_or_file_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(RunDirectoryError, match="full is not empty and holds no run"):
        train(small_config(tmp_path / "full"), model=small_net())
    with pytest.raises(RunDirectoryError, match="notes.txt is a file"):
        train(small_config(tmp_path / "full" / "notes.txt"), model=small_net())
    assert os.listdir(tmp_path / "full") == ["notes.txt"]


def test_a_damaged_checkpoint_is_not_resumed_and_the_best_one_takes_over(finished):
    output, _ = finished
    (output / "last.pt").write_bytes((output / "last.pt").read_bytes()[:700])
    with pytest.raises(CheckpointError, match=r"last.pt: damaged .*best.pt exists: to go on from it, copy it over"):
        train(small_config(output, epochs=2), resume=True, model=small_net())
    (output / "last.pt").write_bytes((output / "best.pt").read_bytes())
    result = train(small_config(output, epochs=2), resume=True, model=small_net())
    assert result.epochs == 2
    assert [record["epoch"] for record in read_metrics(output)] == [0, 1]


@pytest.mark.parametrize(
    ("changes", "model", "message"),
    [
        ({"model": "gun_tiny"}, None, "Did you mean gunn_tiny"),
        ({"model": "gunn18"}, None, "too small for the poolings"),
        ({"device": "cuda:99"}, None, "device 'cuda:99' is not there"),
        ({}, small_net(classes=7), r"to shape \(1, 7\), expected \(1, 4\); build it with num_classes=4"),
    ],
    ids=["unknown model", "images too small", "no such device", "other classes"],
)
def test_what_cannot_work_fails_before_a_directory_is_made(tmp_path, changes, model, message):
    with pytest.raises(ValueError, match=message):
        train(small_config(tmp_path / "run", **changes), model=model)
    assert os.listdir(tmp_path) == []


# divergence ---------------------------------------------------------------------------------------------------------


class Poisoned(SilentReporter):
    """Makes a weight infinite after one step."""

    def __init__(self, model, epoch, step):
        self.model, self.at = model, (epoch, step)

    def step(self, epoch, step, images_per_second):
        if (epoch, step) == self.at:
            with torch.no_grad():
                self.model[-1].weight.fill_(math.inf)


@pytest.mark.parametrize(("step", "name"), [(1, "training loss in epoch 3"), (3, "test loss after epoch 3")])
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_checkpoint(tmp_path, step, name):
    output, model = tmp_path / "run", small_net()
    with pytest.raises(DivergenceError) as caught:
        train(small_config(output), model=model, reporter=Poisoned(model, 2, step))
    text = str(caught.value)
    assert text.startswith(f"the {name} is nan, at learning rate 0.001; training has diverged.")
    assert "lower lr (was 0.1)" in text
    assert f"{output}/last.pt holds the state after 2 of 4 epochs" in text
    state = load_checkpoint(output / "last.pt")
    assert state["epoch"] == 2
    assert all(torch.isfinite(tensor).all() for tensor in state["model_state"].values())


# evaluation ---------------------------------------------------------------------------------------------------------


class Threshold(nn.Module):
    """Logits that choose class 1 where an image's mean is above 0."""

    def forward(self, x):
        mean = x.mean((1, 2, 3))
        return torch.stack([torch.zeros_like(mean), mean], 1)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_every_image_is_counted_once_whatever_the_batch_size(batch_size):
    images = torch.tensor([0, 255, 255, 0, 255, 0, 255], dtype=torch.uint8).view(7, 1, 1, 1)
    labels = torch.tensor([0, 1, 1, 0, 0, 1, 1])
    split = Split(images, labels)
    data = ImageDataset("bits", split, split, 2, mean=(127.5,), std=(255.0,), mirror=True)
    result = evaluate(Threshold(), data.evaluation_batches(split, batch_size))
    assert (result.count, result.correct, result.accuracy) == (7, 5, 5 / 7)
    # Logits (0, ±0.5): the loss is log(1 + exp(-0.5)) for each right one and log(1 + exp(0.5)) for each wrong one ...
    right, wrong = math.log1p(math.exp(-0.5)), math.log1p(math.exp(0.5))
    assert result.loss == pytest.approx((5 * right + 2 * wrong) / 7, rel=1e-6)


def test_evaluating_nothing_counts_nothing():
    result = evaluate(Threshold(), [])
    assert (result.count, result.correct) == (0, 0)
    assert math.isnan(result.accuracy)
    assert math.isnan(result.loss)


def test_evaluation_restores_every_modules_mode_and_no_statistics_move():
    model = small_net().train()
    model[1].freeze_batch_norm()
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate(model, [(torch.rand(5, 2, 6, 6), torch.tensor([0, 1, 2, 3, 0]))])
    assert [module.training for module in model.modules()] == modes
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_evaluating_a_run_names_what_is_missing(tmp_path):
    with pytest.raises(RunDirectoryError, match="holds no run"):
        evaluate_run(tmp_path)
    save_config(small_config(tmp_path), tmp_path / "config.yaml")
    with pytest.raises(CheckpointError, match=r"best.pt: no such checkpoint"):
        evaluate_run(tmp_path, "best")
    with pytest.raises(ConfigError, match="checkpoint must be last or best, got 'first'"):
        evaluate_run(tmp_path, "first")


# reports ------------------------------------------------------------------------------------------------------------


def test_lines_tell_every_epoch(tmp_path, capsys):
    train(small_config(tmp_path / "run", epochs=2), model=small_net(), reporter=LineReporter())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("gunn_tiny (")
    assert "on fake (50 training, 21 test images of 2x6x6), 2 epochs, batch 16" in lines[0]
    assert [line.split("  ")[0] for line in lines[1:]] == ["epoch 1/2", "epoch 2/2"]
    assert lines[2].endswith("eta 0:00")


def test_the_bar_shows_epoch_steps_and_rate_and_leaves_a_line_an_epoch():
    screen = io.StringIO()
    bar = BarReporter(Console(file=screen, force_terminal=True, width=100))
    bar.start("a net on data", epochs=4, steps=10, first_epoch=1)
    bar.step(2, 5, 1234.0)
    bar.refresh()
    record = {"epoch": 1, "lr": 0.1, "train_loss": 1.0, "test_accuracy": 0.5, "images_per_second": 99.0}
    bar.epoch(record, 3.0)
    bar.close()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    assert text.startswith("a net on data, resumed after epoch 1\n")
    assert epoch_line(record, 4) in text
    assert all(part in text for part in ("epoch 3/4", "15/30", "1,234 img/s", "eta"))


def test_an_epoch_line_and_a_clock():
    record = {"epoch": 6, "lr": 0.01, "train_loss": 0.12345, "test_accuracy": 0.975, "images_per_second": 1234.4}
    assert epoch_line(record, 20) == "epoch  7/20  lr 0.01  loss 0.1235  test  97.50 %  1,234 img/s"
    assert "no test images" in epoch_line({**record, "test_accuracy": None}, 20)
    assert [clock(s) for s in (0, 59.6, 3599, 3661)] == ["0:00", "1:00", "59:59", "1:01:01"]
