"""Experts in the graph: only those that a token chooses are computed."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch

from exporters.onnx.decoder import DecoderGraph
from exporters.onnx.form import Form
from smoothquant import decoder
from smoothquant.attention import patterns
from smoothquant.layers import FloatLayer, float_layer
from smoothquant.roles import ROUTER
from tests.exporters.onnx.graphs import Runner
from tests.families.case import Case
from tests.models import sample_ids


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case("mixtral", tmp_path_factory.mktemp("experts"))


@torch.no_grad()
def chosen(case: Case, ids: torch.Tensor) -> set[str]:
    """Names of the experts that these tokens go through, by our float decoder."""
    model, found = case.model, set()
    hidden, positions = decoder.embed(model, ids, torch.float32), patterns(model, ids.shape[1], torch.float32)
    for index in range(model.geometry.layers):

        def listen(role: str, x: torch.Tensor, y: torch.Tensor, index: int = index) -> None:
            if role == ROUTER:
                experts = decoder.route(model.geometry, y)[0].unique().tolist()
                found.update(model.linear(index, f"up.{expert}").rpartition(".")[0] for expert in experts)

        layer = float_layer(model, index)
        listening = FloatLayer(index, layer.weights, layer.biases, layer.norms, listen)
        hidden = decoder.forward(model, listening, hidden, positions)
    return found


@pytest.mark.parametrize("form", ["float", "per-token", "per-tensor"])
def test_other_experts_are_not_computed(form: str, mixtral: Case, tmp_path: Path) -> None:
    """One token, and weights of NaN in every expert that it does not choose: nothing of them gets into the logits."""
    folder, ids = mixtral.export(form), torch.tensor([[40]])
    expected = Runner(folder / "model.onnx").run(ids)[0]
    mine = chosen(mixtral, ids)
    assert len(mine) == 2 * 2

    data = bytearray((folder / "model.onnx.data").read_bytes())
    graph, spoiled = DecoderGraph(mixtral.model, Form(form)).graph, set()
    for name, place in graph.data.places.items():
        if ".experts." in name and name.endswith(("weight", "weight_scale")):
            expert = name.rpartition(".")[0].rpartition(".")[0]
            if expert not in mine:
                data[place.offset : place.offset + place.nbytes] = torch.full(place.shape, torch.nan).numpy().tobytes()
                spoiled.add(expert)
    assert len(spoiled) == 2 * 4 - len(mine)
    (tmp_path / "model.onnx.data").write_bytes(data)
    (tmp_path / "model.onnx").write_bytes((folder / "model.onnx").read_bytes())
    assert torch.equal(Runner(tmp_path / "model.onnx").run(ids)[0], expected)
    assert not Runner(tmp_path / "model.onnx").run(sample_ids(1, 24))[0].isfinite().all()  # others choose them


def test_no_operator_that_tensorrt_lacks(mixtral: Case) -> None:
    """Measured with TensorRT-RTX's parser: no NonZero, no Compress, no scatter with a reduction."""
    for form in ("float", "per-token", "per-tensor"):
        graph = onnx.load(mixtral.export(form) / "model.onnx", load_external_data=False).graph
        kinds = {node.op_type for node in graph.node}
        assert not kinds & {"NonZero", "Compress", "ScatterND", "If", "Loop"}
        scatters = [node for node in graph.node if node.op_type == "ScatterElements"]
        assert len(scatters) == 2
        assert not any(attribute.name == "reduction" for node in scatters for attribute in node.attribute)
