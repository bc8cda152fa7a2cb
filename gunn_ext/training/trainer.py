"""The training loop: `train` takes a configuration to a trained network and the files of its run."""

from __future__ import annotations

import copy
import itertools
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gunn_ext.data import Augmentation, batches
from gunn_ext.data.dataset import batches_per_epoch
from gunn_ext.layers import GunnLayer
from gunn_ext.models import create_model
from gunn_ext.synchronized import convert_sync_batchnorm
from gunn_ext.training.checkpoint import epoch_seed, load_checkpoint, load_weights, save_checkpoint
from gunn_ext.training.config import Config
from gunn_ext.training.datasets import load_data
from gunn_ext.training.device import backend_name
from gunn_ext.training.distributed import World, job_name, join_world, restarts, unwrapped
from gunn_ext.training.errors import CheckpointError, ConfigError, DivergenceError, TrainingInterrupted
from gunn_ext.training.evaluation import Evaluation, evaluate
from gunn_ext.training.interrupt import StopOnSignal
from gunn_ext.training.precision import autocast
from gunn_ext.training.progress import Reporter, SilentReporter
from gunn_ext.training.result import Result, versions
from gunn_ext.training.run_directory import RunDirectory
from gunn_ext.training.schedule import learning_rate
from gunn_ext.training.step import TrainingStep

STEPS_BETWEEN_CHECKS = 50  # the loss stays on the device; reading it, to see that it is finite, waits for the device


def train(
    config: Config, *, resume: bool = False, model: nn.Module | None = None, reporter: Reporter | None = None
) -> Result:
    """Train a network and write its run directory.

    Processes that torchrun starts, or that belong to a process group, train it together; each is given the same
    arguments and returns the same result, rank 0 alone writes and reports.

    After every epoch ``last.pt``, and ``best.pt`` where the accuracy rose (on the validation split, or else on the
    test split), hold the complete state; before the first, ``last.pt`` holds the initial one. SIGINT and SIGTERM end
    the run after the current step, and the epoch they fall into is done again on resuming. A resumed run is bitwise
    the run that was never interrupted (same device, same number of threads). The state of torch's global random
    generators is restored at the end.

    Args:
        config: Settings.
        resume: Go on with the run in ``config.run_directory``, which must have the same settings.
        model: Trained in place of one built from ``config.model``, which then is a mere name. Changed in place.
        reporter: Told about the progress; silent by default.

    Returns:
        What summary.json holds.

    Raises:
        ConfigError: The settings do not fit the data or the number of processes, or the device is not there.
        RunDirectoryError: The directory holds another run, or, resuming, none.
        CheckpointError: The checkpoint to resume from is damaged.
        DivergenceError: The loss is not finite any more; the last good checkpoint is kept.
        TrainingInterrupted: A signal asked to stop.
    """
    world = join_world(config.device)
    with torch.random.fork_rng([world.device] if world.device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        run = _Run(config.resolved(), world, model, reporter if reporter and world.is_main else SilentReporter())
        run.begin(resume)
        return run.train()


class _Run:
    """The state of a run and what is done with it, epoch by epoch."""

    def __init__(self, config: Config, world: World, model: nn.Module | None, reporter: Reporter) -> None:
        self.config = config
        self.world = world
        self.device = device = world.device
        self.reporter = reporter
        self.directory = RunDirectory(config.run_directory)
        self.data = load_data(config, device)
        # Built on the CPU, so that the initial weights of a seed are the same for every device.
        built = create_model(config.model, self.data.classes, self.data.image_shape[0]) if model is None else model
        built = built.to(device)
        self.model = unwrapped(built)  # its weights are saved
        self._check_world(built)
        self._probe()
        if world.size > 1 and config.sync_batch_norm:
            self.model = convert_sync_batchnorm(self.model)
        self.network = self._network(built)
        self.step = TrainingStep(self.model, config, device, self.network)
        self.augmentation = Augmentation(
            bool(config.augment.mirror), config.augment.crop_padding or 0, config.augment.cyclic_shift
        )
        self.steps = batches_per_epoch(len(self.data.train), config.batch_size)  # of a whole epoch
        self.last_step = min(config.epochs * self.steps, config.max_steps or sys.maxsize)
        self.epochs = -(-self.last_step // self.steps)  # the last one may be cut short
        self.epoch = 0  # epochs completed
        self.best: dict[str, Any] = {"accuracy": None, "epoch": -1}
        self.progress: dict[str, Any] = {"train_seconds": 0.0, "pass_seconds": 0.0, "images": 0, "record": None}

    def _check_world(self, given: nn.Module) -> None:
        """Check that several processes can divide the work."""
        size, config = self.world.size, self.config
        if size == 1:
            return
        images = min(config.batch_size, len(self.data.train))
        if images % size:
            what = "batch_size" if images == config.batch_size else "the number of training images, one batch,"
            raise ConfigError(
                f"{what} ({images}) must be divisible by the number of processes ({size}): each trains on an equal "
                f"part. The nearest possible: {images // size * size or size} or {(images // size + 1) * size}."
            )
        if config.cuda_graph:
            raise ConfigError("cuda_graph serves one process; set cuda_graph=false, or train without torchrun.")
        if isinstance(given, nn.parallel.DistributedDataParallel):
            raise ConfigError("train() wraps the model in DistributedDataParallel itself; give it the bare model.")

    @torch.no_grad()
    def _probe(self) -> None:
        """Run one image through the network, so that what does not fit fails before a directory is made."""
        self.model.eval()
        logits = self.model(torch.zeros(1, *self.data.image_shape, device=self.device))
        self.model.train()
        if logits.shape != (1, self.data.classes):
            raise ConfigError(
                f"model {self.config.model!r} maps an image of {self.data.name} to shape {tuple(logits.shape)}, "
                f"expected (1, {self.data.classes}); build it with num_classes={self.data.classes}."
            )

    def _network(self, given: nn.Module) -> Callable[..., Any]:
        """What is called in training: the model laid out, and compiled, as configured."""
        if self.config.cuda_graph and self.device.type != "cuda":
            raise ConfigError(f"cuda_graph needs a CUDA device, this run is on {self.device}; set cuda_graph=false.")
        if self.config.channels_last:
            # The parameters of gradual layers have other ranks, so that the module as a whole cannot be converted.
            nn.utils.convert_conv2d_weight_memory_format(self.model, torch.channels_last)
        network = self.world.parallel(given)
        return torch.compile(network) if self.config.compile else network

    def begin(self, resume: bool) -> None:
        """Make the run directory, or take up the state in it: where asked for, or where torchrun has restarted us."""
        content = self.world.on_main(lambda: self._open(resume))
        if content is not None:
            self._take_up(content)

    def _open(self, resume: bool) -> dict[str, Any] | None:
        """On rank 0: the state to go on from; None for a new run, whose first checkpoint is then written."""
        directory, job = self.directory, job_name()
        own = restarts() > 0 and directory.belongs_to(job)
        if resume or (own and directory.last_file.exists()):
            directory.check_resumable(self.config)
            return load_checkpoint(directory.last_file, "cpu" if self.world.size > 1 else self.device)
        if not own:
            directory.create(self.config, job)
        self.save(directory.last_file)
        return None

    def _take_up(self, content: dict[str, Any]) -> None:
        path = self.directory.last_file
        load_weights(self.model, content, path)
        try:
            self.step.load_state_dict(content)
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
                **self.step.state_dict(),
                "epoch": self.epoch,
                "best": self.best,
                "progress": self.progress,
                "image_shape": list(self.data.image_shape),
                "normalization": {"mean": list(self.data.mean), "std": list(self.data.std)},
                "versions": versions(),
            },
        )

    def train(self) -> Result:
        """All epochs that are left, then the summary."""
        self.world.on_main(lambda: self.directory.keep_metrics(self.epoch))
        try:
            with StopOnSignal() as stop:
                self.reporter.start(self._describe(), self.epochs, self.steps, self.epoch)
                while self.epoch < self.epochs:
                    self._train_epoch(stop)
        finally:
            self.reporter.close()
        result = self._result()
        self.world.on_main(lambda: self.directory.write_summary(vars(result)))
        return result

    def _train_epoch(self, stop: StopOnSignal) -> None:
        epoch, started = self.epoch, time.perf_counter()
        loss, train_accuracy, images = self._training_pass(epoch, lambda: self._check_stop(stop))
        passed = time.perf_counter() - started
        for model in self._models() if not self.config.sync_batch_norm else ():
            self.world.average_statistics(model)
        held_out = self.data.validation is not None
        checked = self._evaluate(self.data.validation if held_out else self.data.test)
        accuracy = checked.accuracy if checked.count else None
        test = checked if checked.count and not held_out else None  # of a run that chooses by others, looked at once

        self.epoch += 1
        improved = accuracy is None or self.best["accuracy"] is None or accuracy > self.best["accuracy"]
        if improved:
            self.best = {"accuracy": accuracy, "epoch": epoch}
        seconds = time.perf_counter() - started
        record = {
            "epoch": epoch,
            "lr": self._learning_rate(epoch * self.steps),
            "train_loss": loss,
            "train_accuracy": train_accuracy,
            "test_loss": test.loss if test else None,
            "test_accuracy": test.accuracy if test else None,
            "test_accuracy5": test.accuracy5 if test else None,
            "validation_loss": checked.loss if held_out else None,
            "validation_accuracy": accuracy if held_out else None,
            "seconds": seconds,
            "images_per_second": images / passed,
        }
        self.progress = {
            "train_seconds": self.progress["train_seconds"] + seconds,
            "pass_seconds": self.progress["pass_seconds"] + passed,
            "images": self.progress["images"] + images,
            "record": record,
        }
        self.world.on_main(lambda: self._write(record, improved))
        left = self.progress["train_seconds"] / self.epoch * (self.epochs - self.epoch)
        self.reporter.epoch(record, left)
        if self.epoch < self.epochs:
            self._check_stop(stop)

    def _write(self, record: dict[str, Any], improved: bool) -> None:
        """On rank 0: the files of a completed epoch."""
        # In this order a crash in between is harmless: what is ahead of last.pt is dropped or redone on resuming.
        self.directory.append_metrics(record)
        if improved:
            self.save(self.directory.best_file)
        schedule = self.config.schedule
        if schedule.name == "snapshot":
            cycle, rest = divmod(self.epoch, self.config.epochs // schedule.cycles)
            if rest == 0:
                self.save(self.directory.snapshot_file(cycle))
        self.save(self.directory.last_file)

    def _training_pass(self, epoch: int, check_stop: Callable[[], None]) -> tuple[float, float, int]:
        """One pass over the training split; returns mean loss, accuracy in training, and number of images."""
        config, world, name = self.config, self.world, f"training loss in epoch {epoch + 1}"
        # The order is the same on every rank; dropout is not.
        torch.manual_seed(epoch_seed(config.seed, epoch, "model" if world.is_main else f"model {world.rank}"))
        generator = torch.Generator(self.device).manual_seed(epoch_seed(config.seed, epoch, "data"))
        self.model.train()
        started, images, first = time.perf_counter(), 0, epoch * self.steps
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        order = itertools.islice(
            batches(len(self.data.train), config.batch_size, generator), min(self.steps, self.last_step - first)
        )
        drawn = self.data.training_batches(order, self.augmentation, generator, world.part)
        for step, (inputs, labels) in enumerate(drawn, 1):
            rate = self._learning_rate(first + step - 1)
            loss, right = self.step(inputs, labels, rate)
            total += loss * len(labels)
            correct += right
            images += len(labels) * world.size
            if step % STEPS_BETWEEN_CHECKS == 0:
                self._check_finite(world.total([float(total)])[0], name, rate)
            self.reporter.step(epoch, step, images / (time.perf_counter() - started))
            check_stop()
        loss_sum, right_sum = world.total([float(total), int(correct)])
        self._check_finite(loss_sum / images, name, rate)
        return loss_sum / images, right_sum / images, images

    def _models(self) -> list[nn.Module]:
        """The network that is trained, and the average of its weights, where there is one: the last is evaluated."""
        return [self.model] if self.step.average is None else [self.model, self.step.average.model]

    def _evaluate(self, split: Any) -> Evaluation:
        """Accuracy and loss on a split of what would be the network if the run ended here."""
        evaluation = self._evaluate_model(self._models()[-1], split)
        if evaluation.count:
            rate = self._learning_rate(self.epoch * self.steps)
            part = "test" if split is self.data.test else "validation"
            self._check_finite(evaluation.loss, f"{part} loss after epoch {self.epoch + 1}", rate)
        return evaluation

    def _evaluate_model(self, model: nn.Module, split: Any) -> Evaluation:
        batches = self.data.evaluation_batches(self.world.own(split), self.config.eval_batch_size)
        return evaluate(model, batches, autocast(self.device, self.step.dtype), self.world)

    def _test_chosen(self) -> dict[str, Any]:
        """The test results of the best network, chosen on the validation split."""
        path = self.directory.best_file
        model = copy.deepcopy(self.model)
        where = "cpu" if self.world.size > 1 else self.device
        load_weights(model, self.world.on_main(lambda: load_checkpoint(path, where)), path, averaged=True)
        test = self._evaluate_model(model, self.data.test)
        if not test.count:
            return {"test_accuracy": None, "test_loss": None, "test_accuracy5": None}
        return {"test_accuracy": test.accuracy, "test_loss": test.loss, "test_accuracy5": test.accuracy5}

    def _learning_rate(self, step: int) -> float:
        return learning_rate(self.config.schedule, self.config.lr, step, self.steps, self.config.epochs)

    def _check_finite(self, value: float, name: str, rate: float) -> None:
        if not math.isfinite(value):
            raise DivergenceError(
                f"the {name} is {value}, at learning rate {rate:g}; training has diverged. Start a new run with a "
                f"lower lr (was {self.config.lr:g}). {self.directory.last_file} holds the state after "
                f"{self.epoch} of {self.epochs} epochs."
            )

    def _check_stop(self, stop: StopOnSignal) -> None:
        number = self.world.largest(stop.signal_number or 0)
        if number:
            raise TrainingInterrupted(
                f"interrupted; {self.directory.last_file} holds the state after {self.epoch} of "
                f"{self.epochs} epochs. Continue with: gunn train --resume --output {self.directory.path}",
                number,
            )

    def _describe(self) -> str:
        config, shape = self.config, "x".join(map(str, self.data.image_shape))
        processes = f" in each of {self.world.size} processes" if self.world.size > 1 else ""
        return (
            f"{config.model} ({self._parameters():,} parameters) on {config.data} ({len(self.data.train):,} training, "
            f"{len(self.data.test):,} test images of {shape}), {self.epochs} epochs, batch {config.batch_size}, "
            f"{self._used_backend()}, {torch.get_num_threads()} threads{processes} → {self.directory.path}"
        )

    def _parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    def _used_backend(self) -> str:
        gradual = any(isinstance(module, GunnLayer) and module.gradual for module in self.model.modules())
        return backend_name(self.device) if gradual else "torch"

    def _result(self) -> Result:
        progress, record = self.progress, self.progress["record"]
        if self.data.validation is not None:
            record = record | self._test_chosen()
        return Result(
            output=str(self.directory.path),
            test_accuracy=record["test_accuracy"],
            best_accuracy=self.best["accuracy"],
            best_epoch=self.best["epoch"],
            test_count=len(self.data.test),
            validation_count=0 if self.data.validation is None else len(self.data.validation),
            test_loss=record["test_loss"],
            test_accuracy5=record.get("test_accuracy5"),
            epochs=self.epoch,
            steps_taken=int(self.step.taken),
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
