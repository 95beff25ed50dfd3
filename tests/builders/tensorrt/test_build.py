"""Engine folders: what is in them, and what TensorRT was asked for."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from builders.tensorrt import compiler
from builders.tensorrt.build import build
from builders.tensorrt.compiler import Options
from builders.tensorrt.engine import TensorRTEngine
from smoothquant import files
from smoothquant.artifacts.smoothing_file import SMOOTHING
from smoothquant.errors import OutputError
from smoothquant.journal import work_folder
from smoothquant.outputs import OURS, load_manifest
from tests.builders.tensorrt import fake
from tests.builders.tensorrt.conftest import LIMITS
from tests.outputs import top


def configuration(trt: Any) -> Any:
    return next(call[1] for call in trt.calls if call[0] == "config")


# -- what is in them ---------------------------------------------------------------------------------------------------


def test_engine_folder(make: Callable[..., Path], exports: dict[str, Path], gpu: fake.FakeGpu) -> None:
    folder, made = make("per-token"), exports["per-token"]
    exported = top(made) - {"model.onnx", "model.onnx.data"}
    assert top(folder) == exported | {"model.plan"}
    assert {path.name for path in (folder / OURS).iterdir()} == {
        "layers.json",
        "manifest.json",
        "smoothing.safetensors",
        "tokenizer.json",
    }
    for name in exported | {SMOOTHING}:
        assert (folder / name).read_bytes() == (made / name).read_bytes()
        assert not (folder / name).samefile(made / name)
    manifest, source = load_manifest(folder), load_manifest(made)
    assert manifest.step == "build tensorrt"
    inputs = manifest.inputs
    assert inputs["export"] == source.inputs
    assert inputs["tensorrt"] == {"version": "11.1.0.106", "gpu": gpu.name, "capability": [9, 0]}
    assert inputs["limits"] == {
        "batch": 3, "length": 64, "chunk": 16, "usual_prompt": 16, "usual_context": 31, "window": None,
        "capacity": None,
    }  # fmt: skip
    assert (manifest.geometry, manifest.contract) == (source.geometry, source.contract)
    assert manifest.results["warnings"] == ["Make sure input input_ids has Int64 binding."]
    assert gpu.selected == 1  # in the thread that builds


@pytest.mark.parametrize("version", ["11.1.0.106", "10.16.1.11"])
@pytest.mark.parametrize(("form", "count"), [("float", 0), ("per-token", 8), ("per-tensor", 9)])
def test_products_that_became_int8_kernels(
    form: str, count: int, version: str, make: Callable[..., Path], trt: Any
) -> None:
    trt.__version__ = version
    kernels = load_manifest(make(form)).results["kernels"]
    assert (kernels["int8"], kernels["quantized"]) == (count, count)
    assert all(product["kernels"] == ["sm80_gemm_int8"] for product in kernels["products"])


def test_a_product_that_did_not_is_named_with_its_reason(make: Callable[..., Path], trt: Any) -> None:
    trt.faults.float_nodes.add("model.layers.1.mlp.down_proj/MatMul")
    kernels = load_manifest(make("per-token")).results["kernels"]
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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine", "timing.cache"]


def test_timing_cache_for_which_the_disk_is_full(
    exports: dict[str, Path], tmp_path: Path, trt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is worth more than it."""

    write = files.DISK.write

    def full(path: Path, pieces: object, *, new: bool = False) -> None:
        if "timing.cache" in path.name:
            path.touch()
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, pieces, new=new)

    monkeypatch.setattr(files.DISK, "write", full)
    said: list[str] = []
    manifest = build(
        exports["float"], tmp_path / "engine", LIMITS, timing_cache=tmp_path / "timing.cache", warn=said.append
    )
    [line] = said
    assert re.search(r"timing\.cache: .*not written \(No space left on device\); the engine is whole$", line)
    assert manifest.results["warnings"] == ["Make sure input input_ids has Int64 binding.", line]
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
    assert build(exports["float"], out, LIMITS, overwrite=True).inputs["tensorrt"]["gpu"] == "NVIDIA A100"


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
    assert build(exports["float"], tmp_path / "engine", LIMITS).step == "build tensorrt"
    assert not work_folder(tmp_path / "engine").exists()
