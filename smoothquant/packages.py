"""Packages that only some commands need. They are imported on use; the error about a missing one names it."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from smoothquant.errors import MissingPackageError

CONVERT = ("torch", "safetensors", "transformers")  # of the extra `convert`, which most commands need
INSTALL = "pip install 'smoothquant-toolchain[convert]'"


def require(module: str, why: str = "", package: str = "") -> ModuleType:
    """The imported module. Raises MissingPackageError, which says what to install, if it is missing.

    why: begins the message instead of "the package ... is not installed". package: what pip installs, if that
    is not the name of the module.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise _missing(package or module.partition(".")[0], why) from error


def what_is_missing(error: ImportError) -> MissingPackageError | None:
    """What to tell a user whose command has met this error, because it needs the extra `convert`; None for another."""
    package = (error.name or "").partition(".")[0]
    return _missing(package) if isinstance(error, ModuleNotFoundError) and package in CONVERT else None


def _missing(package: str, why: str = "") -> MissingPackageError:
    install = INSTALL if package in CONVERT else f"pip install {package}"
    return MissingPackageError(why or f"the package {package} is not installed", do=install)
