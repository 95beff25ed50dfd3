"""Engine folders: what is in them, what TensorRT was asked for, and what never becomes one."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from builders.tensorrt import Options, TensorRTEngine, build, compiler, machine
from exporters.export import Source, export
from exporters.huggingface import W8A8Writer
from smoothquant.errors import MissingPackageError, OutputError, UserError
from smoothquant.model import Model
from smoothquant.settings import SmoothingSettings
from smoothquant.workspace import load_manifest
from tests.builders.tensorrt import fake
from tests.builders.tensorrt.conftest import LIMITS


def refused(export_folder: Path, out: Path, **options: Any) -> str:
    """The one line with which `build` refuses. Nothing is left that a later step would take for an engine."""
    with pytest.raises(UserError) as caught:
        build(export_folder, out, LIMITS, **options)
    assert not out.exists()
    line = str(caught.value)
    assert "\n" not in line
    return line


def configuration(trt: Any) -> Any:
    return next(call[1] for call in trt.calls if call[0] == "config")


# -- what is in them ---------------------------------------------------------------------------------------------------


def test_engine_folder(make: Callable[..., Path], exports: dict[str, Path], gpu: fake.FakeGpu) -> None:
    folder, made = make("per-token"), exports["per-token"]
    exported = {path.name for path in made.iterdir()} - {"model.onnx", "model.onnx.data"}
    assert {path.name for path in folder.iterdir()} == exported | {"model.plan", "layers.json"}
    for name in exported - {"manifest.json"}:
        assert (folder / name).samefile(made / name)
    manifest, source = load_manifest(folder), load_manifest(made)
    assert manifest["step"] == "build tensorrt"
    inputs = manifest["inputs"]
    assert inputs["export"] == source["inputs"]
    assert inputs["tensorrt"] == {"version": "11.1.0.106", "gpu": gpu.name, "capability": [9, 0]}
    assert inputs["limits"] == {
        "batch": 3, "length": 64, "chunk": 16, "usual_prompt": 16, "usual_context": 31, "window": None
    }  # fmt: skip
    assert (manifest["geometry"], manifest["contract"]) == (source["geometry"], source["contract"])
    assert manifest["warnings"] == ["Make sure input input_ids has Int64 binding."]
    assert gpu.selected == 1  # in the thread that builds


@pytest.mark.parametrize("version", ["11.1.0.106", "10.16.1.11"])
@pytest.mark.parametrize(("form", "count"), [("float", 0), ("per-token", 8), ("per-tensor", 9)])
def test_products_that_became_int8_kernels(
    form: str, count: int, version: str, make: Callable[..., Path], trt: Any
) -> None:
    trt.__version__ = version
    kernels = load_manifest(make(form))["kernels"]
    assert (kernels["int8"], kernels["quantized"]) == (count, count)
    assert all(product["kernels"] == ["sm80_gemm_int8"] for product in kernels["products"])


def test_a_product_that_did_not_is_named_with_its_reason(make: Callable[..., Path], trt: Any) -> None:
    trt.faults.float_nodes.add("model.layers.1.mlp.down_proj/MatMul")
    kernels = load_manifest(make("per-token"))["kernels"]
    assert (kernels["int8"], kernels["quantized"]) == (7, 8)
    [product] = [product for product in kernels["products"] if not product["int8"]]
    assert product["module"] == "model.layers.1.mlp.down_proj"
    assert product["why"] == "layer model.layers.1.mlp.down_proj/MatMul (gemm) reads Float"


# -- what TensorRT is asked for ----------------------------------------------------------------------------------------


def test_options_reach_tensorrt(exports: dict[str, Path], tmp_path: Path, trt: Any) -> None:
    asked = Options(1.5, 5, hardware_compatible=True, version_compatible=True, weight_streaming=True, tf32=False)
    build(exports["per-token"], tmp_path / "engine", LIMITS, asked)
    config = configuration(trt)
    assert config.pools == {"WORKSPACE": 3 << 29}
    assert config.flags == {"VERSION_COMPATIBLE", "WEIGHT_STREAMING"}  # and no precision
    assert config.builder_optimization_level == 5
    assert config.hardware_compatibility_level.name == "AMPERE_PLUS"
    assert config.profiling_verbosity.name == "DETAILED"
    trt.calls.clear()
    TensorRTEngine(tmp_path / "engine").logits(torch.zeros(1, 1, dtype=torch.int64))
    assert ("host code", True) in trt.calls
    assert ("budget", 123) in trt.calls


def test_without_options_nothing_is_asked_for(make: Callable[..., Path], trt: Any) -> None:
    make("per-token")
    config = configuration(trt)
    assert (config.pools, config.flags) == ({}, {"TF32"})
    assert not hasattr(config, "hardware_compatibility_level")
    assert ("host code", False) in trt.calls
    assert ("budget", 0) in trt.calls


@pytest.mark.parametrize(
    ("found", "tried"),
    [(None, [b""]), (b"times", [b"times"]), (b"other GPU's", [b"other GPU's", b""]), (b"garbage", [b""])],
)
def test_timing_cache(found: bytes | None, tried: list, exports: dict[str, Path], tmp_path: Path, trt: Any) -> None:
    path = tmp_path / "timing.cache"
    if found is not None:
        path.write_bytes(found)
    build(exports["float"], tmp_path / "engine", LIMITS, timing_cache=path)
    assert [call[1] for call in trt.calls if call[0] == "timing cache"] == tried
    assert path.read_bytes() == tried[-1] + b"+1"
    assert not list(tmp_path.glob("*.new"))


@pytest.mark.parametrize("place", ["missing/timing.cache", "file/timing.cache", "folder"])
def test_timing_cache_that_cannot_be_written(place: str, exports: dict[str, Path], tmp_path: Path, trt: Any) -> None:
    """Said before the build."""
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    line = refused(exports["float"], tmp_path / "engine", timing_cache=tmp_path / place)
    assert f"{place}: cannot be read or written there (" in line
    assert "expected a file in a folder that is there and writable" in line
    assert not [call for call in trt.calls if call[0] == "config"]


def test_timing_cache_for_which_the_disk_is_full(
    exports: dict[str, Path], tmp_path: Path, trt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is worth more than it."""

    def full(self: Path, content: object) -> None:
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    said: list[str] = []
    manifest = build(
        exports["float"], tmp_path / "engine", LIMITS, timing_cache=tmp_path / "timing.cache", warn=said.append
    )
    [line] = said
    assert line.endswith("timing.cache: not written (No space left on device); the engine is whole")
    assert manifest["warnings"] == ["Make sure input input_ids has Int64 binding.", line]
    assert list(tmp_path.iterdir()) == [tmp_path / "engine"]
    TensorRTEngine(tmp_path / "engine")


def test_progress_only_grows_and_gets_there(exports: dict[str, Path], tmp_path: Path, trt: Any) -> None:
    seen: list[tuple[int, int]] = []
    build(exports["float"], tmp_path / "engine", LIMITS, progress=lambda done, total: seen.append((done, total)))
    done = [done for done, _ in seen]
    assert done == sorted(set(done))
    assert seen[-1] == (1000, 1000)
    assert len(seen) == 8


# -- built once --------------------------------------------------------------------------------------------------------


def test_finished_engine_is_left_alone_until_something_changes(
    exports: dict[str, Path], tmp_path: Path, trt: Any, gpu: fake.FakeGpu
) -> None:
    out = tmp_path / "engine"
    first = build(exports["float"], out, LIMITS)
    trt.calls.clear()
    assert build(exports["float"], out, LIMITS) == first
    assert trt.calls == []
    with pytest.raises(OutputError, match="not made by this command with these inputs"):
        build(exports["float"], out, LIMITS | {"length": 32})
    gpu.name, gpu.capability = "NVIDIA A100", (8, 0)
    with pytest.raises(OutputError, match="not made by this command with these inputs"):
        build(exports["float"], out, LIMITS)
    assert build(exports["float"], out, LIMITS, overwrite=True)["inputs"]["tensorrt"]["gpu"] == "NVIDIA A100"


def test_interrupted_build_stops_tensorrt_and_can_be_done_again(
    exports: dict[str, Path], tmp_path: Path, trt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C reaches the waiting thread while the other one builds."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    gate = compiler.wait
    monkeypatch.setattr(compiler, "wait", interrupted)
    stopped: list[bool] = []
    original = fake.Builder.build_serialized_network

    def build_slowly(self: Any, network: Any, config: Any) -> Any:
        monitor = config.progress_monitor
        deadline = 200
        while monitor.step_complete("Timing", 0) and deadline:
            deadline -= 1
            __import__("time").sleep(0.01)
        stopped.append(deadline > 0)
        return original(self, network, config)

    monkeypatch.setattr(fake.Builder, "build_serialized_network", build_slowly)
    with pytest.raises(KeyboardInterrupt):
        build(exports["float"], tmp_path / "engine", LIMITS)
    assert stopped == [True]
    assert not (tmp_path / "engine").exists()
    monkeypatch.setattr(compiler, "wait", gate)
    monkeypatch.setattr(fake.Builder, "build_serialized_network", original)
    assert build(exports["float"], tmp_path / "engine", LIMITS)["step"] == "build tensorrt"
    assert not list(tmp_path.glob("*.partial"))


# -- what never becomes one --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [{"optimization_level": 6}, {"workspace": 0.0}, {"workspace": float("nan")}])
def test_options_out_of_range(option: dict) -> None:
    with pytest.raises(UserError, match="expected"):
        Options(**option)


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
    """Edit a graph, and make the manifest agree with its new size."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    edit(model)
    onnx.save(model, folder / "model.onnx")
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in ("model.onnx", "model.onnx.data"):
        manifest["files"][name] = (folder / name).stat().st_size if (folder / name).exists() else 0
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_graph_without_quantize(copy_of: Callable[[str], Path], tmp_path: Path, trt: Any) -> None:
    """A graph of floats whose manifest promises INT8. (One that promises float becomes a float engine.)"""
    folder = copy_of("float")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["inputs"]["activations"] = "per-token"
    (folder / "manifest.json").write_text(json.dumps(manifest))
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
    assert "model.layers.1.mlp.down_proj: it was quantized, and is not any more; export again" in line


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
    assert "model.onnx: not an ONNX model" in refused(folder, tmp_path / "engine")


def test_operator_that_the_parser_does_not_know(exports: dict[str, Path], tmp_path: Path, trt: Any) -> None:
    trt.faults.refuse_operator = "Softmax"
    line = refused(exports["per-token"], tmp_path / "engine")
    assert "TensorRT's parser refuses it at model.layers.0.attention/Softmax (Softmax): no importer registered" in line
    assert "and 1 errors more" in line


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
    with pytest.raises(MissingPackageError, match=f"TensorRT {version}; expected version 10.1 or later, or 11; pip"):
        build(exports["float"], tmp_path / "engine")


@pytest.mark.parametrize("version", ["10.1.0", "11.4.0.106"])
def test_the_oldest_and_the_newest(version: str, trt: Any) -> None:
    trt.__version__ = version
    assert machine.require_tensorrt() == version


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
        with pytest.raises(UserError, match=f"built by TensorRT {built}, this is {here}; expected TensorRT {built}"):
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
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["model.plan"] = 0
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"model\.plan: empty; expected TensorRT's plan; copy it again, or build"):
        TensorRTEngine(folder)


def test_the_gpu_check_needs_no_deserialization(make: Callable[..., Path], gpu: fake.FakeGpu, trt: Any) -> None:
    folder, other = make("float"), fake.FakeGpu("NVIDIA A100", (8, 0))
    trt.calls.clear()
    with pytest.raises(UserError):
        machine.check_plan_fits(folder, load_manifest(folder), other, trt.__version__)
    assert trt.calls == []


def test_engine_needs_no_export(make: Callable[..., Path], exports: dict[str, Path], tmp_path: Path) -> None:
    """The plan holds graph and weights. (The stand-in's holds where they are, so only the folder is looked at.)"""
    shutil.copytree(make("float"), tmp_path / "moved")
    assert TensorRTEngine(tmp_path / "moved").folder == tmp_path / "moved"
