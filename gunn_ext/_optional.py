"""Packages that are used where they are installed, and only there."""

from __future__ import annotations

import importlib
from types import ModuleType


class MissingPackageError(RuntimeError):
    """A package of one of the extras is needed and cannot be imported."""


def try_import(name: str) -> tuple[ModuleType | None, str]:
    """Import a package that may be missing or broken.

    A broken one raises anything at all: torchvision beside a torch of another build, for one, a RuntimeError.

    Args:
        name: Of the module.

    Returns:
        The module and an empty text, or None and why it cannot be imported.
    """
    try:
        return importlib.import_module(name), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {' '.join(str(error).split())}"


def require(name: str, extra: str) -> ModuleType:
    """Import a package of one of the extras.

    Args:
        name: Of the module.
        extra: Of gunn_ext, that installs it.

    Raises:
        MissingPackageError: It cannot be imported; the message says why and what to install.
    """
    module, reason = try_import(name)
    if module is None:
        raise MissingPackageError(
            f"{name} is needed here but cannot be imported ({reason}); pip install 'gunn-ext[{extra}]'."
        )
    return module
