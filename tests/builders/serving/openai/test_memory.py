"""A server promises no more keys and values than there is memory for."""

from __future__ import annotations

from pathlib import Path

import pytest

from builders.onnxruntime import OnnxRuntimeEngine, build
from builders.onnxruntime.record import GROUPED
from builders.serving.openai import service
from builders.serving.openai.service import ServingLimits, open_service
from smoothquant import machine
from smoothquant.errors import UserError

TOKEN = 2 * 2 * 2 * 16 * 4  # bytes of its keys and values: 2 layers, 2 kv heads of 16 channels in float32


def test_the_context_is_what_memory_holds(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def length(free: int | None, **limits: int) -> int:
        monkeypatch.setattr(service, "free_memory", lambda: free)
        return open_service(engine, None, ServingLimits(**limits), fast=True).length

    longest = OnnxRuntimeEngine(engine).longest
    whole = 16 * longest * TOKEN
    assert length(None) == length(2 * whole) == longest
    monkeypatch.setattr(service, "LEAST_CONTEXT", 8)
    assert length(whole) == int(0.9 * longest)
    with pytest.raises(UserError, match=rf"16 sequences of {longest} tokens: .* expected at most 0.0 GB, .*: 7 tokens"):
        length(16 * TOKEN * 8)
    assert length(16 * TOKEN * 8, batch=1, context=100) == 100
    with pytest.raises(UserError, match="give a smaller --max-batch or --max-context"):
        length(16 * TOKEN * 100, context=100)


def test_caches_are_as_large_as_said(exports: dict[str, Path], tmp_path: Path) -> None:
    build(exports["float"], tmp_path / "engine", attention=GROUPED)
    engine = OnnxRuntimeEngine(tmp_path / "engine")
    slots = engine.slots(3, 300)
    assert slots.together
    slots.append(slots.open(), [1] * 290)
    assert sum(buffer.nbytes for buffer in slots._buffers.values()) == engine.cache_bytes(3, 300)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("version", "limits"),
    [(1, ("memory.limit_in_bytes", "memory.usage_in_bytes")), (2, ("memory.max", "memory.current"))],
)
def test_memory_of_a_control_group(
    version: int, limits: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "memory" if version == 1 else tmp_path
    places = "4:memory:/a/b\n3:cpu:/\n" if version == 1 else "0::/a/b\n"
    read = machine._lines
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(
        machine, "_lines", lambda path: places.splitlines() if path == Path("/proc/self/cgroup") else read(path)
    )
    whole = machine.free_memory()
    assert whole is not None
    for folder, limit, used, files in (
        ("a/b", "max", 0, 0),
        ("a", 5 << 20, 3 << 20, 1 << 20),
        ("", 9 << 20, 4 << 20, 0),
    ):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name, value in zip(limits, (limit, used), strict=True):
            (root / folder / name).write_text(f"{value}\n")
        (root / folder / "memory.stat").write_text(f"anon 7\ninactive_file {files}\n")
    assert machine.free_memory() == 3 << 20
    (root / "a" / limits[0]).write_text("1\n")
    assert machine.free_memory() == 0
    for folder in ("a", ""):
        (root / folder / limits[0]).write_text("max\n")
    assert machine.free_memory() == pytest.approx(whole, rel=0.2)
