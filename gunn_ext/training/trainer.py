"""The training loop: `train` takes a configuration to a trained network and the files of its run."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gunn_ext._info import __version__
from gunn_ext.data import Augmentation, batches
from gunn_ext.data.dataset import batches_per_epoch
from gunn_ext.layers import GunnLayer
from gunn_ext.models import create_model
from gunn_ext.training.checkpoint import epoch_seed, load_checkpoint, load_weights, save_checkpoint
from gunn_ext.training.config import Config
from gunn_ext.training.datasets import load_data
from gunn_ext.training.device import backend_name, resolve_device
from gunn_ext.training.errors import CheckpointError, ConfigError, DivergenceError, TrainingInterrupted
from gunn_ext.training.evaluation import Evaluation, evaluate
from gunn_ext.training.interrupt import StopOnSignal
from gunn_ext.training.progress import Reporter, SilentReporter
from gunn_ext.training.run_directory import RunDirectory
from gunn_ext.training.schedule import step_learning_rate

STEPS_BETWEEN_CHECKS = 50  # the loss stays on the device; reading it, to see that it is finite, waits for the device


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        output: The run directory.
        test_accuracy: Of the network after the last epoch, 0 … 1; None without test images.
        best_accuracy: The highest of all epochs. It was chosen on the test split, so quote ``test_accuracy``.
        best_epoch: Where that was, counted from 0.
        test_count: Test images.
        test_loss: Mean cross-entropy on them after the last epoch; None without test images.
        epochs: Of the run.
        train_seconds: Wall time of all epochs with evaluation and checkpoints, over all resumptions.
        images_per_second: Training images over the time of the training passes alone.
        parameters: Trainable values of the network.
        backend: What computed the gradual layers, such as ``cpu/avx512``; ``torch`` for a network without any.
        seed: Of the run.
        model: Name of the network.
        data: Name of the data set.
        versions: Of gunn_ext, torch and python, at the end.
        device: Where it ran.
        threads: Of the CPU.
    """

    output: str
    test_accuracy: float | None
    best_accuracy: float | None
    best_epoch: int
    test_count: int
    test_loss: float | None
    epochs: int
    train_seconds: float
    images_per_second: float
    parameters: int
    backend: str
    seed: int
    model: str
    data: str
    versions: dict[str, str]
    device: str
    threads: int


def train(
    config: Config, *, resume: bool = False, model: nn.Module | None = None, reporter: Reporter | None = None
) -> Result:
    """Train a network and write its run directory.

    After every epoch ``last.pt``, and ``best.pt`` where the test accuracy rose, hold the complete state; before the
    first, ``last.pt`` holds the initial one. SIGINT and SIGTERM end the run after the current step, and the epoch
    they fall into is done again on resuming. A resumed run is bitwise the run that was never interrupted (same
    device, same number of threads). The state of torch's global random generators is restored at the end.

    Args:
        config: Settings.
        resume: Go on with the run in ``config.run_directory``, which must have the same settings.
        model: Trained in place of one built from ``config.model``, which then is a mere name. Changed in place.
        reporter: Told about the progress; silent by default.

    Returns:
        What summary.json holds.

    Raises:
        ConfigError: The settings do not fit the data, or the device is not there.
        RunDirectoryError: The directory holds another run, or, resuming, none.
        CheckpointError: The checkpoint to resume from is damaged.
        DivergenceError: The loss is not finite any more; the last good checkpoint is kept.
        TrainingInterrupted: A signal asked to stop.
    """
    device = resolve_device(config.device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        run = _Run(config.resolved(), device, model, reporter or SilentReporter())
        if resume:
            run.resume()
        else:
            run.directory.create(config)
            run.save(run.directory.last_file)
        return run.train()


def evaluate_run(path: Path | str, checkpoint: str = "last", device: str = "auto") -> Evaluation:
    """Evaluate a run's network on the test split of its data.

    Args:
        path: The run directory.
        checkpoint: ``"last"`` or ``"best"``.
        device: As in `Config`.

    Raises:
        RunDirectoryError: There is no run.
        CheckpointError: The checkpoint is missing, damaged or of another model.
    """
    directory = RunDirectory(path)
    config = directory.load_config()
    file = {"last": directory.last_file, "best": directory.best_file}.get(checkpoint)
    if file is None:
        raise ConfigError(f"checkpoint must be last or best, got {checkpoint!r}.")
    where = resolve_device(device)
    content = load_checkpoint(file, where)
    data = load_data(config, where)
    model = create_model(config.model, data.classes, data.image_shape[0]).to(where)
    load_weights(model, content, file)
    return evaluate(model, data.evaluation_batches(data.test, config.eval_batch_size))


class _Run:
    """The state of a run and what is done with it, epoch by epoch."""

    def __init__(self, config: Config, device: torch.device, model: nn.Module | None, reporter: Reporter) -> None:
        self.config = config
        self.device = device
        self.reporter = reporter
        self.directory = RunDirectory(config.run_directory)
        self.data = load_data(config, device)
        # Built on the CPU, so that the initial weights of a seed are the same for every device.
        built = create_model(config.model, self.data.classes, self.data.image_shape[0]) if model is None else model
        self.model = built.to(device)
        self._probe()
        optimizer = config.optimizer
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=config.lr,
            momentum=optimizer.momentum,
            nesterov=optimizer.nesterov,
            weight_decay=optimizer.weight_decay,
        )
        self.augmentation = Augmentation(
            bool(config.augment.mirror), config.augment.crop_padding or 0, config.augment.cyclic_shift
        )
        self.epoch = 0  # epochs completed
        self.best: dict[str, Any] = {"accuracy": None, "epoch": -1}
        self.progress: dict[str, Any] = {"train_seconds": 0.0, "pass_seconds": 0.0, "images": 0, "record": None}

    @torch.no_grad()
    def _probe(self) -> None:
        """Run one image through the network, so that what does not fit fails before a directory is made."""
        self.model.eval()
        logits = self.model(self.data.normalize(self.data.train.images[:1]))
        self.model.train()
        if logits.shape != (1, self.data.classes):
            raise ConfigError(
                f"model {self.config.model!r} maps an image of {self.data.name} to shape {tuple(logits.shape)}, "
                f"expected (1, {self.data.classes}); build it with num_classes={self.data.classes}."
            )

    def resume(self) -> None:
        """Take up the state of last.pt."""
        self.directory.check_resumable(self.config)
        path = self.directory.last_file
        content = load_checkpoint(path, self.device)
        load_weights(self.model, content, path)
        try:
            self.optimizer.load_state_dict(content["optimizer_state"])
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{path}: its optimizer state does not fit this model ({error}).") from error
        self.epoch, self.best, self.progress = content["epoch"], content["best"], content["progress"]

    def save(self, path: Path) -> None:
        """Write the state as a checkpoint."""
        save_checkpoint(
            path,
            {
                "config": self.config.to_dict(),
                "model": {
                    "name": self.config.model,
                    "num_classes": self.data.classes,
                    "in_chans": self.data.image_shape[0],
                },
                "model_state": dict(self.model.state_dict()),
                "optimizer_state": self.optimizer.state_dict(),
                "epoch": self.epoch,
                "best": self.best,
                "progress": self.progress,
                "normalization": {"mean": list(self.data.mean), "std": list(self.data.std)},
                "versions": versions(),
            },
        )

    def train(self) -> Result:
        """All epochs that are left, then the summary."""
        config = self.config
        self.directory.keep_metrics(self.epoch)
        steps = batches_per_epoch(len(self.data.train), config.batch_size)
        try:
            with StopOnSignal() as stop:
                self.reporter.start(self._describe(), config.epochs, steps, self.epoch)
                while self.epoch < config.epochs:
                    self._train_epoch(stop)
        finally:
            self.reporter.close()
        result = self._result()
        self.directory.write_summary(vars(result))
        return result

    def _train_epoch(self, stop: StopOnSignal) -> None:
        epoch, started = self.epoch, time.perf_counter()
        rate = self._learning_rate(epoch)
        loss, images = self._training_pass(epoch, rate, lambda: self._check_stop(stop))
        passed = time.perf_counter() - started
        test = self._evaluate()
        accuracy = test.accuracy if test.count else None

        self.epoch += 1
        improved = accuracy is None or self.best["accuracy"] is None or accuracy > self.best["accuracy"]
        if improved:
            self.best = {"accuracy": accuracy, "epoch": epoch}
        seconds = time.perf_counter() - started
        record = {
            "epoch": epoch,
            "lr": rate,
            "train_loss": loss,
            "test_loss": test.loss if test.count else None,
            "test_accuracy": accuracy,
            "seconds": seconds,
            "images_per_second": images / passed,
        }
        self.progress = {
            "train_seconds": self.progress["train_seconds"] + seconds,
            "pass_seconds": self.progress["pass_seconds"] + passed,
            "images": self.progress["images"] + images,
            "record": record,
        }
        # In this order a crash in between is harmless: what is ahead of last.pt is dropped or redone on resuming.
        self.directory.append_metrics(record)
        if improved:
            self.save(self.directory.best_file)
        self.save(self.directory.last_file)
        left = self.progress["train_seconds"] / self.epoch * (self.config.epochs - self.epoch)
        self.reporter.epoch(record, left)
        if self.epoch < self.config.epochs:
            self._check_stop(stop)

    def _training_pass(self, epoch: int, rate: float, check_stop: Callable[[], None]) -> tuple[float, int]:
        """One pass over the training split; returns mean loss and number of images."""
        config = self.config
        torch.manual_seed(epoch_seed(config.seed, epoch, "model"))
        generator = torch.Generator(self.device).manual_seed(epoch_seed(config.seed, epoch, "data"))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        started, images = time.perf_counter(), 0
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        order = batches(len(self.data.train), config.batch_size, generator)
        for step, (inputs, labels) in enumerate(self.data.training_batches(order, self.augmentation, generator), 1):
            total += self._step(inputs, labels) * len(labels)
            images += len(labels)
            if step % STEPS_BETWEEN_CHECKS == 0:
                self._check_finite(float(total), f"training loss in epoch {epoch + 1}", rate)
            self.reporter.step(epoch, step, images / (time.perf_counter() - started))
            check_stop()
        mean = float(total) / images
        self._check_finite(mean, f"training loss in epoch {epoch + 1}", rate)
        return mean, images

    def _step(self, inputs: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(self.model(inputs), labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def _evaluate(self) -> Evaluation:
        test = evaluate(self.model, self.data.evaluation_batches(self.data.test, self.config.eval_batch_size))
        if test.count:
            self._check_finite(test.loss, f"test loss after epoch {self.epoch + 1}", self._learning_rate(self.epoch))
        return test

    def _learning_rate(self, epoch: int) -> float:
        schedule = self.config.schedule
        return step_learning_rate(
            epoch, self.config.epochs, base=self.config.lr, drops=schedule.drops, factor=schedule.factor
        )

    def _check_finite(self, value: float, name: str, rate: float) -> None:
        if not math.isfinite(value):
            raise DivergenceError(
                f"the {name} is {value}, at learning rate {rate:g}; training has diverged. Start a new run with a "
                f"lower lr (was {self.config.lr:g}). {self.directory.last_file} holds the state after "
                f"{self.epoch} of {self.config.epochs} epochs."
            )

    def _check_stop(self, stop: StopOnSignal) -> None:
        if stop.signal_number is not None:
            raise TrainingInterrupted(
                f"interrupted; {self.directory.last_file} holds the state after {self.epoch} of "
                f"{self.config.epochs} epochs. Continue with: gunn train --resume --output {self.directory.path}",
                stop.signal_number,
            )

    def _describe(self) -> str:
        config, shape = self.config, "x".join(map(str, self.data.image_shape))
        return (
            f"{config.model} ({self._parameters():,} parameters) on {config.data} ({len(self.data.train):,} training, "
            f"{len(self.data.test):,} test images of {shape}), {config.epochs} epochs, batch {config.batch_size}, "
            f"{self._used_backend()}, {torch.get_num_threads()} threads → {self.directory.path}"
        )

    def _parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    def _used_backend(self) -> str:
        gradual = any(isinstance(module, GunnLayer) and module.gradual for module in self.model.modules())
        return backend_name(self.device) if gradual else "torch"

    def _result(self) -> Result:
        progress, record = self.progress, self.progress["record"]
        return Result(
            output=str(self.directory.path),
            test_accuracy=record["test_accuracy"],
            best_accuracy=self.best["accuracy"],
            best_epoch=self.best["epoch"],
            test_count=len(self.data.test),
            test_loss=record["test_loss"],
            epochs=self.epoch,
            train_seconds=progress["train_seconds"],
            images_per_second=progress["images"] / progress["pass_seconds"],
            parameters=self._parameters(),
            backend=self._used_backend(),
            seed=self.config.seed,
            model=self.config.model,
            data=self.config.data,
            versions=versions(),
            device=str(self.device),
            threads=torch.get_num_threads(),
        )


def versions() -> dict[str, str]:
    """Versions of what computes."""
    return {"gunn_ext": __version__, "torch": str(torch.__version__), "python": platform.python_version()}
