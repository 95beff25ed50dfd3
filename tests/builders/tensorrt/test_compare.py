"""Outputs of an engine beside ONNX Runtime's, by Polygraphy."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("polygraphy")

from builders.tensorrt.compare import compare
from builders.tensorrt.engine import TensorRTEngine
from smoothquant.errors import MissingPackageError
from tests.builders.tensorrt import fake

OUTPUTS = {"logits", *(f"present.{layer}.{part}" for layer in (0, 1) for part in ("key", "value"))}


def test_every_output_of_prefill_and_decode(
    make: Callable[..., Path], exports: dict[str, Path], trt: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = TensorRTEngine(make("per-token"))
    trt.calls.clear()
    found = compare(exports["per-token"], engine, tokens=12)
    assert {(one.run, one.output) for one in found} == {
        (run, name) for run in ("prefill", "decode") for name in OUTPUTS
    }
    assert all(one.absolute == one.relative == one.typical == 0 for one in found)  # the stand-in computes alike
    ran = [call[1:] for call in trt.calls if call[0] == "run"]
    assert ran == [(0, (1, 12), (1, 12)), (1, (1, 1), (1, 13))]
    assert capsys.readouterr() == ("", "")


def test_a_difference_is_measured(
    make: Callable[..., Path], exports: dict[str, Path], trt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TensorRTEngine(make("float"))
    original = fake.Context.execute_async_v3

    def off_by_a_half(self: fake.Context, stream: int) -> bool:
        done = original(self, stream)
        logits = next(tensor for tensor in self.engine.outputs if tensor.name == "logits")
        self._array(logits, (*self.shapes["input_ids"], logits.shape[-1]))[0, 0, 3] += 0.5
        return done

    monkeypatch.setattr(fake.Context, "execute_async_v3", off_by_a_half)
    for one in compare(exports["float"], engine, tokens=12):
        assert one.absolute == pytest.approx(0.5 if one.output == "logits" else 0)
        assert one.typical == 0


def test_without_polygraphy(
    make: Callable[..., Path], exports: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TensorRTEngine(make("float"))
    monkeypatch.setitem(sys.modules, "polygraphy.comparator", None)
    with pytest.raises(MissingPackageError, match="pip install polygraphy"):
        compare(exports["float"], engine)
