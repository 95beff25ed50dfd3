"""smoothquant check: the command line around the linter and the compiler."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import pytest

from builders.check.lint import RULES
from builders.check.tensorrt_rtx import available, packages
from builders.check.tensorrt_rtx.packages import bindings
from builders.onnxruntime import build
from recipes.abilities import COMMANDS
from recipes.cli import main
from smoothquant.workspace import MANIFEST
from tests.builders.check.lint.graphs import LINEAR, PRODUCT, W, X, graph, saved
from tests.exporters.onnx.graphs import FLOAT, export_onnx, source_of
from tests.lacking import with_compiler
from tests.outputs import write_manifest

COMPILER = ("--compiler", "tensorrt-rtx")


@pytest.fixture(scope="module")
def exported(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(source_of(llama_folder), tmp_path_factory.mktemp("check") / "onnx")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    ended = signal.getsignal(signal.SIGTERM)
    status = main(["check", *map(str, arguments)])
    signal.signal(signal.SIGTERM, ended)  # the command line sets its own
    found = capsys.readouterr()
    return status, found.out, found.err


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Status, and the one line on stderr."""
    status, _, err = run(capsys, *arguments, "--quiet")
    [line] = err.strip().splitlines()
    assert line.startswith("smoothquant: ")
    return status, line


def test_an_export_and_its_engine_are_fine(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(exported, tmp_path / "engine")
    for place in (exported, tmp_path / "engine", exported / "model.onnx"):
        status, out, _ = run(capsys, place)
        file = place if place.suffix else place / "model.onnx"
        said = f"{file}: 8 quantized products; nothing to find fault with\nin floating point: lm_head\n"
        assert (status, out) == (0, said)


@with_compiler
def test_the_compiler_prints_its_table(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, exported, *COMPILER, "--layers")
    assert status == 0
    assert "8 of 8 quantized products are INT8 matrix products" in out
    assert "INT8 matrix products" in out
    assert "model.layers.1.mlp.down_proj/MatMul" in out
    assert "plan " in out
    assert "compiling" in err


@with_compiler
def test_json(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, exported, *COMPILER, "--json", "--max-batch", 2, "--chunk", 32, "--max-length", 64)
    assert status == 0
    assert json.loads(out)["passed"]
    [content] = json.loads(out)["graphs"]
    assert content["passed"]
    assert content["findings"] == []
    assert [verdict["int8"] for verdict in content["verdicts"]] == [True] * 8
    assert content["compilation"]["activation_bytes"] > 0
    assert {layer["kind"] for layer in content["compilation"]["layers"]} >= {"gemm", "kgen"}


def test_both_forms_of_an_export(llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export_onnx(source_of(llama_folder), tmp_path / "both", activations="both")
    capsys.readouterr()  # transformers' progress
    status, out, _ = run(capsys, tmp_path / "both")
    assert status == 0
    assert [line.partition(":")[0] for line in out.splitlines()[::2]] == [
        str(tmp_path / "both" / name) for name in ("model.onnx", "model.per-tensor.onnx")
    ]


def test_a_float_export(llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = export_onnx(source_of(llama_folder), tmp_path / "float", **FLOAT)
    capsys.readouterr()  # transformers' progress
    status, line = refused(capsys, out)
    assert status == 1
    assert "no matrix product is quantized (no int8 weight behind DequantizeLinear); make it with smoothquant" in line


def test_faults_are_printed_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = f"""{X} wd = DequantizeLinear(w, w_scale_zero) [layer__linear__MatMul] h = MatMul(xd, wd)
        [layer__act__FastGelu] y = com.microsoft.FastGelu(h)"""
    path = saved(graph(body), tmp_path)
    status, out, err = run(capsys, path)
    assert status == 1
    assert "error (contrib-operator): layer/act: the operator com.microsoft.FastGelu is not standard ONNX" in out
    assert "error (scale-positive)" in out
    assert "warning (axis)" in out
    assert re.search(r"\n    TensorRT refuses the graph: .*positive", out)
    assert err.endswith("(and 1 more)\n")
    status, out, _ = run(capsys, path, "--json")
    assert status == 1
    assert [finding["effect"] for finding in json.loads(out)["graphs"][0]["findings"]] == [
        "refused",
        "refused",
        "worse",
    ]


@with_compiler
def test_a_product_that_is_not_int8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(graph(f"{X} h = Relu(xd) {W} [layer__linear__MatMul] y = MatMul(h, wd)"), tmp_path)
    status, out, err = run(capsys, path, *COMPILER)
    assert status == 1
    assert f"not INT8: {LINEAR}: Relu stands between DequantizeLinear and the product" in out
    assert "0 of 1 quantized products are INT8 matrix products" in out
    assert f"{LINEAR}: Relu stands between" in err


@with_compiler
def test_a_graph_that_the_compiler_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(graph(f"{X} h = Identity(w) wd = DequantizeLinear <axis = 1> (h, w_scale) {PRODUCT}"), tmp_path)
    status, out, _ = run(capsys, path, *COMPILER)
    assert status == 1
    assert "TensorRT-RTX 1.7" in out
    assert "refuses the graph" in out


def test_missing_data(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of our folders the manifest knows it; of others the graph. The compiler is not asked."""
    shutil.copytree(exported, tmp_path / "copy")
    (tmp_path / "copy/model.onnx.data").unlink()
    assert refused(capsys, tmp_path / "copy", *COMPILER)[0] == 2
    (tmp_path / "copy" / MANIFEST).unlink()
    if available():
        status, line = refused(capsys, tmp_path / "copy", *COMPILER)
        assert status == 1
        assert f"model.onnx.data is missing; put the whole file into {tmp_path / 'copy'}" in line


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--tensorrt", "new"), "--tensorrt new; expected a version from 8 on, such as 10.3"),
        (("--tensorrt", "7.2"), "--tensorrt 7.2; expected a version from 8 on"),
        (("--chunk", "64"), "--chunk without --compiler; expected --compiler tensorrt-rtx with it"),
        (("--layers",), "--layers without --compiler; expected --compiler tensorrt-rtx with it, or a TensorRT engine"),
        ((*COMPILER, "--max-batch", "0"), "--max-batch 0; expected 1 or more"),
        ((*COMPILER, "--chunk", "64", "--max-length", "64"), "--max-length 64; expected more than the --chunk, 64"),
    ],
)
def test_options(options: tuple, said: str, exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, line = refused(capsys, exported, *options)
    assert status == 2
    assert said in line


def test_bad_input(tmp_path: Path, llama_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, tmp_path / "nowhere") == (
        2,
        f"smoothquant: {tmp_path / 'nowhere'}: no such file; expected an ONNX file, or a folder with model.onnx",
    )
    assert "no such file" in refused(capsys, llama_folder)[1]
    (tmp_path / "text.onnx").write_text("import this")
    assert "text.onnx: not an ONNX model" in refused(capsys, tmp_path / "text.onnx")[1]
    write_manifest(tmp_path, "calibrate")
    status, line = refused(capsys, tmp_path)
    assert status == 2
    assert "made by 'calibrate', which there is no check for; expected an ONNX file, a TensorRT-LLM checkpoint" in line


def test_rules_are_printed_with_their_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--rules")
    assert status == 0
    for rule in RULES:
        assert f"{rule.id}: {rule.demands}\n    else {rule.effect.value}: {rule.because}\n" in out
    status, out, _ = run(capsys, "--rules", "--json")
    assert [rule["id"] for rule in json.loads(out)["rules"]] == [rule.id for rule in RULES]
    assert refused(capsys) == (2, "smoothquant: nothing to check; expected a folder or an .onnx file, or --rules")


def test_an_older_tensorrt(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, exported, "--tensorrt", "8.6.1")
    assert status == 0
    assert "warning (opset): model.onnx: opset 21 is newer than TensorRT 8.6 knows (17)" in out


def test_without_the_compiler(
    exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    bindings.cache_clear()
    status, line = refused(capsys, exported, *COMPILER)
    bindings.cache_clear()
    assert status == 3
    assert line.endswith(f"pip install {packages.VERSIONS}")


def test_versions_are_the_same_everywhere() -> None:
    """In the message, the extra, the constraints, and what doctor looks for."""
    root = Path(__file__).parents[2]
    for file in ("pyproject.toml", "constraints.txt"):
        assert all(version in (root / file).read_text() for version in packages.VERSIONS.split())
    assert tuple(packages.VERSIONS.split()) in [needs for _, needs, *_ in COMMANDS]
    assert all(package in packages.VERSIONS for package in packages.PACKAGES.values())


@pytest.mark.parametrize("options", [COMPILER, ("--tensorrt", "8.6")])
def test_options_of_graphs(options: tuple, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A TensorRT-LLM checkpoint is no graph."""
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "LlamaForCausalLM", "quantization": {}}))
    (tmp_path / "rank0.safetensors").touch()
    status, line = refused(capsys, tmp_path, *options)
    assert status == 2
    assert f"{tmp_path} with {options[0]}; expected an ONNX graph" in line
