"""Results of validation for people (`write_report`: one HTML file) and for programs (`write_json`)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from builders.report.html import page
from builders.validate.validation import Validation
from smoothquant import workspace

__all__ = ["write_json", "write_report"]


def write_report(path: str | Path, validations: Sequence[Validation]) -> None:
    """Write one self-contained HTML file, whole or not at all. Raises MissingPackageError without matplotlib."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_text(page(validations), encoding="utf-8")
    os.replace(new, path)


def write_json(path: str | Path, validations: Sequence[Validation], inputs: str = "") -> None:
    """Write {"inputs", "validations"}, whole or not at all. inputs: what the results depend on."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    workspace.write_json(path, {"inputs": inputs, "validations": [found.as_dict() for found in validations]})
