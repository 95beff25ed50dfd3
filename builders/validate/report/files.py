"""Write reports to disk, whole or not at all.

report.html   the page for people (`page`)
report.json   {"inputs": ..., "validations": [Validation.as_dict(), ...]}
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from builders.validate.report.page import page
from builders.validate.report.tables import ExtraRows
from builders.validate.validation import Validation
from smoothquant.errors import OutputError


def write_report(path: str | Path, validations: Sequence[Validation], extra_rows: ExtraRows | None = None) -> None:
    """Write the HTML report of one or more engines, validated against one reference.

    extra_rows: further rows of the table of measures, by title, with one text for each engine. Raises OutputError if
    `path` cannot be written, ValueError without validations or for a row of another length.
    """
    rows = extra_rows or {}
    if not validations or any(len(texts) != len(validations) for texts in rows.values()):
        raise ValueError("a report needs validations, and extra rows one text per validation")
    _write(Path(path), page(validations, rows))


def write_json(path: str | Path, validations: Sequence[Validation], inputs: str | None = None) -> None:
    """Write validations as JSON. inputs: the identity of the validated engines, for a caller that reads the file again.

    Raises OutputError if `path` cannot be written.
    """
    content = {"inputs": inputs, "validations": [found.as_dict() for found in validations]}
    _write(Path(path), json.dumps(content, allow_nan=False) + "\n")


def _write(path: Path, content: str) -> None:
    new = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            new.write_text(content, encoding="utf-8")
            os.replace(new, path)
        finally:
            new.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror})", expected="a writable place", do="choose another place"
        ) from error
