"""smoothquant check of an engine folder: its products, and its outputs beside ONNX Runtime's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builders import onnxruntime
from builders.tensorrt.build import build as build_tensorrt
from tests.builders.tensorrt.conftest import LIMITS
from tests.recipes.test_check import run

DOWN = "model.layers.1.mlp.down_proj"


def checked(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()  # of what was built
    return run(capsys, *arguments, "--quiet")


def test_every_product_is_int8(make: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = checked(capsys, make("per-token"), "--layers")
    assert status == 0
    assert "8 of 8 quantized products are INT8 kernels" in out
    assert f"{DOWN}/MatMul" in out


def test_a_lost_product_fails(
    exports: dict[str, Path], tmp_path: Path, trt: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    trt.faults.float_nodes = {f"{DOWN}/MatMul"}
    build_tensorrt(exports["per-token"], tmp_path / "engine", LIMITS)
    status, out, err = checked(capsys, tmp_path / "engine")
    assert status == 1
    assert "7 of 8 quantized products are INT8 kernels" in out
    [line] = err.splitlines()
    assert line.startswith(f"smoothquant: {tmp_path / 'engine'}: {DOWN} is not INT8: layer ")
    status, out, _ = checked(capsys, tmp_path / "engine", "--json")
    assert status == 1
    assert not json.loads(out)["passed"]


def test_outputs_beside_onnxruntimes(
    make: Callable[..., Path], exports: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("polygraphy")
    engine = make("per-token")
    onnxruntime.build(exports["per-token"], tmp_path / "onnxruntime")
    for graph in (exports["per-token"], tmp_path / "onnxruntime"):
        status, out, err = checked(capsys, engine, "--against", graph, "--json")
        assert (status, err) == (0, "")
        outputs = json.loads(out)["outputs"]
        assert {one["run"] for one in outputs} == {"prefill", "decode"}
        assert all(one["absolute"] == 0 for one in outputs)  # the stand-in computes alike
    status, out, _ = checked(capsys, engine, "--against", exports["per-token"])
    assert "0.00e+00" in out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--compiler", "tensorrt-rtx"), "per-token with --compiler; expected an ONNX graph; check the export"),
        (("--against", "per-tensor"), "differ in "),
        (("--against", "nowhere"), "nowhere"),
    ],
)
def test_bad_options(
    options: tuple[str, str],
    said: str,
    make: Callable[..., Path],
    exports: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, _, err = checked(capsys, make("per-token"), options[0], exports.get(options[1], options[1]))
    assert status == 2
    [line] = err.splitlines()
    assert said in line


def test_only_engines_are_compared(exports: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = checked(capsys, exports["float"], "--against", exports["float"])
    assert status == 2
    assert "with --against; expected a folder made by smoothquant build tensorrt" in err
