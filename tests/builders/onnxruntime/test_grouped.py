"""Grouped attention: what it takes, and is refused for. That it computes the same in any company: `tests.families`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy
import pytest
import torch

from builders.onnx_graph import OnnxGraph
from builders.onnxruntime import build
from builders.onnxruntime.engine import OnnxRuntimeEngine
from builders.onnxruntime.record import ATTENTION, GROUPED
from exporters.export import Source, export
from recipes.families import open_model
from smoothquant.errors import UserError
from smoothquant.model import Model
from smoothquant.settings import SmoothingSettings
from tests import zoo
from tests.builders.engines import refused_line
from tests.families.differences import GRAPH
from tests.models import sample_ids
from tests.writers import onnx_writer


def test_an_attention_that_is_one_operator_is_refused(llama: Model, tmp_path: Path) -> None:
    source = Source(llama, SmoothingSettings(groups="none"))
    export(source, [onnx_writer(tmp_path / "onnx", "float", opset=23)])
    line = refused_line(lambda made, out: build(made, out, attention=GROUPED), tmp_path / "onnx", tmp_path / "engine")
    assert "the attention of layer 0" in line
    assert "--attention standard" in line


def test_it_is_for_the_processor(exports: Mapping[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="grouped attention on cuda; expected the provider cpu"):
        build(exports["float"], tmp_path / "engine", provider="cuda", attention=GROUPED)
    assert not (tmp_path / "engine").exists()
    build(exports["float"], tmp_path / "engine", attention=GROUPED)
    with pytest.raises(
        UserError, match="expected the provider cpu, not cuda; build an engine with --attention standard"
    ):
        OnnxRuntimeEngine(tmp_path / "engine", provider="cuda")


@pytest.mark.parametrize(
    ("layout", "changes", "turns"),
    [
        ("llama", {}, True),
        ("llama", {"body": "fp16"}, True),
        ("phi3-partial", {"num_attention_heads": 2}, True),  # 16 of 32 channels
        ("phi3-partial", {}, None),  # 8 of 16: half of them are no multiple of 8
        ("qwen3", {"head_dim": 16}, None),  # norms lie between
        ("bloom", {}, False),
    ],
)
def test_what_the_operator_takes(layout: str, changes: dict, turns: bool | None, tmp_path: Path) -> None:
    """The products of q, k and v side by side, which it turns by their positions or not; None: each by itself. The
    logits are those of the exported attention."""
    body = changes.get("body", "fp32")
    config = {name: value for name, value in changes.items() if name != "body"}
    model = open_model(zoo.save(layout, tmp_path / "model", **config))
    export(Source(model, SmoothingSettings(groups="none")), [onnx_writer(tmp_path / "onnx", "float", body)])
    engines = []
    for attention in ATTENTION:
        build(tmp_path / "onnx", tmp_path / attention, attention=attention)
        engines.append(OnnxRuntimeEngine(tmp_path / attention))
    operators = [node for node in OnnxGraph(tmp_path / GROUPED).nodes if node.op_type == "GroupQueryAttention"]
    assert len(operators) == model.geometry.layers
    for node in operators:
        assert bool(node.input[1]) == (turns is None)  # keys
        assert ("do_rotary" in {attribute.name for attribute in node.attribute}) == bool(turns)
    [tokens] = sample_ids(sequences=1, tokens=20).tolist()
    expected, found = (read_logits(engine, tokens) for engine in engines)
    step = 2**-10 * abs(expected).max()  # of float16 numbers, at the largest logit
    assert abs(found - expected).max() <= (GRAPH if body == "fp32" else step)


def test_an_int8_cache_gives_the_logits_of_the_exported_attention(llama: Model, tmp_path: Path) -> None:
    """In pieces of a prompt, and in steps. The scales are so coarse that a float cache gives others."""
    outputs = {name: torch.full((rows,), 4.0) for name, (rows, _) in llama.linears()}
    source = Source(llama, SmoothingSettings(groups="none"), output_absmax=outputs)
    [tokens] = sample_ids(sequences=1, tokens=20).tolist()
    for kv in ("int8", "float"):
        export(source, [onnx_writer(tmp_path / kv, "float", kv=kv)])
        build(tmp_path / kv, tmp_path / f"{kv}-engine", attention=GROUPED)
    expected = read_logits(OnnxRuntimeEngine(tmp_path / "int8"), tokens)
    found, other = (read_logits(OnnxRuntimeEngine(tmp_path / f"{kv}-engine"), tokens) for kv in ("int8", "float"))
    largest = abs(expected).max()
    assert abs(found - expected).max() <= GRAPH * largest
    assert abs(other - expected).max() > 500 * GRAPH * largest


def read_logits(engine: OnnxRuntimeEngine, tokens: list[int]) -> numpy.ndarray:
    """Logits (tokens, vocab), read in two pieces and token by token."""
    decoding = engine.empty()
    parts = [decoding.append(tokens[:7], 0), decoding.append(tokens[7:16], 0)]
    return numpy.concatenate([*parts, *(decoding.append([token]) for token in tokens[16:])])
