"""Engines of a real TensorRT: their kernels, their outputs beside ONNX Runtime's, and the overflow of FP16 scales."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from act_scales.collect import collect
from act_scales.text import Text
from builders.nvidia.layers import read_layers
from builders.onnxruntime import OnnxRuntimeEngine
from builders.tensorrt.build import build
from builders.tensorrt.compare import compare
from builders.tensorrt.compiler import Options, compile_graph
from builders.tensorrt.engine import TensorRTEngine
from builders.tensorrt.hardware import find_gpu
from builders.tensorrt.kernels import built_products
from builders.tensorrt.runtime import LoadedPlan
from exporters.export import Source, export
from recipes import tiny_llama
from smoothquant.model import Model
from smoothquant.settings import SmoothingSettings
from tests.benchmarks import gpu
from tests.benchmarks.gpu import FORMS
from tests.gpu import overflow
from tests.gpu.conftest import Note
from tests.models import open_llama, sample_ids
from tests.writers import onnx_writer

pytestmark = pytest.mark.gpu
LIMITS = {"batch": 2, "length": 128, "chunk": 64}
EXACT = Options(tf32=False)
REFERENCES = {"per-token bf16": "per-token"}  # where ONNX Runtime does not run the same form
PROMPT = list(range(40, 60))


@pytest.fixture(scope="module")
def model() -> Model:
    return open_llama(tiny_llama.PATH)


@pytest.fixture(scope="module")
def exports(model: Model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exports")
    writers = [onnx_writer(folder / name.replace(" ", "-"), **options) for name, options in FORMS.items()]
    scales = collect(model, Text(tuple(sample_ids(8, 64)), "sample"), folder / "scales.safetensors")
    names = {"model": model.checkpoint.fingerprint}
    export(Source(model, SmoothingSettings(0.7), scales.input_absmax, names, scales.output_absmax), writers)
    return {name: writer.out for name, writer in zip(FORMS, writers, strict=True)}


@pytest.mark.parametrize("form", FORMS)
def test_engine(form: str, exports: dict[str, Path], tmp_path: Path, note: Note) -> None:
    """Logits and tokens are those of ONNX Runtime. INT8 kernels are noted: for so small a model others may be quicker.
    The large one is judged (`tests.benchmarks.tensorrt_speed`)."""
    manifest = build(exports[form], tmp_path / "engine", LIMITS, EXACT)
    kernels = manifest.results["kernels"]
    engine = TensorRTEngine(tmp_path / "engine")
    reference = OnnxRuntimeEngine(exports[REFERENCES.get(form, form)])
    ids = torch.randint(0, 2048, (3, 100), generator=torch.Generator().manual_seed(0))
    found, expected = engine.logits(ids), reference.logits(ids)
    error = float((found - expected).norm() / expected.norm())
    agree = float((found.argmax(-1) == expected.argmax(-1)).float().mean())
    note(gpu.engine(form), "{int8} of {quantized}".format(**kernels) + f"; off by {error:.2e}, top-1 {agree:.2%}")
    assert kernels["quantized"] == (0 if form == "float" else 17 if form == "int8 head" else 16)
    assert error <= (1e-4 if form == "float" else 5e-2)  # quantized: some activations fall on other roundings
    assert agree >= (0.999 if form == "float" else 0.95)
    tokens = list(engine.generate(PROMPT, 32))
    if form == "float":
        assert tokens == list(reference.generate(PROMPT, 32))
    assert len(tokens) > 0


@pytest.mark.parametrize("form", ["float", "per-token"])
def test_every_output(form: str, exports: dict[str, Path], tmp_path: Path) -> None:
    build(exports[form], tmp_path / "engine", LIMITS, EXACT)
    for one in compare(exports[form], TensorRTEngine(tmp_path / "engine")):
        print(f"{form}: {one}")
        assert one.absolute <= (1e-3 if form == "float" else 1.0)


@pytest.mark.parametrize("inner", gpu.SIZES)
@pytest.mark.parametrize("float16_scales", [False, True])
def test_scales_and_overflow(inner: int, float16_scales: bool, tmp_path: Path, note: Note) -> None:
    """Float32 scales give the right numbers at any length. What float16 ones give is noted, not judged."""
    path = tmp_path / "model.onnx"
    overflow.save(path, inner, float16_scales=float16_scales)
    device = find_gpu()
    compiled = compile_graph(path, [], Options(), prepare=device.select)
    plan = LoadedPlan(compiled.plan, "product", device)
    [product] = built_products(read_layers(plan.layers()), ["linear/MatMul"])
    with device.use():
        x = torch.full((1, inner), 127 * overflow.SCALE, dtype=torch.float16, device=device.device)
        y = torch.empty(1, overflow.COLUMNS, dtype=torch.float16, device=device.device)
        plan.run(0, {"x": (1, inner)}, {"x": x.data_ptr(), "y": y.data_ptr()})
    device.wait()
    expected = overflow.EXPECTED * inner
    if float16_scales:
        kind = "INT8" if product.int8 else "no INT8 kernel"
        note(gpu.overflow(inner), f"{y[0, 0].item():.2f} instead of {expected:.2f} ({kind})")
    else:
        assert product.int8
        assert (y.float() - expected).abs().max() <= 2e-3 * expected
