"""Embeddings and learned positions: stored once, in 16 bits where the checkpoint has them, at no change of a number."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch

from builders.check import check
from builders.check.tensorrt_rtx import available, compile_onnx
from builders.nvidia.profiles import single_profile
from exporters.export import Source, export
from recipes.families import open_model
from smoothquant.layers import float_layer
from smoothquant.settings import SmoothingSettings
from tests import zoo
from tests.exporters.onnx.graphs import Runner, load_graph
from tests.families.case import run
from tests.families.differences import GRAPH, largest_difference
from tests.models import sample_ids
from tests.writers import onnx_writer

NONE = SmoothingSettings(groups="none")
FLOAT, HALF, BF16 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16


def tables(folder: Path) -> dict[str, int]:
    """The last part of a table's name -> its element type."""
    stored = load_graph(folder).graph.initializer
    return {t.name.split(".")[-2]: t.data_type for t in stored if "embed" in t.name and "norm" not in t.name}


@pytest.mark.parametrize(
    ("layout", "dtype", "options", "expected"),
    [
        ("llama", torch.bfloat16, {}, {"embed_tokens": BF16}),
        ("llama", torch.float16, {}, {"embed_tokens": HALF}),
        ("llama", torch.float32, {}, {"embed_tokens": FLOAT}),
        ("llama", torch.bfloat16, {"body": "fp16"}, {"embed_tokens": HALF}),
        ("llama", torch.bfloat16, {"opset": 17}, {"embed_tokens": FLOAT}),
        ("llama-tied", torch.bfloat16, {}, {"embed_tokens": FLOAT}),  # the head's, too
        ("llama-tied", torch.bfloat16, {"lm_head": "int8"}, {"embed_tokens": BF16}),
        ("opt", torch.float16, {"lm_head": "int8"}, {"embed_tokens": HALF, "embed_positions": HALF}),
        ("gemma2", torch.bfloat16, {"lm_head": "int8"}, {"embed_tokens": BF16}),
    ],
)
def test_dtypes(layout: str, dtype: torch.dtype, options: dict, expected: dict[str, int], tmp_path: Path) -> None:
    model = open_model(zoo.save(layout, tmp_path / "model", dtype=dtype))
    export(Source(model, NONE), [onnx_writer(tmp_path / "onnx", **options)])
    assert tables(tmp_path / "onnx") == expected
    onnx.checker.check_model(str(tmp_path / "onnx/model.onnx"), full_check=True)
    assert Runner(tmp_path / "onnx/model.onnx").run(sample_ids())[0].isfinite().all()
    compiler = (lambda g: compile_onnx(g.path, single_profile(2, 64, 64), g.symbols)) if available() else None
    found = check(tmp_path / "onnx", compile=compiler)
    assert found.faults == []
    assert found.findings == ()


@pytest.mark.parametrize("layout", ["llama", "opt", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_numbers_are_the_checkpoints(layout: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The float graph, whose other weights are float32, gives the logits of the checkpoint in float32."""
    model, ids = open_model(zoo.save(layout, tmp_path / "model", dtype=dtype)), sample_ids(2, 20)
    export(Source(model, NONE), [onnx_writer(tmp_path / "onnx", "float")])
    expected = run(model, ids, (float_layer(model, layer) for layer in range(model.geometry.layers)))
    assert largest_difference(Runner(tmp_path / "onnx/model.onnx").run(ids)[0], expected) <= GRAPH


def test_tied_embeddings_are_stored_once(tmp_path: Path) -> None:
    """And an INT8 head beside them leaves them float."""
    model = open_model(zoo.save("llama-tied", tmp_path / "model", dtype=torch.bfloat16))
    export(Source(model, NONE), [onnx_writer(tmp_path / head, lm_head=head) for head in ("float", "int8")])
    for lm_head in ("float", "int8"):
        stored = {tensor.name: tensor for tensor in onnx.load(tmp_path / lm_head / "model.onnx").graph.initializer}
        assert "lm_head.weight" not in stored
        assert ("lm_head.weight_int8" in stored) == (lm_head == "int8")
        table = onnx.numpy_helper.to_array(stored["model.embed_tokens.weight"]).astype("float32")
        assert torch.equal(torch.from_numpy(table), model.read("model.embed_tokens.weight").float())
