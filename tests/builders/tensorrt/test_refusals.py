"""What never becomes an engine, and engines that do not run here: one line each, and nothing left."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from builders.onnx_graph import OnnxGraph
from builders.tensorrt import hardware
from builders.tensorrt.build import build
from builders.tensorrt.compiler import Options
from builders.tensorrt.engine import TensorRTEngine
from builders.tensorrt.record import TensorRTInputs, TensorRTResults
from exporters.export import Source, export
from exporters.huggingface import W8A8Writer
from recipes.families import open_model
from smoothquant.artifacts.record import as_json
from smoothquant.errors import MissingPackageError, UserError
from smoothquant.model import Model
from smoothquant.outputs import load_manifest
from smoothquant.settings import SmoothingSettings
from tests import zoo
from tests.builders.tensorrt import fake
from tests.builders.tensorrt.conftest import LIMITS
from tests.outputs import agree, made_from
from tests.writers import onnx_writer


def refused(export_folder: Path, out: Path, **options: Any) -> str:
    """The one line with which `build` refuses. Nothing is left that a later step would take for an engine."""
    with pytest.raises(UserError) as caught:
        build(export_folder, out, LIMITS, **options)
    assert not out.exists()
    line = str(caught.value)
    assert "\n" not in line
    return line


# -- what never becomes one --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [{"optimization_level": 6}, {"workspace": 0.0}, {"workspace": float("nan")}])
def test_options_out_of_range(option: dict) -> None:
    with pytest.raises(UserError, match="expected"):
        Options(**option)


@pytest.mark.parametrize("layout", ["bloom", "mixtral"])
def test_sums_in_a_parser_that_makes_a_loop_of_them(
    layout: str, exports: dict[str, Path], tmp_path: Path, gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ALiBi and experts count with CumSum. A Llama does not, and takes an older TensorRT."""
    source = Source(open_model(zoo.save(layout, tmp_path / "model")), SmoothingSettings(groups="none"))
    export(source, [onnx_writer(tmp_path / "export")])
    graph = OnnxGraph(tmp_path / "export")
    axes = [graph.array(node.input[1]) for node in graph.standard("CumSum")]
    assert axes
    assert all(axis == 1 for axis in axes)  # TensorRT may take one axis for all (onnx/onnx-tensorrt#1034)
    for version, refuses in (("10.7.0.23", True), ("10.8.0.43", False)):
        monkeypatch.setitem(sys.modules, "tensorrt", fake.module(version))
        if refuses:
            assert "TensorRT 10.7.0.23 runs CumSum as a loop" in refused(tmp_path / "export", tmp_path / "engine")
            build(exports["per-token"], tmp_path / "llama", LIMITS)
        else:
            build(tmp_path / "export", tmp_path / "engine", LIMITS)


@pytest.mark.parametrize("place", ["missing/timing.cache", "file/timing.cache", "folder.cache"])
def test_timing_cache_that_cannot_be_written(place: str, exports: dict[str, Path], tmp_path: Path, trt: Any) -> None:
    """Said before the build."""
    (tmp_path / "file").touch()
    (tmp_path / "folder.cache").mkdir()
    line = refused(exports["float"], tmp_path / "engine", timing_cache=tmp_path / place)
    assert re.search(rf"{re.escape(str(place))}: .*cannot be read or written", line)
    assert "writable" in line
    assert not [call for call in trt.calls if call[0] == "config"]


def test_a_timing_cache_is_known_by_its_name(exports: dict[str, Path], tmp_path: Path, trt: Any) -> None:
    """The file is written over: a name that was mistyped costs nobody a file."""
    (tmp_path / "thesis.txt").write_text("the only copy")
    line = refused(exports["float"], tmp_path / "engine", timing_cache=tmp_path / "thesis.txt")
    assert "expected a name that ends in .cache or .timing" in line
    assert (tmp_path / "thesis.txt").read_text() == "the only copy"


def test_limits_that_contradict_the_model(exports: dict[str, Path], tmp_path: Path, trt: Any) -> None:
    with pytest.raises(UserError, match="--max-length 513; expected 2 to 512, the positions that the model knows"):
        build(exports["float"], tmp_path / "engine", {"length": 513})


def test_other_kinds_of_folders(
    llama: Model, input_absmax: dict[str, torch.Tensor], make: Callable[..., Path], tmp_path: Path
) -> None:
    assert "not an output of this tool" in refused(llama.checkpoint.folder, tmp_path / "engine")
    export(Source(llama, SmoothingSettings(), input_absmax), [W8A8Writer(tmp_path / "w8a8")])
    assert "made by 'export w8a8'; expected an ONNX export" in refused(tmp_path / "w8a8", tmp_path / "engine")
    assert "made by 'build tensorrt'" in refused(make("float"), tmp_path / "engine")


def change(folder: Path, edit: Callable[[onnx.ModelProto], None]) -> None:
    """Edit a graph, and make the manifest agree with it."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    edit(model)
    onnx.save(model, folder / "model.onnx")
    agree(folder)


def test_graph_without_quantize(copy_of: Callable[[str], Path], tmp_path: Path, trt: Any) -> None:
    """A graph of floats whose manifest promises INT8. (One that promises float becomes a float engine.)"""
    folder = copy_of("float")
    agree(folder, inputs={**load_manifest(folder).inputs, "schemes": made_from("per-token")["schemes"]})
    assert "model.onnx: no matrix product is quantized" in refused(folder, tmp_path / "engine")


def test_contrib_operators(copy_of: Callable[[str], Path], tmp_path: Path, trt: Any) -> None:
    def edit(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.op_type == "Softmax")
        node.op_type, node.domain = "FusedSoftmax", "com.microsoft"

    folder = copy_of("per-token")
    change(folder, edit)
    line = refused(folder, tmp_path / "engine")
    assert "model.layers.0.attention: the operator com.microsoft.FusedSoftmax is not standard ONNX" in line
    assert "export the graph in standard operators" in line


def test_a_linear_that_lost_its_quantization(copy_of: Callable[[str], Path], tmp_path: Path, trt: Any) -> None:
    """The product reads what is in front of its Q, and the weight's values: right numbers, no INT8."""

    def edit(model: onnx.ModelProto) -> None:
        made = {output: node for node in model.graph.node for output in node.output}
        product = next(node for node in model.graph.node if node.name == "model.layers.1.mlp.down_proj/MatMul")
        weight = made[product.input[1]].input[0]
        for tensor in model.graph.initializer:
            if tensor.name == weight:
                tensor.data_type = onnx.TensorProto.FLOAT
                tensor.external_data[2].value = str(4 * int(tensor.external_data[2].value))
        product.input[:] = [made[made[product.input[0]].input[0]].input[0], weight]

    folder = copy_of("per-token")
    change(folder, edit)
    line = refused(folder, tmp_path / "engine")
    assert re.search(r"model\.layers\.1\.mlp\.down_proj: .*was quantized.*; export again", line)


def test_missing_and_short_data(copy_of: Callable[[str], Path], tmp_path: Path, trt: Any) -> None:
    folder = copy_of("per-token")
    with open(folder / "model.onnx.data", "r+b") as file:
        file.truncate(1000)
    assert "model.onnx.data has 1000 bytes" in refused(folder, tmp_path / "engine")
    change(folder, lambda model: None)  # and should the manifest not know: the graph does
    assert "the file of weights model.onnx.data has 1000 bytes of " in refused(folder, tmp_path / "engine")
    (folder / "model.onnx.data").unlink()
    assert "model.onnx.data is missing" in refused(folder, tmp_path / "engine")


def test_not_an_onnx_file(copy_of: Callable[[str], Path], tmp_path: Path, trt: Any) -> None:
    folder = copy_of("per-token")
    (folder / "model.onnx").write_bytes(b"\xff" * (folder / "model.onnx").stat().st_size)
    assert "its content is not what was written" in refused(folder, tmp_path / "engine")
    agree(folder)  # and should the manifest not know: onnx does
    assert "model.onnx: not an ONNX model" in refused(folder, tmp_path / "engine")


def test_operator_that_the_parser_does_not_know(exports: dict[str, Path], tmp_path: Path, trt: Any) -> None:
    trt.faults.refuse_operator = "Softmax"
    line = refused(exports["per-token"], tmp_path / "engine")
    assert "TensorRT's parser refuses it at model.layers.0.attention/Softmax (Softmax): no importer registered" in line
    assert "(and 1 more)" in line


@pytest.mark.parametrize("reason", ["", "Error Code 2: OutOfMemory (Requested size was 99 bytes.)\n"])
def test_no_plan(reason: str, exports: dict[str, Path], tmp_path: Path, trt: Any) -> None:
    trt.faults.no_plan = reason or " "
    line = refused(exports["per-token"], tmp_path / "engine")
    assert "TensorRT 11.1.0.106 builds no engine" in line
    assert "lower --max-length, --max-batch or --chunk" in line
    assert ("Requested size was 99 bytes." in line) == bool(reason)


def test_no_room_for_a_context(exports: dict[str, Path], tmp_path: Path, trt: Any) -> None:
    trt.faults.no_context = True
    assert "the engine gets no room for its activations" in refused(exports["float"], tmp_path / "engine")


def test_logits_that_are_not_finite(
    exports: dict[str, Path], tmp_path: Path, trt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = fake.Context.execute_async_v3

    def overflow(self: fake.Context, stream: int) -> bool:
        done = original(self, stream)
        logits = next(tensor for tensor in self.engine.outputs if tensor.name == "logits")
        self._array(logits, (*self.shapes["input_ids"], logits.shape[-1]))[0, 1, 2] = float("inf")
        return done

    monkeypatch.setattr(fake.Context, "execute_async_v3", overflow)
    assert "logits that are not finite" in refused(exports["per-token"], tmp_path / "engine")


# -- without TensorRT, without a GPU, with another one -----------------------------------------------------------------


def test_without_tensorrt(exports: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingPackageError) as caught:
        build(exports["float"], tmp_path / "engine")
    assert str(caught.value).startswith("the package tensorrt ")
    assert "pip install tensorrt, or use the image of docker/tensorrt" in str(caught.value)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("version", ["8.6.1", "10.0.1", "12.0.0.1"])
def test_another_generation(version: str, exports: dict[str, Path], tmp_path: Path, trt: Any) -> None:
    trt.__version__ = version
    with pytest.raises(MissingPackageError, match=f"TensorRT {version} .*; expected version 10.1 or later, or 11; pip"):
        build(exports["float"], tmp_path / "engine")


@pytest.mark.parametrize("version", ["10.1.0", "11.4.0.106"])
def test_the_oldest_and_the_newest(version: str, trt: Any) -> None:
    trt.__version__ = version
    assert hardware.require_tensorrt() == version


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu(exports: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", fake.module())
    with pytest.raises(MissingPackageError, match=r"no GPU: .*expected an NVIDIA GPU and a PyTorch for CUDA; run it"):
        build(exports["float"], tmp_path / "engine")


def test_plan_of_another_gpu(make: Callable[..., Path], gpu: fake.FakeGpu) -> None:
    folder = make("float")
    gpu.name, gpu.capability = "NVIDIA A100", (8, 0)
    with pytest.raises(UserError) as caught:
        TensorRTEngine(folder)
    assert "built for compute capability 9.0 (NVIDIA H100 80GB HBM3), this GPU has 8.0; expected a GPU like" in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("built", "here", "compatible", "runs"),
    [
        ("11.1.0.106", "11.1.0.106", False, True),
        ("11.1.0.106", "11.2.1.2", False, False),
        ("11.1.0.106", "11.2.1.2", True, True),
        ("11.2.1.2", "11.1.0.106", True, False),  # later ones only
        ("10.16.1.11", "11.1.0.106", True, False),  # of the same generation
        ("10.13.3.9", "10.13.3.9.post1", False, True),
    ],
)
def test_plan_of_another_version(
    built: str, here: str, compatible: bool, runs: bool, exports: dict[str, Path], tmp_path: Path, trt: Any
) -> None:
    trt.__version__ = built
    build(exports["float"], tmp_path / "engine", LIMITS, Options(version_compatible=compatible))
    trt.__version__ = here
    if runs:
        TensorRTEngine(tmp_path / "engine")
    else:
        with pytest.raises(UserError, match=f"built by TensorRT {built}, this is .*{here}; expected TensorRT {built}"):
            TensorRTEngine(tmp_path / "engine")


@pytest.mark.parametrize(("capability", "runs"), [((8, 0), True), ((12, 0), True), ((7, 5), False)])
def test_hardware_compatible_plan(
    capability: tuple[int, int], runs: bool, exports: dict[str, Path], tmp_path: Path, trt: Any, gpu: fake.FakeGpu
) -> None:
    build(exports["float"], tmp_path / "engine", LIMITS, Options(hardware_compatible=True))
    gpu.capability = capability
    if runs:
        TensorRTEngine(tmp_path / "engine")
    else:
        with pytest.raises(UserError, match=r"this GPU has 7\.5"):
            TensorRTEngine(tmp_path / "engine")


def test_plan_that_tensorrt_refuses(make: Callable[..., Path]) -> None:
    folder = make("float")
    (folder / "model.plan").write_bytes(b"\x00" * (folder / "model.plan").stat().st_size)
    with pytest.raises(UserError) as caught:
        TensorRTEngine(folder)
    assert "TensorRT 11.1.0.106 refuses this plan (Serialization (magic tag does not match))" in str(caught.value)


def test_a_plan_without_content(make: Callable[..., Path]) -> None:
    folder = make("float")
    (folder / "model.plan").write_bytes(b"")
    agree(folder)
    with pytest.raises(UserError, match=r"model\.plan: empty; expected TensorRT's plan; copy it again, or build"):
        TensorRTEngine(folder)


def test_the_gpu_check_needs_no_deserialization(make: Callable[..., Path], gpu: fake.FakeGpu, trt: Any) -> None:
    folder, other = make("float"), fake.FakeGpu("NVIDIA A100", (8, 0))
    made = load_manifest(folder).inputs_as(TensorRTInputs)
    trt.calls.clear()
    with pytest.raises(UserError):
        hardware.check_plan_fits(folder, made, other, trt.__version__)
    assert trt.calls == []


@pytest.mark.parametrize("where", ["inputs", "results"])
def test_a_manifest_with_a_key_more_or_less(where: str, make: Callable[..., Path]) -> None:
    manifest = load_manifest(make("float"))
    read = {
        "inputs": lambda changed: changed.inputs_as(TensorRTInputs),
        "results": lambda changed: changed.results_as(TensorRTResults),
    }[where]
    content = dict(getattr(manifest, where))
    assert as_json(read(manifest)) == content
    with pytest.raises(UserError, match="unknown key 'surplus'"):
        read(replace(manifest, **{where: content | {"surplus": 1}}))
    for key in content:
        lacking = {name: value for name, value in content.items() if name != key}
        with pytest.raises(UserError, match=f"key '{key}' is missing"):
            read(replace(manifest, **{where: lacking}))


def test_engine_needs_no_export(make: Callable[..., Path], exports: dict[str, Path], tmp_path: Path) -> None:
    """The plan holds graph and weights. (The stand-in's holds where they are, so only the folder is looked at.)"""
    shutil.copytree(make("float"), tmp_path / "moved")
    assert TensorRTEngine(tmp_path / "moved").folder == tmp_path / "moved"
