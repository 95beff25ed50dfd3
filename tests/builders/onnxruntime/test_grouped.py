"""Grouped attention: what it is refused for. That it computes the same, in any company: `tests.families`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from builders.onnxruntime import build
from builders.onnxruntime.record import GROUPED
from exporters.export import Source, export
from smoothquant.errors import UserError
from smoothquant.model import Model
from smoothquant.settings import SmoothingSettings
from tests.builders.engines import refused_line
from tests.writers import onnx_writer


def test_an_attention_that_is_one_operator_is_refused(llama: Model, tmp_path: Path) -> None:
    source = Source(llama, SmoothingSettings(groups="none"))
    export(source, [onnx_writer(tmp_path / "onnx", "float", opset=23)])
    line = refused_line(lambda made, out: build(made, out, attention=GROUPED), tmp_path / "onnx", tmp_path / "engine")
    assert "the attention of layer 0" in line
    assert "--attention standard" in line


def test_it_is_for_the_processor(exports: Mapping[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="grouped attention on cuda; expected the provider cpu"):
        build(exports["float"], tmp_path / "engine", provider="cuda", attention=GROUPED)
    assert not (tmp_path / "engine").exists()
