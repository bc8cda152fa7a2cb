"""Checkpoints: atomic, plain, verified; damage of any kind is told and never loaded."""

import os

import pytest
import torch

from gunn_ext import GunnLayer
from gunn_ext.training import CheckpointError, load_checkpoint, load_weights, save_checkpoint
from gunn_ext.training.checkpoint import epoch_seed


def content():
    model = torch.nn.Linear(3, 2)
    return {
        "config": {"lr": 0.1, "drops": [0.5, 0.75], "output": None},
        "model": {"name": "linear"},
        "model_state": dict(model.state_dict()),
        "optimizer_state": torch.optim.SGD(model.parameters(), 0.1).state_dict(),
        "epoch": 3,
        "best": {"accuracy": 0.5, "epoch": 1},
        "progress": {},
        "normalization": {"mean": [1.0], "std": [2.0]},
        "versions": {},
    }


def test_what_is_saved_is_loaded_and_torch_reads_it_without_our_classes(tmp_path):
    path, saved = tmp_path / "last.pt", content()
    save_checkpoint(path, saved)
    for loaded in (load_checkpoint(path), torch.load(path, weights_only=True)):
        assert (loaded["format"], loaded["version"]) == ("gunn_ext.checkpoint", 2)
        assert loaded["config"] == saved["config"]
        assert torch.equal(loaded["model_state"]["weight"], saved["model_state"]["weight"])
    assert os.listdir(tmp_path) == ["last.pt"]


def test_a_checkpoint_of_version_1_is_read_with_what_it_lacked(tmp_path):
    path = tmp_path / "last.pt"
    torch.save({"format": "gunn_ext.checkpoint", "version": 1, **content()}, path)
    loaded = load_checkpoint(path)
    assert [loaded[k] for k in ("scaler_state", "average_state", "steps_taken", "image_shape")] == [None, None, 0, None]
    load_weights(model := torch.nn.Linear(3, 2), loaded, path, averaged=True)
    assert torch.equal(model.weight, loaded["model_state"]["weight"])


def test_a_failing_write_leaves_the_old_checkpoint_and_no_rubbish(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_checkpoint(path, content())
    before = path.read_bytes()

    def full(obj, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, content())
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["last.pt"]


@pytest.mark.parametrize("kept", [0, 10, 0.5, -10], ids=["empty", "10 bytes", "half", "end cut off"])
def test_a_truncated_checkpoint_is_named_with_the_next_step(tmp_path, kept):
    last, best = tmp_path / "last.pt", tmp_path / "best.pt"
    save_checkpoint(best, content())
    whole = best.read_bytes()
    last.write_bytes(whole[: int(len(whole) * kept) if isinstance(kept, float) else kept])
    with pytest.raises(CheckpointError, match="damaged or no checkpoint") as caught:
        load_checkpoint(last)
    assert str(caught.value).startswith(f"{last}: ")
    assert f"{best} exists: to go on from it, copy it over {last}." in str(caught.value)
    best.unlink()
    with pytest.raises(CheckpointError, match="Start a new run in another --output"):
        load_checkpoint(last)


def test_a_flipped_bit_in_a_weight_is_found_though_torch_would_load_it(tmp_path):
    path, saved = tmp_path / "last.pt", content()
    saved["model_state"]["weight"] = torch.arange(64.0)
    save_checkpoint(path, saved)
    damaged = bytearray(path.read_bytes())
    pattern = b"".join(bytes(torch.tensor([v]).view(torch.uint8).tolist()) for v in (40.0, 41.0))
    damaged[damaged.index(pattern)] ^= 1
    path.write_bytes(damaged)
    assert not torch.equal(torch.load(path, weights_only=True)["model_state"]["weight"], torch.arange(64.0))
    with pytest.raises(CheckpointError, match="wrong checksum"):
        load_checkpoint(path)


def test_foreign_missing_newer_and_incomplete_files_are_told_apart(tmp_path):
    path = tmp_path / "last.pt"
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(path)
    torch.save({"weights": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of gunn_ext"):
        load_checkpoint(path)
    torch.save({"format": "gunn_ext.checkpoint", "version": 3}, path)
    with pytest.raises(CheckpointError, match="checkpoint version 3, this gunn_ext reads versions 1 and 2"):
        load_checkpoint(path)
    save_checkpoint(path, {"config": {}})
    with pytest.raises(CheckpointError, match=r"incomplete, without best, epoch, model"):
        load_checkpoint(path)


class Unpicklable:
    """Stands for any class that is not plain data."""


def test_a_checkpoint_that_would_run_code_is_not_loaded(tmp_path):
    path = tmp_path / "last.pt"
    torch.save({"format": "gunn_ext.checkpoint", "version": 1, "x": Unpicklable()}, path)
    with pytest.raises(CheckpointError, match="damaged or no checkpoint"):
        load_checkpoint(path)


def test_weights_of_another_model_are_refused_and_change_nothing(tmp_path):
    model, path = GunnLayer(8, 4), tmp_path / "last.pt"
    other = {"model": {"name": "other"}, "model_state": GunnLayer(8, 2).state_dict(), "average_state": None}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, other, path)
    text = str(caught.value)
    assert text.startswith(f"{path}: weights of another model than GunnLayer as configured")
    assert "units.0.project.weight is (2, 4, 8), expected (4, 2, 4)" in text
    assert text.endswith("the checkpoint holds model 'other'.")
    with pytest.raises(CheckpointError, match="weight is missing"):
        load_weights(torch.nn.Linear(2, 2), {"model": {}, "model_state": {}, "average_state": None}, path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_epoch_seeds_are_fixed_and_differ():
    assert epoch_seed(0, 0, "data") == epoch_seed(0, 0, "data")
    seeds = {epoch_seed(seed, epoch, use) for seed in range(5) for epoch in range(20) for use in ("data", "model")}
    assert len(seeds) == 200
    assert all(0 <= seed < 2**32 for seed in seeds)
