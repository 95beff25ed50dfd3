"""A sample of all interruptions, another one in every scenario; `python -m tests.crash` is all of them."""

from __future__ import annotations

import subprocess
import sys
from itertools import chain
from pathlib import Path

from tests.crash.scenarios import SCENARIOS

ROOT = Path(__file__).parents[2]


def crash(*options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tests.crash", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_interrupted_runs_end_as_if_nothing_had_happened() -> None:
    names = [name for name in SCENARIOS if not name.startswith(("run", "search", "validate-team"))]
    found = crash(*chain.from_iterable(("--scenario", name) for name in names), "--sample", "6", "--seed", "1")
    assert found.returncode == 0, found.stdout + found.stderr
    assert f"{6 * len(names)} interruptions, 0 faults" in found.stdout


def test_a_run_of_all_steps_and_steps_of_two_processes() -> None:
    names = ("run", "run-overwrite", "search-team", "validate-team")
    found = crash(*chain.from_iterable(("--scenario", name) for name in names), "--sample", "2", "--seed", "1")
    assert found.returncode == 0, found.stdout + found.stderr


def test_a_disk_that_lies_is_noticed() -> None:
    """The control: on a disk that forgets what was synced, outputs are lost, and the harness says so."""
    found = crash("--scenario", "w8a8", "--sample", "30", "--seed", "1", "--lying")
    assert found.returncode == 1, found.stdout + found.stderr
    assert "Point(scenario='w8a8', kind='power'" in found.stdout
