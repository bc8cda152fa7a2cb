"""Networks that are measured: GUNN in its variants, and which images a network takes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from gunn_ext.bench.others import OTHERS
from gunn_ext.layers import GunnLayer
from gunn_ext.models import list_models, model_spec
from gunn_ext.models.gunn import Spec
from gunn_ext.reference import ReferenceGunnLayer

VARIANTS = ("ours", "ours, recompute=False", "eager")


def network(name: str, variant: str = "ours", *, gradual: bool = True) -> nn.Module:
    """A registered GUNN as ``variant`` of `VARIANTS` has it, or its simultaneous twin, always with the same weights.

    Raises:
        ValueError: The model is no GUNN.
    """
    spec = model_spec(name)
    if not isinstance(spec, Spec):
        raise ValueError(f"{name} is no GUNN and has no variants; it is a {type(spec).__name__}.")
    torch.manual_seed(0)
    model = replace(spec, gradual=spec.gradual and gradual).build(recompute=variant != "ours, recompute=False")
    return _with_reference(model) if variant == "eager" else model


def _with_reference(model: nn.Module) -> nn.Module:
    """``model``, every GUNN or SUNN layer of it replaced by `ReferenceGunnLayer` with the same parameters."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, GunnLayer):
                like = next(child.parameters())
                reference = ReferenceGunnLayer(**child.arguments(), device=like.device, dtype=like.dtype)
                reference.load_state_dict(child.state_dict())
                setattr(parent, name, reference.train(child.training))
    return model


def input_of(name: str) -> tuple[int, int]:
    """Classes, and height and width of the images, of a network that can be measured.

    Raises:
        ValueError: No network has this name.
    """
    if name in OTHERS:
        return OTHERS[name][1:]
    if name not in list_models():
        raise ValueError(f"unknown model {name!r}; expected {', '.join([*list_models(), *OTHERS])}.")
    spec = model_spec(name)
    return spec.num_classes, spec.input_size[0]
