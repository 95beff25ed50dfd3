"""The data file: aligned, larger than 2 GiB, the same after an interruption, and only what was planned."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy
import onnx
import onnxruntime
import pytest
import torch

from exporters.export import export
from exporters.onnx import OnnxWriter
from exporters.onnx.external_data import FILE, Content, ExternalData
from exporters.onnx.graph import Graph
from smoothquant import workroom
from smoothquant.data_file import DataFile
from smoothquant.outputs import load_manifest
from smoothquant.stream import QuantizedLayer, SmoothedLayer
from tests.exporters.onnx.graphs import FORMS, export_onnx, load_graph, source_of
from tests.writers import onnx_writer

PAGE = 4096

ELSEWHERE = Content(lambda: ())  # the tests write it themselves


@pytest.mark.parametrize("form", ["float", "per tensor, int8 head"])
def test_tensors_are_aligned_and_apart(form: str, make_llama: Callable[..., Path], tmp_path: Path) -> None:
    out = export_onnx(source_of(make_llama(vocab_size=1024)), tmp_path / "out", **FORMS[form])
    places = []
    for tensor in load_graph(out).graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = {entry.key: entry.value for entry in tensor.external_data}
            assert place["location"] == "model.onnx.data"
            offset, length = int(place["offset"]), int(place["length"])
            itemsize = 1 if tensor.data_type == onnx.TensorProto.INT8 else 4
            assert length == numpy.prod(tensor.dims, dtype=int) * itemsize
            assert offset % (PAGE if length >= 16 * PAGE else 64) == 0
            places.append((offset, offset + length))
    places.sort()
    assert all(end <= start for (_, end), (start, _) in pairwise(places))
    assert places[-1][1] == (out / FILE).stat().st_size
    assert any(end - start >= 16 * PAGE for start, end in places)


def test_a_tensor_behind_three_gigabytes(tmp_path: Path) -> None:
    """The file is sparse: only what is written takes room. onnx and onnxruntime find the tensors again."""
    graph, wide = Graph(), 3 << 30
    graph.weight("before", (wide,), torch.int8, ELSEWHERE)
    graph.weight("matrix", (5, 4), torch.float32, ELSEWHERE)
    graph.weight("vector", (4,), torch.float32, ELSEWHERE)
    graph.data.open(DataFile(tmp_path / FILE))
    matrix, vector = torch.randn(5, 4), torch.randn(4)
    graph.data.write_transposed("matrix", [matrix.t()[:3], matrix.t()[3:]])
    graph.data.write("vector", vector)
    assert graph.data.places["matrix"].offset >= wide > 2**31
    graph.input("x", torch.float32, ("rows", 5))
    graph.output(graph.op("Add", graph.op("MatMul", "x", "matrix"), "vector"), "y", torch.float32, ("rows", 4))
    model = graph.model({})
    del model.graph.initializer[0]  # nobody reads it, and onnx would load it
    onnx.save(model, tmp_path / "model.onnx")
    stored = {tensor.name: tensor for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert numpy.array_equal(onnx.numpy_helper.to_array(stored["matrix"]), matrix.numpy())
    assert numpy.array_equal(onnx.numpy_helper.to_array(stored["vector"]), vector.numpy())
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    x = torch.randn(2, 5)
    [y] = session.run(["y"], {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), x @ matrix + vector)


@pytest.mark.parametrize("form", ["float, fp16", "per token, int8 head", "per tensor"])
def test_resumed_export_is_the_same(
    form: str, make_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workroom, "KEEP_EVERY", -1.0)
    source = source_of(make_llama(num_hidden_layers=3, attention_bias=True))
    whole = export_onnx(source, tmp_path / "whole", **FORMS[form])
    written: list[int] = []

    class Interrupted(OnnxWriter):
        fail_at: int | None = 1

        def write(self, layer: SmoothedLayer, quantized: QuantizedLayer | None) -> None:
            if layer.index == self.fail_at:
                self.data.write(f"{self.model.norm(1, 'mlp')}.weight", torch.ones(64))  # half done
                raise KeyboardInterrupt
            written.append(layer.index)
            super().write(layer, quantized)

    with pytest.raises(KeyboardInterrupt):
        export(source, [onnx_writer(tmp_path / "resumed", kind=Interrupted, **FORMS[form])])
    assert not (tmp_path / "resumed").exists()
    Interrupted.fail_at = None
    export(source, [onnx_writer(tmp_path / "resumed", kind=Interrupted, **FORMS[form])])
    assert written == [0, 1, 2]  # layer 0 was not done again
    manifest = load_manifest(whole)
    assert load_manifest(tmp_path / "resumed") == manifest
    for name in manifest.files:
        assert (tmp_path / "resumed" / name).read_bytes() == (whole / name).read_bytes()


def planned(tmp_path: Path) -> ExternalData:
    data = ExternalData()
    data.plan("weight", (4, 6), torch.float32, ELSEWHERE)
    data.open(DataFile(tmp_path / FILE))
    return data


@pytest.mark.parametrize("wrong", [(6, 4), (24,), (3, 6), (5, 6), (4, 5), (4, 7)])
def test_wrong_shapes_are_refused(wrong: tuple[int, ...], tmp_path: Path) -> None:
    data, tensor = planned(tmp_path), torch.zeros(wrong)
    for write in (
        lambda: data.write("weight", tensor),
        lambda: data.write_rows("weight", [tensor]),
        lambda: data.write_rows("weight", tensor.split(2)),
        lambda: data.write_transposed("weight", [tensor.transpose(0, -1)]),
    ):
        with pytest.raises(ValueError, match="weight: "):
            write()


def test_only_what_was_planned_is_written(tmp_path: Path) -> None:
    data = planned(tmp_path)
    for write in (data.write, lambda name, tensor: data.write_transposed(name, [tensor.t()])):
        with pytest.raises(ValueError, match=r"weight: .*float16.*planned torch.float32"):
            write("weight", torch.zeros(4, 6).half())
    with pytest.raises(ValueError, match="planned twice"):
        data.plan("weight", (1,), torch.int8, ELSEWHERE)
    with pytest.raises(KeyError):
        data.write("bias", torch.zeros(4))


@pytest.mark.parametrize("limit", [1, 7, 1000])
def test_short_writes_go_on(limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may take fewer bytes than it is given: it never takes more than 2 GiB."""
    pwrite = os.pwrite
    monkeypatch.setattr("os.pwrite", lambda file, content, offset: pwrite(file, content[:limit], offset))
    matrix, data = torch.randn(4, 6), planned(tmp_path)
    for write in (
        lambda: data.write("weight", matrix),
        lambda: data.write_rows("weight", matrix.split(3)),
        lambda: data.write_transposed("weight", matrix.t().split(5)),
    ):
        (tmp_path / FILE).write_bytes(b"")
        data.open(DataFile(tmp_path / FILE))
        write()
        assert (tmp_path / FILE).read_bytes() == matrix.numpy().tobytes()
