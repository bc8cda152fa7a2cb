"""The command: what it prints, returns and leaves; every mistake of a user is one line and status 2."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import gunn_ext
from gunn_ext import cli
from gunn_ext.commands.settings import parse_train_arguments
from gunn_ext.training import Config, OptimizerConfig, load_config
from gunn_ext.training.data_config import DATASETS

SMALL = ["--data=fake", "--fake.shape=[1,8,8]", "--fake.classes=3", "--fake.train_images=16", "--fake.test_images=6",
         "--batch-size=8", "--device=cpu"]  # fmt: skip

COMMANDS = ("train", "eval", "predict", "recipes", "reproduce", "sweep", "curves", "bench", "models", "info")


def run(capsys, *arguments):
    """Status, standard output and standard error of a command."""
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def assert_one_line_error(outcome, *parts):
    status, _, err = outcome
    assert status == 2
    assert err.startswith("gunn: error: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err


# settings -----------------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_library():
    assert parse_train_arguments([]) == (Config(), False)


def test_options_reach_every_setting_in_both_spellings():
    config, resume = parse_train_arguments(
        ["--model", "gunn15", "--batch-size=8", "--eval_batch_size", "9", "--lr", "1e-3", "--optimizer.weight-decay=0",
         "--schedule.drops=[0.25]", "--augment.mirror=true", "--digits.image-size", "32", "--output=/no/such-run_x"]
    )  # fmt: skip
    assert not resume
    assert (config.model, config.batch_size, config.eval_batch_size, config.lr) == ("gunn15", 8, 9, 0.001)
    assert config.optimizer == OptimizerConfig(weight_decay=0.0)
    assert (config.schedule.drops, config.augment.mirror, config.digits.image_size) == ((0.25,), True, 32)
    assert config.output == "/no/such-run_x"


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)], ids=["file first", "file last"])
def test_options_beat_the_file_wherever_it_stands(tmp_path, order):
    (tmp_path / "c.yaml").write_text("lr: 1e-2\nepochs: 7\noptimizer:\n  momentum: 0.5\n")
    options = [f"--config={tmp_path / 'c.yaml'}", "--epochs=3"][order]
    config, _ = parse_train_arguments(options)
    assert config == Config(lr=0.01, epochs=3, optimizer=OptimizerConfig(momentum=0.5))


def test_a_saved_configuration_is_a_file_for_config(tmp_path):
    config, _ = parse_train_arguments([*SMALL, "--lr=3e-5", f"--output={tmp_path}/run"])
    from gunn_ext.training import save_config

    save_config(config.resolved(), tmp_path / "c.yaml")
    assert parse_train_arguments(["--config", str(tmp_path / "c.yaml")])[0] == config.resolved()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epoch", "3"], "unknown setting 'epoch'. Did you mean 'epochs'?"),
        (["--optimizer.momentun=3"], "unknown setting 'optimizer.momentun'. Did you mean 'optimizer.momentum'?"),
        (["--lr", "nan"], "lr: expected a finite float, got nan."),
        (["--lr", "abc"], "lr: expected a float, got abc."),
        (["--batch-size", "0"], "batch_size must be at least 1, got 0."),
        (["--batch-size", "2.5"], "batch_size: expected an int, got 2.5."),
        (
            ["--data", "digit"],
            f"data must be one of {', '.join(DATASETS)}, got 'digit'. Did you mean 'digits'?",
        ),
        (["--model", "gun15"], "Unknown model 'gun15'. Did you mean gunn15"),
        (["--lr"], "argument --lr: expected one argument"),
        (["gunn15"], "unexpected argument 'gunn15'; settings are given as --name value."),
        (["--config", "/no/such.yaml"], "/no/such.yaml: cannot be read (No such file or directory)"),
        (["--resume", "--output", "/no/such"], "/no/such holds no run (no config.yaml)"),
        (["--device", "cuda:99"], "device 'cuda:99' is not there"),
    ],
)
def test_wrong_settings_are_one_line(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert_one_line_error(run(capsys, "train", *arguments), message)
    assert os.listdir(tmp_path) == []


def test_a_wrong_key_in_a_file_is_named_with_the_file(capsys, tmp_path):
    (tmp_path / "c.yaml").write_text("optimizer: {nestrov: true}")
    outcome = run(capsys, "train", "--config", tmp_path / "c.yaml")
    assert_one_line_error(outcome, f"{tmp_path}/c.yaml: unknown setting", "Did you mean 'optimizer.nesterov'?")


# commands -----------------------------------------------------------------------------------------------------------


def test_train_eval_and_resume(capsys, tmp_path):
    output = tmp_path / "run"
    status, out, _ = run(capsys, "train", *SMALL, "--epochs=2", "--output", output)
    assert status == 0
    summary = json.loads((output / "summary.json").read_text())
    accuracy = f"test accuracy {100 * summary['test_accuracy']:.2f} % ({round(6 * summary['test_accuracy'])} of 6)"
    assert f"\n{accuracy} after epoch 2; best " in out
    assert f"run directory: {output} (config.yaml, metrics.jsonl, summary.json, last.pt, best.pt)\n" in out
    assert out.count("\nepoch ") == 2

    status, out, _ = run(capsys, "eval", output)
    assert status == 0
    assert out.startswith(accuracy)
    assert run(capsys, "eval", output, "--checkpoint", "best")[0] == 0

    assert_one_line_error(run(capsys, "train", *SMALL, "--epochs=2", "--output", output), "--resume", "--output")
    assert_one_line_error(
        run(capsys, "train", "--resume", "--output", output, "--lr=0.5"), "lr 0.1 there, 0.5 now", "start a new run"
    )
    # The settings of the run itself are taken; and it may have been moved.
    moved = output.rename(tmp_path / "moved")
    status, out, _ = run(capsys, "train", "--resume", "--output", moved)
    assert status == 0
    assert accuracy in out
    assert sorted(os.listdir(tmp_path)) == ["moved"]


def test_train_goes_to_a_default_directory_and_resumes_from_it(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "train", *SMALL, "--epochs=1", "--seed=4")[0] == 0
    assert load_config("runs/gunn_tiny-fake-seed4/config.yaml").epochs == 1
    assert run(capsys, "train", "--data=fake", "--seed=4", "--resume")[0] == 0


def test_eval_without_a_run_or_with_a_damaged_one_is_one_line(capsys, tmp_path):
    assert_one_line_error(run(capsys, "eval", tmp_path), f"{tmp_path} holds no run (no config.yaml)")
    run(capsys, "train", *SMALL, "--epochs=1", "--output", tmp_path / "run")
    (tmp_path / "run" / "last.pt").write_bytes(b"PK")
    assert_one_line_error(run(capsys, "eval", tmp_path / "run"), "last.pt: damaged", "best.pt exists")


def test_models_lists_costs_and_filters(capsys):
    status, out, _ = run(capsys, "models")
    assert status == 0
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
    assert rows["model"] == ["input", "parameters", "FLOPs", "activations"]
    assert rows["gunn15"][:2] == ["3x32x32", "1,585,746"]
    assert rows["wide_gunn18"][:2] == ["3x224x224", "45,624,936"]
    assert len({len(line) for line in out.splitlines()}) == 1
    assert run(capsys, "models", "gunn*24")[1].split()[5] == "gunn24"
    assert_one_line_error(run(capsys, "models", "x*"), "no model matches 'x*'")


def test_info_prints_what_the_library_says(capsys, monkeypatch):
    facts = {"version": "1.2", "cpu": {"built": True, "simd": "avx2"}}
    module = type(sys)("gunn_ext._info")
    module.info = lambda: facts
    monkeypatch.setitem(sys.modules, "gunn_ext._info", module)
    assert run(capsys, "info") == (0, "version: 1.2\ncpu.built: True\ncpu.simd: avx2\n", "")
    assert json.loads(run(capsys, "info", "--json")[1]) == facts


def test_info_names_version_and_instruction_set(capsys):
    status, out, _ = run(capsys, "info")
    assert status == 0
    lines = dict(line.split(": ", 1) for line in out.splitlines())
    assert lines["gunn_ext"] == json.loads(run(capsys, "info", "--json")[1])["gunn_ext"]
    assert lines["torch"] == torch.__version__
    assert lines["simd"] in ("avx512bf16", "avx512", "avx2", "baseline")


def test_help_and_unknown_commands(capsys):
    for arguments, expected in ((["--help"], 0), ([], 2)):
        status, out, _ = run(capsys, *arguments)
        assert status == expected
        assert all(f"\n  {command}" in out for command in COMMANDS)
    for command in COMMANDS:
        status, out, _ = run(capsys, command, "--help")
        assert status == 0
        assert f"gunn {command}" in out
    assert_one_line_error(run(capsys, "trian"), f"unknown command 'trian'; expected {', '.join(COMMANDS)}")


@pytest.mark.parametrize("how", ["option", "environment"])
def test_debug_shows_the_traceback(capsys, monkeypatch, how):
    arguments = ["train", "--lr=-1"]
    if how == "option":
        arguments.append("--debug")
    else:
        monkeypatch.setenv("GUNN_DEBUG", "1")
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert err.startswith("Traceback")
    assert "ConfigError: lr must be a finite number above 0, got -1.0." in err


def test_an_unforeseen_error_is_one_line_that_names_its_kind(capsys, monkeypatch):
    def fail(_):
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(cli, "_models", fail)
    assert_one_line_error(run(capsys, "models"), "RuntimeError: no kernel for this (--debug shows where)")


# the process --------------------------------------------------------------------------------------------------------


def start(*arguments, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(gunn_ext.__file__).parents[1])}
    return subprocess.Popen(
        [sys.executable, "-m", "gunn_ext", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_process_with_a_checkpoint_that_resumes(tmp_path, number, status):
    process = start("train", *SMALL, "--epochs=1000", "--output", tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert err.startswith(f"gunn: interrupted; {tmp_path}/run/last.pt holds the state after ")
    assert f"Continue with: gunn train --resume --output {tmp_path}/run\n" in err
    assert "Traceback" not in err
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert 2 <= state["epoch"] == len(metrics.read_text().splitlines())


def test_a_closed_pipe_is_no_error(tmp_path):
    process = start("models")
    process.stdout.close()
    assert process.wait(timeout=60) in (141, 0)
    assert "Traceback" not in process.stderr.read()
