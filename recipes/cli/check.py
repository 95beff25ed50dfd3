"""smoothquant check: what a loader or compiler will refuse, found before it runs; one `Checker` for each kind."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.cli.ui import Ui
from smoothquant.errors import FindingsError, UserError

if TYPE_CHECKING:
    from builders.findings import Finding

Progress = Callable[[int, int], None]  # (done, total)


@dataclass(frozen=True)
class Checker:
    """One kind of folder or file.

    kind: what it is called. matches: whether a path is one; the first checker that says so is asked.
    check: path, the command's arguments, progress -> findings. options: adds this kind's own to the command.
    """

    kind: str
    matches: Callable[[Path], bool]
    check: Callable[[Path, argparse.Namespace, Progress], list[Finding]]
    options: Callable[[argparse.ArgumentParser], None] = lambda command: None


def _is_trtllm(path: Path) -> bool:
    from builders.tensorrt_llm import is_checkpoint

    return path.is_dir() and is_checkpoint(path)


def _check_trtllm(path: Path, arguments: argparse.Namespace, progress: Progress) -> list[Finding]:
    from builders.tensorrt_llm import check

    return check(path, progress)


CHECKERS = (Checker("TensorRT-LLM checkpoint", _is_trtllm, _check_trtllm),)


def add(commands: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    command = commands.add_parser(
        "check",
        parents=[common],
        help="find what a loader would refuse, before it runs",
        description="Check a folder by the rules of what will read it: missing tensors, wrong shapes, unknown keys, "
        "scales that are zero or not finite, numbers that contradict each other. Exit status 1 if there are errors. "
        f"Kinds of folder: {', '.join(checker.kind for checker in CHECKERS)}.",
    )
    command.add_argument("path", metavar="DIR", help="what to check")
    for checker in CHECKERS:
        checker.options(command)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace, ui: Ui) -> None:
    from builders.findings import errors

    path = Path(arguments.path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder", do="check the path")
    checker = next((checker for checker in CHECKERS if checker.matches(path)), None)
    if checker is None:
        raise UserError(
            f"{path}: nothing that can be checked",
            expected=f"one of: {', '.join(checker.kind for checker in CHECKERS)}",
            do="check the path",
        )
    with ui.progress("check") as progress:
        found = checker.check(path, arguments, progress)
    bad = errors(found)
    ui.result({"path": str(path), "kind": checker.kind, "findings": [asdict(finding) for finding in found]})
    if found:
        rows = [(finding.severity, finding.where, finding.what, finding.expected) for finding in found]
        ui.table(f"{path}: {checker.kind}", ("", "where", "found", "expected"), rows)
    else:
        ui.say(f"{path}: {checker.kind}, nothing is wrong with it")
    if bad:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise FindingsError(f"{path}: {bad[0].sentence}{more}", do="make it again")
