"""The package openvino: its version, and what this tool needs of it."""

from __future__ import annotations

from types import ModuleType

from packaging.version import Version

from smoothquant.errors import MissingPackageError
from smoothquant.packages import require

LEAST = "2025.4"


def require_openvino() -> ModuleType:
    """The package openvino. Raises MissingPackageError if it is missing or too old."""
    openvino = require("openvino")
    if Version(version_of(openvino)) < Version(LEAST):
        raise MissingPackageError(
            f"this OpenVINO ({version_of(openvino)}) is too old",
            expected=f"openvino >= {LEAST}",
            do=f"pip install 'openvino>={LEAST}'",
        )
    return openvino


def version_of(openvino: ModuleType) -> str:
    """The version without the number of the build, such as "2026.4.1"."""
    return str(openvino.__version__).partition("-")[0]
