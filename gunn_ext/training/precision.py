"""The arithmetic of a step: which dtype autocast computes in, and how float16 gradients are kept from vanishing."""

from __future__ import annotations

import torch
from torch import Tensor

PRECISIONS = ("float32", "bfloat16", "float16")


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Autocast for 16-bit dtypes, disabled for others."""
    narrow = dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(device.type, dtype if narrow else torch.bfloat16, enabled=narrow)


def loss_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler | None:
    """A gradient scaler for float16, whose gradients would fall below the smallest number; None for others."""
    return torch.amp.GradScaler(device.type) if precision == "float16" else None


def widened(values: Tensor) -> Tensor:
    """``values`` in at least float32."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
