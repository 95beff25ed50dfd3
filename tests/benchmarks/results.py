"""The form of a benchmark's result, so that one table can show them all.

results/NAME.json = {"command", "machine", "versions", "rows": [{"what", "measured", "target"}], "details": {...}}
"""

from __future__ import annotations

import json
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

from smoothquant.files import make_folder, write_text
from smoothquant.machine import cpu_flags, cpuinfo, physical_cores
from smoothquant.outputs import versions

FOLDER = Path(__file__).parent / "results"
NUMBERS = re.compile(r"\[[-+.,\deE\s]+\]")  # a list of numbers in JSON
SHOWN = ("amx_bf16", "amx_int8", "avx512_vnni", "avx512_bf16", "avx_vnni", "avx2")


class Row(NamedTuple):
    """what: was measured; measured: in words and numbers; target: what was asked for, or nothing."""

    what: str
    measured: str
    target: str = ""


def machine() -> dict:
    """The machine that a result was measured on."""
    name = next((line.split(":")[1].strip() for line in cpuinfo() if line.startswith("model name")), platform.machine())
    features = [flag for flag in SHOWN if flag in cpu_flags()]
    return {"processor": name, "cores": physical_cores(), "features": features}


def ratio_text(seconds: Sequence[float], base: Sequence[float]) -> str:
    """How often seconds go into those of a base, measured in the same rounds: median, quartiles, and the seconds."""
    low, middle, high = quantiles([theirs / ours for theirs, ours in zip(base, seconds, strict=True)], n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f}), {median(seconds) * 1e3:.1f} ms"


def publish(name: str, rows: Sequence[Row], details: Mapping | None = None, command: str | None = None) -> None:
    """Print the rows, and `keep` them."""
    show(rows)
    keep(name, rows, details, command)


def keep(name: str, rows: Sequence[Row], details: Mapping | None = None, command: str | None = None) -> None:
    """Write results/NAME.json. Its command names what lies elsewhere by the name alone.

    command: the benchmark's module; None if that is the name.
    """
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    line = " ".join(["python -m", f"tests.benchmarks.{command or name}", *words])
    store(FOLDER / f"{name}.json", line, rows, details)


def show(rows: Sequence[Row]) -> None:
    """Print the rows."""
    width = max((len(row.what) for row in rows), default=0)
    for row in rows:
        print(f"{row.what:<{width}}  {row.measured}" + (f"  (target {row.target})" if row.target else ""))


def store(path: Path, command: str, rows: Sequence[Row], details: Mapping | None = None) -> None:
    """Write a result. Lists of numbers take one line each."""
    content = {
        "command": command,
        "machine": machine(),
        "versions": versions(),
        "rows": [row._asdict() for row in rows],
        "details": dict(details or {}),
    }
    make_folder(path.parent)
    text = NUMBERS.sub(lambda found: " ".join(found[0].split()), json.dumps(content, indent=2))
    write_text(path, text + "\n")
