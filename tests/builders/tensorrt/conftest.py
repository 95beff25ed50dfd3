"""A stand-in for TensorRT and its GPU, and engines of one tiny Llama that were built with it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builders.tensorrt import hardware
from builders.tensorrt.build import build
from tests.builders.tensorrt import fake

LIMITS = {"batch": 3, "length": 64, "chunk": 16}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> fake.FakeGpu:
    found = fake.FakeGpu()
    monkeypatch.setattr(hardware, "find_gpu", lambda: found)
    return found


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch, gpu: fake.FakeGpu) -> Any:
    """The stand-in, where `import tensorrt` finds it."""
    found = fake.module()
    monkeypatch.setitem(sys.modules, "tensorrt", found)
    return found


@pytest.fixture
def make(exports: dict[str, Path], tmp_path: Path, trt: Any) -> Callable[..., Path]:
    """Build an engine: make("per-token", length=64) -> folder."""

    def engine(form: str = "per-token", **limits: int) -> Path:
        build(exports[form], tmp_path / form, LIMITS | limits)
        return tmp_path / form

    return engine
