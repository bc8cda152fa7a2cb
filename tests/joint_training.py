"""What the ranks of tests/test_distributed.py run, and what one process runs alone."""

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from gunn_ext import GunnLayer
from gunn_ext.training import (
    AugmentConfig,
    Config,
    ConfigError,
    DivergenceError,
    FakeConfig,
    FolderConfig,
    OptimizerConfig,
    RunDirectoryError,
    TrainingInterrupted,
    ValidationConfig,
    evaluate_run,
    load_checkpoint,
    train,
)

FAKE = FakeConfig(shape=(2, 6, 6), classes=4, train_images=33, test_images=23)


class Double(nn.Module):
    """A small network with every kind of batch norm, in float64, whatever the images are."""

    def __init__(self, frozen=False, act=lambda: None, channels=2):
        super().__init__()
        torch.manual_seed(5)
        self.net = nn.Sequential(
            nn.Conv2d(channels, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            GunnLayer(8, 4, shortcut=True),
            GunnLayer(8, 2, gradual=False),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 4),
        ).double()
        self.frozen = frozen
        self.act = act

    def train(self, mode=True):
        super().train(mode)
        for module in self.net:
            if self.frozen and isinstance(module, GunnLayer):
                module.freeze_batch_norm()
            elif self.frozen and isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, x):
        self.act()
        return self.net(x.double())


def settings(output, **changes):
    augment = AugmentConfig(mirror=True, crop_padding=1, cyclic_shift=True)
    values = {"data": "fake", "fake": FAKE, "augment": augment, "output": str(output), "device": "cpu", "lr": 0.05}
    values |= {"batch_size": 6, "eval_batch_size": 4, "epochs": 1, "max_steps": 5, "ema": 0.9, "sync_batch_norm": True}
    return Config(**values | changes)


def write_pictures(folder):
    """Image files of four classes: 20 to train on, some of which will be held out, and 7 to test."""
    from PIL import Image

    generator = torch.Generator().manual_seed(3)
    for part, counts in (("train", (4, 5, 6, 5)), ("val", (2, 1, 3, 1))):
        for name, count in zip("abcd", counts, strict=True):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(256, (12 + i, 20 - i, 3), generator=generator, dtype=torch.uint8)
                picture = Image.frombytes("RGB", (pixels.shape[1], pixels.shape[0]), pixels.numpy().tobytes())
                picture.save(folder / part / name / f"{i}.png")


def outcome(result):
    """What must not depend on the number of processes: tensors and losses but for rounding, counts not at all."""
    content = load_checkpoint(Path(result.output) / "last.pt")
    momenta = {str(index): state["momentum_buffer"] for index, state in content["optimizer_state"]["state"].items()}
    tensors = content["model_state"], content["average_state"], momenta
    record = content["progress"]["record"]
    counted = round(result.test_accuracy * result.test_count), result.test_count, record["train_accuracy"]
    losses = record["train_loss"], result.test_loss
    return tensors, losses, *counted, result.steps_taken


def train_alike(output, pictures):
    """Runs that must be the same on any number of ranks: synchronised; frozen, in parts and clipped; from files.

    The last one holds images out: its best network is chosen by these, then tested.
    """
    synchronized = train(settings(output / "synchronized"), model=Double())
    plain = OptimizerConfig(momentum=0.5, nesterov=False)
    parts = settings(output / "parts", accumulate=2, clip_norm=0.3, optimizer=plain, sync_batch_norm=False)
    in_parts = train(parts, model=Double(frozen=True))
    files = {"data": "folder", "data_path": str(pictures), "validation": ValidationConfig(size=8)}
    files["folder"] = FolderConfig(image_size=6, resize=8, workers=0)
    held_out = train(settings(output / "files", epochs=2, max_steps=None, **files), model=Double(channels=3))
    chosen = held_out.best_accuracy, held_out.best_epoch, held_out.validation_count
    return outcome(synchronized), outcome(in_parts), (*outcome(held_out), *chosen)


def check_local_statistics(output):
    """Without synchronisation ranks have the same weights, and the same running statistics when an epoch ends."""
    model = Double()
    result = train(settings(output, sync_batch_norm=False), model=model)
    state = model.state_dict()
    saved = load_checkpoint(Path(result.output) / "last.pt")["model_state"]
    assert saved.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(value, saved[name]), name


def on_rank_1(act, call):
    """A function that does something in its ``call``-th call, counted from 1, on rank 1."""
    calls = []

    def maybe():
        calls.append(None)
        if dist.get_rank() == 1 and len(calls) == call:
            act()

    return maybe


def check_agreement(output):
    """What happens on one rank, or is wrong, raises on every rank."""
    interrupted = settings(output / "interrupted", max_steps=None, epochs=50)
    kill = on_rank_1(lambda: os.kill(os.getpid(), signal.SIGTERM), call=4)
    with pytest.raises(TrainingInterrupted, match="state after 0 of 50 epochs. Continue with") as stopped:
        train(interrupted, model=Double(act=kill))
    assert stopped.value.signal_number == signal.SIGTERM

    model = Double()

    def poison():
        with torch.no_grad():
            model.net[-1].bias.fill_(float("nan"))

    model.act = on_rank_1(poison, call=3)
    with pytest.raises(DivergenceError, match="training loss in epoch 1 is nan"):
        train(settings(output / "nan", sync_batch_norm=False), model=model)

    with pytest.raises(RunDirectoryError, match="holds a run already"):
        train(interrupted, model=Double())
    with pytest.raises(RunDirectoryError, match="lr 0.05 there, 0.1 now"):
        train(settings(output / "interrupted", max_steps=None, epochs=50, lr=0.1), resume=True, model=Double())
    with pytest.raises(ConfigError, match=r"batch_size \(5\) must be divisible by the number of processes \(2\).* 4 o"):
        train(settings(output / "none", batch_size=5), model=Double())
    with pytest.raises(ConfigError, match=r"number of training images, one batch, \(33\) must be divisible by"):
        train(settings(output / "none", batch_size=64), model=Double())
    with pytest.raises(ConfigError, match="cuda_graph serves one process"):
        train(settings(output / "none", cuda_graph=True), model=Double())
    with pytest.raises(ConfigError, match="give it the bare model"):
        train(settings(output / "none"), model=nn.parallel.DistributedDataParallel(Double()))
    dist.barrier()
    assert not (output / "none").exists()


def train_and_evaluate(config):
    """A whole run, then its evaluation."""
    train(config)
    return evaluate_run(config.output)


def check_all(output, pictures):
    """All of the above in one start of the ranks."""
    alike = train_alike(output, pictures)
    if dist.get_world_size() == 2:
        check_local_statistics(output / "local")
        check_agreement(output)
    return alike
