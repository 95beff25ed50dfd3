"""LongRoPE: one set of frequencies is chosen when a model is opened, and nothing built on it takes longer sequences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from act_scales.collect import collect
from act_scales.text import Text
from builders.onnxruntime import OnnxRuntimeEngine, build
from builders.validate import validate_engines
from exporters.export import Source, export
from recipes.families import open_model
from smoothquant.errors import OutputError, UserError
from smoothquant.model import Model
from smoothquant.settings import SmoothingSettings
from tests import zoo
from tests.models import sample_ids
from tests.writers import onnx_writer

SHORT, LONG = 256, 512  # of the layout: the original length, and the whole


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.save("phi3-longrope", tmp_path_factory.mktemp("longrope"))


@pytest.fixture(scope="module")
def opened(folder: Path) -> Callable[[int | None], Model]:
    return lambda length: open_model(folder, length=length)


@pytest.mark.parametrize(
    ("length", "positions"), [(None, SHORT), (1, SHORT), (SHORT, SHORT), (SHORT + 1, LONG), (LONG, LONG)]
)
def test_the_length_that_is_wanted_chooses(length: int | None, positions: int, opened: Callable) -> None:
    model, short = opened(length), opened(None)
    assert model.geometry.max_positions == model.facts().max_positions == positions
    assert (model.geometry.attention == short.geometry.attention) == (positions == SHORT)
    assert model.choices == {"max_positions": positions}


def test_a_length_beyond_the_model(opened: Callable) -> None:
    for length in (0, LONG + 1):
        with pytest.raises(UserError, match=rf"--max-length {length}; expected 1 to {LONG}, this model's positions"):
            opened(length)


def test_a_length_changes_nothing_where_one_set_holds_for_all(tmp_path: Path) -> None:
    folder = zoo.save("llama", tmp_path)
    assert open_model(folder, length=100).geometry == open_model(folder).geometry
    assert open_model(folder).choices == {}


def test_calibration_beyond_the_short_frequencies_is_refused(opened: Callable, tmp_path: Path) -> None:
    text = Text((torch.arange(SHORT + 1) % 256,), "sample")
    with pytest.raises(UserError, match=f"{SHORT}, this model's positions"):
        collect(opened(None), text, tmp_path / "s.safetensors")
    short, long = (Text((ids,), "sample") for ids in (torch.arange(SHORT) % 256, text.sequences[0]))
    made = collect(opened(None), short, tmp_path / "s.safetensors", dtype="float32")
    with pytest.raises(OutputError):  # a file of the other frequencies is another file
        collect(opened(LONG), short, tmp_path / "s.safetensors", dtype="float32")
    other = collect(opened(LONG), long, tmp_path / "l.safetensors", dtype="float32")
    assert any(not torch.equal(made.input_absmax[name], other.input_absmax[name]) for name in made.input_absmax)


def exported(model: Model, out: Path) -> None:
    source = Source(model, SmoothingSettings(groups="none"), None, {"model": model.checkpoint.fingerprint})
    export(source, [onnx_writer(out, "float")])


def test_an_engine_ends_where_its_frequencies_do(opened: Callable, tmp_path: Path) -> None:
    for length in (SHORT, LONG):
        exported(opened(length), tmp_path / f"onnx-{length}")
        build(tmp_path / f"onnx-{length}", tmp_path / f"engine-{length}")
    engine = OnnxRuntimeEngine(tmp_path / f"engine-{SHORT}")
    assert engine.longest == SHORT
    with pytest.raises(UserError, match=rf"at most {SHORT} tokens together"):
        list(engine.generate([1] * (SHORT - 4), 5))
    assert OnnxRuntimeEngine(tmp_path / f"engine-{LONG}").longest == LONG
    with pytest.raises(OutputError):
        exported(opened(LONG), tmp_path / f"onnx-{SHORT}")

    text = Text(tuple(sample_ids(2, 24)), "sample")
    for length in (SHORT, LONG):
        [found] = validate_engines({"engine": tmp_path / f"engine-{length}"}, opened(length), text)
        assert found.metrics.relative_error < 1e-4
    with pytest.raises(
        UserError, match=rf"up to {SHORT} tokens; expected .* {LONG}; validate with --max-length {SHORT}"
    ):
        validate_engines({"engine": tmp_path / f"engine-{SHORT}"}, opened(LONG), text)
