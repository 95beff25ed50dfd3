"""The table of readers and the runs behind it, for the documents."""

from __future__ import annotations

from builders.readers import READERS, STATEMENTS
from builders.readers.runs import ReaderRun, evidence, load_runs
from smoothquant.int8_config import COMPRESSED_TENSORS, MODELOPT
from tests.families.table import TITLES

ACTIVATIONS = ("float", "per-token", "per-tensor")


def table() -> str:
    """Every statement: who reads what, where, and as what."""
    lines = ["| | folder | on | | kernel | what happens | known from |", "|---|---|---|---|---|---|---|"]
    for one in STATEMENTS:
        reader = READERS[one.reader]
        told = "; ".join(filter(None, (one.what, one.do)))
        cells = (f"{reader.title} {reader.version}", one.about, str(one.on), one.outcome.value, one.kernel, told)
        lines.append(f"| {' | '.join((*cells, evidence(one)))} |")
    return "\n".join(lines) + "\n"


def runs() -> str:
    """What each server did with each layout, on the devices that it was run on."""
    lines = []
    for kind in dict.fromkeys(map(_kind, load_runs())):
        found = [run for run in load_runs() if _kind(run) == kind]
        reader, device, dialect = kind
        header = f"{READERS[reader].title} {found[0].version}, {device}, {dialect}"
        shown = [act for act in ACTIVATIONS if any(run.folder.activations == act for run in found)]
        lines += [f"| {header} | {' | '.join(shown)} |", "|---" * (len(shown) + 1) + "|"]
        for layout in dict.fromkeys(run.layout for run in found):
            cells = [
                _cell([run for run in found if (run.layout, run.folder.activations) == (layout, act)]) for act in shown
            ]
            lines.append(f"| {TITLES[layout]} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _kind(run: ReaderRun) -> tuple[str, str, str]:
    """What a table is of: a reader, a device, and the dialect of its INT8 folders."""
    return run.reader, run.device, MODELOPT if run.folder.form == MODELOPT else COMPRESSED_TENSORS


def _cell(found: list[ReaderRun]) -> str:
    return "; ".join(f"{run.outcome}: {run.found}" for run in found)
