"""Packages that only some commands need: imported when they are, and named when they are missing."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from smoothquant.errors import MissingPackageError


def require(module: str, why: str = "", package: str = "") -> ModuleType:
    """Import a module. Raises MissingPackageError, with what to install, if it is not there.

    why: what needs it, instead of the plain statement; package: its name to pip, where that is another one.
    """
    package = package or module
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingPackageError(
            why or f"the package {package} is not installed", do=f"pip install {package}"
        ) from error
