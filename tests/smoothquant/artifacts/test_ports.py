"""The names of a decoder's ports are those of the graph that is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx

from smoothquant.artifacts import ports
from tests.exporters.onnx.graphs import FLOAT, export_onnx, source_of


def test_ports_of_a_graph(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    source = source_of(make_llama())
    graph = onnx.load(export_onnx(source, tmp_path / "onnx", **FLOAT) / "model.onnx", load_external_data=False).graph
    every = [(layer, part) for layer in range(2) for part in ports.CACHED]
    inputs, outputs = [value.name for value in graph.input], [value.name for value in graph.output]
    first, last = ["input_ids", "attention_mask", "position_ids"], ["logits_to_keep"]
    assert inputs == [*first, *(ports.past(*each) for each in every), *last]
    assert outputs == ["logits", *(ports.present(*each) for each in every)]
    assert ports.past(1, "key") == "past_key_values.1.key"
    assert [ports.past_of(ports.present(*each)) for each in every] == [ports.past(*each) for each in every]
