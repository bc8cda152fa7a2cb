"""Holds images out of the training split, to choose by, so that the test split is looked at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gunn_ext.data.dataset import ImageDataset
from gunn_ext.data.folder import FolderDataset


def hold_out(data: ImageDataset | FolderDataset, size: float, seed: int = 0) -> ImageDataset | FolderDataset:
    """Move some training images to the validation split, of every class its share.

    Normalisation stays that of all training images.

    Args:
        data: A data set without validation split.
        size: Number of images, or, below 1, share of the training split.
        seed: Of the choice, which depends on nothing else but the labels.

    Raises:
        ValueError: Nothing would be held out, or nothing left to train on.
    """
    labels = data.train.labels.cpu()
    count = round(size * len(labels)) if size < 1 else int(size)
    if not 0 < count < len(labels):
        raise ValueError(
            f"validation.size={size:g} holds out {count} of {len(labels)} training images; expected at least 1 and at "
            f"most {len(labels) - 1}."
        )
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    held_out[stratified(labels, count, seed)] = True
    (chosen,), (left,) = torch.where(held_out), torch.where(~held_out)
    place = data.train.labels.device
    parts: dict[str, Any] = {"train": data.train.take(left.to(place)), "validation": data.train.take(chosen.to(place))}
    return replace(data, **parts)


def stratified(labels: Tensor, count: int, seed: int) -> Tensor:
    """Indices of ``count`` labels at random, of every class its share, largest remainders rounded up."""
    counts = labels.bincount()
    quotas, remainders = counts * count // len(labels), counts * count % len(labels)
    quotas[remainders.argsort(descending=True, stable=True)[: count - int(quotas.sum())]] += 1
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = []
    for label, quota in enumerate(quotas.tolist()):
        chosen.append(order[labels[order] == label][:quota])
    return torch.cat(chosen).sort().values
