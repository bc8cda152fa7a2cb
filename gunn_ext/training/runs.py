"""Run directories as networks: what a finished or begun run has learnt, evaluated."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from gunn_ext.models import create_model
from gunn_ext.training.checkpoint import load_checkpoint, load_weights
from gunn_ext.training.config import Config
from gunn_ext.training.data_config import FILES
from gunn_ext.training.datasets import load_data
from gunn_ext.training.distributed import join_world
from gunn_ext.training.errors import CheckpointError, ConfigError
from gunn_ext.training.evaluation import Ensemble, Evaluation, evaluate
from gunn_ext.training.precision import autocast
from gunn_ext.training.run_directory import RunDirectory


@dataclass(frozen=True)
class Trained:
    """The network of a run.

    Attributes:
        model: In evaluation mode; an `Ensemble` of snapshots where these were asked for.
        config: Of the run.
        classes: That it tells apart.
        image_shape: (C, H, W) of its images.
        mean: Of the training images, per channel, on the scale 0 … 255.
        std: Likewise.
        files: The checkpoints it came from.
    """

    model: nn.Module
    config: Config
    classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    files: tuple[Path, ...]


def load_run(
    path: Path | str, checkpoint: str = "last", device: torch.device | str = "cpu", *, ensemble: int | None = None
) -> Trained:
    """Load the network of a run, with the moving average of its weights where it kept one.

    Args:
        path: The run directory.
        checkpoint: ``"last"`` or ``"best"``; not looked at for an ensemble.
        device: Where it will lie.
        ensemble: Average the softmax of the last so many snapshots; 0: of all.

    Raises:
        ConfigError: ``checkpoint`` is neither.
        RunDirectoryError: There is no run.
        CheckpointError: A checkpoint is missing, damaged or of another model.
    """
    directory = RunDirectory(path)
    config = directory.load_config()
    if ensemble is None:
        file = {"last": directory.last_file, "best": directory.best_file}.get(checkpoint)
        if file is None:
            raise ConfigError(f"checkpoint must be last or best, got {checkpoint!r}.")
        files = [file]
    else:
        if ensemble < 0:
            raise ConfigError(f"ensemble must be a number of snapshots, or 0 for all, got {ensemble}.")
        files = directory.snapshot_files()
        if not files or len(files) < ensemble:
            raise CheckpointError(
                f"{path} holds {len(files)} snapshots, expected at least {ensemble or 1}; a run with "
                "schedule.name=snapshot leaves one at the end of each cycle."
            )
        files = files[-ensemble:]
    models = []
    for file in files:
        content = load_checkpoint(file, device)
        facts = content["model"]
        model = create_model(config.model, facts["num_classes"], facts["in_chans"]).to(device)
        load_weights(model, content, file, averaged=True)
        models.append(model.eval())
    normalization = content["normalization"]
    return Trained(
        model=models[0] if ensemble is None else Ensemble(models).eval(),
        config=config,
        classes=facts["num_classes"],
        image_shape=tuple(content["image_shape"] or config.image_shape or load_data(config, device).image_shape),
        mean=tuple(normalization["mean"]),
        std=tuple(normalization["std"]),
        files=tuple(files),
    )


def evaluate_run(
    path: Path | str,
    checkpoint: str = "last",
    device: str = "auto",
    *,
    ensemble: int | None = None,
    ten_crop: bool = False,
) -> Evaluation:
    """Evaluate a run's network on the test split of its data, in the precision of the run.

    Processes that torchrun starts, or that belong to a process group, share the images: all must call it, and each
    returns the result for all.

    Args:
        path: The run directory.
        checkpoint: ``"last"`` or ``"best"``.
        device: As in `Config`.
        ensemble: As in `load_run`.
        ten_crop: Average ten views of each image, where the data set is one of files.

    Raises:
        ConfigError: The data set has no ten views.
        RunDirectoryError: There is no run.
        CheckpointError: A checkpoint is missing, damaged, of another model or of other classes than the data has.
    """
    world = join_world(device)
    where = world.device
    trained = load_run(path, checkpoint, where, ensemble=ensemble)
    config = trained.config
    if ten_crop:
        if config.data not in FILES:
            raise ConfigError(f"ten views are cut from files, data {' or '.join(FILES)}; this run has {config.data}.")
        config = replace(config, folder=replace(config.folder, ten_crop=True))
    data = load_data(config, where)
    if (data.classes, data.image_shape[0]) != (trained.classes, trained.image_shape[0]):
        raise CheckpointError(
            f"{trained.files[0]}: a network for {trained.classes} classes and {trained.image_shape[0]} channels, but "
            f"the data set {config.data} has {data.classes} and {data.image_shape[0]}. Restore config.yaml and the "
            "data of the run."
        )
    batches = data.evaluation_batches(world.own(data.test), config.eval_batch_size)
    return evaluate(trained.model, batches, autocast(where, getattr(torch, config.precision)), world)
