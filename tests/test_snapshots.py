"""Snapshots at the ends of cycles, their ensemble by hand, and runs with every option resumed bit by bit."""

import json
import os
import signal

import pytest
import torch
from test_training import SignalAt, assert_same, read_metrics, repeatable, small_config, small_net
from torch import nn

from gunn_ext.cli import main
from gunn_ext.training import (
    CheckpointError,
    Config,
    ConfigError,
    Ensemble,
    FakeConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainingInterrupted,
    evaluate,
    evaluate_run,
    load_checkpoint,
    load_data,
    load_run,
    train,
)

FAKE = FakeConfig(shape=(1, 8, 8), classes=7, train_images=16, test_images=12)


def snapshot_config(output, **changes):
    values = {"data": "fake", "fake": FAKE, "batch_size": 8, "epochs": 4, "device": "cpu", "output": str(output)}
    return Config(**{**values, "schedule": ScheduleConfig(name="snapshot", cycles=2), **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two cycles of two epochs."""
    output = tmp_path_factory.mktemp("runs") / "run"
    train(snapshot_config(output))
    return output


def test_a_snapshot_is_written_at_the_end_of_each_cycle(finished):
    assert sorted(name for name in os.listdir(finished) if "snapshot" in name) == ["snapshot-001.pt", "snapshot-002.pt"]
    first, second = (load_checkpoint(finished / f"snapshot-00{i}.pt") for i in (1, 2))
    assert (first["epoch"], second["epoch"]) == (2, 4)
    assert_same(second["model_state"], load_checkpoint(finished / "last.pt")["model_state"])
    assert [record["lr"] for record in read_metrics(finished)] == pytest.approx([0.1, 0.05, 0.1, 0.05])


def test_the_ensemble_is_the_mean_of_the_softmax(finished):
    config = load_run(finished).config
    data = load_data(config, "cpu")
    members = [load_run(finished, ensemble=1).model, nn.Sequential()]
    state = load_checkpoint(finished / "snapshot-001.pt")["model_state"]
    members[1] = load_run(finished).model
    members[1].load_state_dict(state)
    inputs, labels = next(data.evaluation_batches(data.test, 100))
    with torch.no_grad():
        mean = (members[0](inputs).softmax(1) + members[1](inputs).softmax(1)) / 2
    found = evaluate_run(finished, ensemble=0, device="cpu")
    assert found.count == 12
    assert found.correct == int((mean.argmax(1) == labels).sum())
    assert found.correct5 == sum(
        int(label) in row.argsort()[-5:].tolist() for row, label in zip(mean, labels, strict=True)
    )
    assert found.loss == pytest.approx(float(-mean[torch.arange(12), labels].log().mean()), rel=1e-5)
    assert evaluate_run(finished, ensemble=1, device="cpu").loss == pytest.approx(evaluate_run(finished).loss)


def test_an_ensemble_of_constants_by_hand():
    class Constant(nn.Module):
        def __init__(self, *probabilities):
            super().__init__()
            self.logits = torch.tensor(probabilities).log()

        def forward(self, x):
            return self.logits.expand(len(x), -1) + 3  # a softmax does not see what is added to all

    both = Ensemble([Constant(0.6, 0.3, 0.1), Constant(0.1, 0.7, 0.2)])
    torch.testing.assert_close(both(torch.zeros(2, 1)).exp(), torch.tensor([[0.35, 0.5, 0.15]] * 2))
    result = evaluate(both, [(torch.zeros(2, 1), torch.tensor([0, 1]))])
    assert (result.correct, result.correct5, result.accuracy5) == (1, 2, 1.0)


def test_top_5_counts_the_five_largest():
    logits = torch.arange(7.0).expand(7, -1)
    result = evaluate(nn.Identity(), [(logits, torch.arange(7))])
    assert (result.correct, result.correct5) == (1, 5)


def test_missing_snapshots_are_told(finished, tmp_path, capsys):
    with pytest.raises(CheckpointError, match=r"holds 2 snapshots, expected at least 3; a run with schedule.name"):
        load_run(finished, ensemble=3)
    with pytest.raises(ConfigError, match="ensemble must be a number of snapshots, or 0 for all, got -1"):
        load_run(finished, ensemble=-1)
    train(small_config(tmp_path / "plain", epochs=1), model=small_net())
    assert main(["eval", str(tmp_path / "plain"), "--ensemble"]) == 2
    assert "plain holds 0 snapshots, expected at least 1" in capsys.readouterr().err


def test_eval_prints_top_1_and_top_5_of_the_ensemble(finished, capsys):
    found = evaluate_run(finished, ensemble=0)
    assert main(["eval", str(finished), "--ensemble"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"test accuracy {100 * found.accuracy:.2f} % ({found.correct} of 12), top-5 ")
    assert "ensemble of snapshot-001.pt, snapshot-002.pt" in out
    assert main(["eval", str(finished), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["count"], facts["correct"]) == (12, evaluate_run(finished).correct)


# every option -------------------------------------------------------------------------------------------------------

EVERYTHING = {
    "epochs": 4,
    "precision": "float16",
    "ema": 0.9,
    "accumulate": 2,
    "clip_norm": 1.0,
    "label_smoothing": 0.1,
    "channels_last": True,
    "lr": 0.01,
}


@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [
        ("sgd", ScheduleConfig(name="snapshot", cycles=2)),
        ("adamw", ScheduleConfig(name="cosine", warmup_epochs=0.5)),
        ("rmsprop", ScheduleConfig(milestones=(1, 2), factors=(0.5, 0.1))),
    ],
)
def test_a_run_with_every_option_resumes_bit_by_bit(tmp_path, optimizer, schedule):
    settings = {**EVERYTHING, "optimizer": OptimizerConfig(name=optimizer), "schedule": schedule}
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    train(small_config(straight, **settings), model=small_net())
    with pytest.raises(TrainingInterrupted):
        train(small_config(broken, **settings), model=small_net(), reporter=SignalAt(signal.SIGINT, 3, 1))
    train(small_config(broken, **settings), resume=True, model=small_net())
    for name in sorted(set(os.listdir(straight)) - {"config.yaml", "metrics.jsonl", "summary.json"}):
        ours, theirs = (load_checkpoint(directory / name) for directory in (broken, straight))
        for part in ("model_state", "optimizer_state", "scaler_state", "average_state", "steps_taken", "epoch", "best"):
            assert_same(ours[part], theirs[part], f"{name} {part}")
    assert list(map(repeatable, read_metrics(broken))) == list(map(repeatable, read_metrics(straight)))


def test_the_average_is_what_is_evaluated(tmp_path):
    train(snapshot_config(tmp_path / "run", ema=0.99, schedule=ScheduleConfig()))
    content = load_checkpoint(tmp_path / "run" / "last.pt")
    model = load_run(tmp_path / "run").model
    assert_same(dict(model.state_dict()), content["average_state"])
    assert not torch.equal(content["average_state"]["classifier.weight"], content["model_state"]["classifier.weight"])
    assert evaluate_run(tmp_path / "run").accuracy == read_metrics(tmp_path / "run")[-1]["test_accuracy"]


def test_a_run_ends_after_max_steps_even_within_an_epoch(tmp_path):
    config = small_config(tmp_path / "run", epochs=300, max_steps=5)  # three steps an epoch
    result = train(config, model=small_net())
    records = read_metrics(tmp_path / "run")
    assert (result.epochs, result.steps_taken, len(records)) == (2, 5, 2)
    longer = train(small_config(tmp_path / "longer", epochs=300, max_steps=6), model=small_net())
    assert longer.steps_taken == 6
    assert repeatable(read_metrics(tmp_path / "longer")[0]) == repeatable(records[0])
    assert train(config, resume=True, model=small_net()) == result


def test_a_compiled_network_is_saved_under_plain_names(tmp_path, monkeypatch):
    compiled = []
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda m: compiled.append(m) or compiler(m, backend="eager"))
    train(small_config(tmp_path / "a", epochs=1, compile=True), model=small_net())
    assert len(compiled) == 1
    train(small_config(tmp_path / "b", epochs=1), model=compiler(small_net(), backend="eager"))
    train(small_config(tmp_path / "c", epochs=1), model=small_net())
    states = [load_checkpoint(tmp_path / name / "last.pt")["model_state"] for name in "abc"]
    assert_same(states[0], states[2])
    assert_same(states[1], states[2])


def test_channels_last_reaches_the_convolutions(tmp_path):
    seen = []
    model = small_net()
    model[0].register_forward_pre_hook(lambda m, args: seen.append((args[0].stride(), m.weight.stride())))
    train(small_config(tmp_path / "run", epochs=1, channels_last=True, max_steps=1), model=model)
    assert seen[1] == ((72, 1, 12, 2), (18, 1, 6, 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cuda_graph": True}, "cuda_graph needs a CUDA device, this run is on cpu; set cuda_graph=false."),
        ({"cuda_graph": True, "compile": True}, "compile and cuda_graph exclude each other"),
        ({"accumulate": 3}, r"batch_size \(16\) must be divisible by accumulate \(3\)"),
        ({"precision": "fp16"}, "precision must be one of float32, bfloat16, float16, got 'fp16'"),
        ({"ema": 1.0}, "ema must be a finite number at least 0 and below 1, got 1.0"),
        ({"clip_norm": 0.0}, "clip_norm must be a finite number above 0, got 0.0"),
        ({"label_smoothing": 1.0}, "label_smoothing must be a finite number at least 0 and below 1"),
        ({"max_steps": 0}, "max_steps must be at least 1, got 0"),
    ],
)
def test_impossible_options_are_refused_before_a_directory_is_made(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        train(small_config(tmp_path / "run", **changes), model=small_net())
    assert os.listdir(tmp_path) == []


def test_a_run_of_before_these_settings_resumes(tmp_path):
    """Its config.yaml lacks their keys, and its checkpoint their state."""
    import yaml

    output = tmp_path / "run"
    with pytest.raises(TrainingInterrupted):
        train(small_config(output), model=small_net(), reporter=SignalAt(signal.SIGINT, 2, 1))
    file = output / "config.yaml"
    values = yaml.safe_load(file.read_text())
    old = {name: values[name] for name in ("model", "data", "epochs", "batch_size", "eval_batch_size", "lr", "seed",
           "device", "output", "augment", "digits", "fake")}  # fmt: skip
    old["optimizer"] = {name: values["optimizer"][name] for name in ("momentum", "nesterov", "weight_decay")}
    old["schedule"] = {name: values["schedule"][name] for name in ("drops", "factor")}
    file.write_text(yaml.safe_dump(old))
    content = load_checkpoint(output / "last.pt")
    for name in ("scaler_state", "average_state", "steps_taken", "image_shape"):
        del content[name]
    torch.save({**content, "version": 1}, output / "last.pt")
    train(small_config(output), resume=True, model=small_net())
    train(small_config(tmp_path / "straight"), model=small_net())
    assert_same(
        load_checkpoint(output / "last.pt")["model_state"],
        load_checkpoint(tmp_path / "straight/last.pt")["model_state"],
    )
