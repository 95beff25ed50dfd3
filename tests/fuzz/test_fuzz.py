"""Some trials of every kind, always the same ones; `python -m tests.fuzz --minutes 60` tries others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.kinds import KINDS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_damaged_is_believed(kind: str) -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--only", kind, "--trials", "60", "--seed", "12"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout
