"""Which statements of the table a program has confirmed: `python -m tests.servers` writes runs.json."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from builders.readers.devices import device_of
from builders.readers.folder import FolderFacts
from builders.readers.judge import judge
from builders.readers.statement import Statement
from smoothquant.artifacts.record import read
from smoothquant.reading import read_object

FILE = Path(__file__).with_name("runs.json")


@dataclass(frozen=True)
class ReaderRun:
    """What a reader did with a folder.

    version: of the reader. device: what it ran on. layout: the model's layout in the tests. outcome: a value of
    `Outcome`. found: numbers, or the reader's own words.
    """

    reader: str
    version: str
    device: str
    layout: str
    folder: FolderFacts
    outcome: str
    found: str


@dataclass(frozen=True)
class ReaderRuns:
    """All runs that are kept. command: how they were made."""

    command: str
    runs: tuple[ReaderRun, ...]


@cache
def load_runs() -> tuple[ReaderRun, ...]:
    """The runs that are kept."""
    return read(ReaderRuns, read_object(FILE, do="python -m tests.servers"), str(FILE)).runs


def confirming(statement: Statement) -> tuple[ReaderRun, ...]:
    """The runs that a statement is confirmed by."""
    return tuple(run for run in load_runs() if judge(run.folder, run.reader, device_of(run.device)) == statement)


def evidence(statement: Statement) -> str:
    """Whether a statement was run or read, and where."""
    devices = dict.fromkeys(run.device for run in confirming(statement))
    if devices:
        return f"run on {' and '.join(devices)}: tests/servers"
    how = "run" if statement.source.startswith("tests/") else "read"
    return f"{how}: {statement.source}" if statement.source else ""
