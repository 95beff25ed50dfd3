"""Write reports to disk, whole or not at all.

report.html   for people: `page`
plan.html     for people, of a search: `plan_page`
report.json   {"made_by": `MARK`, "inputs": ..., "validations": [Validation.as_dict(), ...], "sha256": of all this}

All hold one of `MARKS` near their beginning. A file without is not ours, and is never written over.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from builders.validate.report.page import MARK, page
from builders.validate.report.plan_page import PLAN_MARK, plan_page
from builders.validate.report.plan_view import PlanView
from builders.validate.report.tables import ExtraRows
from builders.validate.validation import Validation
from smoothquant.artifacts.seal import opened, sealed
from smoothquant.errors import OutputError
from smoothquant.files import check_place, make_folder, write_text
from smoothquant.model import Model
from smoothquant.plan import Plan
from smoothquant.reading import read_json

MARKS = (MARK, PLAN_MARK)


def write_report(path: str | Path, validations: Sequence[Validation], extra_rows: ExtraRows | None = None) -> None:
    """Write the HTML report of one or more engines, validated against one reference.

    extra_rows: further rows of the table of measures, by title, with one text for each engine. Raises OutputError if
    `path` cannot be written, ValueError without validations or for a row of another length.
    """
    rows = extra_rows or {}
    if not validations or any(len(texts) != len(validations) for texts in rows.values()):
        raise ValueError("a report needs validations, and extra rows one text per validation")
    _write(Path(path), page(validations, rows))


def write_plan_page(path: str | Path, plan: Plan, model: Model, input_absmax: Mapping[str, Tensor]) -> None:
    """Write the HTML page of a plan.

    input_absmax: of every linear of the model, before smoothing, float32 (in,), as the plan's act scales have it.
    Raises OutputError if `path` cannot be written, UserError for a plan of other linears than the model's.
    """
    _write(Path(path), plan_page(PlanView(plan, model, input_absmax)))


def write_json(path: str | Path, validations: Sequence[Validation], inputs: str | None = None) -> None:
    """Write validations as JSON. inputs: the identity of the validated engines, for a caller that reads the file again.

    Raises OutputError if `path` cannot be written.
    """
    content = {"made_by": MARK, "inputs": inputs, "validations": [found.as_dict() for found in validations]}
    _write(Path(path), json.dumps(sealed(content), allow_nan=False) + "\n")


def read_report(path: Path, inputs: str) -> list[Validation]:
    """The validations of a JSON report that was written for these inputs; none, if it is not there, was changed or
    is of another shape."""
    content = opened(read_json(path)) or {}
    if content.get("inputs") != inputs:
        return []
    try:
        return [Validation.from_dict(found) for found in content["validations"]]
    except (AttributeError, KeyError, TypeError, ValueError):  # of another version, or sealed by somebody else
        return []


def check_report(path: Path, option: str) -> None:
    """Raise OutputError for a place where no report could be written, or that holds what is not a report of ours.
    option: by which a user named it."""
    check_place(path, option, path)
    if os.path.lexists(path) and not _is_report(path):
        raise OutputError(
            f"{option} {path} exists, and it is no report of this tool",
            expected="a new file, or a report to be replaced",
            do=f"choose another {option}, or move it away",
        )


def _is_report(path: Path) -> bool:
    """Whether a file begins as our reports do."""
    try:
        with open(path, "rb") as file:
            start = file.read(1024)
    except OSError:
        return False
    return any(mark.encode() in start for mark in MARKS)


def _write(path: Path, content: str) -> None:
    check_report(path, "report")
    if path.is_file() and path.read_bytes() == content.encode():
        return
    try:
        make_folder(path.parent)
        write_text(path, content)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror})", expected="a writable place", do="choose another place"
        ) from error
