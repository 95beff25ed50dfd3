"""OpenVINO engines: logits and tokens beside ONNX Runtime's, what runs in INT8, and what never becomes an engine."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy
import onnx
import pytest
import torch

from act_scales.text import Text
from builders.engine.faster import MEASURED, faster_engine
from builders.engine.table import open_engine
from builders.onnxruntime import OnnxRuntimeEngine
from builders.openvino import OpenVinoEngine, build
from builders.openvino.graph import SETTINGS
from builders.validate import validate_engines
from exporters.export import Source, export
from smoothquant.errors import MissingPackageError, UserError
from smoothquant.model import Model
from smoothquant.outputs import OURS, load_manifest
from smoothquant.settings import SmoothingSettings
from tests.builders.engines import refused_line
from tests.families.differences import token_errors
from tests.models import sample_ids
from tests.outputs import agree, top
from tests.writers import onnx_writer

PROMPT, NEW = [256, 5, 6, 7, 40, 41], 24
ENGINE, GRAPH = (import_module(f"builders.openvino.{name}") for name in ("engine", "graph"))


def refused(folder: Path, out: Path) -> str:
    return refused_line(build, folder, out)


@pytest.mark.parametrize(("form", "kernels"), [("float", 0), ("per-token", 8), ("per-tensor", 9)])
def test_engine_folder(form: str, kernels: int, exports: dict[str, Path], openvino_engines: dict[str, Path]) -> None:
    folder, exported = openvino_engines[form], top(exports[form])
    assert top(folder) == exported
    assert {path.name for path in (folder / OURS).iterdir()} == {
        "manifest.json",
        "smoothing.safetensors",
        "tokenizer.json",
    }
    assert all((folder / name).read_bytes() == (exports[form] / name).read_bytes() for name in exported)
    manifest = load_manifest(folder)
    assert manifest.step == "build openvino"
    assert manifest.inputs["openvino"] == manifest.versions["openvino"]
    assert manifest.results["kernels"] == {"integer": kernels, "quantized": kernels}


@pytest.mark.parametrize("form", ["float", "per-token", "per-tensor"])
def test_logits_and_tokens_are_those_of_onnxruntime(form: str, openvino_engines: dict[str, Path]) -> None:
    """Tokens without a rounding flip, which are most, have the same logits but for float32 sums in another order."""
    engine, other = open_engine(openvino_engines[form]), OnnxRuntimeEngine(openvino_engines[form])
    assert isinstance(engine, OpenVinoEngine)
    ids = sample_ids(64, 12)
    errors = token_errors(engine.logits(ids), other.logits(ids))
    assert errors.median() <= 1e-6
    assert (errors > 1e-4).double().mean() <= (0 if form == "float" else 0.1)
    if form == "float":
        found = list(engine.generate(PROMPT, NEW))
        assert len(set(found)) > 4
        assert found == list(other.generate(PROMPT, NEW))


def test_sequences_have_caches_of_their_own(openvino_engines: dict[str, Path]) -> None:
    engine, prompts = OpenVinoEngine(openvino_engines["per-token"]), ([1, 2, 3], [9, 8, 7, 6])
    under_way = [engine.start(prompt) for prompt in prompts]
    for token in (5, 6):
        for decoding in under_way:
            decoding.step(token)
    for prompt, decoding in zip(prompts, under_way, strict=True):
        expected = engine.logits(torch.tensor([[*prompt, 5, 6]]))[0, -1].numpy()
        assert numpy.abs(decoding.logits - expected).max() <= 5e-6 * numpy.abs(expected).max()


def test_int8_cache(llama: Model, tmp_path: Path) -> None:
    outputs = {name: torch.full((rows,), 4.0) for name, (rows, _) in llama.linears()}
    source = Source(llama, SmoothingSettings(groups="none"), output_absmax=outputs)
    export(source, [onnx_writer(tmp_path / "onnx", "float", kv="int8")])
    build(tmp_path / "onnx", tmp_path / "engine")
    engine = OpenVinoEngine(tmp_path / "engine")
    [kind] = {str(state.state.element_type) for state in engine.start(PROMPT)._request.request.query_state()}
    assert "int8" in kind
    assert list(engine.generate(PROMPT, NEW)) == list(OnnxRuntimeEngine(tmp_path / "onnx").generate(PROMPT, NEW))


def test_a_prompt_computes_the_logits_of_its_last_token(
    openvino_engines: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export made before logits_to_keep has no such input, and gives the logits of all tokens."""
    engine = OpenVinoEngine(openvino_engines["float"])
    assert engine.graph.keeps
    assert engine.start(PROMPT)._request.request.get_tensor("logits").shape[1] == 1
    monkeypatch.setattr(GRAPH, "_open_logits_to_keep", lambda graph: False)
    older = OpenVinoEngine(openvino_engines["float"])
    assert older.start(PROMPT)._request.request.get_tensor("logits").shape[1] == len(PROMPT)
    assert list(older.generate(PROMPT, NEW)) == list(engine.generate(PROMPT, NEW))


def test_what_is_float_stays_float(openvino_engines: dict[str, Path]) -> None:
    model = OpenVinoEngine(openvino_engines["per-token"]).graph.model
    assert {key: str(model.get_property(key)) for key in ("KV_CACHE_PRECISION", "INFERENCE_PRECISION_HINT")} == {
        "KV_CACHE_PRECISION": "<Type: 'float32'>",
        "INFERENCE_PRECISION_HINT": "<Type: 'float32'>",
    }
    assert model.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == SETTINGS["DYNAMIC_QUANTIZATION_GROUP_SIZE"] == 0


def test_validate(llama: Model, input_absmax: dict[str, torch.Tensor], tmp_path: Path) -> None:
    source = Source(llama, SmoothingSettings(0.5), input_absmax, {"model": llama.checkpoint.fingerprint})
    export(source, [onnx_writer(tmp_path / "onnx", "per-token")])
    build(tmp_path / "onnx", tmp_path / "engine")
    [found] = validate_engines({"engine": tmp_path / "engine"}, llama, Text(tuple(sample_ids(2, 24)), "sample"))
    assert found.metrics.relative_error < 0.1


# -- what never becomes an engine, and what does not open ------------------------------------------------------------


def test_linear_that_is_not_an_integer_kernel(copy_of: Callable[[str], Path], tmp_path: Path) -> None:
    """A curve between DequantizeLinear and MatMul: a product of floats, silently."""
    folder = copy_of("per-token")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    [product] = [node for node in model.graph.node if node.op_type == "MatMul" and "layers.1.mlp.down" in node.name]
    place = list(model.graph.node).index(product)
    model.graph.node.insert(place, onnx.helper.make_node("Sigmoid", [product.input[0]], ["bent"], name="between"))
    [product] = [node for node in model.graph.node if node.name == product.name]
    product.input[0] = "bent"
    onnx.save(model, folder / "model.onnx")
    agree(folder)
    line = refused(folder, tmp_path / "engine")
    assert "OpenVINO made 7 integer kernels (model.layers.1.mlp.down_proj in float); expected 8" in line


def test_broken_exports(copy_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy_of("per-token")
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    [gain] = [tensor for tensor in graph.initializer if tensor.name == "model.norm.weight"]
    offset = next(int(entry.value) for entry in gain.external_data if entry.key == "offset")
    with open(folder / "model.onnx.data", "r+b") as file:
        file.seek(offset)
        file.write(numpy.float32("nan").tobytes())
    assert "its content is not what was written" in refused(folder, tmp_path / "engine")
    agree(folder)
    assert "logits that are not finite" in refused(folder, tmp_path / "engine")
    with open(folder / "model.onnx.data", "r+b") as file:
        file.truncate(1000)
    agree(folder)
    assert "refuses the graph" in refused(folder, tmp_path / "engine")


def test_bfloat16_body(llama: Model, tmp_path: Path) -> None:
    source = Source(llama, SmoothingSettings(groups="none"))
    export(source, [onnx_writer(tmp_path / "onnx", "float", body="bf16")])
    assert "computes a bfloat16 graph in float32; expected a body" in refused(tmp_path / "onnx", tmp_path / "engine")


def test_other_instructions(openvino_engines: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    built = load_manifest(openvino_engines["per-token"]).inputs["instructions"]
    monkeypatch.setattr(ENGINE, "cpu_flags", lambda: {"fpu", "sse2"})
    with pytest.raises(UserError, match=f"built for a processor with {built}; this one has no such.* build openvino"):
        OpenVinoEngine(openvino_engines["per-token"])


def test_other_versions(
    exports: dict[str, Path], openvino_engines: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    openvino = import_module("openvino")
    monkeypatch.setattr(openvino, "__version__", "2099.1.0-1-x")
    OpenVinoEngine(openvino_engines["per-token"])  # it still runs all in INT8
    monkeypatch.setattr(GRAPH, "INTEGERS", ("i16",))
    with pytest.raises(UserError, match=r"OpenVINO 2099.1.0 made 0 integer kernels; .*use OpenVINO .*, which built it"):
        OpenVinoEngine(openvino_engines["per-token"])
    monkeypatch.setattr(openvino, "__version__", "2024.6.0-1-x")
    with pytest.raises(MissingPackageError, match=r"this OpenVINO \(2024.6.0\) is too old; expected openvino >= "):
        build(exports["float"], tmp_path / "engine")


def test_missing_package(exports: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingPackageError, match="openvino is not installed; pip install openvino"):
        build(exports["float"], tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_the_faster_engine_is_told_where_it_was_measured() -> None:
    for flag, sentence in MEASURED.items():
        assert sentence in faster_engine({"sse2", flag})
    assert "nobody has measured" in faster_engine({"avx_vnni"})
