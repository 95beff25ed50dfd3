"""The form of a benchmark's result, so that one table can show them all.

results/NAME.json = {"command", "machine", "versions", "rows": [{"what", "measured", "target"}], "details": {...}}
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from smoothquant.machine import cpu_flags, cpuinfo, physical_cores
from smoothquant.outputs import versions

FOLDER = Path(__file__).parent / "results"
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


def publish(name: str, rows: Sequence[Row], details: Mapping | None = None) -> None:
    """Print the rows and write results/NAME.json."""
    command = " ".join(["python -m", f"tests.benchmarks.{name}", *sys.argv[1:]])
    width = max(len(row.what) for row in rows)
    for row in rows:
        print(f"{row.what:<{width}}  {row.measured}" + (f"  (target {row.target})" if row.target else ""))
    content = {
        "command": command,
        "machine": machine(),
        "versions": versions(),
        "rows": [row._asdict() for row in rows],
        "details": dict(details or {}),
    }
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
