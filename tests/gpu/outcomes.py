"""What a check on the GPU found: lines of JSON in the file that GPU_CHECK_OUTCOMES names, each written at once, so that
those of a tier that is stopped are there."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = "GPU_CHECK_OUTCOMES"  # an environment variable
OK, FAILED, NOTE, NOT_RUN = "ok", "FAILED", "note", "not run"


@dataclass(frozen=True)
class Outcome:
    """One line of the table. verdict: OK, FAILED, NOTE (measured, not judged) or NOT_RUN."""

    name: str
    verdict: str
    detail: str = ""


def record(name: str, verdict: str, detail: str = "") -> None:
    """Add a line to the file, if there is one."""
    if path := os.environ.get(FILE):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(Outcome(name, verdict, " ".join(detail.split())[:300]))) + "\n")


def read(path: Path) -> list[Outcome]:
    """The lines so far; the last may be half a line if its writer was stopped."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found.append(Outcome(**json.loads(line)))
        except ValueError:
            break
    return found


def table(rows: Sequence[tuple[str, Outcome]]) -> str:
    """The outcomes by tier, as text."""
    width = max(len(outcome.name) for _, outcome in rows)
    lines = [f"{tier:8} {outcome.verdict:7} {outcome.name:{width}}  {outcome.detail}" for tier, outcome in rows]
    return "\n".join(line.rstrip() for line in lines)
