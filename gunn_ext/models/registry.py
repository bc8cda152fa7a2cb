"""The table of models: names to specs, and the functions that read it.

A spec is data that can build its model. The registry asks of it only what `ModelSpec` says, so every family of models
brings its own kind of spec.
"""

from __future__ import annotations

import difflib
import fnmatch
import inspect
import re
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

_COMMON_ARGUMENTS = ("num_classes", "in_chans", "device", "dtype")
_NAME = re.compile(r"[a-z][a-z0-9_]*")


class ModelSpec(Protocol):
    """What the registry asks of a spec."""

    @property
    def num_classes(self) -> int:
        """Classes of a model that is built without saying how many."""

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width the model was designed for."""

    @property
    def build(self) -> Callable[..., nn.Module]:
        """Builds the model from the keywords num_classes, in_chans, device, dtype and the model's own options."""


_MODELS: dict[str, ModelSpec] = {}


def register_model(name: str, spec: ModelSpec) -> None:
    """Add a model to the table, for `create_model` and `list_models`.

    Args:
        name: Lower-case letters, digits and underscores, beginning with a letter.
        spec: Describes the model and builds it, such as `gunn_ext.models.Spec`.

    Raises:
        ValueError: The name is taken or not of that form.
        TypeError: ``spec`` lacks a part of `ModelSpec`.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"register_model: {name!r} is not a valid name; use lower-case letters, digits and underscores, "
            "beginning with a letter."
        )
    if name in _MODELS:
        raise ValueError(f"register_model: {name!r} is registered already, as {_MODELS[name]}; choose another name.")
    missing = [part for part in ("num_classes", "input_size", "build") if not hasattr(spec, part)]
    if missing:
        raise TypeError(f"register_model: the spec of {name!r}, a {type(spec).__name__}, has no {', '.join(missing)}.")
    _MODELS[name] = spec


def list_models(pattern: str | None = None) -> list[str]:
    """Names of the registered models, sorted.

    Args:
        pattern: Keeps the names that match it; wildcards as in a shell: ``"gunn*"``, ``"*1[58]"``.

    Returns:
        The names; an empty list where none matches.
    """
    return sorted(_MODELS if pattern is None else fnmatch.filter(_MODELS, pattern))


def model_spec(name: str) -> ModelSpec:
    """The spec a model was registered with.

    Raises:
        ValueError: No model has this name; the message suggests the nearest ones.
    """
    if isinstance(name, str) and name in _MODELS:
        return _MODELS[name]
    near = difflib.get_close_matches(re.sub(r"[^a-z0-9_]", "", str(name).lower()), _MODELS, n=3)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(f"Unknown model {name!r}.{hint} list_models() names all {len(_MODELS)}.")


def create_model(
    name: str,
    num_classes: int | None = None,
    in_chans: int = 3,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> nn.Module:
    """Build a registered model with fresh weights.

    Args:
        name: One of `list_models`.
        num_classes: Outputs of the classifier; 0 leaves it out; None takes the spec's number.
        in_chans: Channels of the input images.
        device: Of the parameters; ``"meta"`` builds the model without memory for them.
        dtype: Of the parameters.
        **options: The model's own; for GUNN and SUNN ``recompute``, ``eps`` and ``momentum``, see `GunnNet`.

    Returns:
        The model, in training mode.

    Raises:
        ValueError: An unknown name, or a value the model refuses.
        TypeError: An option the model does not have.
    """
    build = model_spec(name).build
    parameters = inspect.signature(build).parameters
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        known = [parameter for parameter in parameters if parameter not in _COMMON_ARGUMENTS]
        for option in options:
            if option not in known:
                near = difflib.get_close_matches(option, known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                takes = f"its options are {', '.join(known)}" if known else "it has no options"
                raise TypeError(f"create_model: {name!r} has no option {option!r}; {takes}.{hint}")
    if num_classes is None:
        num_classes = model_spec(name).num_classes
    return build(num_classes=num_classes, in_chans=in_chans, device=device, dtype=dtype, **options)
