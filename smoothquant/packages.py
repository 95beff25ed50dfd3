"""Packages that only some commands need. They are imported on use; the error about a missing one names it."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from smoothquant.errors import MissingPackageError


def require(module: str, why: str = "", package: str = "") -> ModuleType:
    """The imported module. Raises MissingPackageError, which says what to install, if it is missing.

    why: begins the message instead of "the package ... is not installed". package: the module's name to pip, if that
    is another one.
    """
    package = package or module
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingPackageError(
            why or f"the package {package} is not installed", do=f"pip install {package}"
        ) from error
