"""What is installed and what it can do here: the first thing to look at when something is amiss."""

from __future__ import annotations

import platform
from typing import Any

import torch

from gunn_ext import ops

# Kept in pyproject.toml alone; the compiled module carries the copy it was built with.
__version__: str = ops.core_info()["version"]


def _driver_version() -> str | None:
    try:
        version: int = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError):  # torch's own name, in CUDA builds only
        return None
    return f"{version // 1000}.{version % 1000 // 10}"


def info() -> dict[str, Any]:
    """Versions, the backends that were built and why another is missing, instruction set, threads, CUDA.

    Returns:
        Plain strings, numbers, booleans and None. ``simd`` is the instruction set chosen on this machine (set
        GUNN_SIMD to force one); ``cuda_architectures`` and ``cuda_toolkit`` are those of the build; ``cuda_driver``
        and ``cuda_devices`` are torch's view of the GPU.
    """
    core = ops.core_info()
    cuda = torch.cuda.is_available()
    return {
        "gunn_ext": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "compiler": core["compiler"],
        "backends": ["cpu", *(["cuda"] if core["cuda"] else [])],
        "cuda_kernels": core["cuda"],
        "cuda_kernels_missing": None if core["cuda"] else core["cuda_reason"],
        "cuda_architectures": core["cuda_architectures"] or None,
        "cuda_toolkit": core["cuda_toolkit"] or None,
        "simd": core["simd"],
        "openmp": core["openmp"],
        "threads": torch.get_num_threads(),
        "cuda_runtime": torch.version.cuda,
        "cuda_driver": _driver_version() if cuda else None,
        "cuda_devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }
