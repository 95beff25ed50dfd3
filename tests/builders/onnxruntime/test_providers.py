"""Where ONNX Runtime runs a graph: what it is told, and what is said when it cannot. No GPU is needed to be told."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest
import torch

from builders.onnxruntime import OnnxRuntimeEngine, build, providers
from builders.onnxruntime.providers import CPU, CUDA, PROVIDERS, RTX, TENSORRT, provider_options, rtx_options
from builders.onnxruntime.session import open_session
from exporters.export import Source, export
from smoothquant.errors import MissingPackageError
from smoothquant.model import Model
from smoothquant.outputs import load_manifest
from smoothquant.settings import SmoothingSettings
from tests.writers import onnx_writer

INPUTS = {
    "input_ids": ("batch", "sequence"),
    "attention_mask": ("batch", "total"),
    "past_key_values.0.key": ("batch", 2, "past", 16),
}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict]:
    """Sessions are not made, but noted: with which providers. All providers and libraries seem to be there."""
    noted: list[dict] = []
    original = onnxruntime.InferenceSession

    class Session:
        def __init__(self, path: str, options: Any, **where: Any) -> None:
            noted.append({"path": path, "options": options, **where})
            chosen = where.get("providers", [RTX, CPU])
            self.names = [one if isinstance(one, str) else one[0] for one in chosen]
            self.real = original(path, options, providers=[CPU])

        def get_providers(self) -> list[str]:
            return self.names

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

    monkeypatch.setattr("onnxruntime.InferenceSession", Session)
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: [TENSORRT, CUDA, CPU])
    monkeypatch.setattr(providers, "_check_library", lambda *_: None)
    monkeypatch.setattr("onnxruntime.preload_dlls", lambda: None)
    monkeypatch.setenv("SMOOTHQUANT_CACHE", str(tmp_path / "cache"))
    return noted


# -- what it is told ---------------------------------------------------------------------------------------------------


def test_cpu_is_the_default(exports: dict[str, Path], made: list[dict]) -> None:
    open_session(exports["float"])
    assert made[0]["providers"] == [CPU]


def test_cuda(exports: dict[str, Path], made: list[dict]) -> None:
    """Float products of fake-quantized operands in full float32, and the CPU for what CUDA lacks."""
    open_session(exports["float"], provider="cuda")
    assert made[0]["providers"] == [(CUDA, {"use_tf32": "0"}), CPU]


def test_tensorrt(exports: dict[str, Path], made: list[dict], tmp_path: Path) -> None:
    open_session(exports["per-token"], provider="tensorrt")
    [(name, options), (second, _), last] = made[0]["providers"]
    assert (name, second, last) == (TENSORRT, CUDA, CPU)
    assert options["trt_int8_enable"] == "True"
    assert options["trt_fp16_enable"] == "False"
    cache = Path(options["trt_engine_cache_path"])
    assert cache.is_dir()
    assert cache.parent == tmp_path / "cache/engines"
    assert options["trt_profile_min_shapes"].startswith("input_ids:1x1,attention_mask:1x1,position_ids:1x1,")
    assert options["trt_profile_max_shapes"].endswith(",past_key_values.1.value:1x2x512x16")


def test_compiled_engines_are_of_one_checkpoint(
    llama: Model, made: list[dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two have the same graph, and TensorRT's provider would take the one's engine for the other's."""
    for checkpoint in ("one", "other"):
        source = Source(llama, SmoothingSettings(groups="none"), None, {"model": checkpoint})
        export(source, [onnx_writer(tmp_path / checkpoint)])
    monkeypatch.setattr(sys.modules["builders.onnxruntime.build"], "_check", lambda *_: {})
    build(tmp_path / "one", tmp_path / "engine", provider="tensorrt")
    for folder in ("one", "other", "engine"):
        open_session(tmp_path / folder, provider="tensorrt")
    one, other, engine = (session["providers"][0][1]["trt_engine_cache_path"] for session in made)
    assert (tmp_path / "one/model.onnx").read_bytes() == (tmp_path / "other/model.onnx").read_bytes()
    assert one == engine != other


def test_half_body(llama: Model, made: list[dict], tmp_path: Path) -> None:
    """Half-precision kernels are allowed where the graph is half precision, and not where it is not."""
    export(Source(llama, SmoothingSettings(groups="none")), [onnx_writer(tmp_path / "onnx", "per-token", "fp16")])
    open_session(tmp_path / "onnx", provider="tensorrt")
    assert made[0]["providers"][0][1]["trt_fp16_enable"] == "True"


def test_large_graphs_keep_their_weights_out_of_the_message(
    exports: dict[str, Path], made: list[dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph counts with the external data that it names; an ONNX Runtime without the option is told of."""
    folder = exports["per-token"]
    whole = sum((folder / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    for most in (whole - 4096, whole):  # the data begin at multiples of a page
        monkeypatch.setattr(providers, "LARGEST_MESSAGE", most)
        open_session(folder, provider="tensorrt")
    large, small = (session["providers"][0][1] for session in made)
    assert large.pop("trt_load_user_initializer") == "True"
    assert large == small
    monkeypatch.setattr(providers, "LARGEST_MESSAGE", 0)
    monkeypatch.setattr("onnxruntime.__version__", "1.22.1")
    with pytest.raises(MissingPackageError, match=r"ONNX Runtime 1\.22\.1 gives TensorRT at most 2 GB; .*>= 1\.23\.0"):
        build(folder, tmp_path / "engine", provider="tensorrt")
    assert not (tmp_path / "engine").exists()


def test_profile_holds_prefill_and_decode() -> None:
    [(_, options), *_] = provider_options("tensorrt", INPUTS, half=False, large=False, longest=64, cache=Path("c"))
    least, usual, most = (options[f"trt_profile_{point}_shapes"] for point in ("min", "opt", "max"))
    assert least == "input_ids:1x1,attention_mask:1x1,past_key_values.0.key:1x2x0x16"
    assert usual == "input_ids:1x1,attention_mask:1x33,past_key_values.0.key:1x2x32x16"
    assert most == "input_ids:1x64,attention_mask:1x128,past_key_values.0.key:1x2x64x16"
    assert rtx_options(INPUTS, longest=64, cache=Path("c")) == {
        "nv_profile_min_shapes": least,
        "nv_profile_opt_shapes": usual,
        "nv_profile_max_shapes": most,
        "nv_runtime_cache_path": "c",
    }


def test_long_models_get_a_profile_of_bounded_length() -> None:
    options = rtx_options(INPUTS, longest=1 << 20, cache=Path("c"))
    assert options["nv_profile_max_shapes"].startswith("input_ids:1x2048,attention_mask:1x4096,")


def test_rtx_is_a_plugin(exports: dict[str, Path], made: list[dict], monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[tuple] = []
    devices: list[SimpleNamespace] = [SimpleNamespace(ep_name=CPU)]

    def register(name: str, path: str) -> None:
        registered.append((name, path))
        devices.append(SimpleNamespace(ep_name=RTX))

    added: list[tuple] = []

    class Options(onnxruntime.SessionOptions):
        def add_provider_for_devices(self, chosen: list, options: dict) -> None:
            added.append((chosen, options))

    monkeypatch.setitem(sys.modules, providers.RTX_MODULE, SimpleNamespace(get_library_path=lambda: "plugin.so"))
    monkeypatch.setattr("onnxruntime.register_execution_provider_library", register)
    monkeypatch.setattr("onnxruntime.get_ep_devices", lambda: devices)
    monkeypatch.setattr("onnxruntime.SessionOptions", Options)
    for _ in range(2):
        open_session(exports["per-token"], provider="nv-tensorrt-rtx")
    assert registered == [(RTX, "plugin.so")]  # once
    assert "providers" not in made[0]
    [chosen, options] = added[0]
    assert chosen == devices[1:]
    assert options["nv_profile_min_shapes"].startswith("input_ids:1x1,")


def test_a_graph_that_is_chosen_is_run_in_the_folder_being_made(
    llama: Model, input_absmax: dict[str, torch.Tensor], made: list[dict], tmp_path: Path
) -> None:
    """It has no manifest yet; the compiled engine is kept where the finished folder looks for it."""
    source = Source(llama, SmoothingSettings(0.5), input_absmax, {"model": "m"})
    export(source, [onnx_writer(tmp_path / "both", "both")])
    build(tmp_path / "both", tmp_path / "engine", activations="per-tensor", provider="tensorrt")
    OnnxRuntimeEngine(tmp_path / "engine")
    caches = [session["providers"][0][1]["trt_engine_cache_path"] for session in made]
    assert len(caches) == 2
    assert caches[0] == caches[1]


# -- an engine remembers -----------------------------------------------------------------------------------------------


def test_an_engine_runs_where_it_was_built_for(
    exports: dict[str, Path], tmp_path: Path, made: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["builders.onnxruntime.build"], "_check", lambda *_: {"integer": 0, "quantized": 8})
    build(exports["per-token"], tmp_path / "engine", provider="cuda")
    assert load_manifest(tmp_path / "engine").inputs["provider"] == "cuda"
    engine = OnnxRuntimeEngine(tmp_path / "engine")
    assert made[-1]["providers"][0][0] == CUDA
    assert engine.provider.device == "cuda"  # where the cache stays between steps
    OnnxRuntimeEngine(tmp_path / "engine", provider="cpu")
    assert made[-1]["providers"] == [CPU]
    genai = json.loads((tmp_path / "engine/genai_config.json").read_text())
    assert genai["model"]["decoder"]["session_options"]["provider_options"] == [{"cuda": {}}]


# -- what is said when it cannot ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "expected"), [("cuda", CUDA), ("tensorrt", TENSORRT)])
def test_package_without_the_provider(name: str, expected: str, exports: dict[str, Path], tmp_path: Path) -> None:
    """The plain package, for real."""
    if expected in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is installed")
    with pytest.raises(MissingPackageError) as caught:
        build(exports["float"], tmp_path / "engine", provider=name)
    assert f"has no {expected}; expected the package onnxruntime-gpu; pip uninstall" in str(caught.value)
    assert caught.value.exit_code == 3
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize(
    ("name", "missing", "said"),
    [
        (
            "tensorrt",
            "libnvinfer.so.10",
            r"libnvinfer\.so\.10: .*expected TensorRT 10: pip install 'tensorrt-cu13<11'",
        ),
        ("cuda", "libcuda.so.1", r"libcuda\.so\.1: .*; expected a machine with an NVIDIA GPU and its driver"),
    ],
)
def test_library_that_is_missing(name: str, missing: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(library: str) -> None:
        if library == missing:
            raise OSError(f"{library}: cannot open shared object file: No such file or directory")

    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: [TENSORRT, CUDA, CPU])
    monkeypatch.setattr("onnxruntime.preload_dlls", lambda: None)
    monkeypatch.setattr(providers.ctypes, "CDLL", load)
    with pytest.raises(MissingPackageError, match=said):
        providers.check_available(PROVIDERS[name])


def test_silent_fallback_is_an_error(
    exports: dict[str, Path], made: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxruntime.InferenceSession.get_providers", lambda self: [CPU])
    with pytest.raises(MissingPackageError, match=f"could not load {CUDA}, and fell back to {CPU}; expected CUDA 13"):
        open_session(exports["float"], provider="cuda")


def test_rtx_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, providers.RTX_MODULE, None)
    with pytest.raises(MissingPackageError, match=f"is not installed; pip install {providers.RTX_PACKAGE}"):
        providers.check_available(PROVIDERS["nv-tensorrt-rtx"])


def test_rtx_that_cannot_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """What onnxruntime 1.32 says on a machine without a driver."""

    def register(name: str, path: str) -> None:
        raise RuntimeError(
            "[ONNXRuntimeError] : 1 : FAIL : Failed to load library plugin.so with error: libcuda.so.1: cannot open "
            "shared object file: No such file or directory"
        )

    monkeypatch.setitem(sys.modules, providers.RTX_MODULE, SimpleNamespace(get_library_path=lambda: "plugin.so"))
    monkeypatch.setattr("onnxruntime.register_execution_provider_library", register)
    with pytest.raises(MissingPackageError) as caught:
        providers.check_available(PROVIDERS["nv-tensorrt-rtx"])
    assert str(caught.value).startswith("the RTX provider cannot be loaded (libcuda.so.1: cannot open shared object")


def test_rtx_without_a_gpu_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_ep_devices", lambda: [])
    with pytest.raises(MissingPackageError, match=r"finds no GPU.*not A100, 8\.0, or H100, 9\.0"):
        providers.rtx_devices()


def test_every_provider_says_what_it_does_with_the_graph() -> None:
    assert set(PROVIDERS) == {"cpu", "cuda", "tensorrt", "nv-tensorrt-rtx"}
    assert "float" in PROVIDERS["cuda"].effect
    assert "no INT8 speed" in PROVIDERS["cuda"].effect
