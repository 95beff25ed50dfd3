"""Several formats in one pass: the bytes of as many exports, and the work of one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from torch import Tensor

from exporters.export import Source, Writer, export
from exporters.huggingface import SmoothedWriter, W8A8Writer
from exporters.trtllm import Ranks, TrtllmWriter, choose
from smoothquant import stream
from smoothquant.checkpoint import Checkpoint
from smoothquant.errors import OutputError
from smoothquant.model import Model
from smoothquant.scheme import scheme_of
from tests.exporters.trtllm.checkpoints import makers
from tests.plans import source_with_plan
from tests.writers import onnx_writer, w8a8_writer

STATIC = scheme_of("per-tensor")
LAYOUTS: dict[str, dict[str, object]] = {
    "llama": {},
    "bloom": {},
    "falcon-40b": {},
    "opt": {},
    "mixtral": {},
    "phi3": {},
}


def writers(layout: str, out: Path) -> list[Writer]:
    """All formats that a layout has, each in its folder. OPT is static in TensorRT-LLM, and Mixtral is not there."""
    found: list[Writer] = [
        W8A8Writer(out / "w8a8"),
        onnx_writer(out / "onnx", "both", "fp16", lm_head="int8"),
        w8a8_writer(out / "static", "per-tensor"),
        SmoothedWriter(out / "hf"),
    ]
    if layout == "opt":
        found.append(TrtllmWriter(out / "trtllm", choose(STATIC)))
    elif layout != "mixtral":
        found.append(TrtllmWriter(out / "trtllm", ranks=Ranks(tp=1, pp=2)))
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return makers(tmp_path_factory, LAYOUTS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_bytes_of_single_exports(layout: str, make: Any, tmp_path: Path) -> None:
    source: Source = make(layout)
    export(source, writers(layout, tmp_path / "together"))
    for writer in writers(layout, tmp_path / "alone"):
        export(source, [writer])
    assert contents(tmp_path / "together") == contents(tmp_path / "alone")
