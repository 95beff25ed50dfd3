"""An INT8 KV cache: integers to the bit, the arithmetic of the reference, and no key of the calibration saturates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch

from act_scales.text import Text
from builders.check import check
from builders.check.tensorrt_rtx import available, compile_onnx
from builders.nvidia.profiles import single_profile
from builders.onnxruntime import OnnxRuntimeEngine, build
from builders.validate import read_scheme, validate_engines
from exporters.export import export
from smoothquant.contract import relative_error
from smoothquant.errors import ActScalesError, UserError
from smoothquant.layers import W8A8Layer
from smoothquant.quantization import quantize_tensor
from smoothquant.stream import quantize_layer
from tests.exporters.onnx.graphs import Runner, expose, load_graph, source_of
from tests.families.case import SETTINGS, Case, run
from tests.families.differences import token_errors
from tests.models import sample_ids
from tests.writers import onnx_writer

LAYOUTS = (
    "llama",
    "mixtral",
    "falcon-40b",
    "falcon-rw",
    "phi3-partial",
    "qwen3",
    "gemma3",
    "qwen3-yarn",
    "phi3-longrope-long",
    "granite",
)
PARTS = ("key", "value")
FOR_CACHE = replace(SETTINGS, cache="own")  # as the command line has it


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    root, made = tmp_path_factory.mktemp("cache"), {}
    return lambda name: made.setdefault(name, Case(name, root / name))


def exported(case: Case, activations: str = "per-token") -> Path:
    out = case.root / f"int8-cache-{activations}"
    export(replace(case.source, settings=FOR_CACHE), [onnx_writer(out, activations, kv="int8")])
    return out


def reference(case: Case, folder: Path) -> Iterator[W8A8Layer]:
    scheme = read_scheme(folder)
    for layer in case.smoothed(FOR_CACHE):
        yield replace(
            quantize_layer(layer).runnable(scheme.scheme.activations),
            cache_scales=scheme.cache_scales(case.model, layer.index),
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_cache_holds_the_exact_integers(layout: str, cases: Callable[[str], Case]) -> None:
    """What goes out is what `quantize_tensor` makes of the keys and values, which fit: the bounds hold."""
    case, ids = cases(layout), sample_ids()  # of the calibration
    folder = exported(case, "float")
    scheme, last = read_scheme(folder), case.model.geometry.layers - 1
    graph = load_graph(folder).graph
    joined = {node.output[0]: node.input for node in graph.node if node.output[0].startswith("present.")}
    made_by = {node.output[0]: node for node in graph.node}
    for layer in (0, last):
        for part, scale in zip(PARTS, scheme.cache_scales(case.model, layer) or (), strict=True):
            present = f"present.{layer}.{part}"
            past, new = joined[present]
            assert past == f"past_key_values.{layer}.{part}"
            quantize = made_by[new]
            assert quantize.op_type == "QuantizeLinear"
            x, integers = expose(folder, [quantize.input[0]]).run(ids, outputs=[quantize.input[0], present])
            assert integers.dtype == torch.int8
            assert torch.equal(integers, quantize_tensor(x, scale)[0].to(torch.int8))
            reach = (x.abs().max() / scale).item()
            noise = 1e-2 if layer else 1e-5  # the last layer reads what the caches of others have made of the text
            assert 127 / 5 < reach <= 127 * (1 + noise)  # 5: keys are bounded, not seen, behind norm and rotation


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_model_is_the_reference(layout: str, cases: Callable[[str], Case]) -> None:
    """As near to the float64 W8A8 model with an 8-bit cache as PyTorch in float32 is, but for tokens that a rounding
    flips; and in pieces it is the same."""
    case, ids = cases(layout), sample_ids(64, 16, seed=8)
    folder = exported(case)
    exact, pytorch = (run(case.model, ids, reference(case, folder), d) for d in (torch.float64, torch.float32))
    found = Runner(folder / "model.onnx").run(ids)[0]
    assert token_errors(found, exact).median() <= 1.5 * token_errors(pytorch, exact).median()
    assert relative_error(exact, case.w8a8(ids, "per-token")) > 1e-3  # the cache is another model
    chunked = Runner(folder / "model.onnx")
    parts = [chunked.run(ids[:, :7])[0], *(chunked.run(ids[:, i : i + 1])[0] for i in range(7, 16))]
    assert token_errors(torch.cat(parts, dim=1), found).median() <= 1e-5


@pytest.mark.parametrize("body", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("layout", ["llama", "qwen3", "falcon-rw"])
def test_tensorrt(layout: str, body: str, cases: Callable[[str], Case]) -> None:
    """It compiles, and the cache goes in and out as INT8."""
    case = cases(layout)
    out = case.root / f"int8-cache-{body}"
    export(replace(case.source, settings=FOR_CACHE), [onnx_writer(out, kv="int8", body=body)])
    onnx.checker.check_model(str(out / "model.onnx"), full_check=True)
    graph = load_graph(out).graph
    cached = [value for value in (*graph.input, *graph.output) if value.name.startswith(("past", "present"))]
    assert {value.type.tensor_type.elem_type for value in cached} == {onnx.TensorProto.INT8}
    compiler = (lambda g: compile_onnx(g.path, single_profile(4, 128, 128), g.symbols)) if available() else None
    found = check(out, compile=compiler)
    assert found.faults == []
    assert found.findings == ()


def test_engines(cases: Callable[[str], Case], tmp_path: Path) -> None:
    """Generation, with a cache that a window cuts, is that of whole sequences; validation knows the cache."""
    case, prompt = cases("mistral"), [40, 41, 42, 7, 8, 9, 100, 101]
    export(case.source, [onnx_writer(tmp_path / "onnx", kv="int8")])
    build(tmp_path / "onnx", tmp_path / "engine")
    engine, tokens = OnnxRuntimeEngine(tmp_path / "engine"), list(prompt)
    for token in engine.generate(prompt, 20):
        assert token == int(engine.logits(torch.tensor([tokens]))[0, -1].argmax())
        tokens.append(token)
    assert len(tokens) > 20
    text = Text(tuple(sample_ids(8, 24, seed=3)), "sample")
    [found] = validate_engines({"engine": tmp_path / "engine"}, case.model, text, exact=True)
    assert found.exactness
    assert found.exactness.engine < 0.5 * found.metrics.relative_error  # of itself, not of the float cache


def test_keys_normed_over_all_heads_have_no_scale(cases: Callable[[str], Case], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="INT8 KV cache of keys that are normed over all heads at once; expected"):
        export(cases("olmo2").source, [onnx_writer(tmp_path / "out", kv="int8")])


def test_ranges_of_outputs_are_needed(cases: Callable[[str], Case], llama_folder: Path, tmp_path: Path) -> None:
    source = source_of(llama_folder)  # without them, as imported scales are
    with pytest.raises(ActScalesError, match=r"an INT8 KV cache without the range of the outputs of .*q_proj") as found:
        export(source, [onnx_writer(tmp_path / "out", kv="int8")])
    assert "\n" not in str(found.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="'fp8'; expected one of float, int8"):
        onnx_writer(tmp_path / "out", kv="fp8")
