"""What a format cannot hold is refused when its writer is made, in one line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from exporters.huggingface import W8A8Writer
from exporters.onnx import OnnxWriter
from smoothquant.artifacts.ports import graph_files
from smoothquant.errors import UserError
from smoothquant.scheme import CACHES, HEADS, IN_FLOAT, PER_TOKEN, Scheme, scheme_of

STATIC = scheme_of("per-tensor")


@pytest.mark.parametrize(
    ("writer", "schemes", "said"),
    [
        (
            W8A8Writer,
            [scheme_of("per-token", "per-tensor")],
            "per-tensor weights, .* expected per-channel weights; cache, head and embedding in float",
        ),
        (W8A8Writer, [scheme_of("per-token", kv_cache="int8")], "a KV cache in int8"),
        (W8A8Writer, [scheme_of("per-token", head="int8")], "a head in int8"),
        (W8A8Writer, [IN_FLOAT], "float weights"),
        (OnnxWriter, [scheme_of("per-token", "per-tensor")], "per-tensor weights; expected per-channel ones"),
        (OnnxWriter, [scheme_of("per-token", kv_cache="int8-shared")], "one scale for keys and values"),
        (OnnxWriter, [replace(IN_FLOAT, head=HEADS["int8"])], "a float graph with an int8 lm_head"),
        (OnnxWriter, [PER_TOKEN, PER_TOKEN], "graphs with per-token and per-token activations in one folder"),
        (OnnxWriter, [PER_TOKEN, replace(STATIC, kv_cache=CACHES["int8"])], "expected graphs that share weights, KV"),
        (OnnxWriter, [PER_TOKEN, IN_FLOAT], "expected graphs that share weights"),
    ],
)
def test_refused(writer: Callable[..., object], schemes: list[Scheme], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said) as caught:
        writer(tmp_path / "out", *schemes)
    assert "\n" not in str(caught.value)


def test_taken(tmp_path: Path) -> None:
    """The controls: what those refuse is what they do not hold, and nothing else."""
    kept = replace(STATIC, float_linears=("model.layers.0.mlp.down_proj",))
    assert W8A8Writer(tmp_path / "out").schemes == (PER_TOKEN,)
    assert W8A8Writer(tmp_path / "out", kept).schemes == (kept,)
    assert OnnxWriter(tmp_path / "out", PER_TOKEN, kept).schemes == (PER_TOKEN, kept)
    assert OnnxWriter(tmp_path / "out", replace(IN_FLOAT, kv_cache=CACHES["int8"])).schemes[0].kv_cache.quantized
    assert list(graph_files([PER_TOKEN, kept])) == ["model.onnx", "model.per-tensor.onnx"]
    assert list(graph_files([kept])) == ["model.onnx"]
