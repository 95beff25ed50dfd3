"""Graphs of other opsets: what the linter says of them is what the compiler does."""

from __future__ import annotations

from pathlib import Path

import pytest

from builders.check import check
from builders.check.lint import Effect
from builders.check.tensorrt_rtx import compile_onnx
from builders.nvidia.profiles import single_profile
from exporters.export import export
from tests.families.case import Case
from tests.lacking import with_compiler
from tests.writers import onnx_writer

CAPPED = "gemma2"  # its attention has a softcap


@with_compiler
@pytest.mark.parametrize("layout", ["llama", CAPPED, "falcon-rw", "mixtral"])
def test_opsets(layout: str, tmp_path: Path) -> None:
    """17 compiles as 21 does; 23, with the operator Attention, in half bodies and without a softcap."""
    source = Case(layout, tmp_path).source
    for opset in (17, 23):
        for body in ("fp32", "fp16"):
            out = tmp_path / f"{opset}-{body}"
            export(source, [onnx_writer(out, body=body, opset=opset)])
            found = check(out, compile=lambda g: compile_onnx(g.path, single_profile(4, 128, 128), g.symbols))
            assert found.compilation is not None
            refused = opset == 23 and (body == "fp32" or layout == CAPPED)
            assert bool(found.compilation.errors) == refused
            assert {finding.effect for finding in found.findings} == ({Effect.REFUSED} if refused else set())
            assert not found.lost
            assert len(found.verdicts) == (0 if refused else len(found.products))
