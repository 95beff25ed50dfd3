"""Exports of one tiny Llama, made once. Tests that break something work on a copy."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from exporters.export import Source, export
from smoothquant.model import Model
from smoothquant.settings import SmoothingSettings
from tests.writers import onnx_writer

FORMS = {
    "float": {"activations": "float"},
    "per-token": {"activations": "per-token"},
    "per-tensor": {"activations": "per-tensor", "lm_head": "int8"},
}


@pytest.fixture(scope="session")
def exports(
    llama: Model, input_absmax: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """ONNX exports by form. Read only."""
    folder = tmp_path_factory.mktemp("exports")
    source = Source(llama, SmoothingSettings(0.5), input_absmax, {"model": "m", "act_scales": "a"})
    export(source, [onnx_writer(folder / name, **options) for name, options in FORMS.items()])
    return {name: folder / name for name in FORMS}


@pytest.fixture
def copy_of(exports: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of an export, to break: copy_of("per-token") -> folder."""

    def copy(form: str) -> Path:
        shutil.copytree(exports[form], tmp_path / "export")
        return tmp_path / "export"

    return copy
