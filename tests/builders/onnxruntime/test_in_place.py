"""An engine whose cache is written in place: the tokens of one whose cache grows, and a line for what it cannot do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy
import pytest
import torch

from builders import openvino
from builders.onnxruntime import build
from builders.onnxruntime.engine import OnnxRuntimeEngine
from builders.onnxruntime.genai import GENAI
from builders.onnxruntime.record import GROUPED
from builders.serving.triton import check_cache
from exporters.export import Source, export
from smoothquant.errors import UserError
from smoothquant.model import Model
from smoothquant.settings import SmoothingSettings
from tests.models import sample_ids
from tests.writers import onnx_writer

CAPACITY = 48


@pytest.fixture(scope="module")
def engines(llama: Model, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, OnnxRuntimeEngine]:
    root, found = tmp_path_factory.mktemp("in-place"), {}
    for name, capacity in (("grown", None), ("place", CAPACITY)):
        source = Source(llama, SmoothingSettings(groups="none"))
        export(source, [onnx_writer(root / f"{name}.onnx", capacity=capacity)])
        build(root / f"{name}.onnx", root / name)
        found[name] = OnnxRuntimeEngine(root / name)
    return found


def test_it_generates_the_same_tokens(engines: Mapping[str, OnnxRuntimeEngine]) -> None:
    for prompt in sample_ids(3, 20, seed=5).tolist():
        grown, place = (list(engine.generate(prompt, CAPACITY - 20)) for engine in engines.values())
        assert grown == place
    ids = sample_ids(2, CAPACITY, seed=6)
    grown, place = (engine.logits(ids) for engine in engines.values())
    torch.testing.assert_close(place, grown, rtol=1e-4, atol=1e-4)


def test_sequences_of_different_lengths_take_a_step_together(engines: Mapping[str, OnnxRuntimeEngine]) -> None:
    """One joins as another leaves, and one begins as a copy."""
    slots, tokens = engines["place"].slots(3, CAPACITY), sample_ids(3, 24, seed=7).numpy()
    assert slots.together
    first, second = slots.open(), slots.open()
    slots.append(first, tokens[0, :11].tolist())
    slots.append(second, tokens[1, :4].tolist())
    slots.step({first: tokens[0, 11], second: tokens[1, 4]})
    third = slots.fork(second, 4)
    slots.close(first)
    found = slots.step({second: tokens[1, 5], third: tokens[2, 0]})
    alone = engines["grown"].empty()
    numpy.testing.assert_allclose(found[second], alone.append(tokens[1, :6].tolist())[-1], rtol=1e-4, atol=1e-4)
    alone = engines["grown"].empty()
    both = [*tokens[1, :4].tolist(), int(tokens[2, 0])]
    numpy.testing.assert_allclose(found[third], alone.append(both)[-1], rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused(engines: Mapping[str, OnnxRuntimeEngine]) -> None:
    engine = engines["place"]
    with pytest.raises(UserError, match=f"at most {CAPACITY} tokens together"):
        next(engine.generate([1] * CAPACITY, 1))
    with pytest.raises(
        UserError, match=f"expected at most {CAPACITY}, the capacity of its cache; export it with a larg"
    ):
        engine.logits(sample_ids(1, CAPACITY + 1))
    decoding = engine.start([1] * CAPACITY)
    with pytest.raises(UserError, match=f"a sequence of {CAPACITY + 1} tokens; expected at most {CAPACITY}"):
        decoding.step(1)
    assert engine.cache_bytes(2, 8) == 2 * 2 * 2 * 16 * 4 * 2 * CAPACITY  # of a buffer, not of a sequence


def test_who_cannot_run_it(engines: Mapping[str, OnnxRuntimeEngine], tmp_path: Path) -> None:
    engine = engines["place"].folder
    made = engine.parent / "place.onnx"
    assert not (engine / GENAI).exists()
    with pytest.raises(
        UserError, match=r"the provider cuda; expected the provider cpu .*export without --cache in-place"
    ):
        OnnxRuntimeEngine(engine, provider="cuda")
    with pytest.raises(UserError, match=r"with grouped attention; expected the provider cpu and standard attention"):
        build(made, tmp_path / "grouped", attention=GROUPED)
    for folder in (engine, made):
        with pytest.raises(UserError, match=r"configuration of Triton does not run; .*export it again without --cache"):
            check_cache(folder)


def test_openvino_does_not_run_it(engines: Mapping[str, OnnxRuntimeEngine], tmp_path: Path) -> None:
    made = engines["place"].folder.parent / "place.onnx"
    with pytest.raises(UserError, match=r"OpenVINO .* does not run; .*export it again without --cache in-place"):
        openvino.build(made, tmp_path / "openvino")
