"""Engine folders: what is in them, and what never becomes one."""

from __future__ import annotations

import hashlib
import platform
import shutil
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy
import onnx
import onnxruntime
import pytest
import torch

from builders.onnxruntime import OnnxRuntimeEngine, build, session
from exporters.export import Source, export
from exporters.huggingface import W8A8Writer
from smoothquant.artifacts.smoothing_file import SMOOTHING
from smoothquant.errors import MissingPackageError, OutputError, UserError
from smoothquant.machine import physical_cores
from smoothquant.model import Model
from smoothquant.outputs import MANIFEST, OURS, load_manifest
from smoothquant.settings import SmoothingSettings
from tests.builders.engines import refused_line
from tests.models import sample_ids
from tests.outputs import agree, top

on_x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the fused kernel is x86's")


def refused(folder: Path, out: Path) -> str:
    return refused_line(build, folder, out)


# -- what is in them -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "kernels"), [("float", 0), ("per-token", 8), ("per-tensor", 9)])
@on_x86
def test_engine_folder(form: str, kernels: int, exports: dict[str, Path], engines: dict[str, Path]) -> None:
    exported = top(exports[form])
    assert top(engines[form]) == exported | {"genai_config.json"}
    assert {path.name for path in (engines[form] / OURS).iterdir()} == {
        "manifest.json",
        "smoothing.safetensors",
        "tokenizer.json",
    }
    for name in exported | {SMOOTHING}:
        assert (engines[form] / name).read_bytes() == (exports[form] / name).read_bytes()
        assert not (engines[form] / name).samefile(exports[form] / name)  # who changes one does not change the other
    manifest, made = load_manifest(engines[form]), load_manifest(exports[form])
    assert manifest.step == "build onnxruntime"
    digests = {name: hashlib.sha256((exports[form] / name).read_bytes()).hexdigest() for name in made.files}
    content = hashlib.sha256("".join(f"{name} {digests[name]}\n" for name in sorted(digests)).encode())
    threads = physical_cores()
    assert manifest.inputs == {"export": made.inputs, "content": content.hexdigest()[:16], "threads": threads}
    assert manifest.results["kernels"] == {"integer": kernels, "quantized": kernels}
    assert manifest.contract == made.contract


def test_engine_outlives_its_export(copy_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy_of("per-token")
    build(folder, tmp_path / "engine")
    expected = OnnxRuntimeEngine(folder).logits(sample_ids())
    shutil.rmtree(folder)
    assert torch.equal(OnnxRuntimeEngine(tmp_path / "engine").logits(sample_ids()), expected)


@pytest.mark.parametrize("threads", [1, 2])
def test_logits_do_not_depend_on_the_batch(threads: int, engines: dict[str, Path]) -> None:
    """A sequence's logits are its own. Float32 sums may be split otherwise: a few units of 1.2e-7, and no flip here."""
    engine, ids = OnnxRuntimeEngine(engines["float"], threads=threads), sample_ids()
    alone = torch.cat([engine.logits(row[None]) for row in ids])
    together = engine.logits(ids)
    assert together.dtype == torch.float32
    assert (together - alone).abs().max() <= 5e-6 * alone.abs().max()


# -- built once ----------------------------------------------------------------------------------------------------


def test_finished_engine_is_left_alone(exports: dict[str, Path], tmp_path: Path) -> None:
    first = build(exports["float"], tmp_path / "engine")
    written = (tmp_path / "engine" / MANIFEST).stat().st_mtime_ns
    assert build(exports["float"], tmp_path / "engine") == first
    assert (tmp_path / "engine" / MANIFEST).stat().st_mtime_ns == written


def test_other_folder_is_refused_and_may_be_overwritten(exports: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "engine"
    out.mkdir()
    (out / "thesis.txt").write_text("the only copy")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="exists, and this tool did not make it"):
            build(exports["float"], out, overwrite=overwrite)
    assert (out / "thesis.txt").read_text() == "the only copy"
    (out / "thesis.txt").unlink()
    build(exports["float"], out)
    with pytest.raises(OutputError, match="exists"):
        build(exports["per-token"], out)  # an engine, of another export
    build(exports["per-token"], out, overwrite=True)
    assert load_manifest(out).origin.scheme.activations.form == "per-token"


def test_interrupted_build_goes_on(exports: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(import_module("builders.onnxruntime.build"), "_check", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build(exports["float"], tmp_path / "engine")
    assert not (tmp_path / "engine").exists()
    assert build(exports["float"], tmp_path / "engine").step == "build onnxruntime"
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


# -- what never becomes one ----------------------------------------------------------------------------------------


def test_missing_data_file(copy_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy_of("per-token")
    (folder / "model.onnx.data").unlink()
    assert "model.onnx.data is missing" in refused(folder, tmp_path / "engine")


def test_truncated_data_file(copy_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy_of("per-token")
    with open(folder / "model.onnx.data", "r+b") as file:
        file.truncate(1000)
    assert "model.onnx.data has 1000 bytes" in refused(folder, tmp_path / "engine")
    agree(folder)  # and should the manifest not know: onnxruntime does
    assert "ONNX Runtime refuses" in refused(folder, tmp_path / "engine")


def test_garbage_graph(copy_of: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    folder = copy_of("per-token")
    size = (folder / "model.onnx").stat().st_size
    (folder / "model.onnx").write_bytes(b"\xff" * size)
    assert "its content is not what was written" in refused(folder, tmp_path / "engine")
    agree(folder)  # and should the manifest not know: onnxruntime does
    assert "ONNX Runtime refuses" in refused(folder, tmp_path / "engine")
    assert capfd.readouterr() == ("", "")  # the line is all that the user sees


def test_no_manifest(copy_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy_of("per-token")
    (folder / MANIFEST).unlink()
    assert "not an output of this tool" in refused(folder, tmp_path / "engine")
    assert "not an output of this tool" in refused(tmp_path / "nowhere", tmp_path / "engine")


def test_other_kinds_of_folders(
    llama: Model, input_absmax: dict[str, torch.Tensor], engines: dict[str, Path], tmp_path: Path
) -> None:
    assert "not an output of this tool" in refused(llama.checkpoint.folder, tmp_path / "engine")
    export(Source(llama, SmoothingSettings(), input_absmax), [W8A8Writer(tmp_path / "w8a8")])
    assert "made by 'export w8a8'; expected an ONNX export" in refused(tmp_path / "w8a8", tmp_path / "engine")
    assert "made by 'build onnxruntime'" in refused(engines["float"], tmp_path / "engine")


@on_x86
@pytest.mark.parametrize("operand", [0, 1])
def test_linear_that_is_not_an_integer_kernel(
    operand: int, copy_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A factor between DequantizeLinear and MatMul: the right answer, in float, several times slower, silently."""
    monkeypatch.setattr(session, "SETTINGS", {})  # without VNNI onnxruntime 1.32 would not even run it
    folder = copy_of("per-token")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    [product] = [node for node in model.graph.node if node.op_type == "MatMul" and "layers.1.mlp.down" in node.name]
    one = onnx.numpy_helper.from_array(numpy.full(1, 1.5, dtype=numpy.float32), "factor")
    model.graph.initializer.append(one)
    model.graph.node.insert(
        list(model.graph.node).index(product),
        onnx.helper.make_node("Mul", [product.input[operand], "factor"], ["scaled"], name="between"),
    )
    [product] = [node for node in model.graph.node if node.name == product.name]
    product.input[operand] = "scaled"
    onnx.save(model, folder / "model.onnx")
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    agree(folder)
    line = refused(folder, tmp_path / "engine")
    assert "made 7 integer kernels; expected 8" in line


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite(value: float, copy_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy_of("per-token")
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    [gain] = [tensor for tensor in graph.initializer if tensor.name == "model.norm.weight"]
    offset = next(int(entry.value) for entry in gain.external_data if entry.key == "offset")
    with open(folder / "model.onnx.data", "r+b") as file:
        file.seek(offset)
        file.write(numpy.float32(value).tobytes())
    agree(folder)
    assert "logits that are not finite" in refused(folder, tmp_path / "engine")


def subnormals_count() -> bool:
    return torch.tensor(sys.float_info.min, dtype=torch.float64).div(2).item() > 0 and sys.float_info.min / 2 > 0


def test_sessions_leave_the_arithmetic_alone(exports: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions flush subnormal numbers; the thread that calls them does so only meanwhile."""
    inside = []
    original = onnxruntime.InferenceSession

    def first_of_the_process(*args: object, **options: object) -> onnxruntime.InferenceSession:
        torch.set_flush_denormal(True)  # what onnxruntime does, once
        return original(*args, **options)

    monkeypatch.setattr("onnxruntime.InferenceSession", first_of_the_process)
    monkeypatch.setattr(original, "run", lambda *args: inside.append(subnormals_count()) or [numpy.zeros((1, 1, 9))])
    assert subnormals_count()
    engine = OnnxRuntimeEngine(exports["float"])
    assert subnormals_count()
    engine.logits(sample_ids())
    assert inside == [False]
    assert subnormals_count()
    list(engine.generate([1, 2, 3], 2))
    assert subnormals_count()


def test_unknown_provider(engines: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"--provider flux; expected one of cpu, cuda, tensorrt, nv-tensorrt-rtx"):
        OnnxRuntimeEngine(engines["float"], provider="flux")


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_missing_package(
    package: str, exports: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=f"{package} is not installed; pip install {package}"):
        build(exports["float"], tmp_path / "engine")
    assert not (tmp_path / "engine").exists()
