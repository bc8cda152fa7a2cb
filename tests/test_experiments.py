"""Sweeps and curves: every combination once, mean and spread by hand, wrong values before anything runs."""

import json
import math
import os

import pytest
from test_cli import assert_one_line_error, run
from test_training import read_metrics

from gunn_ext.commands.experiments import _seeds, _values
from gunn_ext.training import ConfigError
from gunn_ext.training.curves import find_runs, read_curves
from gunn_ext.training.trials import spread

MADE = ["--data=fake", "--fake.shape=[1,8,8]", "--fake.classes=3", "--fake.train_images=16", "--fake.test_images=20",
        "--batch-size=8", "--epochs=2", "--device=cpu"]  # fmt: skip


def test_mean_and_deviation_by_hand():
    assert spread([1.0, 2.0, 6.0]) == (3.0, 7.0**0.5)
    assert spread([1.0, math.nan, 2.0]) == (1.5, 0.5**0.5)
    assert spread([4.0])[0] == 4.0
    assert math.isnan(spread([4.0])[1])
    assert all(map(math.isnan, spread([math.nan])))


def test_values_are_separated_by_commas_outside_brackets():
    arguments = [
        "--lr",
        "0.1,0.2",
        "--fake.shape=[1,8,8],[3,4,4]",
        "--batch-size=8",
        "--optimizer.betas",
        "(0.9, 0.8)",
    ]
    assert _values(arguments) == [
        ("lr", ["0.1", "0.2"]),
        ("fake.shape", ["[1,8,8]", "[3,4,4]"]),
        ("batch_size", ["8"]),
        ("optimizer.betas", ["(0.9, 0.8)"]),
    ]
    for wrong, message in (
        (["lr"], "unexpected argument 'lr'"),
        (["--lr"], "--lr: expected a value"),
        (["--lr=1", "--lr=2"], "--lr is given twice"),
        (["--lr=1,1"], "each value once"),
    ):
        with pytest.raises(ConfigError, match=message):
            _values(wrong)


def test_seeds_are_a_range_or_a_list():
    assert (_seeds("0:3"), _seeds("2:3"), _seeds("4,1")) == ([0, 1, 2], [2], [4, 1])
    for wrong in ("3:3", "1,1", "a", "", "1:2:3"):
        with pytest.raises(Exception, match="expected seeds such as 0:5 or 1,3"):
            _seeds(wrong)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep of two seeds over two rates, one of which diverges."""
    from gunn_ext import cli

    folder = tmp_path_factory.mktemp("sweeps") / "s"
    arguments = ["sweep", "--seeds=0:2", "--lr", "0.01,1e38", *MADE, f"--output={folder}"]
    assert cli.main(arguments) == 0
    return folder, arguments


def test_a_sweep_runs_every_combination_and_tells_mean_and_spread(swept, capsys):
    folder, arguments = swept
    runs = ["lr=0.01-seed0", "lr=0.01-seed1", "lr=1e38-seed0", "lr=1e38-seed1"]
    assert sorted(os.listdir(folder)) == [*runs, "sweep.json"]
    good, diverged = json.loads((folder / "sweep.json").read_text())["rows"]
    errors = [100 * (1 - read_metrics(folder / name)[-1]["test_accuracy"]) for name in runs[:2]]
    assert (good["settings"], good["finished"]) == ({"lr": "0.01"}, 2)
    assert good["error"] == pytest.approx(sum(errors) / 2)
    assert good["error_std"] == pytest.approx(abs(errors[0] - errors[1]) / 2**0.5)
    assert [trial["seed"] for trial in good["trials"]] == [0, 1]
    assert (diverged["finished"], diverged["error"]) == (0, None)
    assert "diverged" in diverged["trials"][0]["failure"]

    before = {name: (folder / name / "last.pt").stat().st_mtime_ns for name in runs[:2]}
    status, out, _ = run(capsys, *arguments)  # again: nothing that is finished is done anew
    assert status == 0
    assert {name: (folder / name / "last.pt").stat().st_mtime_ns for name in runs[:2]} == before
    assert f"{good['error']:.2f} ± {good['error_std']:.2f}" in out
    assert f"diverged: {folder}/lr=1e38-seed1: the training loss" in out


def test_wrong_values_are_told_before_anything_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, part in (
        (["--lr", "0.1,fast"], "lr: expected a float, got fast."),
        (["--model", "gunn_tiny", "--lrr", "1"], "unknown setting 'lrr'. Did you mean 'lr'?"),
        (["--seed", "1"], "seeds are given as --seeds"),
    ):
        assert_one_line_error(run(capsys, "sweep", *MADE, *arguments), part)
    assert run(capsys, "sweep", "--seeds", "x")[0] == 2
    assert os.listdir(tmp_path) == []


def test_runs_that_differ_in_their_seed_make_one_curve(swept):
    folder, _ = swept
    runs = [run for run in find_runs([folder]) if "0.01" in run.name]
    (curve,) = read_curves(runs)
    records = [read_metrics(run) for run in runs]
    assert (curve.label, curve.runs) == ("gunn_tiny, fake", 2)
    for epoch in range(2):
        pair = [100 * (1 - r[epoch]["test_accuracy"]) for r in records]
        assert curve.test_error[epoch] == pytest.approx(sum(pair) / 2)
        assert curve.test_std[epoch] == pytest.approx(abs(pair[0] - pair[1]) / 2**0.5)
        pair = [100 * (1 - r[epoch]["train_accuracy"]) for r in records]
        assert curve.train_error[epoch] == pytest.approx(sum(pair) / 2)


def test_curves_are_drawn_and_written_as_numbers(swept, capsys, tmp_path):
    folder, _ = swept
    assert run(capsys, "train", *MADE, "--model=gunn_tiny", "--lr=0.02", f"--output={tmp_path}/run")[0] == 0
    arguments = ["--output", tmp_path / "c.png", "--json", tmp_path / "c.json"]
    status, out, err = run(capsys, "curves", folder / "lr=0.01-seed0", tmp_path / "run", *arguments)
    assert (status, out, err) == (0, f"{tmp_path}/c.png\n", "")
    assert (tmp_path / "c.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    rows = json.loads((tmp_path / "c.json").read_text())["rows"]
    assert [row["label"] for row in rows] == ["lr 0.01", "lr 0.02"]
    assert rows[0]["test_std"] == [None, None]

    assert_one_line_error(run(capsys, "curves", tmp_path / "none"), "none holds no run")
    outcome = run(capsys, "curves", folder / "lr=1e38-seed0", "--output", tmp_path / "d.png")
    assert_one_line_error(outcome, "has no finished epoch yet")
    assert not (tmp_path / "d.png").exists()
