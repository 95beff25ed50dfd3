"""An embedding in INT8: ONNX Runtime looks up what our arithmetic says, in one table with a head that is tied to it."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from pathlib import Path

import numpy
import onnx
import onnxruntime
import pytest
import torch
from onnx.numpy_helper import to_array
from torch import Tensor

from builders.check.lint import quantized_products
from builders.onnx_graph import OnnxGraph
from builders.onnxruntime import build as onnxruntime_build
from builders.tensorrt.build import build as tensorrt_build
from builders.validate import read_scheme
from builders.validate.layers import W8A8Stream
from exporters.export import Source, export
from exporters.onnx import OnnxWriter
from smoothquant import decoder
from smoothquant.artifacts.ports import INPUT_IDS
from smoothquant.contract import relative_error
from smoothquant.embedding import Embedding
from smoothquant.errors import UserError
from smoothquant.scheme import Scheme, scheme_of
from tests.exporters.onnx.graphs import Runner
from tests.exporters.onnx.test_planned_head import IDS, ours, source_of, stored
from tests.families.case import Case
from tests.plans import plan_of
from tests.writers import onnx_writer

FLOAT_HEAD = scheme_of("per-token", embedding="int8")
INT8_HEAD = scheme_of("per-token", head="int8", embedding="int8")
LAYOUTS = [("llama", FLOAT_HEAD), ("llama", INT8_HEAD), ("llama-tied", FLOAT_HEAD), ("llama-tied", INT8_HEAD)]
LAYOUTS += [("opt-350m", INT8_HEAD), ("gemma3", INT8_HEAD)]  # a projection behind the rows; a multiplier


def exported(name: str, scheme: Scheme, root: Path) -> Source:
    source = source_of(name, root, scheme)
    export(source, [OnnxWriter(root / "out", scheme)])
    return source


def looked_up(folder: Path, module: str) -> Tensor:
    """What ONNX Runtime computes for IDS in the nodes of the embedding, (sequences, tokens, embedded size)."""
    proto = onnx.load(folder / "model.onnx")
    nodes = [node for node in proto.graph.node if node.name.startswith(f"{module}/")]
    read = {name for node in nodes for name in node.input}
    value = onnx.helper.make_tensor_value_info(nodes[-1].output[0], onnx.TensorProto.FLOAT, None)
    tables = [one for one in proto.graph.initializer if one.name in read]
    graph = onnx.helper.make_graph(nodes, "embedding", proto.graph.input[:1], [value], tables)
    part = onnx.helper.make_model(graph, opset_imports=proto.opset_import, ir_version=proto.ir_version)
    session = onnxruntime.InferenceSession(part.SerializeToString(), providers=["CPUExecutionProvider"])
    [found] = session.run(None, {INPUT_IDS: IDS.numpy()})
    return torch.from_numpy(found)


@pytest.mark.parametrize(("name", "scheme"), LAYOUTS)
def test_onnxruntime_computes_it(name: str, scheme: Scheme, tmp_path: Path) -> None:
    """The rows to the bit, and so the logits; the rows of a float embedding give others."""
    source = exported(name, scheme, tmp_path)
    stream = W8A8Stream(source.model, read_scheme(tmp_path / "out", [plan_of(source)]))
    assert stream.embedding is not None
    expected = stream.embedding.rows(IDS) * source.model.geometry.embedding_scale
    found = looked_up(tmp_path / "out", source.model.family.embedding)
    assert found.equal(expected)
    [logits] = Runner(tmp_path / "out/model.onnx").run(IDS)
    error = relative_error(logits.flatten(0, 1), ours(source, tmp_path / "out"))
    assert error < (5e-3 if name == "opt-350m" else 1e-6)  # of which tokens round to the other side of a step
    plain = source.model.lookup(stream.embedding.table, IDS).float() * source.model.geometry.embedding_scale
    assert 1e-4 < relative_error(expected, plain) < 0.1  # the control: a random plan moves scales by a tenth


def test_rows_written_out(tmp_path: Path) -> None:
    """Of the shared table, from the file alone: integers and scale of the head, over the scale of its input."""
    source = exported("llama-tied", INT8_HEAD, tmp_path)
    head, graph = plan_of(source).head(source.model), stored(tmp_path / "out")
    assert head.rounded is not None
    assert head.smoothing_scale is not None
    assert graph["model.embed_tokens.divisor"].equal(head.smoothing_scale)
    rows = head.rounded.weight.double() * head.rounded.weight_scale.double()[:, None] / head.smoothing_scale.double()
    found = looked_up(tmp_path / "out", "model.embed_tokens")
    torch.testing.assert_close(found.double(), rows[IDS], rtol=1e-6, atol=0)
    unrounded = decoder.embed(source.model, IDS, torch.float64)
    assert relative_error(found, unrounded) < 0.1
    assert relative_error(found, Embedding(source.model, quantized=True).rows(IDS)) > 1e-4  # a table of its own


def test_one_table(tmp_path: Path) -> None:
    """In the file, and in what ONNX Runtime makes of the graph; the head keeps its integer kernel."""
    source = source_of("llama-tied", tmp_path, INT8_HEAD)
    float_rows = scheme_of("per-token", head="int8")
    export(source, [OnnxWriter(tmp_path / "int8", INT8_HEAD), OnnxWriter(tmp_path / "float", float_rows)])
    geometry = source.model.geometry
    table = geometry.vocab_size * geometry.hidden_size

    def tables(path: Path) -> list[int]:
        proto = onnx.load(path)
        return [to_array(one).nbytes for one in proto.graph.initializer if numpy.prod(one.dims) == table]

    runner = Runner(tmp_path / "int8/model.onnx")
    assert tables(tmp_path / "int8/model.onnx") == tables(tmp_path / "int8/model.optimized.onnx") == [table]
    assert sorted(tables(tmp_path / "float/model.onnx")) == [table, 4 * table]
    assert runner.fused["MatMulIntegerToFloat"] == len(quantized_products(OnnxGraph(tmp_path / "int8/model.onnx")))
    sizes = {rows: (tmp_path / rows / "model.onnx.data").stat().st_size for rows in ("int8", "float")}
    assert abs(sizes["float"] - sizes["int8"] - 4 * table) < 8192  # but for pages and the divisor


def test_two_graphs_and_a_float16_body(tmp_path: Path) -> None:
    """They share the table; each rounds the float32 rows to its own body."""
    case = Case("llama-tied", tmp_path)
    options = {"lm_head": "int8", "embedding": "int8"}
    export(case.source, [onnx_writer(tmp_path / "both", "both", **options)])
    export(case.source, [onnx_writer(tmp_path / "out", body="fp16", **options)])
    for file in ("model.onnx", "model.per-tensor.onnx"):
        graph = stored(tmp_path / "both", file)
        assert graph["lm_head.weight_int8"].equal(stored(tmp_path / "both")["lm_head.weight_int8"])
        assert "model.embed_tokens.weight" not in graph
        assert Runner(tmp_path / "both" / file).run(IDS)[0].isfinite().all()
    assert "model.embed_tokens.divisor" not in graph  # nothing is smoothed without a plan
    found = Runner(tmp_path / "out/model.onnx").run(IDS)[0]
    assert relative_error(found, Runner(tmp_path / "both/model.onnx").run(IDS)[0]) < 0.05


def test_refused_for_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which looks up no integers, in one line, before anything is looked for on this machine."""
    case = Case("llama", tmp_path)
    for options in ({"body": "bf16"}, {"opset": 17}):
        with pytest.raises(UserError, match=r"is for TensorRT alone; expected a float embedding.*--embedding float"):
            onnx_writer(tmp_path / "out", embedding="int8", **options)
    with pytest.raises(UserError, match="a float graph with an int8 embedding"):
        onnx_writer(tmp_path / "out", "float", embedding="int8")
    export(case.source, [onnx_writer(tmp_path / "out", embedding="int8")])
    monkeypatch.setattr(import_module("builders.onnxruntime.build"), "check_available", lambda provider: None)
    for build in (tensorrt_build, partial(onnxruntime_build, provider="tensorrt")):
        with pytest.raises(UserError, match=r"its embedding is in int8; expected one in float.*--embedding float"):
            build(tmp_path / "out", tmp_path / "engine")
