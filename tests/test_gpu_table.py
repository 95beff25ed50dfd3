"""The table of what only a GPU can tell: empty until one has."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks import gpu


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "FOLDER", tmp_path)


def test_what_nobody_measured_is_said_so() -> None:
    head, _, *rows = gpu.table().splitlines()
    assert head == "| | A100 | H100 |"
    assert rows == [f"| {row} | not measured | not measured |" for row in gpu.ROWS]


def test_what_was_measured_stands_in_its_column() -> None:
    row, other = gpu.speed("decode", gpu.QUICK[0]), gpu.engine("per-token fp16")
    gpu.note("sm90", "NVIDIA H100 80GB HBM3", {row: "1.70x"})
    gpu.note("sm90", "NVIDIA H100 80GB HBM3", {other: "16 of 16"})
    lines = gpu.table().splitlines()
    assert f"| {row} | not measured | 1.70x |" in lines
    assert f"| {other} | not measured | 16 of 16 |" in lines
    assert sum("not measured | not measured" in line for line in lines) == len(gpu.ROWS) - 2
    assert lines[-1].startswith("* NVIDIA H100 80GB HBM3: `docker/tensorrt/gpu_check.sh` (smoothquant ")


def test_rows_that_no_table_has() -> None:
    with pytest.raises(AssertionError):
        gpu.note("sm80", "A100", {"speed": "much"})
