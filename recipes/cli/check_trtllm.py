"""`smoothquant check` of a TensorRT-LLM checkpoint: what its loader would refuse."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from recipes.cli.ui import Ui
from smoothquant.errors import CheckError

KIND = "TensorRT-LLM checkpoint"


def check_trtllm(arguments: argparse.Namespace, ui: Ui) -> None:
    """Raises CheckError if the loader would refuse the folder."""
    from builders.tensorrt_llm import check
    from builders.tensorrt_llm.format.findings import errors

    path = Path(arguments.path)
    with ui.progress("check") as progress:
        found = check(path, progress)
    bad = errors(found)
    ui.result({"path": str(path), "kind": KIND, "findings": [asdict(finding) for finding in found]})
    if found:
        rows = [(finding.severity, finding.where, finding.what, finding.expected) for finding in found]
        ui.table(f"{path}: {KIND}", ("", "where", "found", "expected"), rows)
    else:
        ui.say(f"{path}: {KIND}, nothing is wrong with it")
    if bad:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise CheckError(f"{path}: {bad[0].sentence}{more}", do="make it again")
