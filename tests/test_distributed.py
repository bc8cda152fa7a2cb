"""Several processes train one network: equal to one process, agreed on what goes wrong, restarted by torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from joint_training import Double, check_all, settings, train_alike, train_and_evaluate, write_pictures
from processes import run_ranks
from torch import nn

from gunn_ext.data import Part
from gunn_ext.training import Config, ConfigError, FakeConfig, RunDirectoryError, evaluate_run, load_checkpoint, train
from gunn_ext.training.distributed import World, job_name, join_world, unwrapped

COMMAND = ["--data=fake", "--fake.shape=[1,8,8]", "--fake.classes=3", "--fake.train_images=32", "--fake.test_images=7",
           "--batch-size=16", "--device=cpu", "--epochs=4", "--sync-batch-norm=true"]  # fmt: skip


def command_config(output):
    """The settings of COMMAND."""
    fake = FakeConfig(shape=(1, 8, 8), classes=3, train_images=32, test_images=7)
    options = {"data": "fake", "fake": fake, "batch_size": 16, "device": "cpu", "epochs": 4, "sync_batch_norm": True}
    return Config(**options, output=str(output))


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_train_as_one_process_does(size, tmp_path):
    """Weights, buffers, averages and momenta to 1e-12 after five steps, counts of the evaluation exactly."""
    pictures = tmp_path / "pictures"
    write_pictures(pictures)
    expected = train_alike(tmp_path / "one", pictures)
    results = run_ranks(check_all, size, tmp_path / "ranks", tmp_path / "many", pictures)
    for alike in results:
        for ours, theirs in zip(alike, expected, strict=True):
            torch.testing.assert_close((ours[0], ours[1]), (theirs[0], theirs[1]), rtol=1e-12, atol=1e-12)
            assert ours[2:] == theirs[2:]


def test_torchrun_gives_one_run_and_goes_on_where_a_rank_was_killed(tmp_path):
    """As the uninterrupted run of two ranks, bit by bit; reported once."""
    output, script = tmp_path / "run", Path(__file__).parent / "killed_once.py"
    evaluated = run_ranks(train_and_evaluate, 2, tmp_path / "ranks", command_config(tmp_path / "whole"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    done = subprocess.run(
        [*torchrun, str(script), str(output / "metrics.jsonl"), "train", *COMMAND, f"--output={output}"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("1 threads in each of 2 processes") == 2
    assert done.stdout.count(", resumed after epoch ") == 1
    assert done.stdout.count("test accuracy") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"run", "ranks", "whole"}
    epochs = [json.loads(line)["epoch"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert epochs == list(range(4))
    ours, whole = (load_checkpoint(path / "last.pt") for path in (output, tmp_path / "whole"))
    for name, value in whole["model_state"].items():
        assert torch.equal(ours["model_state"][name], value), name

    alone = evaluate_run(output)  # every image once: 7 of them, in parts of 3 and 4
    assert alone.count == 7
    for joint in evaluated:
        assert (joint.count, joint.correct, joint.correct5) == (alone.count, alone.correct, alone.correct5)
        assert joint.loss == pytest.approx(alone.loss, rel=1e-6)


def launch(monkeypatch, **environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))


def test_only_the_restarts_of_a_job_resume_unasked(tmp_path, monkeypatch):
    run, changes = tmp_path / "run", {"sync_batch_norm": False, "max_steps": None}
    launch(monkeypatch, TORCHELASTIC_RUN_ID="first", TORCHELASTIC_RESTART_COUNT=0)
    train(settings(run, **changes), model=Double())
    launch(monkeypatch, TORCHELASTIC_RUN_ID="second", TORCHELASTIC_RESTART_COUNT=1)
    with pytest.raises(RunDirectoryError, match="holds a run already"):
        train(settings(run, **changes), model=Double())
    launch(monkeypatch, TORCHELASTIC_RUN_ID="first", TORCHELASTIC_RESTART_COUNT=0)
    with pytest.raises(RunDirectoryError, match="holds a run already"):
        train(settings(run, **changes), model=Double())
    before = (run / "last.pt").read_bytes()
    launch(monkeypatch, TORCHELASTIC_RESTART_COUNT=1)
    assert train(settings(run, **changes), model=Double()).epochs == 1  # all done: nothing is trained again
    assert (run / "last.pt").read_bytes() == before
    (run / "last.pt").unlink()  # killed before it was written
    train(settings(run, **changes), model=Double())
    assert (run / "last.pt").exists()


def test_jobs_without_a_name_are_told_apart_by_their_agent(monkeypatch):
    launch(monkeypatch, TORCHELASTIC_RUN_ID="none")
    assert job_name().endswith(f"/{os.getppid()}")
    launch(monkeypatch, TORCHELASTIC_RUN_ID="mine")
    assert job_name() == "mine"
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert job_name() is None


def test_an_incomplete_environment_is_named(monkeypatch):
    launch(monkeypatch, WORLD_SIZE=2, RANK=0)
    with pytest.raises(ConfigError, match="lacks LOCAL_RANK, MASTER_ADDR, MASTER_PORT. Start the"):
        join_world("cpu")
    launch(monkeypatch, WORLD_SIZE=1)
    assert join_world("cpu") == World(torch.device("cpu"))


def test_every_process_takes_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    launch(monkeypatch, WORLD_SIZE=3, RANK=2, LOCAL_RANK=2, MASTER_ADDR="localhost", MASTER_PORT=1)
    with pytest.raises(ConfigError, match="process 2 of this machine .* has no GPU: torch finds 2"):
        join_world("cuda")
    with pytest.raises(ConfigError, match="'cuda:1' names one GPU for all processes"):
        join_world("cuda:1")


@pytest.mark.parametrize("count", [0, 1, 2, 7, 12])
@pytest.mark.parametrize("of", [1, 2, 3, 5])
def test_parts_cover_everything_once(count, of):
    things = list(range(count))
    parts = [things[Part(index, of).range(count)] for index in range(of)]
    assert sum(parts, []) == things
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_names_of_wrappers_are_stripped():
    model = nn.Linear(2, 2)
    assert unwrapped(model) is model
    compiled = nn.Module()
    compiled._orig_mod = model  # as torch.compile's
    assert unwrapped(nn.DataParallel(compiled)) is model
