"""Checkpoints: written atomically, plain types and tensors only, verified before they are used.

A checkpoint is the state between two epochs. It holds no state of random generators, because there is none to hold:
order and augmentation of an epoch are seeded from the run's seed and the epoch's number alone (`epoch_seed`).
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from gunn_ext.training.errors import CheckpointError

FORMAT = "gunn_ext.checkpoint"
VERSION = 2
READABLE = (1, 2)
# What version 2 added, as 1 had it.
_VERSION_1 = {"scaler_state": None, "average_state": None, "steps_taken": 0, "image_shape": None}
_KEYS = {"config", "model", "model_state", "optimizer_state", "epoch", "best", "progress", "normalization", "versions"}


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint so that ``path`` always holds a whole one: the old until the new is complete.

    Args:
        path: Target; a temporary file lies beside it meanwhile.
        content: Plain types and tensors; format name and version are added.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, "version": VERSION, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint, checking first that no byte of it is damaged.

    Args:
        path: As written by `save_checkpoint`.
        device: Where its tensors will lie.

    Returns:
        The content given to `save_checkpoint`, with ``format`` and ``version``.

    Raises:
        CheckpointError: The file is missing, damaged, no checkpoint of ours, or of a newer version; the message names
            the file and the next step.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint.{_elsewhere(path)}")
    try:
        # torch.load verifies no checksums: a flipped bit in a weight would pass.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"wrong checksum in {damaged}")
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # whatever a damaged file makes zipfile, pickle or torch stumble over
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise CheckpointError(f"{path}: damaged or no checkpoint ({reason}).{_elsewhere(path)}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of gunn_ext (no format {FORMAT!r}).{_elsewhere(path)}")
    if content.get("version") not in READABLE:
        raise CheckpointError(
            f"{path}: checkpoint version {content.get('version')!r}, this gunn_ext reads versions "
            f"{' and '.join(map(str, READABLE))}; use the gunn_ext that wrote it, or a newer one."
        )
    missing = sorted(_KEYS - content.keys())
    if missing:
        raise CheckpointError(f"{path}: incomplete, without {', '.join(missing)}.{_elsewhere(path)}")
    return _VERSION_1 | content


def load_weights(model: torch.nn.Module, content: dict[str, Any], path: Path, *, averaged: bool = False) -> None:
    """Copy the weights of a checkpoint into ``model``.

    Args:
        model: Of the same names and shapes.
        content: Of the checkpoint.
        path: Where it was read, for messages.
        averaged: Take the moving average of the weights where the run kept one.

    Raises:
        CheckpointError: Names or shapes do not agree; the model is not changed.
    """
    average = content["average_state"] if averaged else None
    ours, theirs = model.state_dict(), content["model_state"] if average is None else average
    problems = [f"{name} is missing" for name in ours.keys() - theirs.keys()]
    problems += [f"{name} is unknown" for name in theirs.keys() - ours.keys()]
    problems += [
        f"{name} is {tuple(theirs[name].shape)}, expected {tuple(ours[name].shape)}"
        for name in ours.keys() & theirs.keys()
        if ours[name].shape != theirs[name].shape
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        raise CheckpointError(
            f"{path}: weights of another model than {type(model).__name__} as configured ({shown}); the checkpoint "
            f"holds model {content['model'].get('name')!r}."
        )
    model.load_state_dict(theirs)


def epoch_seed(seed: int, epoch: int, purpose: str) -> int:
    """The seed of one epoch's random numbers for one purpose: a pure function, so that resuming needs no state."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{purpose}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def _elsewhere(path: Path) -> str:
    """The next step after ``path`` proved useless: the sibling checkpoint, or a new run."""
    others = [path.with_name(name) for name in ("best.pt", "last.pt") if name != path.name]
    for other in others:
        if other.is_file() and zipfile.is_zipfile(other):
            return f" {other} exists: to go on from it, copy it over {path}."
    return " Start a new run in another --output."
