"""What `smoothquant build tensorrt` says of what it built."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builders.tensorrt import timing
from recipes.cli import build_tensorrt, main
from smoothquant.outputs import load_manifest

DOWN = "model.layers.1.mlp.down_proj"
Ran = tuple[int, list[str], list[str]]


@pytest.fixture
def run(exports: dict[str, Path], tmp_path: Path, trt: Any, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Build an engine from the command line: run("--quiet") -> status, lines of output, lines of errors."""

    def built(*arguments: str) -> Ran:
        made = [str(exports["per-token"]), "--out", str(tmp_path / "engine"), "--max-length", "64", "--fp32"]
        status = main(["build", "tensorrt", *made, *arguments])
        found = capsys.readouterr()
        return status, found.out.splitlines(), found.err.splitlines()

    return built


def test_a_float32_body_has_to_be_asked_for(
    exports: dict[str, Path], tmp_path: Path, trt: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    made = ["build", "tensorrt", str(exports["per-token"]), "--out", str(tmp_path / "engine"), "--max-length", "64"]
    assert main([*made, "--quiet"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "expected a body of fp16 or bf16; export with smoothquant export onnx --for tensorrt, or build it" in line
    assert not (tmp_path / "engine").exists()


def test_all_products_are_int8(run: Callable[..., Ran], tmp_path: Path) -> None:
    status, out, errors = run("--quiet")
    assert (status, errors) == (0, [])
    assert "8 of 8 quantized products are INT8 kernels" in out
    assert out[-1].startswith(f"{tmp_path / 'engine'}: try  smoothquant generate")


@pytest.mark.parametrize("form", ["--quiet", "--json"])
def test_a_float_product_is_the_last_thing_said(form: str, run: Callable[..., Ran], trt: Any) -> None:
    """With its reason, and whatever else is not shown; TensorRT may be right, so it is no failure."""
    trt.faults.float_nodes.add(f"{DOWN}/MatMul")
    status, out, errors = run(form)
    why = f"layer {DOWN}/MatMul (gemm) reads Float"
    assert (status, errors[-1]) == (0, f"warning: not INT8: {DOWN}: {why}")
    if form == "--json":
        assert json.loads("\n".join(out))["manifest"]["results"]["kernels"]["int8"] == 7
    else:
        assert "7 of 8 quantized products are INT8 kernels" in out


def test_many_float_products(
    run: Callable[..., Ran], trt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_tensorrt, "SHOWN", 3)
    run("--quiet")
    modules = [product["module"] for product in load_manifest(tmp_path / "engine").results["kernels"]["products"]]
    trt.faults.float_nodes |= {f"{module}/MatMul" for module in modules}
    trt.__version__ = "11.2.1.2"
    status, _, errors = run("--quiet", "--overwrite")
    assert status == 0
    assert [line.split(": ")[2] for line in errors[:-1]] == modules[:3]
    assert errors[-1] == f"warning: not INT8: 5 more, in {tmp_path / 'engine'}/smoothquant/manifest.json"


def test_a_timing_cache_that_was_not_written(
    run: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "write", lambda config, path: f"{path}: not written")
    status, _, errors = run("--quiet", "--timing-cache", str(tmp_path / "times.cache"))
    assert (status, errors) == (0, [f"warning: {tmp_path / 'times.cache'}: not written"])
