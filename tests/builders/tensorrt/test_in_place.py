"""An engine whose cache is written in place: past and present at one address, and no shape that grows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from builders.onnxruntime import OnnxRuntimeEngine
from builders.tensorrt.build import build
from builders.tensorrt.compare import compare
from builders.tensorrt.engine import TensorRTEngine
from builders.tensorrt.limits import Limits, limits_for
from exporters.export import Source, export
from smoothquant.artifacts.manifest import ModelFacts
from smoothquant.errors import UserError
from smoothquant.model import Model
from smoothquant.settings import SmoothingSettings
from tests.models import sample_ids
from tests.writers import onnx_writer

CAPACITY, PROMPT = 40, [256, 5, 6, 7, 40, 41]
FACTS = ModelFacts(64, 2, 4, 2, 16, 288, 512, 16)


@pytest.fixture
def exported(llama: Model, tmp_path: Path) -> Path:
    source = Source(llama, SmoothingSettings(groups="none"))
    export(source, [onnx_writer(tmp_path / "onnx", capacity=CAPACITY)])
    return tmp_path / "onnx"


def test_it_generates_what_onnx_runtime_does(exported: Path, trt: Any, tmp_path: Path) -> None:
    build(exported, tmp_path / "engine", {"batch": 3, "chunk": 4})
    engine, runtime = TensorRTEngine(tmp_path / "engine"), OnnxRuntimeEngine(exported)
    assert engine.longest == CAPACITY
    trt.calls.clear()
    tokens = list(engine.generate(PROMPT, CAPACITY - len(PROMPT)))
    assert tokens == list(runtime.generate(PROMPT, CAPACITY - len(PROMPT)))
    runs = [call[1:] for call in trt.calls if call[0] == "run"]
    assert runs[:4] == [(0, (1, 2), (0,)), (0, (1, 4), (2,)), (1, (1, 1), (6,)), (1, (1, 1), (7,))]
    ids = sample_ids(4, CAPACITY)
    found, expected = engine.logits(ids), runtime.logits(ids)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    decoding = engine.start([1] * CAPACITY)
    with pytest.raises(UserError, match=f"a sequence of {CAPACITY + 1} tokens; expected at most {CAPACITY}"):
        decoding.step(1)


def test_outputs_beside_onnx_runtime(exported: Path, trt: Any, tmp_path: Path) -> None:
    pytest.importorskip("polygraphy")
    build(exported, tmp_path / "engine", {"chunk": 8})
    differences = compare(exported, TensorRTEngine(tmp_path / "engine"), tokens=7)
    assert {(one.run, one.output) for one in differences} >= {("prefill", "logits"), ("decode", "present.1.key")}
    assert max(one.absolute for one in differences) <= 1e-4


def test_limits() -> None:
    """The capacity is the length, and windows forget nothing."""
    assert limits_for(FACTS, capacity=40) == Limits(1, 40, 40, 40, 19, None, 40)
    assert limits_for(FACTS, capacity=40, length=30).length == 30
    with pytest.raises(UserError, match="--max-length 41; expected 2 to 40, the capacity of the export's cache"):
        limits_for(FACTS, capacity=40, length=41)
    with pytest.raises(UserError, match="--usual-context 5; expected none for a cache that is written in place"):
        limits_for(FACTS, capacity=40, usual_context=5)


def test_integers_are_refused(llama: Model, tmp_path: Path) -> None:
    absmax = {name: torch.ones(shape[1]) for name, shape in llama.linears()}
    outputs = {name: torch.ones(shape[0]) for name, shape in llama.linears()}
    source = replace(Source(llama, SmoothingSettings(groups="none"), absmax), output_absmax=outputs)
    export(source, [onnx_writer(tmp_path / "onnx", kv="int8", capacity=CAPACITY)])
    with pytest.raises(UserError, match=r"its cache is in int8 and written in place; expected one in float"):
        build(tmp_path / "onnx", tmp_path / "engine")
