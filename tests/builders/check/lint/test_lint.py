"""Files with faults, and the order of findings; the rules themselves are in test_rules.py."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy
import onnx
import pytest
from onnx import numpy_helper

from builders.check import check
from builders.check.lint import Effect, lint, quantized_products
from builders.check.tensorrt_rtx import available, compile_apart, compile_onnx
from builders.nvidia.profiles import single_profile
from builders.onnx_graph import OnnxGraph
from smoothquant.errors import MissingPackageError, UserError
from tests.builders.check.lint.graphs import LINEAR, PRODUCT, N, W, X, graph, saved, verdict
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
    assert re.search(r"w_scale holds 0\b.*\b3 of 256 channels", finding.what)


def test_missing_and_short_data(with_data: Path) -> None:
    data = with_data.parent / "weights.bin"
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    [finding] = lint(with_data)
    assert (finding.rule, finding.effect) == ("external-data", Effect.REFUSED)
    assert f"weights.bin has {len(whole) - 1} bytes of {len(whole)}; put the whole file into {data.parent}" in str(
        finding
    )
    data.unlink()
    [finding] = lint(with_data)
    assert "weights.bin is missing" in finding.what
    if available():
        assert verdict(with_data) == "refused"


def test_a_tensor_that_no_file_could_hold(with_data: Path) -> None:
    model = onnx.load(with_data, load_external_data=False)
    of(model, "w_scale").dims[:] = [10**12]
    onnx.save(model, with_data)
    assert OnnxGraph(with_data).array("w_scale") is None
    lint(with_data)


def test_data_at_no_number(with_data: Path) -> None:
    model = onnx.load(with_data, load_external_data=False)
    next(item for item in of(model, "w_scale").external_data if item.key == "offset").value = "start"
    onnx.save(model, with_data)
    [finding] = lint(with_data)
    assert finding.rule == "external-data"
    assert re.search(r"weights\.bin.*w_scale.*number", finding.what)


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


def of(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def node(model: onnx.ModelProto, kind: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == kind)


INVALID: dict[str, Callable[[onnx.ModelProto], object]] = {
    "a product reads nobody": lambda model: node(model, "MatMul").input.__setitem__(1, "nobody"),
    "a product without a weight": lambda model: node(model, "MatMul").input.pop(),
    "DQ without a scale": lambda model: node(model, "DequantizeLinear").input.__delitem__(slice(1, None)),
    "Constant without a value": lambda model: model.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["c"])),
    "a type that is none": lambda model: setattr(of(model, "w_scale"), "data_type", 99),
    "a tensor cut short": lambda model: setattr(of(model, "w_scale"), "raw_data", of(model, "w_scale").raw_data[:-3]),
}


@pytest.mark.parametrize("fault", INVALID)
def test_invalid_onnx(fault: str, tmp_path: Path) -> None:
    """One finding, whatever else could be said; and neither TensorRT nor onnx makes anything of the graph."""
    model = graph(PLAIN)
    INVALID[fault](model)
    path = saved(model, tmp_path)
    [finding] = lint(path)
    assert (finding.rule, finding.effect) == ("valid-onnx", Effect.REFUSED)
    assert "not valid ONNX" in finding.what
    assert "\n" not in str(finding)
    found = check(path, compile=lambda graph: pytest.fail("compiled"))
    assert found.faults == [str(finding)]
    if available():
        assert compile_apart(path, single_profile(2, 16, 16), OnnxGraph(path).symbols).errors


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    path = saved(graph(PLAIN), tmp_path)
    path.write_bytes(path.read_bytes().replace(b"layer/linear/MatMul", b"layer/linear/Mat\xff\xfel"))
    [finding] = lint(path)
    assert (finding.rule, finding.what) == ("valid-onnx", "it is not valid ONNX (a name is not UTF-8)")


def test_an_output_without_a_shape_is_fine(tmp_path: Path) -> None:
    """onnx's checker demands one; TensorRT does not."""
    model = graph(PLAIN)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    path = saved(model, tmp_path)
    assert lint(path) == []
    if available():
        assert verdict(path) == "fine"


def test_a_linear_that_is_not_quantized_any_more(tmp_path: Path) -> None:
    """The graph is fine, all of its quantized products are INT8, and it still is not what was exported."""
    body = f"{X} {W} [layer__linear__MatMul] h = MatMul(xd, wd) [layer__other__MatMul] y = MatMul(h, w_n)"
    model = graph(body)
    model.graph.initializer.append(numpy_helper.from_array(numpy.eye(N, dtype=numpy.float32), "w_n"))
    assert lint(saved(model, tmp_path)) == []
    onnx.helper.set_model_props(model, {"smoothquant": json.dumps({"quantized": [LINEAR, "layer/other"]})})
    path = saved(model, tmp_path)
    [finding] = lint(path)
    assert (finding.rule, finding.effect) == ("missing-product", Effect.LOST)
    assert re.match(r"layer/other: .*was quantized.*; export again", str(finding))
    assert check(path).in_float == ("layer/other",)
    if available():
        made = compile_onnx(path, single_profile(2, 16, 16), OnnxGraph(path).symbols)
        assert [layer.what for layer in made.computing("layer/other/MatMul")] == ["Float gemm"]


@pytest.mark.parametrize("facts", ["", "[]", '{"quantized": null}', '{"quantized": [[1]]}', "not JSON"])
def test_facts_of_others(facts: str, tmp_path: Path) -> None:
    model = graph(PLAIN)
    onnx.helper.set_model_props(model, {"smoothquant": facts})
    assert lint(saved(model, tmp_path)) == []


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
