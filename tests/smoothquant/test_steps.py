"""A step between smoothing and storing: what an export did with it, validation does again, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from act_scales.text import Text
from builders.validate import read_scheme, validate_engines
from builders.validate.scheme import EngineScheme
from exporters.export import Source, export
from exporters.huggingface import W8A8Writer
from exporters.onnx import OnnxWriter
from smoothquant.errors import OutputError, UserError
from smoothquant.fold import SmoothedLayer
from smoothquant.layers import float_layer
from smoothquant.model import Model
from smoothquant.settings import SmoothingSettings
from smoothquant.steps import DEFAULT, STEPS, BorrowRanges, as_records, from_records
from smoothquant.stream import quantize_layer
from smoothquant.workspace import load_manifest
from tests.models import sample_ids
from tests.steps import KNOWN, ClipRows, Shrink


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, step in KNOWN.items():
        monkeypatch.setitem(STEPS, name, step)


@pytest.fixture
def source(llama: Model, input_absmax: dict[str, Tensor]) -> Source:
    fingerprints = {"model": llama.checkpoint.fingerprint}
    steps = (*DEFAULT, ClipRows(0.9))
    return Source(llama, SmoothingSettings(0.5), input_absmax, fingerprints, steps=steps)


def same_weights(model: Model, scheme: EngineScheme, folder: Path) -> list[bool]:
    """Of every linear: whether the scheme's int8 weight and its scales are those in the file."""
    found = []
    with safe_open(folder / "model.safetensors", "pt") as file:
        for index in range(model.geometry.layers):
            layer = scheme.layer(model, index, float_layer(model, index))
            for linear in quantize_layer(layer).linears.values():
                assert linear.input_scale is not None
                found.append(
                    linear.weight.equal(file.get_tensor(f"{linear.name}.weight"))
                    and linear.weight_scale[:, None].equal(file.get_tensor(f"{linear.name}.weight_scale"))
                    and linear.input_scale.reshape(1).equal(file.get_tensor(f"{linear.name}.input_scale"))
                )
    return found


def test_validation_has_the_weights_of_the_export(source: Source, tmp_path: Path) -> None:
    export(source, [W8A8Writer(tmp_path / "out", "per-tensor")])
    manifest, scheme = load_manifest(tmp_path / "out"), read_scheme(tmp_path / "out")
    assert manifest.inputs["steps"] == [{"name": "borrow-ranges"}, {"name": "clip-rows", "quantile": 0.9}]
    assert manifest.contract is not None
    assert manifest.contract.logits_relative_error <= manifest.contract.tolerance  # smoothing alone is measured
    assert scheme.steps == source.steps
    assert all(same_weights(source.model, scheme, tmp_path / "out"))
    assert not any(same_weights(source.model, replace(scheme, steps=DEFAULT), tmp_path / "out"))  # the control


def test_what_steps_make_of_ranges_is_read_and_not_made_again(source: Source, tmp_path: Path) -> None:
    export(replace(source, steps=(Shrink(), ClipRows(0.9), Shrink())), [W8A8Writer(tmp_path / "out", "per-tensor")])
    assert all(same_weights(source.model, read_scheme(tmp_path / "out"), tmp_path / "out"))


def test_the_engine_that_exists_is_measured(source: Source, tmp_path: Path) -> None:
    """Our own arithmetic with the recorded steps is the engine's; without them it is another engine's."""
    export(source, [OnnxWriter(tmp_path / "clipped")])
    export(replace(source, steps=DEFAULT), [OnnxWriter(tmp_path / "plain")])
    text = Text(tuple(sample_ids(sequences=2, tokens=24)), "sample")
    folders = {"clipped": tmp_path / "clipped", "plain": tmp_path / "plain"}
    clipped, plain = validate_engines(folders, source.model, text, exact=True)
    for found in (clipped, plain):
        assert found.exactness is not None
        assert found.exactness.engine <= 2e-5
    assert clipped.metrics.kl_mean > 2 * plain.metrics.kl_mean  # a tenth of the weights are cut
    for cut, whole in zip(clipped.linears, plain.linears, strict=True):
        assert cut.sqnr < whole.sqnr, cut.name


def test_other_steps_are_another_export(source: Source, tmp_path: Path) -> None:
    export(source, [W8A8Writer(tmp_path / "out")])
    with pytest.raises(OutputError, match="not made by this command with these inputs"):
        export(replace(source, steps=DEFAULT), [W8A8Writer(tmp_path / "out")])
    first = read_scheme(tmp_path / "out").key
    export(replace(source, steps=DEFAULT), [W8A8Writer(tmp_path / "out")], overwrite=True)
    assert read_scheme(tmp_path / "out").key != first


def test_records() -> None:
    steps = (BorrowRanges(), ClipRows(0.5))
    assert from_records(as_records(steps)) == steps
    with pytest.raises(UserError, match="step 'knit' between smoothing and storing; expected one of borrow-ranges"):
        from_records([{"name": "knit"}])
    with pytest.raises(UserError, match="step 'clip-rows': key 'quantile' is missing"):
        from_records([{"name": "clip-rows"}])
    with pytest.raises(UserError, match="step 'borrow-ranges': unknown key 'from'"):
        from_records([{"name": "borrow-ranges", "from": "q"}])


def test_a_step_that_validation_would_not_know(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused by the export, not by the validation of a folder that is there."""
    monkeypatch.delitem(STEPS, ClipRows.name)
    with pytest.raises(
        UserError, match=r"step 'clip-rows' .* is not entered in smoothquant\.steps\.STEPS; expected one"
    ):
        export(source, [W8A8Writer(tmp_path / "out")])
    assert not list(tmp_path.iterdir())


def test_a_step_leaves_the_layer_that_it_is_given(llama: Model) -> None:
    source, silent = float_layer(llama, 0), {"up.0": torch.zeros(4), "up.1": torch.tensor([1.0, 3.0, 2.0, 0.0])}
    layer = SmoothedLayer(llama, 0, source, source.norms, dict(silent))
    borrowed = BorrowRanges()(layer).input_absmax
    assert borrowed["up.0"].tolist() == [3, 3, 3, 3]
    assert borrowed["up.1"].equal(silent["up.1"])
    assert not layer.input_absmax["up.0"].any()
