"""Files with faults, and the order of findings; the rules themselves are in test_rules.py."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy
import onnx
import pytest

from builders.lint import Effect, OnnxGraph, lint, quantized_products
from smoothquant.errors import MissingPackageError, UserError
from tests.builders.lint.graphs import LINEAR, PRODUCT, W, X, graph, saved
from tests.exporters.onnx.graphs import FORMS, export_onnx, products, source_of

PLAIN = f"{X} {W} {PRODUCT}"


@pytest.fixture
def with_data(tmp_path: Path) -> Path:
    """A fine graph whose constants lie in a file beside it."""
    path = tmp_path / "model.onnx"
    onnx.save(graph(PLAIN), path, save_as_external_data=True, location="weights.bin", size_threshold=256)
    return path


def test_scales_are_read_from_external_data(with_data: Path) -> None:
    assert lint(with_data) == lint(with_data.parent) == []
    opened = OnnxGraph(with_data)
    scale = opened.array("w_scale")
    assert scale is not None
    with open(with_data.parent / "weights.bin", "r+b") as file:
        entry = {item.key: item.value for item in opened.stored["w_scale"].external_data}
        file.seek(int(entry["offset"]))
        file.write(numpy.zeros(3, numpy.float32).tobytes())
    [finding] = lint(with_data)
    assert finding.rule == "scale-positive"
    assert finding.what == "the scale w_scale holds 0, in 3 of 256 channels"


def test_missing_and_short_data(with_data: Path) -> None:
    data = with_data.parent / "weights.bin"
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    [finding] = lint(with_data)
    assert (finding.rule, finding.effect) == ("external-data", Effect.REFUSED)
    assert str(finding) == (
        f"weights.bin: the file of weights weights.bin has {len(whole) - 1} bytes of {len(whole)}; "
        f"put it, whole, into {data.parent}"
    )
    data.unlink()
    [finding] = lint(with_data)
    assert "weights.bin is missing" in finding.what


@pytest.mark.parametrize("content", [b"", b"\n", b"import this\n" * 9, b"\x08\x0a", b"\x00" * 64])
def test_what_is_no_onnx(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(UserError, match="no such file; expected an ONNX file, or a folder with"):
        lint(tmp_path)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model.onnx: not an ONNX model; expected a whole"):
        lint(path)


def test_a_truncated_file_is_no_onnx(tmp_path: Path) -> None:
    path = saved(graph(PLAIN), tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="not an ONNX model"):
        lint(path)


def test_invalid_onnx(tmp_path: Path) -> None:
    model = graph(PLAIN)
    model.graph.node[-1].input[1] = "nobody"
    findings = lint(saved(model, tmp_path))
    [finding] = [finding for finding in findings if finding.rule == "valid-onnx"]
    assert "not valid ONNX" in finding.what
    assert "\n" not in str(finding)


def test_errors_come_first(tmp_path: Path) -> None:
    body = f"{X} wd = DequantizeLinear(w, w_scale_zero) {PRODUCT}"
    found = lint(saved(graph(body), tmp_path))
    assert [finding.effect.is_error for finding in found] == [True, False]
    assert [finding.rule for finding in found] == ["scale-positive", "axis"]


def test_products_within_a_branch(tmp_path: Path) -> None:
    """What If holds is read as the rest is; its constants may be the outer graph's."""
    body = f"""m = ReduceMax <keepdims = 0> (x)  c = Greater(m, two)
        y = If (c) <then_branch = a () => (o) {{ {X} {W} [layer__linear__MatMul] o = MatMul(xd, wd) }},
                    else_branch = b () => (p) {{ p = MatMul(x, w_float) }}>"""
    path = saved(graph(body), tmp_path)
    [product] = quantized_products(OnnxGraph(path))
    assert product.name == f"{LINEAR}/MatMul"
    assert lint(path) == []


@pytest.mark.parametrize("form", FORMS)
def test_our_graphs_are_clean(form: str, llama_folder: Path, tmp_path: Path) -> None:
    out = export_onnx(source_of(llama_folder), tmp_path / "out", **FORMS[form])
    found = lint(out)
    assert {finding.rule for finding in found} == ({"no-quantization"} if form.startswith("float") else set())
    opened = OnnxGraph(out)
    ours = [product.name for product in products(opened.proto.graph)]
    assert [product.name.rpartition("/")[0] for product in quantized_products(opened)] == ours


def test_without_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingPackageError, match="onnx is not installed; pip install"):
        lint(tmp_path)
