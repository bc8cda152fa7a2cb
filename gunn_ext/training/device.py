"""Where a run computes."""

from __future__ import annotations

import torch

from gunn_ext import ops
from gunn_ext.training.errors import ConfigError


def resolve_device(name: str) -> torch.device:
    """The device of a name as in `Config`.

    Raises:
        ConfigError: There is no such device.
    """
    if name == "auto":
        usable = torch.cuda.is_available() and backend_name(torch.device("cuda")).startswith("cuda")
        return torch.device("cuda" if usable else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ConfigError(f"device {name!r} is not there: torch finds {found} CUDA devices. Use device cpu or auto.")
    return device


def backend_name(device: torch.device) -> str:
    """What computes gradual layers on a device; none where nothing does."""
    try:
        return ops.backend(str(device), torch.float32)
    except RuntimeError:
        return "none"
